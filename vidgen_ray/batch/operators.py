"""What Ray Data runs: one operator for each pool of actors, and one that finishes shots.

A shot that fails travels on as a row with a failure; nothing is raised, so no neighbour is lost. A row may run twice (an
actor or a node died), so every side effect is idempotent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidgen_ray.batch.rows import Batch, Parcel, pack, unpack
from vidgen_ray.batch.upscaling import UpscalerPool
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Artefacts, Item
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.steps import StepFailed, StepRunner, finish

LOADING = "loading"
"""Stage of the failure of a shot whose actor could not load its weights."""


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told. Small: it is kept for the restart of actors."""

    run: str
    profile: Profile
    out: Path
    use_cache: bool
    keep_stages: bool


class StageOperator:
    """Holds the stages of one actor, loaded once, and takes each shot through those it needs."""

    def __init__(self, job: Job, stages: tuple[str, ...]) -> None:
        self._unusable: StepFailed | None = None
        try:
            classes = [STAGE_BY_NAME[name] for name in stages]
            held = [stage(job.profile.params(stage)) for stage in classes]
            for stage in held:
                stage.load()
        except Exception as error:
            # Raised here it would reach the user as Ray's account of a dead actor.
            self._unusable = StepFailed(LOADING, error)
            return
        gpus = {stage.name: job.profile.actor_of(stage).gpus for stage in classes}
        self._runner = StepRunner(held, gpus, OutputFolder(job.out).stage_cache if job.use_cache else None)

    def __call__(self, row: Batch) -> Batch:
        parcel = unpack(row)
        if parcel.failure:
            return row
        try:
            if self._unusable:
                raise self._unusable
            item, records = self._runner.run(parcel.plan, Item(parcel.plan.shot, parcel.artefacts))
        except StepFailed as failed:
            return pack(Parcel(parcel.plan, failure=failed.failure()))
        return pack(Parcel(parcel.plan, parcel.records + tuple(records), item.artefacts))


def operator_named(pool: str) -> type[StageOperator]:
    """A class of its own for each pool: Ray shows operators and workers by their class name."""
    return type(pool, (StageOperator,), {})


class Finisher:
    """Upscales over the pool, encodes, commits. The row that leaves holds no pictures, but the record of the shot."""

    def __init__(self, job: Job, upscalers: Sequence[Any], frames_per_call: int) -> None:
        self._job = job
        self._outputs = OutputFolder(job.out)
        self._pool = UpscalerPool(upscalers, frames_per_call) if upscalers else None
        self._upscaler_gpus = job.profile.actor_of(RealESRGANStage).gpus if upscalers else 0.0

    def __call__(self, row: Batch) -> Batch:
        parcel = unpack(row)
        return pack(replace(parcel if parcel.failure else self._finished(parcel), artefacts=Artefacts(), records=()))

    def _finished(self, parcel: Parcel) -> Parcel:
        plan, shot = parcel.plan, parcel.plan.shot
        upscales = RealESRGANStage.applies(shot)
        try:
            record = finish(
                plan,
                Item(shot, parcel.artefacts),
                parcel.records,
                self._pool.upscaled(shot, parcel.artefacts["frames"]) if self._pool and upscales else None,
                outputs=self._outputs,
                encode=self._job.profile.encode,
                upscaler_gpus=self._upscaler_gpus,
                keep_stages=self._job.keep_stages,
            )
        except StepFailed as failed:
            stage = LOADING if isinstance(failed.cause, SetupError) else failed.stage
            return replace(parcel, failure=StepFailed(stage, failed.cause).failure())
        # A full disk or an unreadable start image is this shot's failure, too.
        except Exception as error:
            return replace(parcel, failure=StepFailed("output", error).failure())
        return replace(parcel, result=record)
