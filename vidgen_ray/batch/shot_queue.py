"""Queue of the shots to render, by priority and with few LoRA changes, and the shots that wait for another one's last frame."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import StageError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.script.lines import Line
from vidgen_ray.shot import PRIORITIES, Priority, Shot

MAX_SHOTS = 4096
"""Shots that are ordered together. They take some megabytes."""
MAX_SKIPS = 4096
"""Shots that may overtake an older shot because they use the active LoRAs."""


class Task(NamedTuple):
    """A shot to render."""

    plan: ShotPlan
    line: Line | None
    """Line of the shot. `None` for a finished shot that is rendered again for its last frame only: it has a row already."""


class ShotQueue:
    """Shots by priority. Those of a priority are in groups with the same LoRAs and, within a group, the same prompt. Groups and
    shots keep their order."""

    def __init__(self) -> None:
        self._levels: dict[Priority, dict[frozenset[str], dict[str, deque[tuple[int, Task]]]]] = {}
        self._active: frozenset[str] | None = None
        """LoRAs of the last shot that had any, since shots without LoRAs do not change them. `None` before the first shot."""
        self._added = Counter[Priority]()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Task]:
        groups = (group for level in self._levels.values() for group in level.values())
        return (task for group in groups for tasks in group.values() for _, task in tasks)

    def add(self, task: Task) -> None:
        priority = task.plan.shot.priority
        group = self._levels.setdefault(priority, {}).setdefault(_loras(task.plan), {})
        group.setdefault(task.plan.shot.prompt, deque()).append((self._added[priority], task))
        self._added[priority] += 1
        self._count += 1

    def pop(self) -> Task:
        """Remove and return the next shot of the highest priority in the queue: of the group with the active LoRAs, or else of
        the group with the oldest shot.

        Raises IndexError if the queue is empty.
        """
        if not self._levels:
            raise IndexError("the queue is empty")
        priority = max(self._levels, key=PRIORITIES.index)
        groups = self._levels[priority]
        loras = next(iter(groups))
        oldest = next(iter(groups[loras].values()))[0][0]
        if self._active in groups and self._added[priority] - oldest <= MAX_SHOTS + MAX_SKIPS:
            loras = self._active
        group = groups[loras]
        prompt = next(iter(group))
        _, task = group[prompt].popleft()
        if not group[prompt]:
            del group[prompt]
        if not group:
            del groups[loras]
        if not groups:
            del self._levels[priority]
        self._active = loras or self._active or loras
        self._count -= 1
        return task


def _loras(plan: ShotPlan) -> frozenset[str]:
    """Return the LoRA files that the shot needs. Their strength can change without loading them again."""
    return frozenset(lora.path for lora in plan.shot.all_loras)


CONTINUE = "continue_from"
"""Failure stage of a shot without a start frame."""


class ContinuedShots:
    """Shots of a run that wait for the shot they continue. Such a shot is planned when that one is finished.

    A shot waits only for one that was accepted before it, so the first shot of each chain is queued or in progress.
    """

    def __init__(
        self,
        outputs: OutputFolder,
        plan: Callable[[Shot], ShotPlan | Failure],
        find: Callable[[ShotPlan], ShotRecord | None],
    ) -> None:
        """`find` returns the finished shot of a plan, if there is one."""
        self._outputs = outputs
        self._plan = plan
        self._find = find
        self._open: set[str] = set()
        """Ids of shots that are queued, in progress or waiting."""
        self._failed: dict[str, str] = {}
        """Id of a failed shot -> message for the shots that continue it."""
        self._waiting: defaultdict[str, list[Line]] = defaultdict(list)
        """Id of a shot -> shots that continue it."""
        self.repeated: list[Task] = []
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

    def with_last_frame(self, task: Task) -> Task:
        """Return the task, with a plan that keeps the last frame if a shot waits for it."""
        return task._replace(plan=task.plan.with_last_frame()) if task.plan.shot.id in self._waiting else task

    def accept(self, line: Line) -> list[Line]:
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

    def done(self, shot_id: str) -> list[Line]:
        """A shot is finished. Return the shots that wait for it, at any distance, with the results that this decides."""
        decided, finished = list[Line](), deque([shot_id])
        while finished:
            done_id = finished.popleft()
            self._open.discard(done_id)
            for line in self._waiting.pop(done_id, ()):
                made = self._decide(line)
                decided += made
                if made and isinstance(made[0].result, ShotRecord):
                    finished.append(line.shot.id or "")
        return decided

    def failed(self, shot_id: str, reason: str) -> list[Line]:
        """A shot has failed. Return the shots that fail with it, at any distance."""
        return self._fail_waiting(shot_id, f"shot {shot_id} failed: {reason}")

    def _fail_waiting(self, shot_id: str, message: str) -> list[Line]:
        decided, failed = list[Line](), deque([shot_id])
        while failed:
            failed_id = failed.popleft()
            self._open.discard(failed_id)
            self._failed[failed_id] = message
            for line in self._waiting.pop(failed_id, ()):
                decided.append(replace(line, results=(_failure(message),)))
                failed.append(line.shot.id or "")
        return decided

    def _fail(self, line: Line, failure: Failure) -> list[Line]:
        return [replace(line, results=(failure,)), *self.failed(line.shot.id or "", failure.message)]

    def _decide(self, line: Line) -> list[Line]:
        """Plan a shot whose source is finished. Empty if the source must be rendered again."""
        source = line.shot.continue_from or ""
        finished = self._outputs.find_by_id(source)
        if finished is None:
            return self._fail(line, _failure(f"shot {source} is neither an earlier line nor finished in {self._outputs.url}"))
        if (frame := self._outputs.last_frame(finished)) is None:
            if source not in self._open:
                again = self._plan(finished.shot)
                if isinstance(again, Failure):
                    lost = f"the last frame of shot {source} was not kept, and it cannot be rendered again: {again.message}"
                    return self._fail(line, _failure(lost))
                self._open.add(source)
                # It may itself continue another shot, whose licences are in its record only.
                self.repeated.append(Task(again.with_source_licences(finished.licences), None))
            self._waiting[source].append(line)
            return []
        plan = self._plan(line.shot.continued(str(frame)))
        if isinstance(plan, Failure):
            return self._fail(line, plan)
        plan = plan.with_source_licences(finished.licences)
        return [replace(line, results=(self._find(plan) or plan,))]


def _failure(message: str) -> Failure:
    return Failure.of(CONTINUE, StageError(message))
