"""rayorch with pools sized by hand. FLUX and its LoRA refinement are two calls of one module and share its actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rayorch

from benchmarks.local_ray import local_ray
from benchmarks.peers.sizes import Pool, by_hand
from benchmarks.simulated import Models, Payload, shot_ids

SHOTS_PER_GPU = 3
"""Shots in progress per GPU: the best of the values tried."""


class Stages:
    """Module class: runs a batch of shots through one of its stages."""

    def __init__(self, run_folder: Path, stages: tuple[str, ...]) -> None:
        self._models = Models(run_folder, stages)

    def run(self, shots: list[str | tuple[str, Payload]], *, stage: str) -> list[tuple[str, Payload]]:
        inputs = [(shot, Payload()) if isinstance(shot, str) else shot for shot in shots]
        return [(name, self._models.run(stage, name, payload)) for name, payload in inputs]


class Chain(rayorch.Pipeline):
    def __init__(self, pools: tuple[Pool, ...], run_folder: Path) -> None:
        self._pools = [
            (
                pool.stages,
                rayorch.RayModule(Stages)
                .pre_init(run_folder, pool.stages)
                .ray_options(replicas=pool.workers, batch_size=1, num_gpus=pool.share, num_cpus=0.25),
            )
            for pool in pools
        ]

    def forward(self, shots: Any) -> Any:
        for stages, module in self._pools:
            for stage in stages:
                shots = module(shots, stage=stage)
        return shots


def run(gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    chain = Chain(by_hand(gpus, gpu_memory_gb), run_folder)
    with local_ray(gpus), rayorch.Executor(chain) as executor:
        executor.run(shot_ids(shots), input_batch_size=1, max_active_input_batches=SHOTS_PER_GPU * gpus)
