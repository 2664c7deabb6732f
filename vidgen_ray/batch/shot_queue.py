"""Queue of the shots to render, ordered to minimize LoRA changes. Independent of stages and workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from vidgen_ray.content_keys import ShotPlan

MAX_SHOTS = 4096
"""Shots that are ordered together. They take some megabytes."""
MAX_SKIPS = 4096
"""Shots that may overtake an older shot because they use the active LoRAs."""


@dataclass(frozen=True, slots=True)
class ShotTask:
    """A shot to render."""

    plan: ShotPlan
    line: int
    """Line number in the script."""
    script: str
    """Script of the line."""
    replaces: str | None
    """Id under which the line failed in an earlier run, if it differs."""
    repeated: bool = False
    """The shot was finished before, and is rendered for its last frame only. Its line has a row already."""


class ShotQueue:
    """Shots in groups with the same LoRAs and, within a group, the same prompt. Groups and shots keep their order."""

    def __init__(self) -> None:
        self._groups: dict[frozenset[str], dict[str, deque[tuple[int, ShotTask]]]] = {}
        self._active: frozenset[str] | None = None
        """LoRAs of the last shot that had any, since shots without LoRAs do not change them. `None` before the first shot."""
        self._added = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ShotTask]:
        return (task for group in self._groups.values() for tasks in group.values() for _, task in tasks)

    def add(self, task: ShotTask) -> None:
        group = self._groups.setdefault(_loras(task.plan), {})
        group.setdefault(task.plan.shot.prompt, deque()).append((self._added, task))
        self._added += 1
        self._count += 1

    def pop(self) -> ShotTask:
        """Remove and return the next shot: of the group with the active LoRAs, or else of the group with the oldest shot.

        Raises IndexError if the queue is empty.
        """
        if not self._groups:
            raise IndexError("the queue is empty")
        loras = next(iter(self._groups))
        oldest = next(iter(self._groups[loras].values()))[0][0]
        if self._active in self._groups and self._added - oldest <= MAX_SHOTS + MAX_SKIPS:
            loras = self._active
        group = self._groups[loras]
        prompt = next(iter(group))
        _, task = group[prompt].popleft()
        if not group[prompt]:
            del group[prompt]
        if not group:
            del self._groups[loras]
        self._active = loras or self._active or loras
        self._count -= 1
        return task


def _loras(plan: ShotPlan) -> frozenset[str]:
    """Return the LoRA files that the shot needs. Their strength can change without loading them again."""
    return frozenset(lora.path for lora in plan.shot.all_loras)
