"""Weight swapping: keeps one group of stages on the GPU and the other groups in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidgen_ray.engine.oom_fallback import free_gpu_memory
from vidgen_ray.stages.base import Stage


class WeightSwapper:
    """Swaps groups of stages whose weights do not fit on the GPU together. Stages outside all groups stay on the GPU."""

    def __init__(self, stages: Mapping[str, Stage[Any]], groups: Sequence[Sequence[str]]) -> None:
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

    def ensure_on_gpu(self, name: str) -> None:
        """Move the stage's group to the GPU, and the group that is there to host memory."""
        group = next((group for group in self._groups if name in group), None)
        if group is None or group == self._on_gpu:
            return
        for other in self._on_gpu:
            self._stages[other].move("cpu")
        free_gpu_memory()
        for member in group:
            self._stages[member].move(self._stages[member].params.device)
        self._on_gpu = group
