"""Steps of tools/gpu_first_hour.py: what to measure first on a kind of GPU that the project has not run on.

Each step measures rows, one after another. Full-size networks have random weights. On a CPU the same code runs at a tiny size:

    python -m benchmarks.gpu_steps chain out/first-hour/04-chain.json --profile tiny
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_cases import (
    FACE,
    LONG_S,
    ROOT,
    WAN,
    Case,
    Run,
    bench_options,
    calls_of,
    chain_shots,
    changed_params,
    gpu_memory,
    host_gb,
    measure_cases,
    random_loras,
    shot_for,
    sized,
    with_infusenet,
    with_upscaler,
)
from benchmarks.gpu_encoding import encoding_rates
from benchmarks.gpu_kernels import (
    attention_rates,
    best_of,
    convolution_rates,
    kernel_tables,
    linear_rates,
    network_table,
    seconds_of,
)
from benchmarks.gpu_memory_steps import drill_step, memory_step, small_step
from benchmarks.gpu_option_steps import compile_step, lora_step, options_step
from benchmarks.gpu_process_steps import PROFILE, group_step, worker_step
from benchmarks.gpu_rows import TIME_IS_OVER, Rows, TimeIsOver
from benchmarks.machine import machine
from vidgen_ray.bench.bench_command import PROMPT, BenchOptions, random_models, with_random_weights
from vidgen_ray.cli.doctor import check_driver, check_python, check_shared_memory, check_torch, memory_limit_gb
from vidgen_ray.engine.trials import TIMEOUT_S
from vidgen_ray.planner.cluster import GB, profile_for, this_machine
from vidgen_ray.planner.speed_trials import invented_item, run_once
from vidgen_ray.render.oom_fallback import allocator_settings, prepare_gpu
from vidgen_ray.shot import Shot
from vidgen_ray.stages import speed
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.flux2_klein import Flux2KleinStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.system.free_memory import free_gpu_memory
from vidgen_ray.weights import built_path

PACKAGES = ("torch", "torchvision", "numpy", "diffusers", "transformers", "accelerate", "peft", "torchao", "spandrel", "triton")
RANKS = (64, 16)
"""Ranks of LoRAs. They fall, and their factors need pinned blocks of several sizes."""


# machine


def machine_step(run: Run) -> None:
    run.rows.measure(
        {
            "checks": partial(_checks, run.on_gpu),
            "pinned memory": _pinned_memory,
            "speeds": partial(_speeds, run.on_gpu),
            "encoding": partial(encoding_rates, run.on_gpu),
        }
    )


def _checks(on_gpu: bool) -> dict[str, Any]:
    findings = [check_python(), check_driver(on_gpu, torch.version.cuda), check_torch(on_gpu, torch), check_shared_memory()]
    compiler = speed.missing_compiler("cuda" if on_gpu else "cpu")
    return {"findings": [*map(asdict, findings)], "missing_compiler": compiler, "memory_limit_gb": memory_limit_gb()}


def _pinned_memory() -> dict[str, Any]:
    """Return the pinned host memory of 16 tensors of 9 MiB per byte of them, and that of a clip that follows a smaller one.

    torch's default allocator takes 1.78 bytes per byte.
    """
    if not torch.cuda.is_available():
        return {"problem": "no GPU: host memory is not pinned"}

    def blocks() -> int:
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])

    before, size = blocks(), 9 << 20
    tensors = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(16)]
    per_byte = (blocks() - before) / (16 * size)
    del tensors
    torch.cuda.synchronize()
    before = blocks()
    clip = torch.empty(25 * 1024 * 576 * 3, dtype=torch.uint8, pin_memory=True)
    del clip
    # The block of the first clip is free now, and too small.
    clip = torch.empty(25 * 1024 * 640 * 3, dtype=torch.uint8, pin_memory=True)
    grown = blocks() - before
    problem = f"a clip of {clip.nbytes} bytes is in blocks of {grown} bytes" if grown < clip.nbytes else None
    return {"bytes_per_byte": per_byte, "clip_bytes": clip.nbytes, "blocks_bytes": grown, "problem": problem}


def _speeds(on_gpu: bool) -> dict[str, float]:
    """Return the speed of a product of matrices, of a copy on the device, and of one from pinned host memory."""
    device, side = ("cuda", 8192) if on_gpu else ("cpu", 256)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    host = torch.empty_like(matrix, device="cpu", pin_memory=on_gpu)
    return {
        "tflop_per_s": 2 * side**3 / best_of(lambda: matrix @ matrix) / 1e12,
        "gb_per_s": 2 * matrix.nbytes / best_of(matrix.clone) / 1e9,
        "link_gb_per_s": host.nbytes / best_of(lambda: host.to(device, non_blocking=True, copy=True)) / 1e9,
    }


# Stages


def profile_step(run: Run) -> None:
    """Run one step of each stage of the default chain with torch's profiler, and time the networks of each."""

    def profiled(stage_class: type[Stage[Any]], shot: Shot) -> dict[str, Any]:
        with stage_class(run.profile.params(stage_class)) as stage:
            call = partial(run_once, stage, invented_item(stage_class, shot))
            tables = kernel_tables(call)
            if stage_class is not RealESRGANStage:
                tables["networks"] = network_table(stage, call)
        free_gpu_memory()
        return tables

    with with_upscaler(run) as run, random_loras(run, [16]) as (lora,):
        run.rows.measure(
            {f"profile {stage.name}": partial(profiled, stage, shot) for stage, shot in chain_shots(run, lora).items()}
        )


