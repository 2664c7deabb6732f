"""Measure stages on this machine: seconds per step, fixed seconds, warm-up and peak memory. Without Ray, one stage at a time.

A stage with denoising steps is measured with two numbers of steps; the line through both gives the seconds per step and those
that do not depend on the steps. A chunked stage is measured on one chunk, because its seconds grow with the frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.engine.oom_fallback import free_gpu_memory
from vidgen_ray.graph import relative_costs, stages_of
from vidgen_ray.media import cover_crop, read_image
from vidgen_ray.planner import Measurement
from vidgen_ray.planner.cluster import GB
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, Item, Stage, frames_after
from vidgen_ray.stages.instantid import InstantIDStage

MIN_SECONDS = 1e-6


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
    check: Callable[[type[Stage[Any]], Shot], None] = lambda stage, shot: None,
) -> Iterator[StageResult]:
    """Measure each stage that the shots pass and the profile has, once per variant, and yield each result.

    `stages`: only these. `None`: all. `check`: called before a stage is loaded. If it raises, the stage is not measured.

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
                check(stage, shot)
                yield StageResult(stage.name, _measure(profile, stage, shot, options), None)
            # Any error of a model concerns this stage only.
            except Exception as error:
                yield StageResult(stage.name, None, str(error) or type(error).__name__)


def _measure(profile: Profile, stage_class: type[Stage[Any]], shot: Shot, options: BenchOptions) -> Measurement:
    params = profile.params(stage_class)
    item = _item_for(profile, stage_class, shot)
    on_gpu = str(params.device).startswith("cuda")
    try:
        with stage_class(params) as stage:
            if on_gpu:
                _reset_peak_memory()
            if isinstance(stage, ChunkedStage):
                return _measure_chunk(stage, item, options, on_gpu)
            return _measure_steps(stage, item, options, on_gpu)
    finally:
        free_gpu_memory()


def _item_for(profile: Profile, stage_class: type[Stage[Any]], shot: Shot) -> Item:
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
            available |= _call(faces, Item(shot, Artefacts(photos=(photo,))))
    return Item(with_local_loras(shot), Artefacts(**{name: available[name] for name in needs}))  # type: ignore[typeddict-item]


def _measure_steps(stage: Stage[Any], item: Item, options: BenchOptions, on_gpu: bool) -> Measurement:
    low, high = options.steps if f"steps.{stage.name}" in stage.reads else (0, 0)
    short, long = (Item(_with_steps(item.shot, stage.name, steps), item.artefacts) for steps in (low, high))
    first_s, long_s = _seconds(lambda: _call(stage, long), options.repeats, on_gpu)
    step_s, fixed_s = None, 0.0
    if high > low:
        _, short_s = _seconds(lambda: _call(stage, short), options.repeats, on_gpu)
        step_s = max(0.0, (long_s - short_s) / (high - low))
        fixed_s = max(0.0, long_s - high * step_s)
    cost = relative_costs(long.shot)[stage.name]
    # Of the reference shot: the part of the steps, and the part that does not depend on them.
    steps_part_s, fixed_part_s = (long_s - fixed_s) / cost.steps, fixed_s / cost.fixed
    reference_s = max(steps_part_s + fixed_part_s, MIN_SECONDS)
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
    frames_made = frames_after(len(frames), stage.frame_factor(shot))
    chunk = slice(0, min(stage.chunk_frames(stage.params), frames_made))
    source_frames = frames[stage.source_frames(shot, chunk)]
    first_s, chunk_s = _seconds(lambda: stage.run_chunk(shot, source_frames, chunk), options.repeats, on_gpu)
    # An earlier chunked stage may make the clip larger. The chunk is one of the generated clip.
    cost = stage.relative_cost(shot) * chunk.stop / frames_made
    return Measurement(
        size=_size(shot),
        variant=stage.variant(shot),
        seconds_of_reference=max(chunk_s / cost, MIN_SECONDS),
        warmup_s=max(0.0, first_s - chunk_s),
        peak_gb=_peak_gb() if on_gpu else None,
    )


def _seconds(call: Callable[[], Any], repeats: int, on_gpu: bool) -> tuple[float, float]:
    """Return the seconds of the first call, and the median of the next ones."""
    first, *others = (_timed(call, on_gpu) for _ in range(repeats + 1))
    return first, median(others)


def _with_steps(shot: Shot, stage: str, steps: int) -> Shot:
    """Return the shot with this number of steps in a stage. 0 changes nothing."""
    return shot.model_copy(update={"steps": shot.steps.model_copy(update={stage: steps})}) if steps else shot


def _call(stage: Stage[Any], item: Item) -> Artefacts:
    (made,) = stage([item])
    return made


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


def _reset_peak_memory() -> None:
    import torch

    torch.cuda.reset_peak_memory_stats()


def _peak_gb() -> float:
    import torch

    return float(torch.cuda.max_memory_allocated() / GB)
