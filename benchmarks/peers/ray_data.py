"""Shared code of the four Ray Data variants: the stage class on simulated models, and the settings of tuned runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from ray.data import DataContext

from benchmarks.peers.sizes import Pool
from benchmarks.simulated import Models, claimed_gpu, shot_ids

NAMES = {"instantid": "Face", "flux": "Flux", "lora": "Lora", "svd": "Svd", "realesrgan": "Upscale"}


class StageActor:
    """Runs batches of shots through some stages. With `pool`, it claims a GPU that no other worker of the pool has."""

    def __init__(self, run_folder: Path, stages: Sequence[str], pool: str | None = None, *, turns: bool = False) -> None:
        gpu = None if pool is None else claimed_gpu(run_folder, pool)
        self._stages = stages
        self._models = Models(run_folder, stages, gpu, turns=turns)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shots = batch.pop("shot")
        payloads = [{name: column[n] for name, column in batch.items()} for n in range(len(shots))]
        for stage in self._stages:
            payloads = [self._models.run(stage, str(shot), payload) for shot, payload in zip(shots, payloads, strict=True)]
        columns = {name: [payload[name] for payload in payloads] for name in payloads[0]}
        return {"shot": shots, **{name: _stack(arrays) for name, arrays in columns.items()}}


def _stack(arrays: list[Any]) -> Any:
    # Do not copy single rows: nearly all batches have one row.
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def operator(stages: Sequence[str]) -> type[StageActor]:
    """Return a subclass whose name Ray Data shows as the name of the operator."""
    return type("".join(NAMES[stage] for stage in stages), (StageActor,), {})


WAIT_FOR_ACTORS_S = 120


def tune() -> None:
    """Configure Ray Data for a chain with large, slow rows."""
    context = DataContext.get_current()
    # Start when all actors are ready. An earlier start would lower the measured efficiency.
    context.wait_for_min_actors_s = WAIT_FOR_ACTORS_S
    # Keep one row per block, so that each row is one task.
    context.target_max_block_size = 1 << 20
    context.execution_options.preserve_order = False
    # Warm-up: the first data set of a driver starts Ray Data's coordinator, which would delay the measured run.
    ray.data.range(1).materialize()


def one_block_per_shot(shots: int) -> Any:
    """Return a data set with one block per shot."""
    return ray.data.from_items([{"shot": shot} for shot in shot_ids(shots)], override_num_blocks=shots)


def fixed_pool(dataset: Any, pool: Pool, run_folder: Path, *, pinned: bool = False, shots_per_turn: int = 0) -> Any:
    """Add an operator with a fixed number of workers.

    `pinned`: place every worker of the pool on another GPU, independently of Ray's placement. `shots_per_turn`: shots per
    batch if FLUX and SVD take turns on a GPU, 0 if they do not.
    """
    return dataset.map_batches(
        operator(pool.stages),
        batch_size=shots_per_turn or 1,
        num_cpus=0.25,
        num_gpus=pool.share,
        compute=ray.data.ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(run_folder, pool.stages, pool.stages[0] if pinned else None),
        fn_constructor_kwargs={"turns": shots_per_turn > 0},
    )


def drain(dataset: Any) -> None:
    """Run the data set and discard its rows."""
    for _ in dataset.iter_internal_ref_bundles():
        pass
