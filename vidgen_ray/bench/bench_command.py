"""`vidgen bench`: measure the stages and the whole chain of a profile on this machine, for later plans.

Without Ray, one stage at a time. A stage with denoising steps is measured with two numbers of steps; the line through both
gives the seconds per step and those that do not depend on the steps. A chunked stage is measured on one chunk, because its
seconds grow with the frames.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from vidgen_ray.bench.published_models import RandomModel, empty_network, networks_in, random_model, random_pipeline
from vidgen_ray.cli.file_options import JsonOption
from vidgen_ray.cli.options import ProfileOption, example
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.errors import SetupError, UsageError, VidgenError
from vidgen_ray.graph import STAGE_BY_NAME, STAGES, relative_costs, stages_of
from vidgen_ray.media.images import cover_crop, read_image
from vidgen_ray.planner.cluster import GB, GpuCard, profile_for, this_machine
from vidgen_ray.planner.demand import Measurement, peak_shares, save_measurements
from vidgen_ray.planner.speed_trials import Trial, TrialResult, settled, try_option, try_options
from vidgen_ray.profile import AUTO, Profile
from vidgen_ray.render.oom_fallback import prepare_gpu
from vidgen_ray.script.check import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, Item, Stage, StageParams, frames_after
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux2_klein import Flux2KleinStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.loading import networks_from
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.system.console import Console, table_of
from vidgen_ray.system.free_memory import free_gpu_memory
from vidgen_ray.weights import resolve

_MIN_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Number and length of the measured runs."""

    steps: tuple[int, int] = (4, 16)
    """Two numbers of denoising steps."""
    repeats: int = 3
    """Calls after the warm-up, of which the median counts."""


QUICK = BenchOptions(steps=(4, 8), repeats=1)


@dataclass(frozen=True, slots=True)
class StageResult:
    """Result of one stage: a measurement, or why there is none."""

    stage: str
    measurement: Measurement | None
    problem: str | None


def bench_stages(
    profile: Profile,
    shots: Iterable[Shot],
    options: BenchOptions,
    stages: Collection[str] | None = None,
) -> Iterator[StageResult]:
    """Measure each stage that the shots pass and the profile has, once per variant, and yield each result.

    `stages`: only these. `None`: all.

    Stages do not get the results of earlier stages but the shot's photo as the image and as every frame of the clip, and its
    face features. Weights are released after each stage. A stage that fails, for example without its weights, is reported.
    """
    done: set[tuple[str, str]] = set()
    for shot in shots:
        for stage in stages_of(shot):
            key = stage.name, stage.variant(shot)
            if key in done or stage.actor not in profile.actors or (stages is not None and stage.name not in stages):
                continue
            done.add(key)
            try:
                params, item = profile.params(stage), item_for(profile, stage, shot)
                yield StageResult(stage.name, measure_stage(stage(params), item, options), None)
            # Any error of a model concerns this stage only.
            except Exception as error:
                yield StageResult(stage.name, None, str(error) or type(error).__name__)


def measure_stage(stage: Stage[Any], item: Item, options: BenchOptions) -> Measurement:
    """Load a stage, measure it on the item and release its weights."""
    import torch

    on_gpu = str(stage.params.device).startswith("cuda")
    try:
        with stage:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            if isinstance(stage, ChunkedStage):
                return _measure_chunk(stage, item, options, on_gpu)
            return _measure_steps(stage, item, options, on_gpu)
    finally:
        free_gpu_memory()


def item_for(profile: Profile, stage_class: type[Stage[Any]], shot: Shot) -> Item:
    """Return the shot with what the stage needs: its photo in place of images and frames."""
    photo = read_image(Path(shot.face_image[0]))
    image = cover_crop(photo, shot.width, shot.height)
    available: dict[str, Any] = {
        "photos": (photo,),
        "image": image,
        "frames": np.repeat(image[None], shot.clip_frames, axis=0),
    }
    needs = stage_class.needs(shot)
    if "face" in needs:
        with InstantIDStage(profile.params(InstantIDStage)) as faces:
            available |= faces(Item(shot, Artefacts(photos=(photo,))))
    return Item(with_local_loras(shot), Artefacts(**{name: available[name] for name in needs}))  # type: ignore[typeddict-item]


