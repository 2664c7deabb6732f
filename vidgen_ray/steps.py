"""A shot's steps, wherever they run: a stage with its inputs, its cache and its seconds; then the files, committed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from vidgen_ray.errors import VidgenError
from vidgen_ray.graph import ShotPlan, Step, stages_of, with_local_loras
from vidgen_ray.media import Mp4Settings, Mp4Writer, cover_crop, read_image, write_png
from vidgen_ray.outputs.folder import OutputFolder, ShotDraft
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord
from vidgen_ray.outputs.stage_cache import StageCache, face_to_json
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Frames, Item, Stage
from vidgen_ray.stages.realesrgan import RealESRGANStage, frame_chunks


class StepFailed(VidgenError):
    """A stage could not do its work for a shot."""

    def __init__(self, stage: str, cause: Exception) -> None:
        self.stage = stage
        self.cause = cause
        super().__init__(stage, cause)

    def __str__(self) -> str:
        kind = "" if isinstance(self.cause, VidgenError) else f"{type(self.cause).__name__}: "
        return f"{self.stage}: {kind}{self.cause}"

    def failure(self) -> Failure:
        return Failure(
            stage=self.stage,
            error=type(self.cause).__name__,
            message=str(self.cause),
            attempts=1,
            worker=f"{os.uname().nodename}:{os.getpid()}",
        )


class StepRunner:
    """Loaded stages, and what is done round each: inputs read, the cache asked, seconds taken.

    `gpus` is the share of a GPU each stage holds; `cache` may be none.
    """

    def __init__(self, stages: Sequence[Stage[Any]], gpus: Mapping[str, float], cache: StageCache | None) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self._gpus = gpus
        self._cache = cache

    def run(self, plan: ShotPlan, item: Item) -> tuple[Item, list[StepRecord]]:
        """Take the item through those of its plan's steps whose stages are held here. Raises StepFailed."""
        records = []
        for step in plan.steps:
            if step.stage in self._stages:
                item, record = self._step(step, item)
                records.append(record)
        return item, records

    def _step(self, step: Step, item: Item) -> tuple[Item, StepRecord]:
        begun = time.monotonic()
        try:
            found = self._cache.get(step.key, self._stages[step.stage].writes) if self._cache else None
            given = self._work(step, item) if found is None else found
        # Whatever a model stumbles over fails this shot, not its neighbours.
        except Exception as error:
            raise StepFailed(step.stage, error) from error
        seconds = time.monotonic() - begun
        record = step_record(step, seconds, self._gpus[step.stage], cached=found is not None)
        # The photo is of no use after the features are known.
        kept = {name: value for name, value in item.artefacts.items() if name != "photo"}
        return Item(item.shot, Artefacts(**{**kept, **given})), record  # type: ignore[typeddict-item]  # both are Artefacts

    def _work(self, step: Step, item: Item) -> Artefacts:
        stage = self._stages[step.stage]
        ready = with_pictures(item, stage.takes)
        (given,) = stage([Item(with_local_loras(ready.shot), ready.artefacts)])
        if self._cache:
            self._cache.put(step.key, given)
        return given


def step_record(step: Step, seconds: float, gpus: float, *, cached: bool) -> StepRecord:
    return StepRecord(
        stage=step.stage,
        key=step.key,
        weights=step.weights,
        seconds=round(seconds, 4),
        gpu_seconds=0.0 if cached else round(seconds * gpus, 4),
        cached=cached,
    )


def with_pictures(item: Item, takes: Iterable[str]) -> Item:
    """The item with the photo and the start image that the shot names by path, where they are taken and not there yet."""
    shot, artefacts = item.shot, item.artefacts.copy()
    if "photo" in takes and "photo" not in artefacts and shot.face_image is not None:
        artefacts["photo"] = read_image(Path(shot.face_image))
    if "image" in takes and "image" not in artefacts and shot.image is not None:
        artefacts["image"] = cover_crop(read_image(Path(shot.image)), shot.width, shot.height)
    return Item(shot, artefacts)


class UpscaledChunk(NamedTuple):
    """A part of a clip, and what it cost the upscaler."""

    frames: Frames
    seconds: float


def finish(
    plan: ShotPlan,
    item: Item,
    records: Sequence[StepRecord],
    upscaled: Iterable[UpscaledChunk] | None,
    *,
    outputs: OutputFolder,
    encode: Mp4Settings,
    upscaler_gpus: float,
    keep_stages: bool,
) -> ShotRecord:
    """Write and commit the shot's files. `upscaled` are chunks of frames in order, taken while they are encoded."""
    shot, artefacts = item.shot, with_pictures(item, ("image",)).artefacts
    records = list(records)
    with outputs.draft(plan) as draft:
        write_png(draft.path("image.png"), artefacts["image"])
        if "frames" in artefacts:
            write_clip(draft.path("video.mp4"), [artefacts["frames"]], shot.fps, encode)
        if upscaled is not None:
            seconds: list[float] = []
            try:
                write_clip(draft.path("hd.mp4"), _counted(upscaled, seconds), shot.fps, encode)
            except Exception as error:
                raise StepFailed(plan.steps[-1].stage, error) from error
            records.append(step_record(plan.steps[-1], sum(seconds), upscaler_gpus, cached=False))
        if keep_stages:
            _write_stages(draft, outputs.stage_cache)
        return draft.commit(records)


def _counted(chunks: Iterable[UpscaledChunk], seconds: list[float]) -> Iterator[Frames]:
    for chunk in chunks:
        seconds.append(chunk.seconds)
        yield chunk.frames


def write_clip(path: Path, chunks: Iterable[Frames], fps: int | Fraction, encode: Mp4Settings) -> None:
    """Encode chunks of frames, each (T, H, W, 3), as they come."""
    chunks = iter(chunks)
    first = next(chunks)
    with Mp4Writer(path, width=first.shape[2], height=first.shape[1], fps=fps, settings=encode) as writer:
        writer.write(first)
        for chunk in chunks:
            writer.write(chunk)


def _write_stages(draft: ShotDraft, cache: StageCache) -> None:
    for stage, step in zip(stages_of(draft.plan.shot), draft.plan.steps, strict=True):
        artefacts = cache.get(step.key, stage.writes) if stage.keeps else None
        if not stage.keeps or artefacts is None:
            continue
        if "face" in artefacts:
            draft.path(stage.keeps).write_text(face_to_json(artefacts["face"]))
        else:
            write_png(draft.path(stage.keeps), artefacts["image"])


def upscale_in_order(stage: RealESRGANStage, shot: Shot, frames: Frames) -> Iterator[UpscaledChunk]:
    """The clip's chunks, upscaled one after another."""
    for chunk in frame_chunks(len(frames), stage.params.frames_per_call):
        begun = time.monotonic()
        yield UpscaledChunk(stage.upscale(frames[chunk], shot.scale, shot.upscaler), time.monotonic() - begun)
