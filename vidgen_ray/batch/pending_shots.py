"""Pending shots of a script: plan each line, skip finished shots, report rejected lines."""

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
    """Callbacks for the lines that are not rendered."""

    def rejected(self, line: RejectedLine) -> None:
        """The line is wrong."""

    def unplannable(self, line: CheckedLine, failure: Failure) -> None:
        """The line refers to a file that does not exist or cannot be read."""

    def skipped(self, task: ShotTask, done: DoneShot) -> None:
        """The shot was finished by an earlier run."""


def pending_shots(
    lines: Iterable[CheckedLine | RejectedLine],
    profile: Profile,
    outputs: OutputFolder,
    skipped_lines: SkippedLines,
    *,
    fresh: bool = False,
    keep_stages: bool = False,
) -> Iterator[ShotTask]:
    """Yield the shots to render and report every other line to `skipped_lines`. `fresh`: also yield finished shots.

    Raises SetupError if the weights that a shot needs are not on this machine.
    """
    planned = _planned(lines, profile, skipped_lines)
    if fresh:
        yield from planned
        return
    tasks, to_look_up = tee(planned)
    finished = outputs.find_finished_each((task.plan for task in to_look_up), keep_stages)
    for task, (_, done) in zip(tasks, finished, strict=True):
        if done is None:
            yield task
        else:
            skipped_lines.skipped(task, done)


def _planned(lines: Iterable[CheckedLine | RejectedLine], profile: Profile, skipped_lines: SkippedLines) -> Iterator[ShotTask]:
    planners: dict[tuple[type[Stage[Any]], ...], ShotPlanner] = {}
    for line in lines:
        if isinstance(line, RejectedLine):
            skipped_lines.rejected(line)
            continue
        used = stages_of(line.shot)
        # Outside the `try`: missing weights fail the run, not the line.
        if used not in planners:
            planners[used] = ShotPlanner(params_of(profile, used), profile.encode)
        try:
            yield ShotTask(planners[used](line.shot), line.line, line.replaces)
        except MissingWeights:
            raise
        except (VidgenError, OSError) as error:
            skipped_lines.unplannable(line, StepFailed("plan", error).failure())
