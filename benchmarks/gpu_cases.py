"""What the steps of tools/gpu_first_hour.py share: shots, stages with random weights, measurements of seconds and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu_kernels import seconds_of
from benchmarks.gpu_rows import CASE_S, Rows
from benchmarks.meta_networks import realesrgan_network
from vidgen_ray.bench.bench_command import PROMPT, BenchOptions, lora_for, measure_stage
from vidgen_ray.bench.published_models import RandomModel, write_random_infusenet
from vidgen_ray.planner.cluster import GB, this_machine
from vidgen_ray.planner.demand import peak_shares
from vidgen_ray.planner.speed_trials import invented_item
from vidgen_ray.profile import Profile
from vidgen_ray.script.check import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, Stage, StageParams
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import built_path

ROOT = Path(__file__).parent.parent
LONG_S = 600.0
"""Longest measurement of Wan, or of several models, in seconds. Those that compile have as long as a trial of a worker."""


@dataclass(frozen=True)
class Run:
    """Inputs of a step."""

    rows: Rows
    profile: Profile
    """Profile whose networks have random weights."""
    models: Mapping[str, RandomModel]
    """Actor -> these networks."""
    on_gpu: bool
    lora: str | None = None
    """LoRA that the user gives."""

    @property
    def clip(self) -> dict[str, int]:
        """Fields of the reference clip; of a tiny one on a CPU."""
        return sized(self.on_gpu, 1024, 576, 25)

    @property
    def upscaler(self) -> str:
        return "x4plus" if self.on_gpu else "animevideov3"


def sized(on_gpu: bool, width: int, height: int, frames: int) -> dict[str, int]:
    """Return the size of a shot: a tiny one on a CPU."""
    return {"width": width, "height": height, "num_frames": frames} if on_gpu else {"width": 128, "height": 64, "num_frames": 5}


def host_gb() -> float:
    return psutil.Process().memory_info().rss / GB


def gpu_memory() -> dict[str, float]:
    """Return the GB that tensors hold, that torch has reserved for them, and that its pinned host memory takes."""
    if not torch.cuda.is_available():
        return {}
    pinned = torch.cuda.host_memory_stats()
    return {
        "allocated_gb": torch.cuda.memory_allocated() / GB,
        "reserved_gb": torch.cuda.memory_reserved() / GB,
        "peak_gb": torch.cuda.max_memory_allocated() / GB,
        "pinned_gb": pinned.get("active_bytes.current", 0) / GB,
        "pinned_blocks_gb": pinned.get("allocated_bytes.current", 0) / GB,
    }


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
    limit_s: float = CASE_S


def measure_case(profile: Profile, case: Case) -> dict[str, Any]:
    """Return the measurement of a case, and what the memory table and the data sheet of the card say."""
    shot = shot_for(profile, **case.fields)
    params, estimated = (changed_params(each(case.stage), case.options) for each in (profile.params, profile.options_of))
    item, stage = invented_item(case.stage, shot), case.stage(params)
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
    return check_shot({"prompt": PROMPT, **fields}, "gpu_first_hour", profile.defaults)


FACE = {"face_image": [str(ROOT / "examples" / "faces" / "astronaut.jpg")], "identity": "infusenet", "pose": "none"}
"""Fields of a shot with a face. Its features are invented, and no keypoints are drawn: a bundle has no models of faces and no
OpenCV."""


WAN = {"video_model": "wan", "guidance": {"wan": 1}}
"""Fields of a shot by Wan with one pass per step."""


def changed_params(params: StageParams, options: Mapping[str, Any]) -> StageParams:
    return type(params).model_validate({**dict(params), **options})


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure_cases(run: Run, cases: Mapping[str, Case]) -> None:
    measured = {name: partial(measure_case, run.profile, case) for name, case in cases.items()}
    run.rows.measure(measured, {name: case.limit_s for name, case in cases.items()})


def bench_options(on_gpu: bool) -> BenchOptions:
    return BenchOptions(repeats=2) if on_gpu else BenchOptions(steps=(2, 4), repeats=1)


@contextmanager
def random_loras(run: Run, ranks: Sequence[int]) -> Iterator[list[dict[str, str]]]:
    """Yield the field `lora` of shots with different LoRAs of these ranks."""
    with ExitStack() as stack:
        flux = run.models[FluxStage.actor]
        yield [{"lora": str(stack.enter_context(lora_for(run.profile, flux, n, rank)))} for n, rank in enumerate(ranks)]


@contextmanager
def with_upscaler(run: Run) -> Iterator[Run]:
    """Yield the run with an upscaler. x4plus has random weights, which take as long as those of the package that has it."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file(realesrgan_network(run.upscaler).state_dict(), Path(folder) / f"{run.upscaler}.safetensors")
        actor = run.profile.actors["realesrgan"].model_copy(update={"weights": folder})
        yield replace(run, profile=run.profile.model_copy(update={"actors": {**run.profile.actors, "realesrgan": actor}}))


def chain_shots(run: Run, lora: Mapping[str, str]) -> dict[type[Stage[Any]], Shot]:
    """Return the stages of the default chain with a face, each with its shot, of one step."""
    steps = {"steps": dict.fromkeys(("flux", "svd"), 1) | {"lora": 2}}
    shot = shot_for(run.profile, **run.clip, **FACE, **lora, **steps, upscaler=run.upscaler)
    return dict.fromkeys((FluxStage, FluxLoRAStage, SVDStage, RealESRGANStage), shot)


def calls_of(stage: Stage[Any], items: Sequence[Item]) -> list[dict[str, float]]:
    """Run the items one after another and return the seconds, the graphs compiled so far and the memory after each."""
    return [
        {"seconds": seconds_of(partial(stage, item)), "graphs": compiled_graphs(), "host_gb": host_gb(), **gpu_memory()}
        for item in items
    ]


def with_infusenet(profile: Profile) -> Profile:
    """Return the profile with InfuseNet for its FLUX: random weights of full size on a GPU, those of `tiny` on a CPU."""
    flux = profile.actors[FluxStage.actor]
    weights = "builtin:tiny/infusenet"
    if flux.device != "cpu":
        folder = built_path("random-infusenet")
        if not folder.exists():
            write_random_infusenet(folder, flux.dtype or "float32", flux.device)
        weights = str(folder)
    changed = flux.model_copy(update={"extra_weights": {"infusenet": weights}})
    return profile.model_copy(update={"actors": {**profile.actors, FluxStage.actor: changed}})
