"""Compute the GPU efficiency of a run from its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.simulated import COMMIT, READY, STAGES, SWAP, Event

CLOCK_S = 0.001
"""Tolerance for overlaps, in seconds, because of steps of the wall clock."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Measurements of one run. `first_start` and `last_commit` are times in seconds since 1970."""

    efficiency: float
    """Work / (GPUs x wall time)."""
    efficiency_since_ready: float
    """Work / sum over GPUs of the seconds from the GPU's readiness to the last commit; see `ready_times`."""
    bound_s: float
    """Wall time if every GPU were busy all the time."""
    wall_s: float
    """Seconds from the start of the first stage to the last commit."""
    ramp_s: float
    """Seconds from the start of the first stage until every GPU has started to work."""
    drain_s: float
    """Seconds from the end of the last work of the first idle GPU to the last commit."""
    swap_s: float
    """Seconds spent moving weights between host and GPU memory, summed over all GPUs."""
    first_start: float
    last_commit: float


def efficiency(events: Sequence[Event], gpus: int) -> Measurement:
    """Measure a successful run. Work that was repeated counts once.

    Raises ValueError if nothing was committed, or if work overlaps on a GPU although its lock forbids this.
    """
    committed = {event.shot for event in events if event.stage == COMMIT}
    work = [event for event in events if event.stage in STAGES]
    if not committed or not work:
        raise ValueError("no shot was committed")
    _check_no_overlap([event for event in events if event.stage not in (COMMIT, READY)])
    first_start = min(event.t0 for event in work)
    last_commit = max(event.t1 for event in events if event.stage == COMMIT)
    work_s = sum(
        min(sum(event.seconds for event in work if event.stage == stage), len(committed) * cost.seconds)
        for stage, cost in STAGES.items()
    )
    started = [min((event.t0 for event in work if event.gpu == gpu), default=last_commit) for gpu in range(gpus)]
    idle = [max((event.t1 for event in work if event.gpu == gpu), default=first_start) for gpu in range(gpus)]
    wall_s = last_commit - first_start
    return Measurement(
        efficiency=work_s / (gpus * wall_s),
        efficiency_since_ready=work_s / sum(last_commit - ready for ready in ready_times(events, gpus)),
        bound_s=work_s / gpus,
        wall_s=wall_s,
        ramp_s=max(started) - first_start,
        drain_s=last_commit - min(idle),
        swap_s=sum(event.t1 - event.t0 for event in events if event.stage == SWAP),
        first_start=first_start,
        last_commit=last_commit,
    )


def ready_times(events: Sequence[Event], gpus: int) -> list[float]:
    """Return for each GPU when the first of its processes had loaded all models that it loads before its first work.

    A GPU without a process counts from the readiness of the first other one, so that it counts as idle.
    """
    ready: dict[int, float] = {}
    for gpu, pid in {(event.gpu, event.pid) for event in events if event.stage == READY}:
        own = [event for event in events if (event.gpu, event.pid) == (gpu, pid)]
        begin = min((event.t0 for event in own if event.stage in STAGES), default=float("inf"))
        loaded = max(event.t1 for event in own if event.stage == READY and event.t1 <= begin)
        ready[gpu] = min(ready.get(gpu, loaded), loaded)
    if not ready:
        raise ValueError("no process has loaded a model")
    return [ready.get(gpu, min(ready.values())) for gpu in range(gpus)]


def _check_no_overlap(events: Sequence[Event]) -> None:
    for gpu in {event.gpu for event in events}:
        on_gpu = sorted((event for event in events if event.gpu == gpu), key=lambda event: event.t0)
        for event, following in pairwise(on_gpu):
            if following.t0 < event.t1 - CLOCK_S:
                overlap_s = event.t1 - following.t0
                raise ValueError(f"GPU {gpu}: {following.stage} started {overlap_s:.3f} s before {event.stage} ended")
