"""Check that the stages of a process have loaded the weights that a shot was planned with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidgen_ray.cache_dir import digest, file_version
from vidgen_ray.content_keys import Step
from vidgen_ray.errors import OtherWeights
from vidgen_ray.model_files import loaded_files
from vidgen_ray.shot import LORA_FIELDS, Shot
from vidgen_ray.stages.base import Stage


class WeightsCheck:
    """Compares digests of this machine's weights with those of plans, once for each stage and each set of weights.

    Digests of files are cached on each machine, and those in a Hugging Face cache are their names.
    """

    def __init__(self) -> None:
        self._at_load: dict[Path, tuple[int, ...]] = {}
        self._checked: set[tuple[str, tuple[str, ...]]] = set()

    def before_load(self, stages: Iterable[Stage[Any]]) -> None:
        """Note the state of the stages' files: those that change before the first check count as other weights."""
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
