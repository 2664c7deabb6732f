"""Steps of tools/gpu_first_hour.py about GPU memory: a small card on which stages take turns."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_cases import (
    FACE,
    LONG_S,
    Case,
    Run,
    bench_options,
    chain_shots,
    gpu_memory,
    measure_cases,
    random_loras,
    with_infusenet,
    with_upscaler,
)
from benchmarks.gpu_kernels import seconds_of
from vidgen_ray.bench.bench_command import with_random_weights
from vidgen_ray.engine.trials import TIMEOUT_S
from vidgen_ray.planner.cluster import GB, profile_for, this_machine
from vidgen_ray.planner.gpu_memory import swap_groups
from vidgen_ray.planner.layout import CONTEXT_GB
from vidgen_ray.planner.speed_trials import invented_item, run_once
from vidgen_ray.render.oom_fallback import OomFallback
from vidgen_ray.render.weights_on_gpu import WeightSwapper
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.system.free_memory import free_gpu_memory

SMALL_CARD_GB = 23.6
"""Memory of an RTX 4090, which the step `small` does not exceed."""


def limit_to_small_card() -> None:
    """Limit this process to the memory of a small card. Its CUDA context is part of that, and does not count for torch."""
    total_gb = torch.cuda.get_device_properties(0).total_memory / GB
    torch.cuda.set_per_process_memory_fraction(SMALL_CARD_GB / total_gb - CONTEXT_GB / total_gb)


def small_step(run: Run) -> None:
    """Measure the stages with the options of a card of 24 GB, in as much memory: one by one, and taking turns."""
    common: dict[str, Any] = {"bench": bench_options(run.on_gpu)}
    profile = profile_for("gpu-24gb") if run.on_gpu else run.profile
    if run.on_gpu:
        limit_to_small_card()
    with with_random_weights(profile, {name: run.models[name] for name in ("flux", "svd")}) as small:
        small_run = replace(run, profile=with_infusenet(small))
        with with_upscaler(small_run) as small_run:
            size = {**run.clip, "upscaler": run.upscaler}
            storage, fp8 = ({"text_encoder": "swapped", "quantize": kind} for kind in ("fp8_storage", "fp8"))
            turns = "24 GB: stages take turns"
            small_run.rows.measure({turns: partial(_turns, small_run)}, {turns: LONG_S})
            measure_cases(
                small_run,
                {
                    "24 GB: flux with a face, fp8_storage": Case(FluxStage, storage, {**size, **FACE}, **common),
                    "24 GB: flux with a face, fp8, compile": Case(
                        FluxStage, {**fp8, "compile": True}, {**size, **FACE}, **common, limit_s=TIMEOUT_S
                    ),
                    "24 GB: svd": Case(SVDStage, {"decode_chunk_frames": 2, "forward_chunking": True}, size, **common),
                    f"24 GB: {run.upscaler}": Case(RealESRGANStage, {"frames_per_call": 1}, size, **common),
                },
            )


def _turns(run: Run) -> dict[str, Any]:
    """Return the seconds and the memory of each stage of two shots, in one process whose stages take turns as planned."""
    machine = this_machine().nodes[0]
    calls = []
    with random_loras(run, [16]) as (lora,), ExitStack() as stack:
        shots = chain_shots(run, lora)
        stages = {stage.name: stage(run.profile.params(stage)) for stage in shots}
        groups = [[name] for name in stages]
        if run.on_gpu:
            planned = swap_groups(run.profile, [*shots], [*shots.values()][:1], replace(machine, gpus=(SMALL_CARD_GB,)))
            groups = [[*group] for group in planned]
        swapper, fallback = WeightSwapper(stages, groups), OomFallback()
        for stage in stages.values():
            stack.callback(stage.close)
        swapper.load()
        for _ in range(2):
            for stage_class, shot in shots.items():
                stage = stages[stage_class.name]
                turn_s = seconds_of(partial(swapper.ensure_on_gpu, stage.name))
                render = partial(run_once, stage, invented_item(stage_class, shot))
                begun = time.perf_counter()
                _, changed = fallback.run(stage, shot, render)
                seconds = time.perf_counter() - begun
                calls.append({"stage": stage.name, "turn_s": turn_s, "seconds": seconds, "changed": changed, **gpu_memory()})
    del stages, stage, render, swapper
    free_gpu_memory()
    return {"groups": groups, "calls": calls}
