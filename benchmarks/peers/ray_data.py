"""What the four ways to use Ray Data share: the user's class over the simulated models, and the settings of a tuned run."""

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
    """Takes batches of shots through some stages. With `pool` it chooses a card that none of the pool has."""

    def __init__(self, run_folder: Path, stages: Sequence[str], pool: str | None = None, *, turns: bool = False) -> None:
        gpu = None if pool is None else claimed_gpu(run_folder, pool)
        self._stages = stages
        self._models = Models(run_folder, stages, gpu, turns=turns)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shots = batch.pop("shot")
        payloads = [{name: column[n] for name, column in batch.items()} for n in range(len(shots))]
        for stage in self._stages:
            payloads = [self._models.run(stage, str(shot), given) for shot, given in zip(shots, payloads, strict=True)]
        # One row, as nearly all batches here, is not copied.
        columns = {name: [given[name] for given in payloads] for name in payloads[0]}
        return {"shot": shots, **{name: of[0][None] if len(of) == 1 else np.stack(of) for name, of in columns.items()}}


def operator(stages: Sequence[str]) -> type[StageActor]:
    """The same class under the name by which Ray Data shows the operator."""
    return type("".join(NAMES[stage] for stage in stages), (StageActor,), {})


WAIT_FOR_ACTORS_S = 120


def tune() -> None:
    """What makes Ray Data fast on a chain of large, slow rows."""
    context = DataContext.get_current()
    # Else the first actors begin while the others still start, which would count against its efficiency.
    context.wait_for_min_actors_s = WAIT_FOR_ACTORS_S
    # One row stays one block, which is one task.
    context.target_max_block_size = 1 << 20
    context.execution_options.preserve_order = False
    # The first data set of a driver starts Ray Data's coordinator; the real one would stall behind it.
    ray.data.range(1).materialize()


def one_block_a_shot(shots: int) -> Any:
    return ray.data.from_items([{"shot": shot} for shot in shot_ids(shots)], override_num_blocks=shots)


def fixed_pool(dataset: Any, pool: Pool, run_folder: Path, *, pinned: bool = False, shots_per_turn: int = 0) -> Any:
    """`pinned`: every worker of the pool on another card, whatever Ray thinks. `shots_per_turn`: so many shots pass FLUX, and
    then SVD, where the two take turns on a card."""
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
    """Run it, keeping nothing."""
    for _ in dataset.iter_internal_ref_bundles():
        pass
