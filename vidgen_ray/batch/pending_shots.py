"""A script's lines on their way in: planned, looked for among what is done, and sorted by what has to happen to each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import tee
from typing import Any, Protocol

from vidgen_ray.batch.task_files import ShotTask
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import MissingWeights, VidgenError
from vidgen_ray.graph import stages_of
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import DoneShot, Failure
from vidgen_ray.profile import Profile
from vidgen_ray.script.reader import CheckedLine, RejectedLine
from vidgen_ray.stages.base import Stage


class SkippedLines(Protocol):
    """Is told of the lines that are not rendered."""

    def refused(self, line: RejectedLine) -> None:
        """A line that cannot be rendered."""

    def unplanned(self, line: CheckedLine, failure: Failure) -> None:
        """A line that names something which is not there."""

    def skipped(self, errand: ShotTask, done: DoneShot) -> None:
        """A line that was done before."""


def pending_shots(
    lines: Iterable[CheckedLine | RejectedLine],
    profile: Profile,
    outputs: OutputFolder,
    account: SkippedLines,
    *,
    fresh: bool = False,
    keep_stages: bool = False,
) -> Iterator[ShotTask]:
    """The shots to render, `fresh` all of them; the account hears of every other line.

    Raises SetupError where the weights that a shot needs are not on this machine.
    """
    planned = _planned(lines, profile, account)
    if fresh:
        yield from planned
        return
    errands, looked_for = tee(planned)
    found = outputs.find_finished_each((errand.plan for errand in looked_for), keep_stages)
    for errand, (_, done) in zip(errands, found, strict=True):
        if done is None:
            yield errand
        else:
            account.skipped(errand, done)


def _planned(lines: Iterable[CheckedLine | RejectedLine], profile: Profile, account: SkippedLines) -> Iterator[ShotTask]:
    planners: dict[tuple[type[Stage[Any]], ...], ShotPlanner] = {}
    for line in lines:
        if isinstance(line, RejectedLine):
            account.refused(line)
            continue
        used = stages_of(line.shot)
        # Weights that are missing are the run's concern, not the line's.
        if used not in planners:
            planners[used] = ShotPlanner(params_of(profile, used), profile.encode)
        try:
            yield ShotTask(planners[used](line.shot), line.line, line.replaces)
        except MissingWeights:
            raise
        except (VidgenError, OSError) as error:
            account.unplanned(line, StepFailed("plan", error).failure())
