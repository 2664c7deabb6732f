"""Progress of a run: counts, rate and remaining time, and their way into the output folder."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from math import sqrt
from types import TracebackType
from typing import NamedTuple, Protocol

from vidgen_ray.engine.callbacks import guarded
from vidgen_ray.engine.status import Attempt, Snapshot
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.run_log import RunLabels, RunLog, RunStatus
from vidgen_ray.outputs.storage import Storage

RECENT_SHARE = 0.25
"""Length of the recent interval as a fraction of the run, between the two limits below."""
RECENT_MIN_S = 60.0
RECENT_MAX_S = 600.0
PLANNING = "planning"
CONNECTING = "connecting to Ray"
STARTING = "starting workers, loading weights"
FIRST_SHOTS = "rendering the first shots"
KEPT_MESSAGES = 20
"""Last messages in the status of a run."""


class RunListener(Protocol):
    """Callbacks of a run, one call at a time. They must not block: the run waits for them. An exception is logged."""

    def on_rejected(self, row: ManifestRow) -> None:
        """A line failed before rendering: it is wrong or refers to a missing file."""

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        """Called repeatedly while the script is read, with the lines so far.

        `total` includes the lines already done (`skipped`) and the `rejected` ones. `complete`: the script was read to its end.
        """

    def on_finished(self, row: ManifestRow) -> None:
        """A shot was rendered or has failed."""

    def on_status(self, snapshot: Snapshot) -> None:
        """Called about every second during rendering."""

    def on_message(self, message: str) -> None:
        """A message for the user, such as a worker that was quarantined or what the run waits for."""


class GuardedListener(RunListener):
    """Listener that passes events on to another one, and never raises."""

    def __init__(self, listener: RunListener, on_failure: Callable[[str], object] = lambda _: None) -> None:
        """`on_failure` gets the message of an exception, of several in a row that of the first."""
        self._on_rejected = guarded(listener.on_rejected, on_failure)
        self._on_lines = guarded(listener.on_lines, on_failure)
        self._on_finished = guarded(listener.on_finished, on_failure)
        self._on_status = guarded(listener.on_status, on_failure)
        self._on_message = guarded(listener.on_message, on_failure)

    def on_rejected(self, row: ManifestRow) -> None:
        self._on_rejected(row)

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        self._on_lines(total, skipped, rejected, complete)

    def on_finished(self, row: ManifestRow) -> None:
        self._on_finished(row)

    def on_status(self, snapshot: Snapshot) -> None:
        self._on_status(snapshot)

    def on_message(self, message: str) -> None:
        self._on_message(message)


class Throughput(NamedTuple):
    """Number of shots that were rendered or failed in an interval of a run."""

    shots: int
    seconds: float


def eta_range(remaining: int, whole: Throughput, recent: Throughput) -> tuple[float, float] | None:
    """Return the lowest and highest estimate of the seconds until `remaining` shots are finished. `None` if unknown.

    The range covers the throughput of the whole run and of the recent interval. It is widened by the relative uncertainty
    of a count, `1 / sqrt(shots)`. A recent interval without shots counts as one shot, so that the highest estimate grows
    while no shot finishes.
    """
    if not whole.shots or whole.seconds <= 0:
        return None
    seconds_per_shot = [interval.seconds / max(interval.shots, 1) for interval in (whole, recent) if interval.seconds > 0]
    margin = 1 + 1 / sqrt(whole.shots)
    return remaining * min(seconds_per_shot) / margin, remaining * max(seconds_per_shot) * margin


class ProgressTracker:
    """Counts lines and estimates the remaining time.

    Events must come one at a time. Properties and estimates can be read from any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, before_first_status: str = CONNECTING) -> None:
        """`before_first_status`: phase after the script was read, until there is a status."""
        self.before_first_status = before_first_status
        self.total = self.done = self.failed = self.skipped = 0
        self.complete = False
        """True once the script has been read to its end, so that `total` is final."""
        self.snapshot: Snapshot | None = None
        """Last status. `None` before the first."""
        self.shots_started = False
        """True once a worker has loaded its weights and works on a shot."""
        self._clock = clock
        self._started: float | None = None
        self._finish_times: list[float] = []

    @property
    def ended(self) -> int:
        """Lines that are done, failed or skipped."""
        return self.done + self.failed + self.skipped

    @property
    def remaining(self) -> int:
        """Lines that have not ended."""
        return max(self.total - self.ended, 0)

    @property
    def phase(self) -> str | None:
        """Phase of a run that is waiting for its first shot, otherwise `None`."""
        if not self.total and not self.complete:
            return PLANNING
        if not self.remaining or self._finish_times:
            return None
        if self.snapshot is None:
            return self.before_first_status
        return FIRST_SHOTS if self.shots_started else STARTING

    def on_rejected(self, row: ManifestRow) -> None:
        """Count a rejected line as failed."""
        self.failed += 1

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        """Set the number of lines so far. The rejected ones have been counted."""
        self.total, self.skipped, self.complete = total, skipped, complete
        if self._started is None:
            self._started = self._clock()

    def on_finished(self, row: ManifestRow) -> None:
        """Count a shot that is done or failed."""
        if row.status == "failed":
            self.failed += 1
        else:
            self.done += 1
        self._finish_times.append(self._clock())

    def on_status(self, snapshot: Snapshot) -> None:
        """Store the status. Throughput is measured from when the first worker starts a shot: loading weights is excluded."""
        self.snapshot = snapshot
        if not self.shots_started and any(stage.running for stage in snapshot.stages.values()):
            self.shots_started = True
            self._started = self._clock()

    @property
    def shots_per_minute(self) -> float | None:
        """Throughput of the recent interval. `None` before the first shot."""
        recent = self._recent()
        return 60 * recent.shots / recent.seconds if self._finish_times and recent.seconds > 0 else None

    @property
    def eta_s(self) -> tuple[float, float] | None:
        """Lowest and highest estimate of the remaining seconds. `None` if unknown."""
        if not self.complete:
            return None
        return eta_range(self.remaining, Throughput(len(self._finish_times), self._elapsed()), self._recent())

    def _elapsed(self) -> float:
        return 0.0 if self._started is None else self._clock() - self._started

    def _recent(self) -> Throughput:
        now, elapsed, times = self._clock(), self._elapsed(), self._finish_times
        seconds = min(elapsed, max(RECENT_MIN_S, min(RECENT_MAX_S, RECENT_SHARE * elapsed)))
        return Throughput(len(times) - bisect_right(times, now - seconds), seconds)