def _measure_steps(stage: Stage[Any], item: Item, options: BenchOptions, on_gpu: bool) -> Measurement:
    low, high = options.steps if f"steps.{stage.name}" in stage.reads else (0, 0)
    all_steps = item.shot.steps
    with_steps = [all_steps.model_copy(update={stage.name: steps}) if steps else all_steps for steps in (low, high)]
    short, long = (Item(item.shot.model_copy(update={"steps": steps}), item.artefacts) for steps in with_steps)
    first_s, long_s = _seconds(lambda: stage(long), options.repeats, on_gpu)
    step_s, fixed_s = None, 0.0
    if high > low:
        _, short_s = _seconds(lambda: stage(short), options.repeats, on_gpu)
        step_s = max(0.0, (long_s - short_s) / (high - low))
        fixed_s = max(0.0, long_s - high * step_s)
    cost = relative_costs(long.shot)[stage.name]
    # Of the reference shot: the part of the steps, and the part that does not depend on them.
    steps_part_s, fixed_part_s = (long_s - fixed_s) / cost.steps, fixed_s / cost.fixed
    reference_s = max(steps_part_s + fixed_part_s, _MIN_SECONDS)
    return Measurement(
        size=_size(item.shot),
        variant=stage.variant(item.shot),
        seconds_of_reference=reference_s,
        fixed_share=min(1.0, fixed_part_s / reference_s),
        fixed_s=fixed_s,
        step_s=step_s,
        warmup_s=max(0.0, first_s - long_s),
        peak_gb=_peak_gb() if on_gpu else None,
    )


def _measure_chunk(stage: ChunkedStage[Any], item: Item, options: BenchOptions, on_gpu: bool) -> Measurement:
    shot, (source,) = item.shot, stage.takes
    frames = item.artefacts[source]  # type: ignore[literal-required]  # the name of an artefact
    source_frames, chunk = stage.first_chunk(shot, frames)
    first_s, chunk_s = _seconds(lambda: stage.run_chunk(shot, source_frames, chunk), options.repeats, on_gpu)
    # An earlier chunked stage may make the clip larger. The chunk is one of the generated clip.
    cost = stage.relative_cost(shot) * chunk.stop / frames_after(len(frames), stage.frame_factor(shot))
    return Measurement(
        size=_size(shot),
        variant=stage.variant(shot),
        seconds_of_reference=max(chunk_s / cost, _MIN_SECONDS),
        warmup_s=max(0.0, first_s - chunk_s),
        peak_gb=_peak_gb() if on_gpu else None,
    )


def _seconds(call: Callable[[], Any], repeats: int, on_gpu: bool) -> tuple[float, float]:
    """Return the seconds of the first call, and the median of the next ones."""
    first, *others = (_timed(call, on_gpu) for _ in range(repeats + 1))
    return first, median(others)


def _timed(call: Callable[[], Any], on_gpu: bool) -> float:
    """Return the seconds of a call, until the GPU has finished."""
    begun = time.perf_counter()
    call()
    if on_gpu:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _size(shot: Shot) -> str:
    return f"{shot.width}x{shot.height}x{shot.num_frames}"


def _peak_gb() -> float:
    import torch

    return float(torch.cuda.max_memory_allocated() / GB)


_SIZE = re.compile(r"(\d+)x(\d+)")
PROMPT = "a man in the rain"
_LORA_RANK = 16
_CHAIN = "chain"
"""Name of the whole chain among the results."""
RANDOM_ACTORS = (
    *(FluxStage.actor, Flux2KleinStage.actor, HunyuanDiTStage.actor),
    *(SVDStage.actor, WanStage.actor, LTXStage.actor),
)
"""Actors whose networks `--weights random` replaces. The others use the weights of the profile."""


