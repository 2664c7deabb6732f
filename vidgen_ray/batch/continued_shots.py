"""Shots that start from the last frame of another one: which wait for which, and what becomes of them. Independent of Ray."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from vidgen_ray.batch.shot_queue import ShotTask
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import StageError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import DoneShot, Failure
from vidgen_ray.script.lines import CheckedLine
from vidgen_ray.shot import Shot

CONTINUE = "continue_from"
"""Failure stage of a shot without a start frame."""


@dataclass(frozen=True, slots=True)
class Decided:
    """Decision about a shot that waited. One of `task`, `done` and `failure` is set."""

    line: CheckedLine
    task: ShotTask | None = None
    """It can be rendered."""
    done: DoneShot | None = None
    """It is finished already."""
    failure: Failure | None = None


class ContinuedShots:
    """Shots of a run that wait for the shot they continue. Such a shot is planned when that one is finished.

    A shot waits only for one that was accepted before it, so the first shot of each chain is queued or in progress.
    """

    def __init__(
        self,
        outputs: OutputFolder,
        plan: Callable[[Shot], ShotPlan | Failure],
        find: Callable[[ShotPlan], DoneShot | None],
    ) -> None:
        """`find` returns the finished shot of a plan, if there is one."""
        self._outputs = outputs
        self._plan = plan
        self._find = find
        self._open: set[str] = set()
        """Ids of shots that are queued, in progress or waiting."""
        self._failed: dict[str, str] = {}
        """Id of a failed shot -> message for the shots that continue it."""
        self._waiting: defaultdict[str, list[CheckedLine]] = defaultdict(list)
        """Id of a shot -> shots that continue it."""
        self.repeated: list[ShotTask] = []
        """Finished shots that are to be rendered again, since their last frame was not kept. The caller takes them."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def shots(self) -> list[Shot]:
        """Waiting shots."""
        return [line.shot for lines in self._waiting.values() for line in lines]

    def opened(self, shot_id: str) -> None:
        """A shot was queued."""
        self._open.add(shot_id)

    def with_last_frame(self, task: ShotTask) -> ShotTask:
        """Return the task, with a plan that keeps the last frame if a shot waits for it."""
        return replace(task, plan=task.plan.with_last_frame()) if task.plan.shot.id in self._waiting else task

    def accept(self, line: CheckedLine) -> list[Decided]:
        """Take a shot that continues another one. Empty if it has to wait."""
        source = line.shot.continue_from or ""
        if self._outputs.storage.local is None:
            return self._fail(
                line, _failure(f"output folder {self._outputs.url}: must be a local folder, not in an object store")
            )
        self._waiting[source].append(line)
        if source in self._failed:
            return self._fail_waiting(source, self._failed[source])
        self._open.add(line.shot.id or "")
        return [] if source in self._open else self.done(source)

    def done(self, shot_id: str) -> list[Decided]:
        """A shot is finished. Return what that decides about the shots that wait for it, at any distance."""
        decided, finished = list[Decided](), deque([shot_id])
        while finished:
            done_id = finished.popleft()
            self._open.discard(done_id)
            for line in self._waiting.pop(done_id, ()):
                made = self._decide(line)
                decided += made
                if made and made[0].done is not None:
                    finished.append(line.shot.id or "")
        return decided

    def failed(self, shot_id: str, reason: str) -> list[Decided]:
        """A shot has failed. Return the shots that fail with it, at any distance."""
        return self._fail_waiting(shot_id, f"shot {shot_id} failed: {reason}")

    def _fail_waiting(self, shot_id: str, message: str) -> list[Decided]:
        decided, failed = list[Decided](), deque([shot_id])
        while failed:
            failed_id = failed.popleft()
            self._open.discard(failed_id)
            self._failed[failed_id] = message
            for line in self._waiting.pop(failed_id, ()):
                decided.append(Decided(line, failure=_failure(message)))
                failed.append(line.shot.id or "")
        return decided

    def _fail(self, line: CheckedLine, failure: Failure) -> list[Decided]:
        return [Decided(line, failure=failure), *self.failed(line.shot.id or "", failure.message)]

    def _decide(self, line: CheckedLine) -> list[Decided]:
        """Plan a shot whose source is finished. Empty if the source must be rendered again."""
        source = line.shot.continue_from or ""
        finished = self._outputs.find_by_id(source)
        if finished is None:
            return self._fail(line, _failure(f"shot {source} is neither an earlier line nor finished in {self._outputs.url}"))
        licences = finished.record().licences
        if (frame := self._outputs.last_frame(finished)) is None:
            if source not in self._open:
                again = self._plan(finished.record().shot)
                if isinstance(again, Failure):
                    lost = f"the last frame of shot {source} was not kept, and it cannot be rendered again: {again.message}"
                    return self._fail(line, _failure(lost))
                self._open.add(source)
                # It may itself continue another shot, whose licences are in its record only.
                self.repeated.append(ShotTask(again.with_source_licences(licences), 0, "", None, repeated=True))
            self._waiting[source].append(line)
            return []
        plan = self._plan(line.shot.continued(str(frame)))
        if isinstance(plan, Failure):
            return self._fail(line, plan)
        plan = plan.with_source_licences(licences)
        if (done := self._find(plan)) is not None:
            return [Decided(line, done=done)]
        return [Decided(line, task=ShotTask(plan, line.line, line.script, line.replaces))]


def _failure(message: str) -> Failure:
    return StepFailed(CONTINUE, StageError(message)).failure()
