"""Steps of tools/gpu_first_hour.py that measure stages in other processes: those of a group of GPUs, and of Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_cases import (
    LONG_S,
    WAN,
    Run,
    chain_shots,
    changed_params,
    gpu_memory,
    random_loras,
    shot_for,
    sized,
    with_upscaler,
)
from benchmarks.gpu_kernels import seconds_of
from vidgen_ray.bench.bench_command import random_models, with_random_weights
from vidgen_ray.engine.gpu_group import GpuGroup
from vidgen_ray.engine.trials import TIMEOUT_S
from vidgen_ray.planner.cluster import profile_for
from vidgen_ray.planner.speed_trials import invented_item, run_once
from vidgen_ray.profile import Profile
from vidgen_ray.render.oom_fallback import prepare_gpu
from vidgen_ray.shot import Shot
from vidgen_ray.stages import speed
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.system.free_memory import free_gpu_memory

PROFILE = "VIDGEN_FIRST_HOUR_PROFILE"
"""Environment variable with the name of the profile, for processes of a group."""


class RandomInGroup(Stage[Any]):
    """Mixin of a stage whose networks have random weights, also in the processes of a group."""

    def load(self) -> None:
        if not torch.cuda.is_available():
            speed.COMPILE_BACKEND = "eager"
        profile = profile_for(os.environ[PROFILE])
        with with_random_weights(profile, random_models(profile)):
            super().load()  # type: ignore[safe-super]  # that of the stage, the next base class


class FluxInGroup(RandomInGroup, FluxStage): ...


class SVDInGroup(RandomInGroup, SVDStage): ...


class WanInGroup(RandomInGroup, WanStage): ...


def group_step(run: Run) -> None:
    """Measure stages on one GPU and on a group of two, and compare what they make."""
    if run.on_gpu and torch.cuda.device_count() < 2:
        run.rows.add("group of two GPUs", "the machine has one GPU", {})
        return
    wan = {**WAN, **sized(run.on_gpu, 832, 480, 81), "steps": {"wan": 2}}
    stages = ((FluxInGroup, sized(run.on_gpu, 1024, 1024, 25)), (SVDInGroup, run.clip), (WanInGroup, wan))

    def measured(stage: type[Stage[Any]], fields: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        params = stage.divided(changed_params(run.profile.params(stage), options))
        if params is None:
            return {"problem": "not divided with the options of this card"}
        item, group = invented_item(stage, shot_for(run.profile, **fields)), GpuGroup(2)

        def seconds_and_result(kind: Stage[Any]) -> tuple[float, np.ndarray[Any, Any]]:
            with kind:
                result = run_once(kind, item)
                return seconds_of(partial(run_once, kind, item)), result

        alone_s, alone = seconds_and_result(stage(params))
        free_gpu_memory()
        try:
            group_s, together = seconds_and_result(group.divided(stage, params))
        finally:
            group.stop()
        levels = float(np.abs(together.astype(int) - alone).mean())
        return {"alone_s": alone_s, "group_s": group_s, "levels": levels, "problem": group.lost or None}

    for compiled in (False, True) if run.on_gpu else (False,):
        end = " compile: True" if compiled else ""
        cases = {
            f"group {stage.name}{end}": partial(measured, stage, fields, {"compile": compiled}) for stage, fields in stages
        }
        run.rows.measure(cases, dict.fromkeys(cases, TIMEOUT_S if compiled else LONG_S))


def worker_step(run: Run) -> None:
    """Measure the stages of the default chain in processes of Ray, each with the CPUs and the GPU of a worker."""
    try:
        import ray  # noqa: F401  # `connected` imports it, too
    except ImportError:
        run.rows.add("worker of Ray", "Ray is not installed")
        return
    from vidgen_ray.engine.ray_cluster import connected

    with with_upscaler(run) as run, random_loras(run, [16]) as (lora,), connected(None, 0):
        shots = chain_shots(run, lora)
        cases = {f"worker {stage.name}": partial(_in_ray, run, stage, shot) for stage, shot in shots.items()}
        run.rows.measure(cases, dict.fromkeys(cases, LONG_S))


def _in_ray(run: Run, stage: type[Stage[Any]], shot: Shot) -> dict[str, Any]:
    import ray

    if run.on_gpu and not ray.cluster_resources().get("GPU"):
        return {"problem": "Ray finds no GPU"}
    resources = {"num_cpus": run.profile.actor_of(stage).cpus, "num_gpus": int(run.on_gpu), "max_retries": 0, "max_calls": 1}
    task = ray.remote(**resources)(_as_worker)
    call = task.remote(os.environ[PROFILE], run.profile, stage, shot, time.time())
    try:
        worker, result, returned_at = ray.get(call)
    # Also if the time of the measurement is over.
    except BaseException:
        ray.cancel(call, force=True)
        raise
    return {"worker": {**worker, "return_s": time.time() - returned_at, "result_mb": result.nbytes / 1e6}}


def _as_worker(
    name: str, profile: Profile, stage_class: type[Stage[Any]], shot: Shot, begun: float
) -> tuple[dict[str, float], np.ndarray[Any, Any], float]:
    """Return seconds of this process, the result of a call, and the time. `begun`: time at which the process was asked for."""
    start_s = time.time() - begun
    prepare_gpu(1.0)
    base = profile_for(name)
    stage = stage_class(profile.params(stage_class))
    with with_random_weights(base, random_models(base)):
        load_s = seconds_of(stage.load)
    try:
        item = invented_item(stage_class, shot)
        first_s = seconds_of(partial(run_once, stage, item))
        seconds = min(seconds_of(partial(run_once, stage, item)) for _ in range(2))
        result = run_once(stage, item)
    finally:
        stage.close()
    threads = float(torch.get_num_threads())
    seconds_of_call = {"start_s": start_s, "load_s": load_s, "first_s": first_s, "seconds": seconds, "threads": threads}
    return {**seconds_of_call, **gpu_memory()}, result, time.time()
