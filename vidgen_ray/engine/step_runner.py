"""A shot's steps, wherever they run: a stage with its inputs, its cache and its seconds; then the files, committed."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from vidgen_ray.content_keys import ShotPlan, Step, with_local_loras
from vidgen_ray.engine.oom_fallback import MEMORY_FREED, run_with_oom_fallback
from vidgen_ray.engine.weight_swapping import WeightSwapper
from vidgen_ray.errors import Cancelled, VidgenError
from vidgen_ray.media import cover_crop, read_image
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, Frames, Item, Stage
from vidgen_ray.stages.progress import report_progress


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
    """Loaded stages, and what is done round each: inputs read, the cache asked, seconds taken, a full GPU survived.

    `gpus` is the share of a GPU that the process holds. `cache` may be none. `turns` are groups of stages of which only one
    fits on the GPU at a time.
    """

    def __init__(
        self,
        stages: Sequence[Stage[Any]],
        gpus: float,
        cache: StageCache | None,
        swapper: Sequence[Sequence[str]] = (),
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self._gpus = gpus
        self._cache = cache
        self.swapper = WeightSwapper(self.stages, swapper)

    def load(self) -> None:
        """Raises SetupError where weights are missing or of another kind."""
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
            # How many steps there will be the stage says with its first.
            report_progress(step.stage, 0, 0)
            found = self._cache.get(step.key, stage.writes) if self._cache else None
            if found is None:
                self.swapper.ensure_on_gpu(step.stage)
                ready = with_pictures(item, stage.takes)
                local = Item(with_local_loras(ready.shot), ready.artefacts)
                (given,), recovered = run_with_oom_fallback(stage, lambda: stage([local]))
                # What leaner settings made is not what the key promises.
                if self._cache and recovered in (None, MEMORY_FREED):
                    self._cache.put(step.key, given)
            else:
                given = found
        except Cancelled:
            raise
        # Whatever a model stumbles over fails this shot, not its neighbours.
        except Exception as error:
            raise StepFailed(step.stage, error) from error
        record = self._record(
            step,
            time.monotonic() - begun,
            cached=found is not None,
            recovered=recovered,
            adapter_loads=stage.adapter_loads - loads,
        )
        # The photos are of no use after the features are known.
        kept = {name: value for name, value in item.artefacts.items() if name != "photos"}
        return Item(item.shot, Artefacts(**{**kept, **given})), record  # type: ignore[typeddict-item]  # both are Artefacts

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


def with_pictures(item: Item, takes: Iterable[str]) -> Item:
    """The item with the photos and the start image that the shot names by path, where they are taken and not there yet."""
    shot, artefacts = item.shot, item.artefacts.copy()
    if "photos" in takes and "photos" not in artefacts and shot.face_image:
        artefacts["photos"] = tuple(read_image(Path(photo)) for photo in shot.face_image)
    if "image" in takes and "image" not in artefacts and shot.image is not None:
        artefacts["image"] = cover_crop(read_image(Path(shot.image)), shot.width, shot.height)
    return Item(shot, artefacts)
