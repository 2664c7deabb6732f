"""How far a run is and how long it will still take; knows nothing of how that is shown."""

from __future__ import annotations

from bisect import bisect_right
from math import sqrt
from typing import NamedTuple

from vidgen_ray.batch.run_progress import Snapshot
from vidgen_ray.outputs.manifest import ManifestRow

RECENT_SHARE = 0.25
RECENT_AT_LEAST_S = 60.0
RECENT_AT_MOST_S = 600.0
REMEMBERED = 10_000
"""Times of ends that are kept, at least; a recent stretch that held more is as long as what is kept."""


class Stretch(NamedTuple):
    """A piece of a run: how many shots were rendered or failed in it, and how long it was."""

    shots: int
    seconds: float


def eta_range(remaining: int, whole: Stretch, recent: Stretch) -> tuple[float, float] | None:
    """Seconds until `remaining` shots have ended, at least and at most; None while nothing is known.

    Spans what the pace of the whole run and that of its recent stretch would give, widened by the uncertainty of a
    count, one in the square root of all shots so far. A recent stretch without a shot counts as one shot, so that the
    upper end grows while nothing happens.
    """
    if not whole.shots or whole.seconds <= 0:
        return None
    shares = [stretch.seconds / max(stretch.shots, 1) for stretch in (whole, recent) if stretch.seconds > 0]
    margin = 1 + 1 / sqrt(whole.shots)
    return remaining * min(shares) / margin, remaining * max(shares) * margin


class RunPace:
    """Counts the lines of a run as they end. Times are seconds of one clock, given by the caller.

    It is told one event at a time; any thread may ask.
    """

    def __init__(self) -> None:
        self.total = self.done = self.failed = self.skipped = 0
        self._worked = 0
        self._ends: list[float] = []
        self._begun: float | None = None
        self.shots_begun = False
        """Whether a worker has had something to do: its weights are loaded."""

    @property
    def ended(self) -> int:
        return self.done + self.failed + self.skipped

    @property
    def remaining(self) -> int:
        return max(self.total - self.ended, 0)

    @property
    def waits_for_first(self) -> bool:
        """Whether there are shots to render and none of them has ended."""
        return bool(self.remaining) and not self._worked

    def plan(self, total: int, done_before: int, refused: int, now: float) -> None:
        self.total, self.skipped, self.failed = total, done_before, refused
        self._begun = now

    def see(self, snapshot: Snapshot, now: float) -> None:
        """The pace counts from the moment at which the first worker has something to do: loading weights is no part of it."""
        if not self.shots_begun and any(stage.running for stage in snapshot.stages.values()):
            self.shots_begun = True
            self._begun = now

    def count(self, row: ManifestRow, now: float) -> None:
        if row.status == "failed":
            self.failed += 1
        else:
            self.done += 1
        self._worked += 1
        self._ends.append(now)
        if len(self._ends) > 2 * REMEMBERED:
            self._ends = self._ends[-REMEMBERED:]

    def per_minute(self, now: float) -> float | None:
        """Shots a minute over the recent stretch; None before the first shot."""
        recent = self._recent(now)
        return 60 * recent.shots / recent.seconds if self._worked and recent.seconds > 0 else None

    def eta(self, now: float) -> tuple[float, float] | None:
        """Seconds that are left, at least and at most."""
        return eta_range(self.remaining, Stretch(self._worked, self._elapsed(now)), self._recent(now))

    def _elapsed(self, now: float) -> float:
        return 0.0 if self._begun is None else now - self._begun

    def _recent(self, now: float) -> Stretch:
        elapsed = self._elapsed(now)
        seconds = min(elapsed, max(RECENT_AT_LEAST_S, min(RECENT_AT_MOST_S, RECENT_SHARE * elapsed)))
        ends = self._ends
        if len(ends) >= REMEMBERED:
            seconds = min(seconds, now - ends[0])
        return Stretch(len(ends) - bisect_right(ends, now - seconds), seconds)


def duration(seconds: float) -> str:
    """`8 s`, `12 min`, `3 h 05 min`, `4 d 02 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02} h"


def span(least: float, most: float) -> str:
    """`12 to 15 min`, or one duration where both ends read the same."""
    low, high = duration(least), duration(most)
    if low == high:
        return low
    unit = high.split(" ", 1)[1]
    if low.split(" ", 1)[1] == unit and " " not in unit:
        return f"{low.split()[0]} to {high}"
    return f"{low} to {high}"