def bench(
    profile: ProfileOption = AUTO,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Size of the clip. Default: that of the profile.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Frames of the clip. Default: those of the profile.")
    ] = None,
    stages: Annotated[
        list[str] | None, typer.Option("--stage", metavar="STAGE", help="Only this stage, without the chain. Repeatable.")
    ] = None,
    upscalers: Annotated[
        list[str] | None,
        typer.Option("--upscaler", metavar="NAME", help="Upscaler to measure. Repeatable. Default: the profile's."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="profile|random",
            help="random: FLUX, klein, HunyuanDiT, SVD, Wan and LTX at full size with random weights, without their files; no "
            "face, no chain. Default: those of the profile.",
        ),
    ] = "profile",
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure once with few steps, only the stages of the default chain.")
    ] = False,
    no_save: Annotated[bool, typer.Option("--no-save", help="Do not store the results for later plans.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the speed and memory of the stages on this machine.

    Prints seconds per step, fixed seconds, warm-up and peak GPU memory. Later plans with this profile on the same kind of
    GPU use the results. Exits with code 4 if no stage could be measured.
    """
    chosen = profile_for(profile)
    if unknown := sorted(set(stages or ()) - STAGE_BY_NAME.keys()):
        raise UsageError(f"--stage: got {unknown[0]!r}, must be one of {', '.join(STAGE_BY_NAME)}")
    if weights not in ("profile", "random"):
        raise UsageError(f"--weights: got {weights!r}, must be profile or random")
    is_random, machine = weights == "random", this_machine()
    with ExitStack() as stack:
        prepare_gpu(1.0)
        # Libraries print to standard output while they load.
        stack.enter_context(redirect_stdout(sys.stderr))
        models: dict[str, RandomModel] = {}
        if is_random:
            models = random_models(chosen)
            chosen = stack.enter_context(with_random_weights(chosen, models))
        lora = stack.enter_context(lora_for(chosen, models.get(FluxStage.actor)))
        shots = _shots(chosen, lora, size, frames, upscalers, stages, quick=quick, identity="none" if is_random else None)
        if not no_save:
            chosen = _with_trials(chosen, shots, machine.kinds, stages)
        results = []
        for result in bench_stages(chosen, shots, QUICK if quick else BenchOptions(), stages):
            if result.measurement and STAGE_BY_NAME[result.stage].actor in models:
                result = replace(result, measurement=result.measurement.model_copy(update={"random_weights": True}))
            results.append(result)
            if not as_json:
                variant = f" {result.measurement.variant}".rstrip() if result.measurement else ""
                typer.echo(f"{result.stage}{variant}: {'measured' if result.measurement else 'not measured'}", err=True)
        chain = None if quick or stages or is_random else _chain(chosen, shots[0])
    measured: defaultdict[str, list[Measurement]] = defaultdict(list)
    for result in results:
        if result.measurement:
            measured[result.stage].append(result.measurement)
    card, shares = machine.card, _peak_shares(chosen, results, machine.nodes[0].assumed_card)
    if not no_save:
        save_measurements(chosen.name, card, measured)
    if as_json:
        typer.echo(
            json.dumps(
                {"profile": chosen.name, "card": card, "stages": [_row(result, shares) for result in results], _CHAIN: chain}
            )
        )
    else:
        Console().print(_table(results, shares))
        if chain:
            typer.echo(f"whole chain: {chain['seconds']:.2f} s a shot, {chain['first_s']:.2f} s the first time")
        for result in results:
            if result.problem:
                typer.echo(f"{result.stage}: not measured: {result.problem}", err=True)
        if measured and not no_save:
            marked = ", marked as measured with random weights" if is_random else ""
            typer.echo(f"stored for plans with {chosen.name} on {card}{marked}")
    if not measured:
        raise typer.Exit(SetupError.exit_code)


def _with_trials(profile: Profile, shots: Sequence[Shot], kinds: Sequence[str], stages: Collection[str] | None) -> Profile:
    """Try the speed options of the stages that are measured, and return the profile with those that help."""
    for actor in profile.actors:
        passed = {stage.name: shot for shot in reversed(shots) for stage in stages_of(shot) if stage.actor == actor}
        measured = {name: shot for name, shot in passed.items() if stages is None or name in stages}

        def tried(trial: Trial, _card: str, measured: Mapping[str, Shot] = measured) -> TrialResult | None:
            # Stages that fail without the option are reported when they are measured.
            with suppress(Exception):
                return try_option(trial, measured.items())
            return None

        if measured:
            try_options(profile, actor, kinds, tried, partial(typer.echo, err=True))
    return settled(profile, kinds)


def _shots(
    profile: Profile,
    lora: Path | None,
    size: str | None,
    frames: int | None,
    upscalers: Sequence[str] | None,
    stages: Sequence[str] | None,
    *,
    quick: bool,
    identity: str | None,
) -> list[Shot]:
    """Return shots that pass the stages of the profile: the whole chain, one per further upscaler, and examples of stages.

    `identity`: how FLUX is conditioned on the face. `None`: the default of the profile.
    """
    fields: dict[str, Any] = {
        "prompt": PROMPT,
        "face_image": [str(example("faces/astronaut.jpg"))],
        "use_hunyuan_style": "hunyuan" in profile.actors,
    }
    if size is not None:
        if (match := _SIZE.fullmatch(size)) is None:
            raise UsageError(f"--size: got {size!r}, must be WIDTHxHEIGHT, e.g. 1024x576")
        fields |= {"width": int(match[1]), "height": int(match[2])}
    if frames is not None:
        fields["num_frames"] = frames
    if identity is not None:
        fields["identity"] = identity
    chain = {**fields, "lora": str(lora)} if lora else fields
    variants = [{**chain, "upscaler": name} for name in upscalers or ()] or [chain]
    for stage in STAGES:
        if stage.actor in profile.actors and (stage.name in stages if stages else not quick):
            variants += [_with_files(fields, values, lora) for values in stage.examples[:1]]
    return [check_shot(variant, "vidgen bench", profile.defaults) for variant in variants]


def _with_files(fields: Mapping[str, Any], values: Mapping[str, Any], lora: Path | None) -> dict[str, Any]:
    """Return the fields with those of a stage's example, whose files do not exist."""
    files = {"face_image": fields["face_image"], "lora": str(lora) if lora else None}
    replaced = {name: files.get(name, value) for name, value in values.items()}
    return {**fields, **{name: value for name, value in replaced.items() if value is not None}}


@contextmanager
def lora_for(profile: Profile, random_flux: RandomModel | None, seed: int = 0, rank: int = _LORA_RANK) -> Iterator[Path | None]:
    """Yield a LoRA with random weights for the profile's FLUX. `None` if its weights are not on this machine."""
    from vidgen_ray.bench.tiny_networks import write_random_lora

    with tempfile.TemporaryDirectory(prefix="vidgen-bench-") as folder:
        file = Path(folder) / "random.safetensors"
        try:
            networks = random_flux.networks if random_flux else dict(networks_in(profile.params(FluxStage).weights))
            write_random_lora(empty_network(networks["transformer"]), file, seed=seed, rank=rank, scale=0.01)
        except (VidgenError, OSError):
            yield None
        else:
            yield file


def random_models(profile: Profile) -> dict[str, RandomModel]:
    """Return actor -> model with random weights. Without actors for whose weights no config is known: they are not measured."""
    folder = profile.source.parent if profile.source else None
    models = {}
    for name in RANDOM_ACTORS:
        if name in profile.actors:
            try:
                models[name] = random_model(profile.actors[name].weights, folder)
            except SetupError as error:
                typer.echo(f"{name}: {error}", err=True)
    return models


@contextmanager
def with_random_weights(profile: Profile, models: Mapping[str, RandomModel]) -> Iterator[Profile]:
    """Yield the profile with the weights of these models. In the block, their networks have random weights."""
    networks = {resolve(model.weights): model.networks for model in models.values()}
    # LoRAs that distil to a few steps do not fit other weights, and cost no time.
    changes = {name: {"weights": model.weights, "extra_weights": {}} for name, model in models.items()}
    actors = {name: profile.actors[name].model_copy(update=change) for name, change in changes.items()}

    def make(params: StageParams, float32_parts: Collection[str]) -> dict[str, Any]:
        return random_pipeline(networks[params.weights], params, float32_parts) if params.weights in networks else {}

    with networks_from(make):
        yield profile.model_copy(update={"actors": {**profile.actors, **actors}})


def _chain(profile: Profile, shot: Shot) -> dict[str, float] | None:
    """Return the seconds of a whole shot in one process, with encoding and writing: of the first one, and of another one."""
    from vidgen_ray.pipeline import VideoGenerationPipeline

    seconds = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="vidgen-bench-") as folder,
            VideoGenerationPipeline(profile, folder, cache="none") as pipeline,
        ):
            for seed in (0, 1):
                begun = time.perf_counter()
                pipeline.render(shot.model_copy(update={"id": f"bench-{seed}", "seed": seed}))
                seconds.append(time.perf_counter() - begun)
    except VidgenError as error:
        typer.echo(f"whole chain: not measured: {error}", err=True)
        return None
    return {"first_s": seconds[0], "seconds": seconds[1]}