def kernels_step(run: Run) -> None:
    rates = {"attention": attention_rates, "convolutions": convolution_rates, "linear layers": linear_rates}
    run.rows.measure({name: lambda make=make: {"rates": make(run.on_gpu)} for name, make in rates.items()})  # type: ignore[misc]


def chain_step(run: Run) -> None:
    """Measure the stages of the default chain with a face one by one, then all of them in one process."""
    common: dict[str, Any] = {"bench": bench_options(run.on_gpu), "is_calibration": True}
    with with_upscaler(run) as run, random_loras(run, [16]) as (lora,):
        size = {**run.clip, "upscaler": run.upscaler}
        measure_cases(
            run,
            {
                "flux with a face": Case(FluxStage, fields={**size, **FACE}, **common),
                "svd": Case(SVDStage, fields=size, **common),
                run.upscaler: Case(RealESRGANStage, fields=size, **common),
                "lora with a face": Case(FluxLoRAStage, fields={**size, **FACE, **lora}, **common),
                "flux without a face": Case(FluxStage, fields=size, bench=bench_options(run.on_gpu)),
            },
        )
        name = "chain in one process"
        run.rows.measure({name: partial(_chain, run, lora)}, {name: LONG_S})


def _chain(run: Run, lora: Mapping[str, str]) -> dict[str, Any]:
    """Return the seconds and the memory of each stage, with all of them loaded, for two shots of different sizes."""
    sizes = (run.clip, sized(run.on_gpu, 1024, 640, 25))
    fields = {**FACE, **lora, "upscaler": run.upscaler, "steps": {"flux": 4, "lora": 4, "svd": 4}}
    stages = [stage(run.profile.params(stage)) for stage in chain_shots(run, lora)]
    calls = []
    with ExitStack() as stack:
        for stage in stages:
            stack.enter_context(stage)
        for size in (*sizes, *sizes):
            shot = shot_for(run.profile, **{**fields, **size})
            for stage in stages:
                seconds = seconds_of(partial(run_once, stage, invented_item(type(stage), shot)))
                calls.append({"stage": stage.name, "size": f"{shot.width}x{shot.height}", "seconds": seconds, **gpu_memory()})
    del stages, stage
    free_gpu_memory()
    return {"calls": calls}


def wan_step(run: Run) -> None:
    """Measure one and two steps of Wan with one pass each, decoded in tiles, and its networks."""
    fields = {**WAN, **sized(run.on_gpu, 1280, 704, 81)}
    wan = partial(Case, WanStage, fields=fields, bench=BenchOptions(steps=(1, 2), repeats=1), limit_s=LONG_S)

    def networks() -> dict[str, Any]:
        shot = shot_for(run.profile, **{**fields, "steps": {"wan": 1}})
        with WanStage(changed_params(run.profile.params(WanStage), {"vae_tiling": True})) as stage:  # type: ignore[arg-type]
            table = network_table(stage, partial(stage, invented_item(WanStage, shot)))
        free_gpu_memory()
        return {"networks": table}

    measure_cases(run, {"wan": wan({"vae_tiling": True}, is_calibration=True)})
    run.rows.measure({"wan networks": networks}, {"wan networks": LONG_S})
    cudnn = {"vae_tiling": True, "attention_backend": "_native_cudnn"}
    measure_cases(run, {"wan attention_backend: _native_cudnn": wan(cudnn)})


