"""Which stages a shot passes, in which order, and the content key of each result.

Same key, same bytes on the same kind of machine: a key is the sha256 of the stage and its version, the fields of the shot
that the stage reads, its options, the digests of its weights and the key before it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vidgen_ray.errors import ProfileError
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
LORA_FIELDS = ("lora", "fast_lora")
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


def check_profile(profile: Profile) -> None:
    """Raises ProfileError for an actor that no stage lives on."""
    known = list(dict.fromkeys(stage.actor for stage in STAGES))
    for actor in profile.actors:
        if actor not in known:
            raise ProfileError(f"profile {profile.name}, actors.{actor}: must be one of {', '.join(known)}")


def params_of(profile: Profile, stages: Iterable[type[Stage[Any]]]) -> dict[str, StageParams]:
    """Stage name -> its parameters, with weights found on this machine."""
    return {stage.name: profile.params(stage) for stage in stages}


def with_local_loras(shot: Shot) -> Shot:
    """The shot with its built-in LoRAs as files of this machine."""
    loras = tuple(LoraRef(path=str(resolve(lora.path)), weight=lora.weight) for lora in shot.lora)
    return shot.model_copy(update={"lora": loras})


class ShotPlanner:
    """Gives shots their steps and keys. Weights are looked at once, so a planner is made anew for each run.

    `params` covers the stages of all shots that will be planned; shots have an id and a seed.
    """

    def __init__(self, params: Mapping[str, StageParams], encode: BaseModel) -> None:
        self._params = params
        self._encode = encode.model_dump(mode="json")
        self._digest = cache(digest)

    def __call__(self, shot: Shot) -> ShotPlan:
        """Raises StageError or SetupError where the shot names something that is not there."""
        local = with_local_loras(shot)
        inputs = {field: self._value(local, field) for field in ("image", "width", "height")} if shot.image else {}
        key = _hash("start", inputs)
        steps = []
        for stage in stages_of(shot):
            params = self._params[stage.name]
            weights = tuple(self._digest(path) for path in stage.weight_files(params, local))
            reads = {field: self._value(local, field) for field in stage.reads}
            key = _hash(stage.name, stage.version, reads, params.for_key(), weights, key)
            steps.append(Step(stage=stage.name, key=key, weights=weights))
        return ShotPlan(shot=shot, steps=tuple(steps), key=_hash("shot", OUTPUT_VERSION, self._encode, key))

    def _value(self, shot: Shot, field: str) -> Any:
        """A field as the key sees it: `steps.flux` looks inside, files stand by their content. LoRAs are local files."""
        value = attrgetter(field)(shot)
        if field in FILE_FIELDS and value is not None:
            return self._digest(Path(value))
        if field in LORA_FIELDS:
            return [(self._digest(Path(lora.path)), lora.weight) for lora in value]
        return value


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