def _peak_shares(profile: Profile, results: Sequence[StageResult], card: GpuCard | None) -> dict[str, float]:
    """Return the fraction of the GPU's peak that each stage has reached, for the network of the reference shot."""
    reference = {stage.name: stage.variant(Shot(prompt="reference")) for stage in STAGES}
    measured = {
        result.stage: one.seconds_of_reference
        for result in results
        if (one := result.measurement) is not None and one.variant == reference[result.stage]
    }
    return peak_shares(profile, measured, card)


def _row(result: StageResult, shares: Mapping[str, float]) -> dict[str, Any]:
    measured = result.measurement.model_dump() if result.measurement else {}
    return {"stage": result.stage, **measured, "peak_share": shares.get(result.stage), "problem": result.problem}


def _table(results: Sequence[StageResult], shares: Mapping[str, float]) -> Table:
    numbers = ("reference shot", "of the peak", "per step", "fixed", "warm-up", "memory")
    table = table_of("stage", "size", *numbers, right=numbers)
    for result in results:
        if (one := result.measurement) is not None:
            table.add_row(
                f"{result.stage} {one.variant}".strip(),
                one.size,
                f"{one.seconds_of_reference:.3g} s",
                f"{shares[result.stage]:.0%}" if result.stage in shares else "",
                "" if one.step_s is None else f"{one.step_s:.3g} s",
                f"{one.fixed_s:.3g} s",
                f"{one.warmup_s:.3g} s",
                "" if one.peak_gb is None else f"{one.peak_gb:.1f} GB",
            )
    return table
