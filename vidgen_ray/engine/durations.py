"""Expected seconds of calls, from the last calls of their stages on this cluster."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Collection, Sequence

from vidgen_ray.graph import STAGE_BY_NAME, relative_costs
from vidgen_ray.outputs.records import StepRecord
from vidgen_ray.shot import Shot

RECENT_CALLS = 32
"""Calls per stage whose seconds are kept."""
USUAL_SHARE = 0.75
"""Share of them that took at most the expected seconds."""
FLOOR_S, FACTOR = 600.0, 10.0
"""A call times out after FACTOR times its expected seconds, but not before FLOOR_S: a model may be compiled for a new size."""


class Durations:
    """Seconds of the last calls of each stage, relative to the cost of their shots."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT_CALLS))
        """Stage -> seconds of the reference shot."""

    def add(self, shot: Shot, records: Sequence[StepRecord], share: float = 1.0) -> None:
        """Add the seconds of a call. `share`: of the clip that it worked on."""
        costs = _costs(shot, [record.stage for record in records if not record.cached])
        for record in records:
            if costs.get(record.stage):
                self._seconds[record.stage].append(record.seconds / (costs[record.stage] * share))

    def expected_s(self, shot: Shot, stages: Collection[str], share: float = 1.0) -> float:
        """Return the expected seconds of a call. Infinite if a stage was not measured yet."""
        return sum(self._usual_s(stage) * cost * share for stage, cost in _costs(shot, stages).items() if cost)

    def _usual_s(self, stage: str) -> float:
        seconds = sorted(self._seconds[stage])
        return seconds[int(USUAL_SHARE * len(seconds))] if seconds else math.inf


def _costs(shot: Shot, stages: Collection[str]) -> dict[str, float]:
    """Return stage -> cost of the shot relative to the reference shot."""
    costs = relative_costs(shot)
    return {stage: costs[stage].mixed(STAGE_BY_NAME[stage].fixed_share) for stage in stages}


def call_timeout_s(timeout_s: float, expected_s: float) -> float:
    """Return the timeout of a call whose stages have the timeout `timeout_s`."""
    return min(timeout_s, max(FLOOR_S, FACTOR * expected_s))
