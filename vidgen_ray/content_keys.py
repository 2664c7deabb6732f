"""Content keys: the steps of a shot and the key of each result.

Same key, same bytes on the same kind of machine: a key is the sha256 of the stage and its version, the fields of the shot
that the stage reads, its options, the digests of its weights and the key before it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel, ConfigDict

from vidgen_ray.cache_dir import digest
from vidgen_ray.graph import STAGE_BY_NAME, STAGES, stages_of
from vidgen_ray.profile import Profile
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.weights import resolve

FILE_FIELDS = ("image",)
FILES_FIELDS = ("face_image",)
LORA_FIELDS = ("lora", "fast_lora")
START_FIELDS = ("height", "image", "width")
"""What the chain begins with where no stage draws the picture."""
PLAIN_FIELDS = tuple(
    sorted(
        {*START_FIELDS, *(field for stage in STAGES for field in (*stage.reads, *stage.identity_fields))}
        - {*FILE_FIELDS, *FILES_FIELDS, *LORA_FIELDS}
    )
)
"""The fields that count in a key as they are; `steps.flux` looks inside."""
WEIGHTS_REMEMBERED = 4096
"""Combinations of a stage, a method of identity, LoRAs and an upscaler. And files, by their path."""
OUTPUT_VERSION = 3
"""Raised when encoding, the set of files of a shot or its record changes."""


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
    number: int = 1
    """Which try this is, counted from 1."""
    again: tuple["ShotPlan", ...] = ()
    """The further tries, in order: the same shot with other seeds, under the same key, for where this one is too unlike."""


def params_of(profile: Profile, stages: Iterable[type[Stage[Any]]]) -> dict[str, StageParams]:
    """Stage name -> its parameters, with weights found on this machine."""
    return {stage.name: profile.params(stage) for stage in stages}


def with_local_loras(shot: Shot) -> Shot:
    """The shot with its built-in LoRAs as files of this machine."""
    loras = tuple(LoraRef(path=str(resolve(lora.path)), weight=lora.weight) for lora in shot.lora)
    return shot.model_copy(update={"lora": loras})


class ShotPlanner:
    """Gives shots their steps and keys. Weights are looked at once, so a planner is made anew for each run.

    `params` covers the stages of all shots that will be planned; shots have an id and a seed. Written for many shots:
    of each key only what differs between shots is put into JSON for each of them, and no file is looked at again while it
    is among the last `WEIGHTS_REMEMBERED`.
    """

    def __init__(self, params: Mapping[str, StageParams], encode: BaseModel) -> None:
        self._params = params
        self._forms = {
            (name, uses_identity): _stage_form(STAGE_BY_NAME[name], of_stage, uses_identity)
            for name, of_stage in params.items()
            for uses_identity in (False, True)
        }
        self._start_form = f'["start",{_fields_form(START_FIELDS)}]'
        self._start = _sha256('["start",{}]')
        self._end = f'["shot",{OUTPUT_VERSION},{_json(encode.model_dump(mode="json"))},'
        self._plain_values = attrgetter(*PLAIN_FIELDS)
        self._digest = lru_cache(WEIGHTS_REMEMBERED)(lambda path: digest(Path(path)))
        self._lora_digest = lru_cache(WEIGHTS_REMEMBERED)(lambda path: digest(resolve(path)))
        self._weights: dict[tuple[str | None, ...], tuple[tuple[str, ...], str]] = {}

    def __call__(self, shot: Shot) -> ShotPlan:
        """Raises StageError or SetupError where the shot names something that is not there."""
        steps, last = self._steps_of(shot)
        check_likeness = InstantIDStage.applies(shot) and shot.min_identity is not None
        # How often is part of it, too: what fails after two tries may be done after three.
        rule = f",{_json(shot.min_identity)},{shot.retries}" if check_likeness else ""
        key = _sha256(f'{self._end}"{last}"{rule}]')
        again = []
        for number in range(1, shot.retries + 1) if check_likeness else ():
            other = shot.again(number)
            again.append(ShotPlan(shot=other, steps=self._steps_of(other)[0], key=key, number=number + 1))
        return ShotPlan(shot=shot, steps=steps, key=key, again=tuple(again))

    def _steps_of(self, shot: Shot) -> tuple[tuple[Step, ...], str]:
        """The steps, and the key of what they leave."""
        texts = dict(zip(PLAIN_FIELDS, map(_json, self._plain_values(shot)), strict=True))
        for field in FILE_FIELDS:
            path = getattr(shot, field)
            texts[field] = "null" if path is None else f'"{self._digest(path)}"'
        for field in FILES_FIELDS:
            texts[field] = _json([self._digest(path) for path in getattr(shot, field)])
        for field in LORA_FIELDS:
            worn = [f'["{self._lora_digest(lora.path)}",{_json(lora.weight)}]' for lora in getattr(shot, field)]
            texts[field] = f"[{','.join(worn)}]"
        key = _sha256(self._start_form % texts) if shot.image else self._start
        steps = []
        for stage in stages_of(shot):
            weights, weights_text = self._weights_of(stage, shot)
            key = _sha256(f'{self._forms[stage.name, stage.uses_identity(shot)] % texts},{weights_text},"{key}"]')
            steps.append(Step(stage=stage.name, key=key, weights=weights))
        return tuple(steps), key

    def _weights_of(self, stage: type[Stage[Any]], shot: Shot) -> tuple[tuple[str, ...], str]:
        """The digests of the stage's weights, and the same as JSON."""
        # All by which a stage may choose its weights.
        known_as = (stage.name, shot.upscaler, shot.mode, shot.flux_identity, *(lora.path for lora in shot.lora))
        found = self._weights.get(known_as)
        if found is None:
            files = stage.weight_files(self._params[stage.name], with_local_loras(shot))
            digests = tuple(self._digest(str(file)) for file in files)
            if len(self._weights) >= WEIGHTS_REMEMBERED:
                self._weights.clear()
            found = self._weights[known_as] = digests, _json(digests)
        return found


def _stage_form(stage: type[Stage[Any]], params: StageParams, uses_identity: bool) -> str:
    """What a stage's key is the hash of, as JSON up to the weights, with holes for the fields of the shot."""
    options = _json(params.for_key()).replace("%", "%%")
    fields = (*stage.reads, *stage.identity_fields) if uses_identity else stage.reads
    return f'["{stage.name}",{stage.version},{_fields_form(fields)},{options}'


def _fields_form(fields: Iterable[str]) -> str:
    return "{" + ",".join(f'"{field}":%({field})s' for field in sorted(fields)) + "}"


def _json(value: Any) -> str:
    """As short as it can be, with names in order: the same text for the same value."""
    write = JSON_OF_TYPE.get(type(value))
    return write(value) if write else json.dumps(value, sort_keys=True, separators=(",", ":"))


JSON_OF_TYPE: dict[type, Callable[[Any], str]] = {
    NoneType: lambda value: "null",
    bool: lambda value: "true" if value else "false",
    int: int.__repr__,
    float: float.__repr__,
    str: json.dumps,
}
"""Short cuts for finite values."""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
