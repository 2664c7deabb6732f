"""Run the steps of a shot on loaded stages: inputs, stage cache, OOM fallback and timing of each step.

Also cuts clips into chunks, and decides which images and clips are like their person.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vidgen_ray.content_keys import ShotPlan, Step, with_local_loras
from vidgen_ray.errors import Cancelled, StageError, VidgenError
from vidgen_ray.graph import STAGE_BY_NAME, chunked_stages_of, clip_growth, clip_length, is_chunked
from vidgen_ray.media.images import cover_crop, read_image
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.profile import Profile
from vidgen_ray.render.cache_writer import CacheWriter
from vidgen_ray.render.oom_fallback import MEMORY_FREED, OomFallback
from vidgen_ray.render.weights_on_gpu import WeightsCheck, WeightSwapper
from vidgen_ray.safety import Safety
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    Artefacts,
    ChunkedStage,
    Frames,
    Image,
    Item,
    Stage,
    frame_chunks,
    report_progress,
)

LIKENESS = "likeness"
"""Failure stage of a shot whose tries were all below `min_identity`."""


class LikenessTooLow(StageError):
    """The image or clip of a try is less like the person than `min_identity`."""

    def __init__(self, likeness: float | None, minimum: float, where: str, tries: int = 1) -> None:
        self.likeness = likeness
        """-1 to 1. `None` if no face was found."""
        self.minimum = minimum
        self.where = where
        """`image` or `clip`."""
        self.tries = tries
        super().__init__(likeness, minimum, where, tries)

    def __str__(self) -> str:
        got = "no face" if self.likeness is None else f"a likeness of {self.likeness:g}"
        tries = "1 try" if self.tries == 1 else f"best of {self.tries} tries"
        return (
            f"min_identity: got {got} in the {self.where} ({tries}), must be at least {self.minimum:g}; raise max_tries or "
            "identity_strength, lower min_identity, or use a photo that shows the face more clearly"
        )


def likeness_of(artefacts: Artefacts) -> Artefacts:
    """Return only the artefacts that `check_likeness` needs. They are a few numbers."""
    selected = Artefacts()
    if "image_likeness" in artefacts:
        selected["image_likeness"] = artefacts["image_likeness"]
    if "clip_likeness" in artefacts:
        selected["clip_likeness"] = artefacts["clip_likeness"]
    return selected


def check_likeness(shot: Shot, artefacts: Artefacts) -> None:
    """Raises LikenessTooLow if the likeness of the image, or the mean over the clip, is known and below `min_identity`.

    Call it after each step: no clip is generated for an image that fails.
    """
    if shot.min_identity is None:
        return
    for where, likeness in (("image", artefacts.get("image_likeness")), ("clip", artefacts.get("clip_likeness"))):
        # Written so that NaN fails, too.
        if likeness is not None and not (likeness.mean is not None and likeness.mean >= shot.min_identity):
            raise LikenessTooLow(likeness.mean, shot.min_identity, where)


def best_try(failures: Sequence[LikenessTooLow]) -> LikenessTooLow:
    """Return one error for all tries, at least one: that of the try with the highest likeness."""
    best = max(failures, key=lambda failure: -2 if failure.likeness is None else failure.likeness)
    return LikenessTooLow(best.likeness, best.minimum, best.where, len(failures))


class StepFailed(VidgenError):
    """A stage failed for a shot."""

    def __init__(self, stage: str, cause: Exception) -> None:
        self.stage = stage
        self.cause = cause
        super().__init__(stage, cause)

    def __str__(self) -> str:
        kind = "" if isinstance(self.cause, VidgenError) else f"{type(self.cause).__name__}: "
        return f"{self.stage}: {kind}{self.cause}"

    def failure(self) -> Failure:
        return Failure.of(self.stage, self.cause)


class WrongResult(VidgenError):
    """A model made something that cannot be right. Its process may be sick."""


class ForeignArtefacts(VidgenError):
    """An artefact is that of another shot, or of another step."""


def check_made_by(steps: Iterable[Step], artefacts: Artefacts) -> None:
    """Raise ForeignArtefacts unless these steps made the artefacts."""
    planned: dict[str, str] = {}
    for step in steps:
        planned.update(dict.fromkeys(STAGE_BY_NAME[step.stage].writes, step.key))
    for name, key in artefacts.get("made_by", {}).items():
        if planned.get(name) != key:
            raise ForeignArtefacts(f"{name} of the step {key[:12]}, must be of {planned.get(name, 'none')[:12]}")


def before_chunks(plan: ShotPlan) -> list[Step]:
    """Return the steps that make whole images and clips."""
    return [step for step in plan.steps if not is_chunked(step.stage)]


class StepRunner:
    """Runs steps on the stages of one process. Close it when the process ends, to write cache entries that are queued.

    `gpus` is the share of a GPU that the process holds. `cache=None` disables the stage cache. Of the groups of stages in
    `swapped`, only one fits on the GPU at a time. `check_weights`, `swapper` and `fallback` are for stages that are loaded.
    `safety` checks each image and clip before it is used or cached.
    """

    def __init__(
        self,
        stages: Sequence[Stage[Any]],
        gpus: float,
        cache: CacheWriter | None,
        swapped: Sequence[Sequence[str]] = (),
        check_weights: WeightsCheck | None = None,
        swapper: WeightSwapper | None = None,
        fallback: OomFallback | None = None,
        safety: Safety | None = None,
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self._gpus = gpus
        self._cache = cache
        self.swapper = swapper or WeightSwapper(self.stages, swapped)
        self._fallback = fallback or OomFallback()
        self._check_weights = check_weights or WeightsCheck()
        self._safety = safety

    def load(self) -> None:
        """Load all stages. Raises SetupError if weights are missing or of another kind."""
        self._check_weights.before_load(self.stages.values())
        self.swapper.load()

    def close(self) -> None:
        """Write the cache entries that are queued, for a bounded time."""
        if self._cache is not None:
            self._cache.close()

    def run(
        self, plan: ShotPlan, item: Item, steps: Collection[str], *, use_cache: bool = True
    ) -> tuple[Item, list[StepRecord]]:
        """Take the item through these steps of its plan. Raises StepFailed."""
        records = []
        for step in plan.steps:
            if step.stage in steps:
                item, record = self._step(plan, step, item, self._cache if use_cache else None)
                records.append(record)
        return item, records

    def run_chunk(
        self, plan: ShotPlan, steps: Collection[str], chunk: slice | None, artefacts: Artefacts
    ) -> tuple[Artefacts, list[StepRecord]]:
        """Take a chunk of the finished clip through these chunked steps. Raises StepFailed.

        `chunk` is a range of its frames. `None`: `artefacts` are the result of earlier chunked steps, not the generated clip.
        Returns all artefacts that chunked steps have made of the chunk so far.
        """
        try:
            check_made_by(plan.steps if chunk is None else before_chunks(plan), artefacts)
            if chunk is not None and "frames" not in artefacts:
                raise ForeignArtefacts("got those of a shot without a clip")
        except ForeignArtefacts as error:
            raise StepFailed(min(steps), error) from error
        made: dict[str, Any] = {**artefacts} if chunk is None else {"chunk": (chunk.start, chunk.stop)}
        records = []
        for step in plan.steps:
            if step.stage in steps:
                stage = self.stages[step.stage]
                assert isinstance(stage, ChunkedStage)
                (source,), (target,) = stage.takes, stage.writes
                if chunk is None or source in made:
                    frames, cut = made[source], None
                else:
                    clip: Frames = artefacts[source]  # type: ignore[literal-required]  # the name of an artefact
                    frames, cut = clip[stage.source_frames(plan.shot, chunk)], chunk
                start, stop = made["chunk"]
                made[target], record = self._chunk_step(stage, step, plan.shot, frames, cut, stop - start)
                made["made_by"] = {**made.get("made_by", {}), target: step.key}
                records.append(record)
        return Artefacts(**made), records  # type: ignore[typeddict-item]  # both are Artefacts

    def _chunk_step(
        self, stage: ChunkedStage[Any], step: Step, shot: Shot, frames: Frames, chunk: slice | None, n_frames: int
    ) -> tuple[Frames, StepRecord]:
        begun = time.monotonic()
        stage.take_notes()  # those of a failed call
        try:
            self._check_weights(stage, step, shot)
            move = partial(self.swapper.ensure_on_gpu, step.stage)
            result, recovered = self._fallback.run(stage, shot, lambda: stage.run_chunk(shot, frames, chunk), move)
            scale = stage.scale_factor(shot)
            expected = (n_frames, frames.shape[1] * scale, frames.shape[2] * scale, 3)
            if wrong := _wrong_array("a clip", result, expected):
                raise WrongResult(f"the model made {wrong}; the GPU may be faulty")
            if _is_single_colour(result) and not _is_single_colour(frames):
                raise WrongResult("the model made frames of a single colour from others; the GPU may be faulty")
        except Cancelled:
            raise
        except Exception as error:
            raise StepFailed(step.stage, error) from error
        return result, self._record(step, time.monotonic() - begun, recovered=recovered, notes=stage.take_notes())

    def _step(self, plan: ShotPlan, step: Step, item: Item, cache: CacheWriter | None) -> tuple[Item, StepRecord]:
        begun = time.monotonic()
        stage = self.stages[step.stage]
        loads, recovered = stage.adapter_loads, None
        stage.take_notes()  # those of a failed call
        # A result of lower-memory settings, and what depends on it, may have other bytes than the key stands for.
        lower_memory = item.artefacts.get("lower_memory", False)
        cache = None if lower_memory else cache
        try:
            # 0 of 0: the stage reports the number of steps with the first one.
            report_progress(step.stage, 0, 0)
            check_made_by(plan.steps[: plan.steps.index(step)], item.artefacts)
            cached = cache.get(step.key, stage.writes) if cache else None
            if cache and cached is not None and _wrong_pixels(stage, plan.shot, cached):
                cache.drop(step.key)
                cached = None
            if cached is None:
                self._check_weights(stage, step, plan.shot)
                ready = with_images(item, stage.needs(item.shot), plan.inputs)
                if self._safety is not None and "image" in ready.artefacts and "image" not in item.artefacts:
                    self._safety.check_image(ready.image)
                local = Item(with_local_loras(ready.shot, plan.inputs), ready.artefacts, step.key)
                move = partial(self.swapper.ensure_on_gpu, step.stage)
                result, recovered = self._fallback.run(stage, plan.shot, lambda: stage(local), move)
                if wrong := _wrong_pixels(stage, plan.shot, result) or _wrong_colour(result, ready.artefacts.get("image")):
                    raise WrongResult(f"the model made {wrong}; it may be the model of another stage, or the GPU is faulty")
                self._check_safety(result)
                lower_memory = lower_memory or recovered not in (None, MEMORY_FREED)
                if cache and not lower_memory:
                    cache.put(step.key, result)
            else:
                result = cached
                self._check_safety(result)
        except Cancelled:
            raise
        # Any error of a model fails this shot only.
        except Exception as error:
            raise StepFailed(step.stage, error) from error
        record = self._record(
            step,
            time.monotonic() - begun,
            cached=cached is not None,
            recovered=recovered,
            adapter_loads=stage.adapter_loads - loads,
            notes=stage.take_notes(),
            origin=stage.origin,
            price=stage.price(stage.params, stage.billed(plan.shot)) if cached is None else None,
        )
        # Photos are not needed after the face features.
        kept = {name: value for name, value in item.artefacts.items() if name != "photos"}
        kept["made_by"] = {**item.artefacts.get("made_by", {}), **dict.fromkeys(result, step.key)}
        if lower_memory:
            kept["lower_memory"] = True
        return Item(item.shot, Artefacts(**{**kept, **result})), record  # type: ignore[typeddict-item]  # both are Artefacts

    def _check_safety(self, result: Artefacts) -> None:
        """Raises UnsafeContent if an image or a clip is refused."""
        if self._safety is not None and "image" in result:
            self._safety.check_image(result["image"])
        if self._safety is not None and "frames" in result:
            self._safety.check_clip(result["frames"])

    def _record(
        self,
        step: Step,
        seconds: float,
        *,
        cached: bool = False,
        recovered: str | None = None,
        adapter_loads: int = 0,
        notes: tuple[str, ...] = (),
        origin: str | None = None,
        price: float | None = None,
    ) -> StepRecord:
        return StepRecord(
            stage=step.stage,
            key=step.key,
            weights=step.weights,
            seconds=round(seconds, 4),
            gpu_seconds=0.0 if cached else round(seconds * self._gpus, 4),
            cached=cached,
            recovered=recovered,
            adapter_loads=adapter_loads,
            notes=notes,
            origin=origin,
            price=price,
        )


def _wrong_pixels(stage: Stage[Any], shot: Shot, result: Artefacts) -> str | None:
    """Return what is wrong with the size or type of an image or a clip that the stage has made, or `None`."""
    expected = (shot.height, shot.width, 3)
    if "image" in result and (wrong := _wrong_array("an image", result["image"], expected)):
        return wrong
    # A chunked stage changes the number and the size of the frames that it gets.
    if isinstance(stage, ChunkedStage) or "frames" not in result:
        return None
    return _wrong_array("a clip", result["frames"], (shot.clip_frames, *expected))


def _wrong_array(kind: str, pixels: Frames, shape: tuple[int, ...]) -> str | None:
    if pixels.shape != shape:
        return f"{kind} of shape {pixels.shape} instead of {shape}"
    return None if pixels.dtype == np.uint8 else f"{kind} of {pixels.dtype} instead of uint8"


def _wrong_colour(result: Artefacts, source: Image | None) -> str | None:
    """Return what is wrong with the colours of an image or a clip made from `source`, if there is one, or `None`."""
    for kind, pixels in (("an image", result.get("image")), ("a clip", result.get("frames"))):
        if pixels is not None and _is_single_colour(pixels) and (source is None or not _is_single_colour(source)):
            return f"{kind} of a single colour"
    return None


def _is_single_colour(pixels: Frames) -> bool:
    """Return whether an image or a clip has a single colour, as sick GPUs make them."""
    first = pixels[(0,) * (pixels.ndim - 1)]
    # Most others differ in the few pixels of the first look, the rest mostly in the first frame or the first rows.
    return all(bool((part == first).all()) for part in (pixels[..., ::16, ::16, :], *pixels))


def with_images(item: Item, takes: Iterable[str], inputs: Mapping[str, str] | None = None) -> Item:
    """Return the item with its photos, start and last image read from the shot's paths, if they are in `takes` and missing.

    With `inputs`, those of the shot's plan, the files must still have their planned digests.
    Raises MediaError and InputChanged.
    """
    shot, artefacts = item.shot, item.artefacts.copy()

    def read(path: str) -> Image:
        return read_image(Path(path), None if inputs is None else inputs[path])

    if "photos" in takes and "photos" not in artefacts and shot.face_image:
        artefacts["photos"] = tuple(map(read, shot.face_image))
    if "image" in takes and "image" not in artefacts and shot.image is not None:
        artefacts["image"] = cover_crop(read(shot.image), shot.width, shot.height)
    if "last_image" in takes and "last_image" not in artefacts and shot.last_image is not None:
        artefacts["last_image"] = cover_crop(read(shot.last_image), shot.width, shot.height)
    return Item(shot, artefacts)


def chunk_frames_of(profile: Profile, stages: Iterable[type[Stage[Any]]]) -> dict[str, int]:
    """Return stage name -> frames per call, for the chunked stages among these. Needs their weights on this machine."""
    return {stage.name: stage.chunk_frames(profile.params(stage)) for stage in stages if issubclass(stage, ChunkedStage)}


def chunk_unit(shot: Shot, chunk_frames: Mapping[str, int]) -> int:
    """Return the number of frames by which the finished clip may be cut. Cuts at its multiples do not change any byte.

    Each chunked stage then starts every chunk at a multiple of its own frames per call, which `chunk_frames` holds.
    """
    return math.lcm(*(chunk_frames[stage.name] for stage in chunked_stages_of(shot)))


def clip_chunks(shot: Shot, unit: int, max_bytes: int = 0) -> list[slice]:
    """Cut the finished clip of a shot with chunked stages into ranges of frames, in order.

    A chunk is the largest multiple of `unit` frames whose result is at most `max_bytes` of raw frames, but at least one unit.
    """
    units = max(1, max_bytes // (chunk_result_bytes(shot) * unit))
    n_frames, _ = clip_length(shot)
    return frame_chunks(n_frames, units * unit)


def chunk_result_bytes(shot: Shot) -> int:
    """Return the bytes of raw RGB frames that the chunked stages make for one frame of the finished clip."""
    chunked = {stage.writes[0] for stage in chunked_stages_of(shot)}
    pixels = sum(scale**2 for name, (scale, _) in clip_growth(shot).items() if name in chunked)
    return 3 * shot.width * shot.height * pixels


def join_records(chunks: Sequence[Sequence[StepRecord]]) -> tuple[StepRecord, ...]:
    """Merge the records of a clip's chunks into one record per stage."""
    return tuple(_joined(records) for records in zip(*chunks, strict=True))


def _joined(records: Sequence[StepRecord]) -> StepRecord:
    recovered = [record.recovered for record in records if record.recovered]
    return records[0].model_copy(
        update={
            "seconds": round(sum(record.seconds for record in records), 4),
            "gpu_seconds": round(sum(record.gpu_seconds for record in records), 4),
            "recovered": recovered[-1] if recovered else None,
            "notes": tuple(dict.fromkeys(note for record in records for note in record.notes)),
        }
    )
