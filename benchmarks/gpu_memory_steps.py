"""Steps of tools/gpu_first_hour.py about GPU memory: peaks beside the memory table, a small card, and running out of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_cases import (
    FACE,
    LONG_S,
    WAN,
    Case,
    Run,
    bench_options,
    chain_shots,
    changed_params,
    gpu_memory,
    measure_cases,
    random_loras,
    shot_for,
    sized,
    with_infusenet,
    with_upscaler,
)
from benchmarks.gpu_kernels import seconds_of
from vidgen_ray.bench.bench_command import with_random_weights
from vidgen_ray.engine.trials import TIMEOUT_S
from vidgen_ray.errors import OutOfMemory
from vidgen_ray.planner.cluster import GB, profile_for, this_machine
from vidgen_ray.planner.gpu_memory import swap_groups
from vidgen_ray.planner.layout import CONTEXT_GB
from vidgen_ray.planner.speed_trials import invented_item, run_once
from vidgen_ray.render.oom_fallback import OomFallback, total_gpu_gb
from vidgen_ray.render.weights_on_gpu import WeightSwapper
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.system.free_memory import free_gpu_memory, gpu_bytes_of_others, is_out_of_memory

LEFT_BYTES = 64 << 20
"""GPU memory that a full card has left."""
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


def memory_step(run: Run) -> None:
    """Compare the peak memory of each stage at three sizes with the memory table."""

    with with_upscaler(run) as run, random_loras(run, [16]) as (lora,):
        small, large = sized(run.on_gpu, 640, 384, 14), sized(run.on_gpu, 1280, 704, 25)
        steps = {"steps": {"flux": 1, "lora": 2, "svd": 1, "wan": 1}}
        chain: dict[str, Any] = {**FACE, **lora, **steps, "upscaler": run.upscaler}
        cases = {
            f"memory {stage.name}": partial(_peaks, run, stage, chain, (small, run.clip, large))
            for stage in chain_shots(run, lora)
        }
        clips = (sized(run.on_gpu, 832, 480, 81), sized(run.on_gpu, 1280, 704, 49), sized(run.on_gpu, 1280, 704, 81))
        cases["memory wan"] = partial(_peaks, run, WanStage, {**WAN, **steps}, clips)
        run.rows.measure(cases, {"memory wan": LONG_S})


def _peaks(
    run: Run, stage_class: type[Stage[Any]], fields: Mapping[str, Any], sizes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the peak memory of a stage at some sizes, and the memory of its CUDA context and of other processes."""
    shots = [shot_for(run.profile, **{**fields, **size}) for size in sizes]
    with stage_class(run.profile.params(stage_class)) as stage:
        peaks = [_peak(run, stage, shot) for shot in shots]
        context_gb = gpu_bytes_of_others() / GB
    del stage
    free_gpu_memory()
    gpu_gb = total_gpu_gb() or 0.0
    over = [
        each["size"]
        for each in peaks
        if (each["peak_gb"] or 0.0) > each["planned_gb"]
        or (each["outcome"] == NO_MEMORY and each["planned_gb"] + CONTEXT_GB <= gpu_gb)
    ]
    return {"peaks": peaks, "context_gb": context_gb, "problem": f"more than planned: {', '.join(over)}" if over else None}


def _peak(run: Run, stage: Stage[Any], shot: Shot) -> dict[str, Any]:
    """Return the peak memory of a call. All is `None` that a CPU, or a call without enough memory, does not have."""
    free_gpu_memory()
    if run.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    outcome = _outcome(partial(run_once, stage, invented_item(type(stage), shot)))
    planned = type(stage).memory(run.profile.options_of(type(stage)), shot)
    is_measured = run.on_gpu and outcome == DONE
    return {
        "size": f"{shot.width}x{shot.height}x{shot.clip_frames}",
        "peak_gb": torch.cuda.max_memory_allocated() / GB if is_measured else None,
        "reserved_gb": torch.cuda.max_memory_reserved() / GB if is_measured else None,
        "planned_gb": planned.total / GB if planned else None,
        "outcome": outcome,
    }


DONE, NO_MEMORY = "done", "out of memory"


def _outcome(action: Callable[[], object]) -> str:
    """Run the action and return what happened. Raises errors that do not mean that memory ran out."""
    try:
        action()
    except Exception as error:
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        return NO_MEMORY
    return DONE


def drill_step(run: Run) -> None:
    """Run out of GPU memory in a call and while weights move to a full card. Compare the bytes when memory is free again."""

    if run.on_gpu and torch.cuda.get_device_properties(0).is_integrated:
        run.rows.add("drill", "GPU and host have the same memory: filling it would end other processes")
        return
    with with_upscaler(run) as run, random_loras(run, [16]) as (lora,):
        chain = chain_shots(run, lora)
        cases = {f"drill {stage.name}": partial(_drill, run, stage, shot, {}) for stage, shot in chain.items()}
        swapped = {"text_encoder": "swapped"}
        cases["drill flux text_encoder: swapped"] = partial(_drill, run, FluxStage, chain[FluxStage], swapped)
        run.rows.measure(cases)


def _drill(run: Run, stage_class: type[Stage[Any]], shot: Shot, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what happens on a full card, in a call and in a move of weights, and how the bytes differ afterwards."""
    item = invented_item(stage_class, shot)
    stage = stage_class(changed_params(run.profile.params(stage_class), options))
    swapper, fallback = WeightSwapper({stage.name: stage}, [(stage.name,)]), OomFallback()
    move = partial(swapper.ensure_on_gpu, stage.name)
    render = partial(fallback.run, stage, shot, partial(run_once, stage, item), move)
    outcomes: list[dict[str, Any]] = []
    free_gpu_memory()
    with stage:
        first, _ = render()
        for what in ("call", "swap"):
            if what == "swap":
                # Moves the weights to the host.
                swapper.regroup([])
                swapper.regroup([(stage.name,)])
            with full_gpu():
                outcome = _outcome(render)
            again, changed = render()
            levels = float(np.abs(again.astype(np.int16) - first).mean())
            outcomes.append({"what": what, "on a full GPU": outcome, "changed": changed, "levels": levels})
    other = [str(each["what"]) for each in outcomes if each["levels"]]
    return {"outcomes": outcomes, "problem": f"other bytes after: {', '.join(other)}" if other else None}


@contextmanager
def full_gpu() -> Iterator[None]:
    """Take the free memory of the GPU but LEFT_BYTES in this block. Without effect on a CPU."""
    free_gpu_memory()
    ballast = []
    for size in (GB, LEFT_BYTES) if torch.cuda.is_available() else ():
        while torch.cuda.mem_get_info()[0] >= size + LEFT_BYTES:
            ballast.append(torch.empty(int(size), dtype=torch.uint8, device="cuda"))
    try:
        yield
    finally:
        ballast.clear()
        free_gpu_memory()
