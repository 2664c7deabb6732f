"""Weights of stages that load none: the smallest files that a run accepts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.system.model_files import PIPELINE_INDEX


def write_fake_weights(folder: Path, stages: Iterable[type[Stage[Any]]]) -> dict[str, Path]:
    """Write a folder of weights for each actor of the stages into `folder`. Return actor -> its folder."""
    folders = dict[str, Path]()
    for stage in stages:
        weights = folders[stage.actor] = folder / stage.actor
        weights.mkdir(parents=True, exist_ok=True)
        if stage.pipelines:
            (weights / PIPELINE_INDEX).write_text(json.dumps({"_class_name": stage.pipelines[0]}))
        elif issubclass(stage, InstantIDStage):
            (weights / "face.onnx").write_bytes(b"nothing")
        else:
            (weights / f"{Shot.model_fields['upscaler'].default}.safetensors").write_bytes(b"nothing")
    return folders
