"""Weight swapping: stages that do not fit on the GPU together take turns in its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidgen_ray.engine.oom_fallback import free_gpu_memory
from vidgen_ray.stages.base import Stage


class WeightSwapper:
    """Stages of one process whose weights do not fit on the GPU together: the group at work is there, the others wait in
    the host's memory."""

    def __init__(self, stages: Mapping[str, Stage[Any]], groups: Sequence[Sequence[str]]) -> None:
        self._stages = stages
        self._groups = groups
        self._present: Sequence[str] = ()

    def load(self) -> None:
        """Load every stage; a stage of a group is taken off the GPU again before the next is loaded."""
        taking_turns = {name for group in self._groups for name in group}
        for name, stage in self._stages.items():
            stage.load()
            if name in taking_turns:
                stage.move("cpu")

    def ensure_on_gpu(self, name: str) -> None:
        """Have the stage's weights where it works."""
        group = next((group for group in self._groups if name in group), None)
        if group is None or group == self._present:
            return
        for other in self._present:
            self._stages[other].move("cpu")
        free_gpu_memory()
        for member in group:
            self._stages[member].move(self._stages[member].params.device)
        self._present = group
