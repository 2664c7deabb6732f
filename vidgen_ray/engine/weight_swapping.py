"""Weight swapping: keeps one group of stages on the GPU and the other groups in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidgen_ray.engine.oom_fallback import free_gpu_memory
from vidgen_ray.stages.base import Stage


class WeightSwapper:
    """Swaps groups of stages whose weights do not fit on the GPU together. Stages outside all groups stay on the GPU.

    While a group is on the GPU, the copy of its weights in host memory is kept; see `stages/host_weights.py`.
    """

    def __init__(self, stages: Mapping[str, Stage[Any]], groups: Sequence[Sequence[str]]) -> None:
        """`stages`: loaded stages by name. It may grow."""
        self._stages = stages
        self._groups = groups
        self._on_gpu: Sequence[str] = ()

    def load(self) -> None:
        """Load every stage. A stage of a group is moved to host memory before the next one is loaded."""
        swapped = {name for group in self._groups for name in group}
        for name, stage in self._stages.items():
            stage.load()
            if name in swapped:
                stage.move("cpu")

    def regroup(self, groups: Sequence[Sequence[str]]) -> None:
        """Use other groups from now on. Loaded stages of the new groups move to host memory, the others to the GPU."""
        if groups == self._groups:
            return
        before = {name for group in self._groups for name in group}
        after = {name for group in groups for name in group}
        for name in after & self._stages.keys():
            self._stages[name].move("cpu")
        free_gpu_memory()
        for name in (before - after) & self._stages.keys():
            self._stages[name].move(self._stages[name].params.device)
        self._groups, self._on_gpu = groups, ()

    def ensure_on_gpu(self, name: str) -> None:
        """Move the stage's group to the GPU, and the group that is there to host memory.

        The stage itself may be loaded afterwards: there is room for it.
        """
        group = next((group for group in self._groups if name in group), None)
        if group is None or group == self._on_gpu:
            return
        self._move_out()
        for member in group:
            if member in self._stages:
                self._stages[member].move(self._stages[member].params.device)
        self._on_gpu = group

    def _move_out(self) -> None:
        for other in self._on_gpu:
            if other in self._stages:
                self._stages[other].move("cpu")
        self._on_gpu = ()
        free_gpu_memory()