def swap_step(run: Run) -> None:
    """Measure FLUX with T5 swapped for each prompt and LoRAs whose ranks fall, and the swapping of all its weights."""

    def swapped() -> dict[str, Any]:
        params = changed_params(run.profile.params(FluxLoRAStage), {"text_encoder": "swapped"})
        prompts = [{"prompt": f"{PROMPT}, {n}", **loras[n % len(loras)]} for n in range(5)]
        shots = [shot_for(run.profile, steps={"lora": 4}, **run.clip, **FACE, **fields) for fields in prompts]
        stage = FluxLoRAStage(params)  # type: ignore[arg-type]
        with stage:
            calls = calls_of(stage, [invented_item(FluxLoRAStage, shot) for shot in shots])
            moves = [
                {"to": to, "seconds": seconds_of(partial(stage.move, to)), "host_gb": host_gb(), **gpu_memory()}
                for to in ("cpu", params.device) * 2
            ]
        del stage
        free_gpu_memory()
        return {"calls": calls, "moves": moves}

    with random_loras(run, RANKS) as loras:
        run.rows.measure({"lora text_encoder: swapped": swapped})


def bytes_step(run: Run) -> None:
    """Compare the bytes of two calls, of one after the weights were swapped, and of one after they were loaded again."""

    def compared(stage_class: type[Stage[Any]], shot: Shot) -> dict[str, Any]:
        item = invented_item(stage_class, shot)
        stage = stage_class(run.profile.params(stage_class))
        with stage:
            results = {"first": run_once(stage, item), "again": run_once(stage, item)}
            stage.move("cpu")
            stage.move(stage.params.device)
            results["swapped"] = run_once(stage, item)
        with stage:
            results["loaded again"] = run_once(stage, item)
        del stage
        free_gpu_memory()
        first = results.pop("first").astype(np.int16)
        levels = {name: float(np.abs(first - result).mean()) for name, result in results.items()}
        other = [name for name, difference in levels.items() if difference]
        return {"levels": levels, "problem": f"other bytes: {', '.join(other)}" if other else None}

    with with_upscaler(run) as run, random_loras(run, [16]) as (lora,):
        run.rows.measure(
            {f"bytes {stage.name}": partial(compared, stage, shot) for stage, shot in chain_shots(run, lora).items()}
        )


UPSCALER_OPTIONS: tuple[dict[str, Any], ...] = (
    {"dense_kernel": True},
    {"tile_px": 512},
    {"dense_kernel": True, "tile_px": 512},
    {"frames_per_call": 1},
    {"frames_per_call": 8},
    {"cudnn_benchmark": True},
)


def upscaler_step(run: Run) -> None:
    """Measure the upscaler: its own kernel with whole frames and tiles, frames per call, and formats of its convolutions."""
    upscaler = run.upscaler
    common: dict[str, Any] = {"fields": {**run.clip, "upscaler": upscaler}, "bench": bench_options(run.on_gpu)}

    def compiled(stage: RealESRGANStage) -> None:
        network = stage._network(upscaler).model
        speed.compile_blocks(network, stage.params.device, (type(network).__name__,))

    def contiguous(stage: RealESRGANStage) -> None:
        model = stage._network(upscaler).model.to(memory_format=torch.contiguous_format)
        model.register_forward_pre_hook(lambda _, given: tuple(each.contiguous() for each in given))

    with with_upscaler(run) as run:
        plain = partial(Case, RealESRGANStage, **common)
        measure_cases(
            run,
            {
                **{
                    f"{upscaler} {', '.join(f'{name}: {value}' for name, value in options.items())}": plain(options)
                    for options in UPSCALER_OPTIONS
                },
                f"{upscaler} contiguous": plain(change=contiguous),
                f"{upscaler} compile": plain(change=compiled, limit_s=TIMEOUT_S),
            },
        )


