"""What a run would have to do, without doing it."""

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
    """How the script's lines stand before a run."""

    lines: int
    """With variants written out."""
    done: int | None
    """Shots that are done already and will be skipped; none where their weights are not here to tell."""
    refused: int
    """Lines that cannot be rendered."""
    cached_steps: int | None
    """Stages, of shots that are to be rendered, of which the cache has the result; none as above."""


class _Tally(SkippedLines):
    def __init__(self) -> None:
        self.done = self.wrong = 0

    def refused(self, line: RejectedLine) -> None:
        self.wrong += 1

    def unplanned(self, line: CheckedLine, failure: Failure) -> None:
        self.wrong += 1

    def skipped(self, errand: ShotTask, done: DoneShot) -> None:
        self.done += 1


def estimated(
    lines: Callable[[], Iterable[CheckedLine | RejectedLine]],
    profile: Profile,
    outputs: OutputFolder,
    address: str | None,
    cluster: Cluster | None,
) -> tuple[Demand, Counts, Cluster]:
    """What is to be rendered, how the lines stand, and the machines: those given, those at `address`, or this one.

    `lines` gives the script anew with each call. Where the weights are not on this machine nothing counts as done.
    Raises SetupError where there is no cluster at the address.
    """
    check_profile(profile)
    try:
        demand, counts = _looked_up(lines(), profile, outputs)
    except SetupError:
        demand, counts = _as_if_new(lines())
    if cluster is None and address is not None:
        with connected(address, 0):
            cluster = live_cluster()
    return demand, counts, cluster or this_machine()


def _looked_up(lines: Iterable[CheckedLine | RejectedLine], profile: Profile, outputs: OutputFolder) -> tuple[Demand, Counts]:
    tally = _Tally()
    cached = 0

    def counted() -> Iterator[Shot]:
        nonlocal cached
        for errand in pending_shots(lines, profile, outputs, tally):
            cached += sum(outputs.stage_cache.has(step.key) for step in errand.plan.steps)
            yield errand.plan.shot

    demand = demand_of(counted())
    return demand, Counts(demand.shots + tally.done + tally.wrong, tally.done, tally.wrong, cached)


def _as_if_new(lines: Iterable[CheckedLine | RejectedLine]) -> tuple[Demand, Counts]:
    wrong = 0

    def good() -> Iterator[Shot]:
        nonlocal wrong
        for line in lines:
            if isinstance(line, CheckedLine):
                yield line.shot
            else:
                wrong += 1

    demand = demand_of(good())
    return demand, Counts(demand.shots + wrong, None, wrong, None)
