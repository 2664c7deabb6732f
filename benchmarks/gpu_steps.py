"""Steps of tools/gpu_first_hour.sh: what to measure first on a kind of GPU that the project has not run on.

Each step measures rows, one after another, and writes its JSON file after each. A step that was cut off measures the missing
rows when it runs again. Full-size networks have random weights. On a CPU the same code runs at a tiny size:

    python -m benchmarks.gpu_steps bench out/first-hour/03-bench.json --profile tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.machine import machine
from benchmarks.meta_networks import realesrgan_network
from vidgen_ray.bench.bench_command import (
    PROMPT,
    BenchOptions,
    item_for,
    lora_for,
    measure_stage,
    random_models,
    with_random_weights,
)
from vidgen_ray.bench.published_models import RandomModel
from vidgen_ray.cli.doctor import check_driver, check_python, check_shared_memory, check_torch, memory_limit_gb
from vidgen_ray.cli.options import example
from vidgen_ray.planner import peak_shares, profile_for, this_machine
from vidgen_ray.planner.cluster import GB
from vidgen_ray.profile import Profile
from vidgen_ray.render.oom_fallback import prepare_gpu
from vidgen_ray.script.check import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages import speed
from vidgen_ray.stages.base import Item, Stage, StageParams
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.system.files import write_atomically
from vidgen_ray.system.free_memory import free_gpu_memory
from vidgen_ray.weights import built_path

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "diffusers", "transformers", "accelerate", "peft", "torchao", "spandrel", "triton")
UNFINISHED = "did not finish"


class Rows:
    """Rows of one step, in a JSON file that is written after each. Rows that an earlier run has measured are kept."""

    def __init__(self, file: Path, step: str, profile: Profile) -> None:
        self._file = file
        known = json.loads(file.read_text())["rows"] if file.exists() else []
        self._rows: dict[str, dict[str, Any]] = {row["name"]: row for row in known}
        file.parent.mkdir(parents=True, exist_ok=True)
        self._header = {"step": step, "profile": profile.name, "card": this_machine().card, "machine": _machine()}

    @property
    def measured(self) -> list[str]:
        return [name for name, row in self._rows.items() if row["problem"] is None]

    def measure(self, cases: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
        """Add a row for each case that has none without a problem. An error of a case is the problem of its row.

        The case in which an earlier run was cut off comes last.
        """
        for name in sorted(cases, key=lambda case: case in self._rows):
            if name not in self.measured:
                self.add(name, UNFINISHED)
                begun = time.monotonic()
                try:
                    values, problem = dict(cases[name]()), None
                # A failed row does not affect the next ones.
                except Exception as error:
                    values, problem = {}, f"{type(error).__name__}: {error}"
                self.add(name, problem, {**values, "took_s": time.monotonic() - begun})
                print(f"{name}: {problem or 'measured'}", file=sys.stderr, flush=True)  # noqa: T201

    def add(self, name: str, problem: str | None, values: Mapping[str, Any] | None = None) -> None:
        """Add or replace a row."""
        self._rows[name] = {"name": name, "problem": problem, **(values or {})}
        write_atomically(self._file, json.dumps({**self._header, "rows": [*self._rows.values()]}, indent=1) + "\n")


def _machine() -> dict[str, Any]:
    found = machine(PACKAGES)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "gpu_gb": gpu.total_memory / GB, "cuda": torch.version.cuda}
    return found


@dataclass(frozen=True)
class Run:
    """Inputs of a step."""

    rows: Rows
    profile: Profile
    """Profile whose networks have random weights."""
    models: Mapping[str, RandomModel]
    """Actor -> these networks."""
    on_gpu: bool


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, until the GPU has finished."""
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def host_gb() -> float:
    return psutil.Process().memory_info().rss / GB


# 1. The machine


def machine_step(run: Run) -> None:
    cases = {"checks": partial(_checks, run.on_gpu), "pinned memory": _pinned_memory, "speeds": partial(_speeds, run.on_gpu)}
    run.rows.measure(cases)


