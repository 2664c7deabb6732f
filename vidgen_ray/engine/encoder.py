"""Ray actor of an engine that writes the files of several shots at once. After a crash, its unfinished shots start again."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.messages import OUTPUT
from vidgen_ray.engine.worker import CONTROL, ActorPlace, activity_of_process, place_of_process
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.render.shot_files import ShotFiles
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.stages.base import Artefacts, Item

CANCELLED_SESSIONS = 64
"""Last cancelled sessions that are remembered. A call of such a session that was sent earlier may start later."""
ENCODER_NICENESS = 10
"""Added to the niceness of encoders. Encoding can wait, but a GPU is idle while its process waits for a CPU core."""


class Encoder:
    """Actor that encodes and commits shots. A session of several calls writes one shot; its number is that of a pool's call."""

    stale_call_s: ClassVar[float] = 10.0
    """Seconds that a call of a crashed director may still take. It may hang, and its result is not needed."""

    def __init__(self, config: EngineConfig) -> None:
        os.nice(ENCODER_NICENESS)
        self._config = config
        self._open: dict[int, ShotFiles] = {}
        self._first_call = 0
        """Sessions with lower numbers are not needed any more."""
        self._busy: set[int] = set()
        """Sessions whose files are being written or deleted."""
        self._changed = threading.Condition()
        self._cancelled: deque[int] = deque(maxlen=CANCELLED_SESSIONS)
        self._cpu_s: defaultdict[int, float] = defaultdict(float)
        """Open session -> CPU seconds of this process for it. Sessions that are open at once may count each other's."""
        self._counted_s = time.process_time()

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def place(self) -> ActorPlace:
        return place_of_process()

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def attach(self, first_call: int) -> None:
        """Start to work for a director whose sessions have numbers from `first_call` on. Deletes the files of earlier ones.

        They are of a director that has crashed, or were sent to the process before. Ends the process if a call of one hangs.
        """
        with self._changed:
            self._first_call = first_call
            if not self._changed.wait_for(lambda: not any(map(self._is_stale, self._busy)), self.stale_call_s):
                os._exit(1)
            for session in filter(self._is_stale, list(self._open)):
                self._delete(session)

    def _is_stale(self, session: int) -> bool:
        return session < self._first_call

    @contextmanager
    def _call(self, session: int) -> Iterator[None]:
        """Wait until no other call works for the session, and do so during the block."""
        with self._changed:
            self._changed.wait_for(lambda: session not in self._busy)
            self._busy.add(session)
        try:
            yield
        finally:
            with self._changed:
                if session in self._open:
                    self._count_cpu(session)
                self._busy.remove(session)
                self._changed.notify_all()

    def _count_cpu(self, session: int) -> None:
        """Add the CPU seconds since the last count to a session. x264 works on its frames between two calls, too."""
        now_s = time.process_time()
        self._cpu_s[session] += now_s - self._counted_s
        self._counted_s = now_s

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def activity(self) -> float:
        """Return CPU seconds plus MB read of this process."""
        return activity_of_process()

    def load(self) -> None:
        """Do nothing. An encoder has no weights."""

    def begin(self, session: int, plan: ShotPlan, artefacts: Artefacts) -> CallResult:
        """Start a shot: write the image and the original clip."""
        with self._call(session):
            if self._is_stale(session) or session in self._cancelled:
                return CallResult(session_lost=True)
            try:
                config, item = self._config, Item(plan.shot, artefacts)
                self._open[session] = ShotFiles(
                    plan,
                    item,
                    config.outputs,
                    config.profile.encode,
                    config.keep_stages,
                    config.profile.provenance,
                    config.profile.checker,
                )
            # Any error, such as a full disk or an unreadable start image, fails this shot only.
            except Exception as error:
                return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def add(self, session: int, chunk: Artefacts) -> CallResult:
        """Encode the next chunk of the clips made by chunked stages."""
        with self._call(session):
            if session not in self._open:
                return CallResult(session_lost=True)
            try:
                self._open[session].add(chunk)
            except Exception as error:
                return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def commit(
        self, session: int, records: tuple[StepRecord, ...], last_chunk: Artefacts | None
    ) -> tuple[CallResult, ShotRecord | None]:
        """Encode the last chunk, if the clip comes in chunks, then finish the files and commit the shot."""
        with self._call(session):
            if session not in self._open:
                return CallResult(session_lost=True), None
            files = self._open[session]
            try:
                if last_chunk is not None:
                    files.add(last_chunk)
                record = files.commit(records)
                with self._changed:
                    self._count_cpu(session)
                record = record.model_copy(update={"encode_s": self._cpu_s[session]})
            except Exception as error:
                return CallResult.of_failure(StepFailed(OUTPUT, error)), None
            finally:
                self._delete(session)
        return CallResult(), record

    def write(
        self,
        session: int,
        plan: ShotPlan,
        artefacts: Artefacts,
        records: tuple[StepRecord, ...],
        only_chunk: Artefacts | None,
    ) -> tuple[CallResult, ShotRecord | None]:
        """Write and commit a shot in a single call: one without chunks, or with a single one."""
        begun = self.begin(session, plan, artefacts)
        if begun.failure is not None or begun.session_lost:
            return begun, None
        return self.commit(session, records, only_chunk)

    def cancel(self, session: int) -> None:
        """Delete the files of a shot that is not committed."""
        with self._call(session):
            self._cancelled.append(session)
            self._delete(session)

    def _delete(self, session: int) -> None:
        self._cpu_s.pop(session, None)
        files = self._open.pop(session, None)
        if files is not None:
            files.close()


def encoder_class(parallel: int = 1) -> Any:
    """Return the Ray actor class of encoders. Ray restarts a crashed process; its caller decides about retries."""
    return ray.remote(max_restarts=-1, max_task_retries=0, max_concurrency=parallel, concurrency_groups={CONTROL: 1})(Encoder)