def others_step(run: Run) -> None:
    """Measure models outside of the default chain."""
    common: dict[str, Any] = {"bench": bench_options(run.on_gpu), "is_calibration": True}
    klein = {"image_model": "klein", "identity": "none", **run.clip}
    ltx = {
        "video_model": "ltx",
        **(sized(True, 1216, 704, 121) if run.on_gpu else {"width": 128, "height": 64, "num_frames": 9}),
    }
    wan = {**WAN, **sized(run.on_gpu, 1280, 704, 81)}
    measure_cases(
        run,
        {
            "klein": Case(Flux2KleinStage, fields=klein, **common),
            "ltx": Case(LTXStage, fields=ltx, **common),
            "hunyuan": Case(HunyuanDiTStage, fields={**run.clip, "use_hunyuan_style": True}, **common),
            "klein compile: True": Case(
                Flux2KleinStage, {"compile": True}, klein, bench_options(run.on_gpu), limit_s=TIMEOUT_S
            ),
            "wan compile: True": Case(
                WanStage, {"vae_tiling": True, "compile": True}, wan, BenchOptions((1, 2), 1), limit_s=TIMEOUT_S
            ),
        },
    )


# Tests


def tests_step(run: Run, chosen: str) -> None:
    """Run the tests marked gpu whose names have, or do not have, the word compile. Each is a row, and pytest's exit code."""

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                problem = None if report.passed else f"{report.outcome}: {str(report.longrepr)[-2000:]}"
                run.rows.add(report.nodeid, problem, {"took_s": report.duration})

    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text())
    done = [name for name in run.rows.problems if "::" in name]
    common = [
        "-o",
        "addopts=",
        "-m",
        "gpu",
        "-n",
        str(min(4, os.cpu_count() or 1)),
        "--timeout",
        "250",
        "-q",
        "--tb",
        "short",
        f"--rootdir={ROOT}",
    ]
    code = int(pytest.main([*files, *common, "-k", chosen, *(f"--deselect={name}" for name in done)], plugins=[Recorder()]))
    # Failed tests have rows. Without a test to run, all of them have.
    expected = (0, 1, 5) if done else (0, 1)
    run.rows.add(
        f"pytest -k '{chosen}'", None if code in expected else f"pytest ended with exit code {code}", {"exit_code": code}
    )


STEPS: Mapping[str, Callable[[Run], None]] = {
    "machine": machine_step,
    "profile": profile_step,
    "kernels": kernels_step,
    "chain": chain_step,
    "wan": wan_step,
    "swap": swap_step,
    "bytes": bytes_step,
    "upscaler": upscaler_step,
    "options": options_step,
    "tests": partial(tests_step, chosen="not compile"),
    "memory": memory_step,
    "drill": drill_step,
    "small": small_step,
    "others": others_step,
    "worker": worker_step,
    "compile": compile_step,
    "compile_tests": partial(tests_step, chosen="compile"),
    "lora": lora_step,
    "group": group_step,
}


WITH_FACE = ("profile", "chain", "swap", "bytes", "options", "small", "memory", "drill", "worker", "compile", "lora")
"""Steps that need InfuseNet."""


def _machine() -> dict[str, Any]:
    found = machine(PACKAGES)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "gpu_gb": gpu.total_memory / GB, "cuda": torch.version.cuda}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("file", type=Path, help="JSON file that the rows are written to")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--lora", help="LoRA of the step lora: a file, or a Hugging Face repository OWNER/NAME")
    parser.add_argument("--until", type=float, default=float("inf"), help="end of the process, by the monotonic clock")
    args = parser.parse_args(argv)
    profile, on_gpu = profile_for(args.profile), torch.cuda.is_available()
    os.environ[PROFILE] = args.profile
    header = {"step": args.step, "profile": profile.name, "card": this_machine().card, "machine": _machine()}
    rows = Rows(args.file, header, args.until)
    # Weights that come with a bundle, in place of the packages that have them.
    for folder in (ROOT / "weights").glob("*"):
        shutil.copytree(folder, built_path(folder.name), dirs_exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        prepare_gpu(1.0)
    rows.add("allocator", "; ".join(str(each.message) for each in caught) or None, {"settings": allocator_settings()})
    if not on_gpu:
        speed.COMPILE_BACKEND = "eager"
    models = random_models(profile)
    with with_random_weights(profile, models) as chosen:
        try:
            STEPS[args.step](Run(rows, with_infusenet(chosen) if args.step in WITH_FACE else chosen, models, on_gpu, args.lora))
        except TimeIsOver:
            return TIME_IS_OVER
    rows.complete()
    return 0


if __name__ == "__main__":
    sys.exit(main())