def _checks(on_gpu: bool) -> dict[str, Any]:
    findings = [check_python(), check_driver(on_gpu, torch.version.cuda), check_torch(on_gpu, torch), check_shared_memory()]
    compiler = speed.missing_compiler("cuda" if on_gpu else "cpu")
    return {"findings": [*map(asdict, findings)], "missing_compiler": compiler, "memory_limit_gb": memory_limit_gb()}


def _pinned_memory() -> dict[str, float]:
    """Return the host memory of 16 pinned tensors of 9 MiB per byte of them: torch's default allocator takes 1.78."""
    size, before = 9 << 20, host_gb()
    tensors = [
        torch.ones(size, dtype=torch.uint8).pin_memory() if torch.cuda.is_available() else torch.ones(size) for _ in range(16)
    ]
    return {"bytes_per_byte": (host_gb() - before) * GB / sum(tensor.nbytes for tensor in tensors)}


def _speeds(on_gpu: bool) -> dict[str, float]:
    """Return the speed of a product of matrices, of a copy on the device, and of one from pinned host memory."""
    device, side = ("cuda", 8192) if on_gpu else ("cpu", 256)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    host = torch.empty_like(matrix, device="cpu", pin_memory=on_gpu)

    def best(call: Callable[[], Any]) -> float:
        return min(seconds_of(call) for _ in range(5))

    return {
        "tflop_per_s": 2 * side**3 / best(lambda: matrix @ matrix) / 1e12,
        "gb_per_s": 2 * matrix.nbytes / best(matrix.clone) / 1e9,
        "link_gb_per_s": host.nbytes / best(lambda: host.to(device, non_blocking=True, copy=True)) / 1e9,
    }


# 2. Tests


def tests_step(run: Run) -> None:
    """Run the tests marked gpu, those that compile last."""

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                problem = None if report.passed else f"{report.outcome}: {str(report.longrepr)[-2000:]}"
                run.rows.add(report.nodeid, problem, {"took_s": report.duration})

    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text())
    done = [f"--deselect={name}" for name in run.rows.measured]
    common = ["-o", "addopts=", "-m", "gpu", "-n", "4", "--timeout", "250", "-q", "--tb", "short", f"--rootdir={ROOT}"]
    for chosen in ("not compile", "compile"):
        pytest.main([*files, *common, "-k", chosen, *done], plugins=[Recorder()])


# 3 to 6. Stages