class RunRecorder(RunListener, AbstractContextManager["RunRecorder"]):
    """Writes the status and the log of a run to its output folder, and passes its events on."""

    def __init__(self, storage: Storage, lease: Lease, labels: RunLabels, listener: RunListener) -> None:
        self.labels = labels
        self._listener = GuardedListener(listener, self._keep_message)
        self._tracker = ProgressTracker()
        self._messages: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self._started_at = datetime.now(UTC)
        self._ended = False
        self._error: str | None = None
        self._lock = threading.Lock()
        self._log = RunLog(storage, labels.run, self._status, lambda: lease.is_sure)
        self._log.add(**labels.model_dump())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended, self._error = True, kind.__name__ if kind else None
        self._log.close()

    def on_rejected(self, row: ManifestRow) -> None:
        self._tracker.on_rejected(row)
        self._listener.on_rejected(row)

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        self._tracker.on_lines(total, skipped, rejected, complete)
        self._listener.on_lines(total, skipped, rejected, complete)

    def on_finished(self, row: ManifestRow) -> None:
        self._tracker.on_finished(row)
        self._listener.on_finished(row)

    def on_status(self, snapshot: Snapshot) -> None:
        self._tracker.on_status(snapshot)
        self._listener.on_status(snapshot)

    def on_message(self, message: str) -> None:
        self._keep_message(message)
        self._listener.on_message(message)

    def _keep_message(self, message: str) -> None:
        with self._lock:
            self._messages.append(message)
        self._log.add(message=message)

    def on_attempt(self, attempt: Attempt) -> None:
        """An attempt of a step of a shot has ended."""
        started_at = datetime.fromtimestamp(attempt.started_at, UTC).isoformat(timespec="milliseconds")
        worker = attempt.worker.removeprefix(f"{self.labels.run}/")
        self._log.add(**{**attempt._asdict(), "started_at": started_at, "worker": worker})

    def _status(self) -> RunStatus:
        tracker, last = self._tracker, self._tracker.snapshot
        snapshot = None if self._ended else last
        with self._lock:
            messages = tuple(self._messages)
        return RunStatus(
            **self.labels.model_dump(),
            started_at=self._started_at,
            at=datetime.now(UTC),
            ended=self._ended,
            error=self._error,
            phase=None if self._ended else tracker.phase,
            total=tracker.total,
            complete=tracker.complete,
            done=tracker.done,
            failed=tracker.failed,
            skipped=tracker.skipped,
            remaining=tracker.remaining,
            shots_per_minute=tracker.shots_per_minute,
            eta_s=tracker.eta_s if tracker.remaining else None,
            waiting_for=snapshot.waiting_for if snapshot else None,
            in_progress=snapshot.in_progress if snapshot else 0,
            gpus_busy=snapshot.gpus_busy if snapshot else None,
            stages=snapshot.stages if snapshot else {},
            quarantined=last.quarantined if last else (),
            messages=messages,
        )
