"""Estimate of a run: what is left to render, without rendering it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vidgen_ray.batch.pending_shots import SkippedLines, pending_shots
from vidgen_ray.batch.task_files import ShotTask
from vidgen_ray.engine.ray_cluster import connected, live_cluster
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import check_profile
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import DoneShot, Failure
from vidgen_ray.planner import Cluster, Demand, demand_of, this_machine
from vidgen_ray.profile import Profile
from vidgen_ray.script.reader import CheckedLine, RejectedLine
from vidgen_ray.shot import Shot


@dataclass(frozen=True, slots=True)
class Counts:
    """Line counts of a script before a run."""

    lines: int
    """Lines, with variants expanded."""
    done: int | None
    """Finished shots that are skipped. `None` if the weights needed to look them up are not on this machine."""
    refused: int
    """Rejected lines and lines that cannot be planned."""
    cached_steps: int | None
    """Steps of pending shots whose result is in the stage cache. `None` as for `done`."""


class _Tally(SkippedLines):
    """Counts of the lines that are not pending."""

    def __init__(self) -> None:
        self.done = self.failed = 0

    def rejected(self, line: RejectedLine) -> None:
        self.failed += 1

    def unplannable(self, line: CheckedLine, failure: Failure) -> None:
        self.failed += 1

    def skipped(self, task: ShotTask, done: DoneShot) -> None:
        self.done += 1


def estimate_run(
    lines: Callable[[], Iterable[CheckedLine | RejectedLine]],
    profile: Profile,
    outputs: OutputFolder,
    address: str | None,
    cluster: Cluster | None,
) -> tuple[Demand, Counts, Cluster]:
    """Return the demand, the line counts and the cluster: `cluster`, the one at `address`, or this machine.

    `lines` returns a new iterator over the script on each call. If the weights are not on this machine, no shot counts as done.
    Raises SetupError if there is no cluster at `address`.
    """
    check_profile(profile)
    try:
        demand, counts = _count_pending(lines(), profile, outputs)
    except SetupError:
        demand, counts = _count_all(lines())
    if cluster is None and address is not None:
        with connected(address, 0):
            cluster = live_cluster()
    return demand, counts, cluster or this_machine()


def _count_pending(
    lines: Iterable[CheckedLine | RejectedLine], profile: Profile, outputs: OutputFolder
) -> tuple[Demand, Counts]:
    tally = _Tally()
    cached = 0

    def pending() -> Iterator[Shot]:
        nonlocal cached
        for task in pending_shots(lines, profile, outputs, tally):
            cached += sum(outputs.stage_cache.has(step.key) for step in task.plan.steps)
            yield task.plan.shot

    demand = demand_of(pending())
    return demand, Counts(demand.shots + tally.done + tally.failed, tally.done, tally.failed, cached)


def _count_all(lines: Iterable[CheckedLine | RejectedLine]) -> tuple[Demand, Counts]:
    failed = 0

    def valid() -> Iterator[Shot]:
        nonlocal failed
        for line in lines:
            if isinstance(line, CheckedLine):
                yield line.shot
            else:
                failed += 1

    demand = demand_of(valid())
    return demand, Counts(demand.shots + failed, None, failed, None)
