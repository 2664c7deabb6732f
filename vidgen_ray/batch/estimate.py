"""Estimate of a run: what is left to render, without rendering it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from more_itertools import batched

from vidgen_ray.batch.line_planner import Continued, LinePlanner, PlannedShot, unique_shots
from vidgen_ray.engine.ray_cluster import connected, live_cluster
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import check_profile
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner import Cluster, Demand, demand_of, this_machine
from vidgen_ray.profile import Profile
from vidgen_ray.script.lines import CheckedLine, RejectedLine, ScriptIndex, ScriptSettings
from vidgen_ray.script.read import iter_script, no_lines, open_lines
from vidgen_ray.shot import Shot

LINES_AT_ONCE = 500
"""Lines that are planned together."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Line counts of a script before a run."""

    lines: int
    """Lines, with variants expanded."""
    done: int | None
    """Finished shots that are skipped. `None` if the weights needed to look them up are not on this machine."""
    rejected: int
    """Rejected lines and lines that cannot be planned."""
    cached_steps: int | None
    """Steps of pending shots whose result is in the stage cache. `None` as for `done`."""


def estimate_run(
    script: ScriptSettings, profile: Profile, outputs: OutputFolder, address: str | None, cluster: Cluster | None
) -> tuple[Demand, Counts, Cluster]:
    """Return the demand, the line counts and the cluster: `cluster`, the one at `address`, or this machine.

    If the weights are not on this machine, no shot counts as done. Raises SetupError if there is no cluster at `address`.
    """
    check_profile(profile)
    try:
        demand, counts = _count_pending(script, profile, outputs)
    except SetupError:
        demand, counts = _count_all(iter_script(script))
    if cluster is None and address is not None:
        with connected(address, 0):
            cluster = live_cluster().total
    return demand, counts, cluster or this_machine()


def pending_demand(script: ScriptSettings, profile: Profile, outputs: OutputFolder) -> Demand:
    """Return the demand of the shots that are left to render. Raises SetupError if their weights are not on this machine."""
    return _count_pending(script, profile, outputs)[0]


def _count_pending(script: ScriptSettings, profile: Profile, outputs: OutputFolder) -> tuple[Demand, Counts]:
    done = failed = cached = 0

    def pending() -> Iterator[Shot]:
        nonlocal done, failed, cached
        for shot in _planned(script, profile, outputs):
            if isinstance(shot, RejectedLine) or isinstance(shot.plan, Failure):
                failed += 1
            elif shot.done is not None:
                done += 1
            elif isinstance(shot.plan, Continued):
                yield shot.line.shot
            elif shot.plan is not None:
                cached += sum(outputs.stage_cache.has(step.key) for step in shot.plan.steps)
                yield shot.plan.shot

    demand = demand_of(pending())
    return demand, Counts(demand.shots + done + failed, done, failed, cached)


def _planned(script: ScriptSettings, profile: Profile, outputs: OutputFolder) -> Iterator[PlannedShot | RejectedLine]:
    checker, lines = open_lines(script)
    planner = LinePlanner(checker, profile, outputs)
    planner.load_finished()
    empty, index = True, ScriptIndex()
    for batch in batched(lines, LINES_AT_ONCE):
        empty = False
        yield from unique_shots(planner.plan(batch), index)
    if empty:
        raise no_lines(script.path)


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
