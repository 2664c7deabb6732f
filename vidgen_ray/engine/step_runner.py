"""Run the steps of a shot on loaded stages: inputs, stage cache, OOM fallback and timing of each step."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from vidgen_ray.content_keys import ShotPlan, Step, with_local_loras
from vidgen_ray.engine.oom_fallback import MEMORY_FREED, run_with_oom_fallback
from vidgen_ray.engine.weight_swapping import WeightSwapper
from vidgen_ray.errors import Cancelled, MediaError, VidgenError
from vidgen_ray.media import cover_crop, read_image
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, Frames, Item, Stage
from vidgen_ray.stages.progress import report_progress

log = logging.getLogger(__name__)


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
        return Failure(
            stage=self.stage,
            error=type(self.cause).__name__,
            message=str(self.cause),
            attempts=1,
            worker=f"{os.uname().nodename}:{os.getpid()}",
        )


class StepRunner:
    """Runs steps on the stages of one process.

    `gpus` is the share of a GPU that the process holds. `cache=None` disables the stage cache. Of the groups of stages in
    `swapped`, only one fits on the GPU at a time.
    """

    def __init__(
        self,
        stages: Sequence[Stage[Any]],
        gpus: float,
        cache: StageCache | None,
        swapped: Sequence[Sequence[str]] = (),
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self._gpus = gpus
        self._cache = cache
        self.swapper = WeightSwapper(self.stages, swapped)

    def load(self) -> None:
        """Load all stages. Raises SetupError if weights are missing or of another kind."""
        self.swapper.load()

    def run(self, plan: ShotPlan, item: Item, steps: Collection[str]) -> tuple[Item, list[StepRecord]]:
        """Take the item through these steps of its plan. Raises StepFailed."""
        records = []
        for step in plan.steps:
            if step.stage in steps:
                item, record = self._step(step, item)
                records.append(record)
        return item, records

    def run_chunk(
        self, plan: ShotPlan, steps: Collection[str], chunk: slice | None, artefacts: Artefacts
    ) -> tuple[Artefacts, list[StepRecord]]:
        """Take a chunk of the clip through these chunked steps. Raises StepFailed.

        `chunk` is a range of frames of the clip in `artefacts`. `None`: `artefacts` are the result of earlier chunked steps.
        Returns all artefacts that chunked steps have made of the chunk so far.
        """
        made: dict[str, Any] = {**artefacts} if chunk is None else {}
        records = []
        for step in plan.steps:
            if step.stage in steps:
                stage = self.stages[step.stage]
                assert isinstance(stage, ChunkedStage)
                (source,), (target,) = stage.takes, stage.writes
                if chunk is None or source in made:
                    frames, lookahead = made[source], None
                else:
                    clip = artefacts[source]  # type: ignore[literal-required]  # the name of an artefact
                    frames, lookahead = clip[chunk], clip[chunk.stop : chunk.stop + stage.lookahead_frames]
                made[target], record = self._chunk_step(stage, step, plan.shot, frames, lookahead)
                records.append(record)
        return Artefacts(**made), records  # type: ignore[typeddict-item]  # both are Artefacts

    def _chunk_step(
        self, stage: ChunkedStage[Any], step: Step, shot: Shot, frames: Frames, lookahead: Frames | None
    ) -> tuple[Frames, StepRecord]:
        begun = time.monotonic()
        try:
            self.swapper.ensure_on_gpu(step.stage)
            result, recovered = run_with_oom_fallback(stage, lambda: stage.run_chunk(shot, frames, lookahead))
        except Cancelled:
            raise
        except Exception as error:
            raise StepFailed(step.stage, error) from error
        return result, self._record(step, time.monotonic() - begun, recovered=recovered)

    def _step(self, step: Step, item: Item) -> tuple[Item, StepRecord]:
        begun = time.monotonic()
        stage = self.stages[step.stage]
        loads, recovered = stage.adapter_loads, None
        try:
            # 0 of 0: the stage reports the number of steps with the first one.
            report_progress(step.stage, 0, 0)
            cached = self._cache.get(step.key, stage.writes) if self._cache else None
            if cached is None:
                self.swapper.ensure_on_gpu(step.stage)
                ready = with_images(item, stage.takes)
                local = Item(with_local_loras(ready.shot), ready.artefacts)
                (result,), recovered = run_with_oom_fallback(stage, lambda: stage([local]))
                # A result of lower-memory settings may have other bytes than the key stands for.
                if self._cache and recovered in (None, MEMORY_FREED):
                    _store(self._cache, step.key, result)
            else:
                result = cached
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
        )
        # Photos are not needed after the face features.
        kept = {name: value for name, value in item.artefacts.items() if name != "photos"}
        return Item(item.shot, Artefacts(**{**kept, **result})), record  # type: ignore[typeddict-item]  # both are Artefacts

    def _record(
        self, step: Step, seconds: float, *, cached: bool = False, recovered: str | None = None, adapter_loads: int = 0
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
        )


def _store(cache: StageCache, key: str, artefacts: Artefacts) -> None:
    """Write a cache entry. A cache that cannot be written, for example on a full disk, does not fail the shot."""
    try:
        cache.put(key, artefacts)
    except (OSError, MediaError) as error:
        log.warning("stage cache: the result %s is not cached: %s", key[:12], error)


def with_images(item: Item, takes: Iterable[str]) -> Item:
    """Return the item with its photos and start image read from the shot's paths, if they are among `takes` and missing."""
    shot, artefacts = item.shot, item.artefacts.copy()
    if "photos" in takes and "photos" not in artefacts and shot.face_image:
        artefacts["photos"] = tuple(read_image(Path(photo)) for photo in shot.face_image)
    if "image" in takes and "image" not in artefacts and shot.image is not None:
        artefacts["image"] = cover_crop(read_image(Path(shot.image)), shot.width, shot.height)
    return Item(shot, artefacts)
