"""Progress of a run: counts, throughput and the estimated remaining time. Independent of how they are displayed."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

from vidgen_ray.engine.status import Snapshot
from vidgen_ray.outputs.manifest import ManifestRow

RECENT_SHARE = 0.25
"""Length of the recent interval as a fraction of the run, between the two limits below."""
RECENT_MIN_S = 60.0
RECENT_MAX_S = 600.0
MAX_FINISH_TIMES = 10_000
"""Number of finish times kept, at least. The recent interval is shortened to those that are kept."""


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
    """Progress listener that counts lines and estimates the remaining time.

    Events must come one at a time. Properties and estimates can be read from any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = self.done = self.failed = self.skipped = 0
        self.complete = False
        """True once the script has been read to its end, so that `total` is final."""
        self.snapshot: Snapshot | None = None
        """Last status. `None` before the first."""
        self.shots_started = False
        """True once a worker has loaded its weights and works on a shot."""
        self._clock = clock
        self._started: float | None = None
        self._finished_shots = 0
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
    def is_waiting_for_first_shot(self) -> bool:
        """True if there are shots to render and none has finished."""
        return bool(self.remaining) and not self._finished_shots

    def on_rejected(self, row: ManifestRow) -> None:
        """Count a rejected line as failed."""
        self.failed += 1

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        """Set the number of lines so far. The rejected ones have been counted."""
        self.total, self.skipped, self.complete = total, skipped, complete
        if self._started is None:
            self._started = self._clock()

    def on_message(self, message: str) -> None:
        """Do nothing. Messages are not counted."""

    def on_finished(self, row: ManifestRow) -> None:
        """Count a shot that is done or failed."""
        if row.status == "failed":
            self.failed += 1
        else:
            self.done += 1
        self._finished_shots += 1
        self._finish_times.append(self._clock())
        if len(self._finish_times) > 2 * MAX_FINISH_TIMES:
            self._finish_times = self._finish_times[-MAX_FINISH_TIMES:]

    def on_status(self, snapshot: Snapshot) -> None:
        """Store the status. Throughput is measured from when the first worker starts a shot: loading weights is excluded."""
        self.snapshot = snapshot
        if not self.shots_started and any(stage.running for stage in snapshot.stages.values()):
            self.shots_started = True
            self._started = self._clock()

    def shots_per_minute(self) -> float | None:
        """Return the throughput of the recent interval. `None` before the first shot."""
        recent = self._recent()
        return 60 * recent.shots / recent.seconds if self._finished_shots and recent.seconds > 0 else None

    def eta(self) -> tuple[float, float] | None:
        """Return the lowest and highest estimate of the remaining seconds. `None` if unknown."""
        if not self.complete:
            return None
        return eta_range(self.remaining, Throughput(self._finished_shots, self._elapsed()), self._recent())

    def _elapsed(self) -> float:
        return 0.0 if self._started is None else self._clock() - self._started

    def _recent(self) -> Throughput:
        now, elapsed, times = self._clock(), self._elapsed(), self._finish_times
        seconds = min(elapsed, max(RECENT_MIN_S, min(RECENT_MAX_S, RECENT_SHARE * elapsed)))
        if len(times) >= MAX_FINISH_TIMES:
            seconds = min(seconds, now - times[0])
        return Throughput(len(times) - bisect_right(times, now - seconds), seconds)
