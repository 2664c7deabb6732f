"""Which stages a shot passes, in which order, and the content key of each result.

Same key, same bytes on the same kind of machine: a key is the sha256 of the stage and its version, the fields of the shot
that the stage reads, its options, the digests of its weights and the key before it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vidgen_ray.local_cache import digest
from vidgen_ray.profile import Profile
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve

STAGES: tuple[type[Stage[Any]], ...] = (
    InstantIDStage,
    FluxStage,
    FluxLoRAStage,
    HunyuanDiTStage,
    SVDStage,
    RealESRGANStage,
)
"""In the order in which a shot passes them. A new stage is one new file and one line here."""

STAGE_BY_NAME = {stage.name: stage for stage in STAGES}
FILE_FIELDS = ("image", "face_image")
NOT_IN_KEYS = {"weights", "device", "threads", "actors"}
"""Of a stage's parameters: weights stand in a key by their digest, the rest says where it runs, not what comes out."""
OUTPUT_VERSION = 1
"""Raised when encoding or the set of files of a shot changes."""


class Step(BaseModel):
    """One stage of one shot."""

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    weights: tuple[str, ...]
    """sha256 of each file or folder of weights."""


class ShotPlan(BaseModel):
    """A shot and the steps it will take. `key` stands for the bytes of all that the shot leaves behind."""

    model_config = ConfigDict(frozen=True)

    shot: Shot
    steps: tuple[Step, ...]
    key: str


def stages_of(shot: Shot) -> tuple[type[Stage[Any]], ...]:
    return tuple(stage for stage in STAGES if stage.applies(shot))


def stages_used(shots: Iterable[Shot]) -> tuple[type[Stage[Any]], ...]:
    """The stages that at least one shot passes, in order."""
    used = {stage for shot in shots for stage in stages_of(shot)}
    return tuple(stage for stage in STAGES if stage in used)


def params_of(profile: Profile, stages: Iterable[type[Stage[Any]]]) -> dict[str, StageParams]:
    """Stage name -> its parameters, with weights found on this machine."""
    return {stage.name: profile.params(stage) for stage in stages}


def plan_shot(shot: Shot, params: Mapping[str, StageParams], encode: BaseModel) -> ShotPlan:
    """The shot's steps with their keys. `shot` has an id and a seed; `params` covers its stages."""
    key = _hash("start", {field: _value(shot, field) for field in ("image", "width", "height")} if shot.image else {})
    steps = []
    for stage in stages_of(shot):
        told = params[stage.name]
        weights = tuple(digest(path) for path in stage.weight_files(told, shot))
        reads = {field: _value(shot, field) for field in stage.reads}
        options = told.model_dump(mode="json", exclude=NOT_IN_KEYS)
        key = _hash(stage.name, stage.version, reads, options, weights, key)
        steps.append(Step(stage=stage.name, key=key, weights=weights))
    return ShotPlan(shot=shot, steps=tuple(steps), key=_hash("shot", OUTPUT_VERSION, encode.model_dump(mode="json"), key))


def _value(shot: Shot, field: str) -> Any:
    """A field as the key sees it: `steps.flux` looks inside, `seed` is the stage's own, files stand by their content."""
    value: Any = shot
    for part in field.split("."):
        value = getattr(value, part)
    if value is None:
        return None
    if field in FILE_FIELDS:
        return digest(Path(value))
    if isinstance(value, tuple) and all(isinstance(v, LoraRef) for v in value):
        return [(digest(resolve(lora.path)), lora.weight) for lora in value]
    return value


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
