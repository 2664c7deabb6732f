"""Ray actors of a run: workers, which hold models on the GPU of a slot, and encoders, which write the files.

They run one call after another. Errors of a shot are returned, not raised. Crashes and timeouts are handled by the director.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from vidgen_ray.engine.engine_config import RunConfig
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
    """Process of an actor."""

    node: str
    """Ray node id."""
    pid: int
    gpus: tuple[str, ...]
    """Ray's ids of its GPUs on the node."""


MAX_CONCURRENT_CALLS = 2
"""The next call runs while the result of the previous one is copied to Ray's object store. For a chunk of large frames, copying
takes a fifth of the computing time."""
ENCODER_NICENESS = 10
"""Added to the niceness of encoders. Encoding can wait, but a GPU is idle while its process waits for a CPU core."""


class Worker:
    """Actor that holds stages in memory and runs one call at a time."""

    def __init__(self, config: RunConfig, spec: WorkerSpec) -> None:
        self._lock = threading.Lock()
        self._config = config
        self._spec = spec
        self._loaded: Failure | StepRunner | None = None

    def place(self) -> ActorPlace:
        return _place()

    def load(self) -> Failure | None:
        """Load the weights. Return the failure if that is impossible. Repeated calls return the same.

        Not part of `__init__`: Ray rejects calls during a restart, so a crash while loading would look like a slow start.
        """
        with self._lock:
            ready = self._ready()
        return ready if isinstance(ready, Failure) else None

    def run(self, plan: ShotPlan, steps: tuple[str, ...], artefacts: Artefacts) -> tuple[CallResult, Artefacts]:
        """Run these steps of a shot. Return the call result and the artefacts."""

        def run_steps(runner: StepRunner) -> tuple[CallResult, Artefacts]:
            item, records = runner.run(plan, Item(plan.shot, artefacts), steps)
            return CallResult(tuple(records), likeness_of(item.artefacts)), item.artefacts

        return self._execute(run_steps, Artefacts())

    def run_chunk(
        self, plan: ShotPlan, steps: tuple[str, ...], chunk: slice | None, artefacts: Artefacts
    ) -> tuple[CallResult, Artefacts]:
        """Run these chunked steps on a chunk of the clip. See `StepRunner.run_chunk`."""

        def process(runner: StepRunner) -> tuple[CallResult, Artefacts]:
            output, records = runner.run_chunk(plan, steps, chunk, artefacts)
            return CallResult(tuple(records)), output

        return self._execute(process, Artefacts())

    def _execute(self, function: Callable[[StepRunner], tuple[CallResult, T]], default: T) -> tuple[CallResult, T]:
        """Return the result of the function, or its failure and `default`."""
        with self._lock:
            ready = self._ready()
            if isinstance(ready, Failure):
                return CallResult(failure=ready, final=True), default
            try:
                return function(ready)
            except StepFailed as failed:
                return CallResult.of_failure(failed), default

    def _ready(self) -> StepRunner | Failure:
        """Return the step runner, and load it first if needed.

        A call meant for the previous process can arrive before `load`.
        """
        if self._loaded is None:
            config, spec = self._config, self._spec
            try:
                stages = [stage(config.profile.params(stage)) for stage in (config.stages[name] for name in spec.stages)]
                cache = config.outputs.stage_cache if config.use_cache else None
                runner = StepRunner(stages, spec.gpus, cache, spec.swap_groups)
                runner.load()
                self._loaded = runner
            except Exception as error:
                # If raised, the user would see Ray's wrapper of the error.
                self._loaded = StepFailed(LOADING, error).failure()
        return self._loaded


class Encoder:
    """Actor that writes the files of several shots at once. After a crash, its unfinished shots start again."""

    def __init__(self, config: RunConfig) -> None:
        os.nice(ENCODER_NICENESS)
        self._config = config
        self._open: dict[str, ShotFiles] = {}

    def place(self) -> ActorPlace:
        return _place()

    def load(self) -> None:
        """Do nothing. An encoder has no weights."""

    def begin(self, plan: ShotPlan, artefacts: Artefacts) -> CallResult:
        """Start a shot: write the image and the original clip."""
        shot_id = plan.shot.id or ""
        self.abandon(shot_id)
        try:
            encode = self._config.profile.encode
            item = Item(plan.shot, artefacts)
            self._open[shot_id] = ShotFiles(plan, item, self._config.outputs, encode, self._config.keep_stages)
        # Any error, such as a full disk or an unreadable start image, fails this shot only.
        except Exception as error:
            return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def add(self, shot_id: str, chunk: Artefacts) -> CallResult:
        """Encode the next chunk of the clips made by chunked stages."""
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
        """Delete the files of a shot that is not committed."""
        files = self._open.pop(shot_id, None)
        if files is not None:
            files.close()


def _place() -> ActorPlace:
    context: Any = ray.get_runtime_context()
    gpus = tuple(context.get_accelerator_ids().get("GPU", ()))
    return ActorPlace(context.get_node_id(), os.getpid(), gpus)
