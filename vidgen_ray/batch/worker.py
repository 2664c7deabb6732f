"""The actors: workers that hold models on a slot's GPU, and encoders that write the files.

They do what they are told, one call after another, and know nothing of the other shots. What a shot cannot get past is an
answer, not an exception; a process that dies or hangs is the director's business.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from vidgen_ray.batch.run_config import RunConfig
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.likeness_check import likeness_of
from vidgen_ray.engine.shot_writer import ShotFiles
from vidgen_ray.engine.step_groups import LOADING, OUTPUT, CallResult
from vidgen_ray.engine.step_runner import StepFailed, StepRunner
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.stages.base import Artefacts, Item

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """Where an actor is."""

    node: str
    pid: int
    gpus: tuple[str, ...]
    """Of its node, as Ray counts them."""


CALLS_AT_ONCE = 2
"""While the result of one call is copied into Ray's memory, which for a chunk of large frames takes as long as a fifth of
its work, the next call works."""


ENCODER_NICENESS = 10
"""Added to an encoder's. A clip can wait to be written; a GPU whose process waits for a core does nothing."""


class Worker:
    """Stages in memory, at work on one call at a time."""

    def __init__(self, job: RunConfig, spec: WorkerSpec) -> None:
        self._at_work = threading.Lock()
        self._job = job
        self._spec = spec
        self._loaded: Failure | StepRunner | None = None

    def place(self) -> ActorPlace:
        return _place()

    def load(self) -> Failure | None:
        """Load the weights, or say why they cannot be. Called again it answers the same.

        Not part of the start: while a process starts again Ray refuses calls, and a death then could not be told from a start
        that takes long.
        """
        with self._at_work:
            ready = self._ready()
        return ready if isinstance(ready, Failure) else None

    def run(self, plan: ShotPlan, steps: tuple[str, ...], artefacts: Artefacts) -> tuple[CallResult, Artefacts]:
        """Take a shot through these steps: what became of it, and what it has now."""

        def taken(runner: StepRunner) -> tuple[CallResult, Artefacts]:
            item, records = runner.run(plan, Item(plan.shot, artefacts), steps)
            return CallResult(tuple(records), likeness_of(item.artefacts)), item.artefacts

        return self._at_work_on(taken, Artefacts())

    def run_chunk(
        self, plan: ShotPlan, steps: tuple[str, ...], chunk: slice | None, artefacts: Artefacts
    ) -> tuple[CallResult, Artefacts]:
        """Take a chunk of the clip through these chunked steps; see `StepRunner.run_chunk`."""

        def process(runner: StepRunner) -> tuple[CallResult, Artefacts]:
            made, records = runner.run_chunk(plan, steps, chunk, artefacts)
            return CallResult(tuple(records)), made

        return self._at_work_on(process, Artefacts())

    def _at_work_on(self, work: Callable[[StepRunner], tuple[CallResult, T]], nothing: T) -> tuple[CallResult, T]:
        """What the work gives, or how it failed and `nothing`."""
        with self._at_work:
            ready = self._ready()
            if isinstance(ready, Failure):
                return CallResult(failure=ready, final=True), nothing
            try:
                return work(ready)
            except StepFailed as failed:
                return CallResult.of_failure(failed), nothing

    def _ready(self) -> StepRunner | Failure:
        """Also where nobody asked to load: a call may be meant for the process before this one, and reach this one before
        anybody knew."""
        if self._loaded is None:
            job, spec = self._job, self._spec
            try:
                stages = [stage(job.profile.params(stage)) for stage in (job.stages[name] for name in spec.stages)]
                cache = job.outputs.stage_cache if job.use_cache else None
                runner = StepRunner(stages, spec.gpus, cache, spec.turns)
                runner.load()
                self._loaded = runner
            except Exception as error:
                # Raised here it would reach the user as Ray's account of it.
                self._loaded = StepFailed(LOADING, error).failure()
        return self._loaded


class Encoder:
    """Writes the files of several shots at once, call by call. What it has begun dies with it and is begun again."""

    def __init__(self, job: RunConfig) -> None:
        os.nice(ENCODER_NICENESS)
        self._job = job
        self._open: dict[str, ShotFiles] = {}

    def place(self) -> ActorPlace:
        return _place()

    def load(self) -> None:
        """An encoder has no weights."""

    def begin(self, plan: ShotPlan, artefacts: Artefacts) -> CallResult:
        """Write the picture and the clip."""
        shot_id = plan.shot.id or ""
        self.abandon(shot_id)
        try:
            encode = self._job.profile.encode
            item = Item(plan.shot, artefacts)
            self._open[shot_id] = ShotFiles(plan, item, self._job.outputs, encode, self._job.keep_stages)
        # A full disk or an unreadable start image is this shot's failure, too.
        except Exception as error:
            return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def add(self, shot_id: str, chunk: Artefacts) -> CallResult:
        """Encode the next chunk of the clips that chunked stages make."""
        if shot_id not in self._open:
            return CallResult(session_lost=True)
        try:
            self._open[shot_id].add(chunk)
        except Exception as error:
            return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def commit(self, shot_id: str, records: tuple[StepRecord, ...]) -> tuple[CallResult, ShotRecord | None]:
        """Finish the files and commit the shot."""
        if shot_id not in self._open:
            return CallResult(session_lost=True), None
        try:
            record = self._open[shot_id].commit(records)
        except Exception as error:
            return CallResult.of_failure(StepFailed(OUTPUT, error)), None
        finally:
            self.abandon(shot_id)
        return CallResult(), record

    def abandon(self, shot_id: str) -> None:
        """Leave nothing of a shot that is not committed."""
        files = self._open.pop(shot_id, None)
        if files is not None:
            files.close()


def _place() -> ActorPlace:
    context: Any = ray.get_runtime_context()
    gpus = tuple(context.get_accelerator_ids().get("GPU", ()))
    return ActorPlace(context.get_node_id(), os.getpid(), gpus)
