"""Ray actor of an engine that writes the files of several shots at once. After a crash, its unfinished shots start again."""

from __future__ import annotations

import os
import threading
from typing import Any, ClassVar

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.calls import OUTPUT, CallResult
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.shot_writer import ShotFiles
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.engine.worker import CONTROL, ActorPlace, place_of_process
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.safety import safety_of
from vidgen_ray.stages.base import Artefacts, Item

ENCODER_NICENESS = 10
"""Added to the niceness of encoders. Encoding can wait, but a GPU is idle while its process waits for a CPU core."""


class Encoder:
    """Actor that encodes and commits shots."""

    stale_call_s: ClassVar[float] = 10.0
    """Seconds that a call of a crashed director may still take. It may hang, and its result is not needed."""

    def __init__(self, config: EngineConfig) -> None:
        os.nice(ENCODER_NICENESS)
        self._config = config
        self._open: dict[str, ShotFiles] = {}
        self._director: str | None = None
        self._files_lock = threading.Lock()
        """Held while files are written or deleted."""

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def place(self) -> ActorPlace:
        return place_of_process()

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def attach(self, director: str) -> None:
        """Start to work for a director. Deletes the unfinished files of an earlier one, which has crashed.

        Ends the process if a call of the earlier director hangs.
        """
        if director == self._director:
            return
        if not self._files_lock.acquire(timeout=self.stale_call_s):
            os._exit(1)
        try:
            self._director = director
            for shot in list(self._open):
                self._delete(shot)
        finally:
            self._files_lock.release()

    def load(self) -> None:
        """Do nothing. An encoder has no weights."""

    def begin(self, director: str, plan: ShotPlan, artefacts: Artefacts) -> CallResult:
        """Start a shot of this director: write the image and the original clip."""
        shot_id = plan.shot.id or ""
        with self._files_lock:
            # After a crash of the encoder, its new process does not know the director yet.
            if self._director not in (None, director):
                return CallResult(session_lost=True)
            self._delete(shot_id)
            try:
                config, item = self._config, Item(plan.shot, artefacts)
                self._open[shot_id] = ShotFiles(
                    plan,
                    item,
                    config.outputs,
                    config.profile.encode,
                    config.keep_stages,
                    config.profile.provenance,
                    safety_of(config.profile.safety),
                )
            # Any error, such as a full disk or an unreadable start image, fails this shot only.
            except Exception as error:
                return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def add(self, shot_id: str, chunk: Artefacts) -> CallResult:
        """Encode the next chunk of the clips made by chunked stages."""
        with self._files_lock:
            if shot_id not in self._open:
                return CallResult(session_lost=True)
            try:
                self._open[shot_id].add(chunk)
            except Exception as error:
                return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def commit(
        self, shot_id: str, records: tuple[StepRecord, ...], last_chunk: Artefacts | None
    ) -> tuple[CallResult, ShotRecord | None]:
        """Encode the last chunk, if the clip comes in chunks, then finish the files and commit the shot."""
        with self._files_lock:
            if shot_id not in self._open:
                return CallResult(session_lost=True), None
            files = self._open[shot_id]
            try:
                if last_chunk is not None:
                    files.add(last_chunk)
                record = files.commit(records)
            except Exception as error:
                return CallResult.of_failure(StepFailed(OUTPUT, error)), None
            finally:
                self._delete(shot_id)
        return CallResult(), record

    def write(
        self,
        director: str,
        plan: ShotPlan,
        artefacts: Artefacts,
        records: tuple[StepRecord, ...],
        only_chunk: Artefacts | None,
    ) -> tuple[CallResult, ShotRecord | None]:
        """Write and commit a shot in a single call: one without chunks, or with a single one."""
        begun = self.begin(director, plan, artefacts)
        if begun.failure is not None or begun.session_lost:
            return begun, None
        return self.commit(plan.shot.id or "", records, only_chunk)

    def abandon(self, shot_id: str) -> None:
        """Delete the files of a shot that is not committed."""
        with self._files_lock:
            self._delete(shot_id)

    def _delete(self, shot_id: str) -> None:
        files = self._open.pop(shot_id, None)
        if files is not None:
            files.close()


def encoder_class() -> Any:
    """Return the Ray actor class of encoders. Ray restarts a crashed process; its caller decides about retries."""
    return ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={CONTROL: 1})(Encoder)
