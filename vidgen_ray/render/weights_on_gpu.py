"""Weights of loaded stages: check that they are the planned ones, and swap groups of stages between GPU and host memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidgen_ray.content_keys import Step
from vidgen_ray.errors import OtherWeights
from vidgen_ray.shot import LORA_FIELDS, Shot
from vidgen_ray.stages.base import Stage, adds_by_address
from vidgen_ray.system.cache_dir import digest, file_version
from vidgen_ray.system.free_memory import free_gpu_memory
from vidgen_ray.system.model_files import loaded_files

LATE_IMPORT = (
    "torch has multiplied matrices in this process before vidgen_ray was imported: results on the CPU may differ from those of "
    "other processes in the last bits; import vidgen_ray first, or set MKL_CBWR=AUTO"
)


class WeightsCheck:
    """Compares digests of this machine's weights with those of plans, once for each stage and each set of weights.

    Digests of files are cached on each machine, and those in a Hugging Face cache are their names.
    """

    def __init__(self) -> None:
        self._at_load: dict[Path, tuple[int, ...]] = {}
        self._checked: set[tuple[str, tuple[str, ...]]] = set()

    def before_load(self, stages: Iterable[Stage[Any]]) -> None:
        """Note the state of the stages' files: those that change before the first check count as other weights.

        Warns if this process may make other bytes on a CPU than others.
        """
        stages = list(stages)
        if any(stage.params.device == "cpu" for stage in stages) and adds_by_address():
            warnings.warn(LATE_IMPORT, stacklevel=2)
        paths = {path for stage in stages for path in (stage.params.weights, *stage.params.extra_weights.values())}
        self._at_load |= {file: file_version(file) for path in paths for file in _files(path)}

    def __call__(self, stage: Stage[Any], step: Step, shot: Shot) -> None:
        """Raises OtherWeights if the stage's weights for the shot are not those that the step was planned with."""
        if (step.stage, step.weights) in self._checked:
            return
        # LoRAs come last and are checked when they are loaded.
        paths = stage.weight_files(stage.params, shot.model_copy(update=dict.fromkeys(LORA_FIELDS, ())))
        for path, planned in zip(paths, step.weights, strict=False):
            if (found := digest(path)) != planned:
                raise OtherWeights(
                    f"{_node()} has other weights of {stage.name} than the driver: {path} has the digest {found[:12]}, must be "
                    f"{planned[:12]}; copy the driver's weights to this node, or use a folder that all nodes share"
                )
            for file in _files(path):
                if self._at_load.get(file, version := file_version(file)) != version:
                    raise OtherWeights(f"{_node()}: {file} changed after {stage.name} loaded it; load the weights again")
        self._checked.add((step.stage, step.weights))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else loaded_files(path)


def _node() -> str:
    return f"node {os.uname().nodename}"


class WeightSwapper:
    """Swaps groups of stages whose weights do not fit on the GPU together. Stages outside all groups stay on the GPU.

    While a group is on the GPU, the copy of its weights in host memory is kept; see `stages/loading.py`.
    """

    def __init__(self, stages: Mapping[str, Stage[Any]], groups: Sequence[Sequence[str]]) -> None:
        """`stages`: loaded stages by name. It may grow."""
        self._stages = stages
        self._groups = groups
        self._was_swapped = {name for group in groups for name in group}
        """Stages that are or were in a group."""
        self._on_gpu: Sequence[str] | None = ()
        """The group on the GPU. `None`: unknown, because a move has failed."""

    def load(self) -> None:
        """Load every stage. A stage of a group is moved to host memory before the next one is loaded."""
        swapped = {name for group in self._groups for name in group}
        for name, stage in self._stages.items():
            stage.load()
            if name in swapped:
                stage.move("cpu")

    def regroup(self, groups: Sequence[Sequence[str]]) -> None:
        """Use other groups from now on. Loaded stages of the new groups move to host memory, the others to the GPU.

        After an error, the next call of `ensure_on_gpu` moves what is left.
        """
        if groups == self._groups:
            return
        self._groups, self._on_gpu = groups, None
        self._was_swapped |= {name for group in groups for name in group}
        self._arrange(())

    def ensure_on_gpu(self, name: str) -> None:
        """Move the stage's group to the GPU, and the group that is there to host memory.

        The stage itself may be loaded afterwards: there is room for it. After an error, no group is on the GPU.
        """
        group = next((group for group in self._groups if name in group), ())
        if self._on_gpu is not None and group in ((), self._on_gpu):
            return
        self._arrange(group)

    def _arrange(self, group: Sequence[str]) -> None:
        """Move all stages to where they belong while this group is on the GPU. Those that are there already stay."""
        self._on_gpu = None
        in_groups = {name for group in self._groups for name in group}
        self._move(in_groups - {*group}, to_gpu=False)
        free_gpu_memory()
        try:
            self._move((self._was_swapped - in_groups) | {*group}, to_gpu=True)
        except BaseException:
            self._move(group, to_gpu=False)
            free_gpu_memory()
            raise
        self._on_gpu = group

    def _move(self, names: Iterable[str], *, to_gpu: bool) -> None:
        for name in names:
            if name in self._stages:
                stage = self._stages[name]
                stage.move(stage.params.device if to_gpu else "cpu")
