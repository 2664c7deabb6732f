"""What the events of a run say: how busy its cards were, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.simulated import COMMIT, STAGES, SWAP, Event

CLOCK_S = 0.001
"""Steps of the wall clock that are no overlap."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one run. `first_start` and `last_commit` are times, the others seconds."""

    efficiency: float
    """Work over GPUs times wall."""
    bound_s: float
    """The wall if every card were busy all the time."""
    wall_s: float
    """From the start of the first stage to the last commit."""
    ramp_s: float
    """From the start of the first stage until every card has begun to work."""
    drain_s: float
    """From when the first card has nothing more to do until the last commit."""
    swap_s: float
    """Of all cards, spent on moving weights between host and card."""
    first_start: float
    last_commit: float


def efficiency(events: Sequence[Event], gpus: int) -> Measurement:
    """Measure a run that ended well.

    Work done twice counts once. Raises ValueError where nothing was committed, or where two pieces of work were on one card
    at the same time, which the lock forbids.
    """
    committed = {event.shot for event in events if event.stage == COMMIT}
    work = [event for event in events if event.stage in STAGES]
    if not committed or not work:
        raise ValueError("no shot was committed")
    _expect_one_at_a_time([event for event in events if event.stage != COMMIT])
    first_start = min(event.t0 for event in work)
    last_commit = max(event.t1 for event in events if event.stage == COMMIT)
    work_s = sum(
        min(sum(event.seconds for event in work if event.stage == stage), len(committed) * cost.seconds)
        for stage, cost in STAGES.items()
    )
    begun = [min((event.t0 for event in work if event.gpu == gpu), default=last_commit) for gpu in range(gpus)]
    idle = [max((event.t1 for event in work if event.gpu == gpu), default=first_start) for gpu in range(gpus)]
    wall_s = last_commit - first_start
    return Measurement(
        efficiency=work_s / (gpus * wall_s),
        bound_s=work_s / gpus,
        wall_s=wall_s,
        ramp_s=max(begun) - first_start,
        drain_s=last_commit - min(idle),
        swap_s=sum(event.t1 - event.t0 for event in events if event.stage == SWAP),
        first_start=first_start,
        last_commit=last_commit,
    )


def _expect_one_at_a_time(events: Sequence[Event]) -> None:
    for gpu in {event.gpu for event in events}:
        on_card = sorted((event for event in events if event.gpu == gpu), key=lambda event: event.t0)
        for one, next_one in pairwise(on_card):
            if next_one.t0 < one.t1 - CLOCK_S:
                raise ValueError(f"GPU {gpu}: {next_one.stage} began {one.t1 - next_one.t0:.3f} s before {one.stage} ended")