@dataclass(frozen=True)
class Case:
    """One measurement of a stage."""

    stage: type[Stage[Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that replace those of the profile."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the shot."""
    bench: BenchOptions = field(default_factory=BenchOptions)
    change: Callable[[Any], Any] | None = None
    """Changes the loaded stage."""
    is_calibration: bool = False
    """Plans may use the seconds."""


def measure_case(profile: Profile, case: Case) -> dict[str, Any]:
    """Return the measurement of a case, and what the memory table and the data sheet of the card say."""
    shot = shot_for(profile, **case.fields)
    params, estimated = (changed_params(each(case.stage), case.options) for each in (profile.params, profile.options_of))
    item, stage = item_for(profile, case.stage, shot), case.stage(params)
    load, graphs = stage.load, compiled_graphs()

    def load_changed() -> None:
        load()
        if case.change:
            case.change(stage)

    stage.load = load_changed  # type: ignore[method-assign]  # of this instance
    measured = measure_stage(stage, item, case.bench)
    memory = case.stage.memory(estimated, shot)
    shares = peak_shares(profile, {case.stage.name: measured.seconds_of_reference}, this_machine().nodes[0].assumed_card)
    return {
        "stage": case.stage.name,
        "measurement": measured.model_copy(update={"random_weights": True}).model_dump(),
        "planned_gb": memory.total / GB if memory else None,
        "peak_share": shares.get(case.stage.name),
        "graphs": compiled_graphs() - graphs,
        "is_calibration": case.is_calibration,
    }


def shot_for(profile: Profile, **fields: Any) -> Shot:
    face = {"face_image": [str(example("faces/astronaut.jpg"))], "identity": "none"}
    return check_shot({"prompt": PROMPT, **face, **fields}, "gpu_first_hour", profile.defaults)


def changed_params(params: StageParams, options: Mapping[str, Any]) -> StageParams:
    return type(params).model_validate({**dict(params), **options})


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure_cases(run: Run, cases: Mapping[str, Case]) -> None:
    run.rows.measure({name: partial(measure_case, run.profile, case) for name, case in cases.items()})


def sized(on_gpu: bool, width: int, height: int, frames: int) -> dict[str, int]:
    """Return the size of a shot: a tiny one on a CPU."""
    return {"width": width, "height": height, "num_frames": frames} if on_gpu else {"width": 128, "height": 64, "num_frames": 5}


def bench_options(on_gpu: bool) -> BenchOptions:
    return BenchOptions() if on_gpu else BenchOptions(steps=(2, 4), repeats=1)


@contextmanager
def random_loras(run: Run, count: int) -> Iterator[list[dict[str, str]]]:
    """Yield the field `lora` of shots with different LoRAs."""
    with ExitStack() as stack:
        flux = run.models[FluxStage.actor]
        yield [{"lora": str(stack.enter_context(lora_for(run.profile, flux, seed)))} for seed in range(count)]


def bench_step(run: Run) -> None:
    size, common = sized(run.on_gpu, 1024, 576, 25), {"bench": bench_options(run.on_gpu), "is_calibration": True}
    with random_loras(run, 1) as (lora,):
        cases = {
            "svd": Case(SVDStage, fields=size, **common),
            "flux": Case(FluxStage, fields=size, **common),
            "lora": Case(FluxLoRAStage, fields={**size, **lora}, **common),
            "hunyuan": Case(HunyuanDiTStage, fields={**size, "use_hunyuan_style": True}, **common),
        }
        measure_cases(run, cases)


def options_step(run: Run) -> None:
    """Measure options of SVD and FLUX, and what a compiled FLUX compiles again."""
    common: dict[str, Any] = {"fields": sized(run.on_gpu, 1024, 576, 25), "bench": bench_options(run.on_gpu)}
    cudnn = {"attention_backend": "_native_cudnn"}
    options: tuple[tuple[type[Stage[Any]], dict[str, Any]], ...] = (
        (SVDStage, {"compile": True}),
        (FluxStage, {"compile": True}),
        (FluxStage, {"quantize": "fp8_storage"}),
        (FluxStage, {"quantize": "fp8"}),
        (SVDStage, {"channels_last": True}),
        (SVDStage, cudnn),
        (FluxStage, cudnn),
    )
    cases = {
        f"{stage.name} {name}: {each[name]}": partial(measure_case, run.profile, Case(stage, each, **common))
        for stage, each in options
        for name in each
    }
    run.rows.measure({**cases, "lora compile: True, sizes and LoRAs": partial(_recompilation, run)})


def _recompilation(run: Run) -> dict[str, Any]:
    profile, other = run.profile, {"width": 768, "height": 1024} if run.on_gpu else {"width": 64, "height": 64}
    sizes = (sized(run.on_gpu, 1024, 576, 25), other)
    with random_loras(run, 3) as loras:
        shots = [*((size, loras[0]) for size in (sizes[0], *sizes, sizes[0])), *((sizes[0], lora) for lora in loras[1:])]
        stage = FluxLoRAStage(changed_params(profile.params(FluxLoRAStage), {"compile": True}))  # type: ignore[arg-type]
        items = [item_for(profile, FluxLoRAStage, shot_for(profile, steps={"lora": 4}, **size, **lora)) for size, lora in shots]
        with stage:
            return {"calls": calls_of(stage, items)}


def calls_of(stage: Stage[Any], items: Sequence[Item]) -> list[dict[str, float]]:
    """Run the items one after another and return the seconds, the graphs compiled so far and the host memory after each."""
    return [{"seconds": seconds_of(partial(stage, item)), "graphs": compiled_graphs(), "host_gb": host_gb()} for item in items]


def upscaler_step(run: Run) -> None:
    """Measure the upscaler: frames per call, and the formats and kernels of its convolutions."""
    upscaler = "x4plus" if run.on_gpu else "animevideov3"
    common: dict[str, Any] = {
        "fields": {**sized(run.on_gpu, 1024, 576, 25), "upscaler": upscaler},
        "bench": bench_options(run.on_gpu),
    }

    def compiled(stage: RealESRGANStage) -> None:
        network = stage._network(upscaler).model
        speed.compile_blocks(network, stage.params.device, (type(network).__name__,))

    def contiguous(stage: RealESRGANStage) -> None:
        model = stage._network(upscaler).model.to(memory_format=torch.contiguous_format)
        model.register_forward_pre_hook(lambda _, given: tuple(each.contiguous() for each in given))

    with tempfile.TemporaryDirectory() as folder:
        weights = ROOT / "weights" / "realesrgan"
        if not (weights / f"{upscaler}.safetensors").exists():
            from safetensors.torch import save_file

            weights = Path(folder)
            save_file(realesrgan_network(upscaler).state_dict(), weights / f"{upscaler}.safetensors")
        actor = run.profile.actors["realesrgan"].model_copy(update={"weights": str(weights)})
        profile = run.profile.model_copy(update={"actors": {**run.profile.actors, "realesrgan": actor}})
        plain = partial(Case, RealESRGANStage, **common)
        cases = {
            f"{upscaler}": plain(is_calibration=True),
            **{f"{upscaler} frames_per_call: {frames}": plain({"frames_per_call": frames}) for frames in (1, 8)},
            f"{upscaler} cudnn_benchmark: True": plain({"cudnn_benchmark": True}),
            f"{upscaler} contiguous": plain(change=contiguous),
            f"{upscaler} compile": plain(change=compiled),
        }
        measure_cases(replace(run, profile=profile), cases)


def wan_step(run: Run) -> None:
    """Measure one and two steps of Wan with one pass each, decoded in tiles and whole."""
    fields = {"video_model": "wan", "guidance": {"wan": 1}, **sized(run.on_gpu, 1280, 704, 81)}
    wan = partial(Case, WanStage, fields=fields, bench=BenchOptions(steps=(1, 2), repeats=1))
    cases = {
        "wan vae_tiling: True": wan({"vae_tiling": True}, is_calibration=True),
        "wan attention_backend: _native_cudnn": wan({"vae_tiling": True, "attention_backend": "_native_cudnn"}),
        "wan vae_tiling: False": wan({"vae_tiling": False}),
        "wan attention_backend: _native_flash": wan({"vae_tiling": True, "attention_backend": "_native_flash"}),
    }
    measure_cases(run, cases)


# 7. Weight swapping


def swap_step(run: Run) -> None:
    """Measure FLUX with a text encoder that is swapped for each prompt, and all of its weights swapped twice."""

    def swapped() -> dict[str, Any]:
        stage = FluxStage(changed_params(run.profile.params(FluxStage), {"text_encoder": "swapped"}))  # type: ignore[arg-type]
        size = sized(run.on_gpu, 1024, 576, 25)
        shots = [
            shot_for(run.profile, steps={"flux": 4}, **size).model_copy(update={"prompt": f"{PROMPT}, {n}"}) for n in range(5)
        ]
        device = stage.params.device
        with stage:
            calls = calls_of(stage, [item_for(run.profile, FluxStage, shot) for shot in shots])
            moves = [
                {"to": to, "seconds": seconds_of(partial(stage.move, to)), "host_gb": host_gb()} for to in ("cpu", device) * 2
            ]
        free_gpu_memory()
        return {"calls": calls, "moves": moves}

    run.rows.measure({"flux text_encoder: swapped": swapped})


STEPS: Mapping[str, Callable[[Run], None]] = {
    "machine": machine_step,
    "tests": tests_step,
    "bench": bench_step,
    "wan": wan_step,
    "options": options_step,
    "upscaler": upscaler_step,
    "swap": swap_step,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("file", type=Path, help="JSON file that the rows are written to")
    parser.add_argument("--profile", default="auto")
    args = parser.parse_args(argv)
    profile, on_gpu = profile_for(args.profile), torch.cuda.is_available()
    # Weights that come with a bundle, in place of the packages that have them.
    for folder in (ROOT / "weights").glob("*"):
        shutil.copytree(folder, built_path(folder.name), dirs_exist_ok=True)
    prepare_gpu(1.0)
    if not on_gpu:
        speed.COMPILE_BACKEND = "eager"
    models = random_models(profile)
    with with_random_weights(profile, models) as chosen:
        STEPS[args.step](Run(Rows(args.file, args.step, profile), chosen, models, on_gpu))


if __name__ == "__main__":
    main()
