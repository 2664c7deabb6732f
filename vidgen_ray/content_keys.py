"""Content keys: the steps of a shot, the key of each result, and the texts that text encoders cut.

Same key, same bytes on the same kind of machine; several GPUs that divide the work of a shot are a kind of their own. A key is
the sha256 of the stage and its version, the fields of the shot that the stage reads, its options, the digests of its weights
and the previous key.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any

from cachetools import LRUCache, cached
from pydantic import BaseModel, InstanceOf

from vidgen_ray.errors import FrozenModel, StageError
from vidgen_ray.graph import stages_of
from vidgen_ray.licences import UsedWeights
from vidgen_ray.profile import DEFAULT_PROVENANCE, Profile, ProvenanceSettings
from vidgen_ray.shot import DERIVED_FIELDS, IMAGE_FIELDS, LORA_FIELDS, LocalLora, LocalVideoLora, LoraRef, Shot, VideoLora
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import resolve

TOKENIZER = "tokenizer.json"
CACHED_TEXTS = 4096


class CutText(FrozenModel):
    """A text of a shot that is longer than a stage reads."""

    stage: str
    label: str
    """Name of the stage, shown to people."""
    read: int
    """Tokens that the stage reads."""
    tokens: int
    """Tokens of the whole text."""

    def __str__(self) -> str:
        name = self.label if self.label.lower() == self.stage else f"{self.label} ({self.stage})"
        return f"{name} reads the first {self.read} of {self.tokens} tokens"


def cut_texts(stages: Iterable[type[Stage[Any]]], params: Mapping[str, StageParams], shot: Shot) -> tuple[CutText, ...]:
    """Return the texts of the shot that these stages cut. Of stages with the same text encoder, only the first is named."""
    found: dict[object, CutText] = {}
    for stage in stages:
        for read in stage.texts(params[stage.name], shot):
            # A token is at least one byte. Two more mark the begin and the end.
            if len(read.text.encode("utf-8", "replace")) + 2 <= read.tokens:
                continue
            tokens = _count(read.tokenizer, read.text)
            if tokens > read.tokens:
                cut = CutText(stage=stage.name, label=stage.label, read=read.tokens, tokens=tokens)
                found.setdefault(read, cut)
    return tuple(found.values())


@lru_cache(CACHED_TEXTS)
def _count(folder: Path, text: str) -> int:
    return _counter(folder)(text)


@lru_cache
def _counter(folder: Path) -> Callable[[str], int]:
    """Return what counts the tokens of a text, with those that mark its begin and its end. It returns 0 without a tokenizer."""
    try:
        if (file := folder / TOKENIZER).exists():
            # Without transformers, whose import takes seconds.
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return lambda text: len(tokenizer.encode(text).ids)
        if folder.is_dir():
            from transformers import AutoTokenizer

            other = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            return lambda text: len(other(text, truncation=False)["input_ids"])
    # Damaged tokenizers raise any exception. They are found when the weights are loaded.
    except Exception:
        pass
    return lambda text: 0


FILE_FIELDS = IMAGE_FIELDS
FILES_FIELDS = ("face_image",)
READ_LORA_FIELDS = (*LORA_FIELDS, *(name for name, fields in DERIVED_FIELDS.items() if "lora" in fields))
"""Fields with LoRAs, and the properties that stages read in their place."""
START_FIELDS = ("height", "image", "width")
"""Fields that the chain starts from if the shot brings its own image."""
NOT_PLAIN_FIELDS = frozenset((*FILE_FIELDS, *FILES_FIELDS, *READ_LORA_FIELDS))
"""Fields that are part of a key by the content of their files. Other fields are by their value."""
_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
"""The shortest JSON with sorted names: equal values give equal text."""
_QUICK_JSON: Mapping[type, Callable[[Any], str]] = {
    int: str,
    float: float.__repr__,
    str: json.encoder.encode_basestring_ascii,
    bool: lambda value: "true" if value else "false",
    list: lambda value: _json(value) if value else "[]",
    type(None): lambda _: "null",
}
"""Type -> what `_json` does, in a tenth of its time."""
CACHED_DIGESTS = 4096
"""Files, and combinations of weights, whose digests a planner caches."""
OUTPUT_VERSION = 3
"""Raised when encoding, the set of files of a shot or its record changes."""


class Step(FrozenModel):
    """One stage of one shot."""

    stage: str
    key: str
    weights: tuple[str, ...]
    """sha256 of each file or folder of weights."""


class ShotPlan(FrozenModel):
    """A shot and its steps. `key` identifies the bytes of all files of the shot."""

    shot: InstanceOf[Shot]
    steps: tuple[Step, ...]
    key: str
    inputs: Mapping[str, str] = {}
    """Photos, start image and LoRAs of the shot, as it names them: path -> sha256 at the time of planning."""
    number: int = 1
    """Number of this try, counted from 1. Each try has another seed."""
    key_text: str | None = None
    """Hashed text of the key, without `min_identity` and `max_tries`. `None` if the shot has no likeness."""
    cut_texts: tuple[CutText, ...] = ()
    """Prompts that text encoders cut. Not part of the key."""
    licences: tuple[UsedWeights, ...] = ()
    """Weights behind the shot and, if it continues another one, behind that shot, with their licences. Not part of the key."""
    keep_last_frame: bool = False
    """Also write the last frame of the generated clip, for a shot that continues this one."""
    again: tuple["ShotPlan", ...] = ()
    """Further tries, in order: the same shot with other seeds and the same key, for when the likeness is too low."""

    def with_last_frame(self) -> "ShotPlan":
        """Return the plan, and its further tries, with `keep_last_frame`."""
        again = tuple(other.with_last_frame() for other in self.again)
        return self.model_copy(update={"keep_last_frame": True, "again": again})

    def with_source_licences(self, licences: Iterable[UsedWeights]) -> "ShotPlan":
        """Return the plan, and its further tries, with the licences of the shot that it continues before its own."""
        merged = tuple(dict.fromkeys((*licences, *self.licences)))
        again = tuple(other.model_copy(update={"licences": merged}) for other in self.again)
        return self.model_copy(update={"licences": merged, "again": again})


def params_of(profile: Profile, stages: Iterable[type[Stage[Any]]]) -> dict[str, StageParams]:
    """Return stage name -> parameters, with weights found on this machine."""
    return {stage.name: profile.params(stage) for stage in stages}


def with_local_loras(shot: Shot, inputs: Mapping[str, str] | None = None) -> Shot:
    """Return the shot with its built-in LoRAs replaced by files of this machine.

    With `inputs`, those of the shot's plan, a LoRA is only loaded if the file still has its planned digest.
    """

    def local(lora: LoraRef) -> LoraRef:
        fields = {**lora.model_dump(), "path": str(resolve(lora.path))}
        if inputs is None:
            return type(lora)(**fields)
        with_digest = LocalVideoLora if isinstance(lora, VideoLora) else LocalLora
        return with_digest(**{**fields, "sha256": inputs[lora.path]})

    return shot.model_copy(update={name: tuple(map(local, getattr(shot, name))) for name in LORA_FIELDS})


class ShotPlanner:
    """Plans the steps and keys of shots.

    Files are hashed once and cached, so create a planner for each run. `params` must cover the stages of all shots that will be
    planned. Shots need an id and a seed.
    """

    def __init__(
        self,
        params: Mapping[str, StageParams],
        encode: BaseModel,
        licences: Callable[[Shot, Sequence[type[Stage[Any]]]], tuple[UsedWeights, ...]] | None = None,
        provenance: ProvenanceSettings = DEFAULT_PROVENANCE,
    ) -> None:
        """`licences`: finds the weights behind a shot with these stages, for its record. `provenance`: how files are marked."""
        self._params = params
        self._licences = licences
        self._options = {name: _json(of_stage.for_key()) for name, of_stage in params.items()}
        self._end = f'["shot",{OUTPUT_VERSION},{_json(encode.model_dump(mode="json"))},{_json(provenance.for_key())}'
        self._digest = lru_cache(CACHED_DIGESTS)(lambda path: digest(Path(path)))
        self._lora_digest = lru_cache(CACHED_DIGESTS)(lambda path: digest(resolve(path)))
        self._weights_of = cached(
            LRUCache(CACHED_DIGESTS),
            key=lambda stages, shot: (stages, *[getattr(shot, field) for field in _weight_fields(stages)]),
            lock=Lock(),
        )(self._hash_weights)

    def __call__(self, shot: Shot, salt: str = "", stages: tuple[type[Stage[Any]], ...] | None = None) -> ShotPlan:
        """Plan a shot. Shots with different `salt` share no key. `stages`: those of the shot, if they are known.

        Raises StageError or SetupError if the shot names something that does not exist, or has no start frame yet.
        """
        if shot.continue_from is not None and shot.image is None:
            raise StageError(f"continue_from: the last frame of {shot.continue_from} is not known yet; see Shot.continued")
        stages = stages_of(shot) if stages is None else stages
        for stage in stages:
            self._params[stage.name].check_shot(shot, stage.name)
            stage.check_shot(self._params[stage.name], shot)
        steps, last = self._steps_of(shot, stages, salt)
        has_likeness = any("image_likeness" in stage.writes for stage in stages)
        key_text = f'{self._end},"{last}",{_json(shot.crop_width)},{_json(shot.crop_height)}'
        key = _key_with_rule(key_text, shot.min_identity if has_likeness else None, shot.max_tries)
        inputs, licences = self._inputs_of(shot), self._licences(shot, stages) if self._licences else ()
        cut = cut_texts(stages, self._params, shot)
        again = []
        for number in range(2, shot.max_tries + 1) if has_likeness and shot.min_identity is not None else ():
            other = shot.with_seed_of_try(number)
            again.append(
                ShotPlan(
                    shot=other,
                    steps=self._steps_of(other, stages, salt)[0],
                    key=key,
                    inputs=inputs,
                    number=number,
                    cut_texts=cut,
                    licences=licences,
                )
            )
        return ShotPlan(
            shot=shot,
            steps=steps,
            key=key,
            inputs=inputs,
            key_text=key_text if has_likeness else None,
            cut_texts=cut,
            licences=licences,
            again=tuple(again),
        )

    def _inputs_of(self, shot: Shot) -> dict[str, str]:
        """Return path -> sha256 of each file that the shot names."""
        images = [path for path in (*(getattr(shot, name) for name in FILE_FIELDS), *shot.face_image) if path is not None]
        loras = {lora.path: self._lora_digest(lora.path) for lora in shot.all_loras}
        return {path: self._digest(path) for path in images} | loras

    def _steps_of(self, shot: Shot, stages: tuple[type[Stage[Any]], ...], salt: str) -> tuple[tuple[Step, ...], str]:
        """Return the steps and the key of the last result."""
        fields_of_stages = tuple([_fields_of(stage, stage.uses_identity(shot)) for stage in stages])
        values = {
            name: _QUICK_JSON.get(type(value), _json)(value)
            for name, value in self._field_values(shot, fields_of_stages).items()
        }
        start = _object(START_FIELDS if shot.image else (), values)
        key = _sha256(f'["start",{start},{_json(salt)}]')
        steps = []
        for stage, fields, (weights, weights_json) in zip(
            stages, fields_of_stages, self._weights_of(stages, shot), strict=True
        ):
            parts = (
                f'"{stage.name}"',
                str(stage.version),
                _object(fields, values),
                self._options[stage.name],
                weights_json,
                f'"{key}"',
            )
            key = _sha256(f"[{','.join(parts)}]")
            steps.append(Step(stage=stage.name, key=key, weights=weights))
        return tuple(steps), key

    def _field_values(self, shot: Shot, fields_of_stages: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
        """Return field -> its value, for the fields of these stages. Files are represented by their digest."""
        names, values_of = _plain_fields(fields_of_stages)
        values: dict[str, Any] = dict(zip(names, values_of(shot), strict=True))
        for name in FILE_FIELDS:
            path = getattr(shot, name)
            values[name] = None if path is None else self._digest(path)
        for name in FILES_FIELDS:
            values[name] = [*map(self._digest, getattr(shot, name))]
        for name in READ_LORA_FIELDS:
            values[name] = [*map(self._lora_values, getattr(shot, name))]
        return values

    def _lora_values(self, lora: LoraRef) -> tuple[Any, ...]:
        expert = (lora.expert,) if isinstance(lora, VideoLora) else ()
        return self._lora_digest(lora.path), lora.weight, *expert

    def _hash_weights(self, stages: tuple[type[Stage[Any]], ...], shot: Shot) -> list[tuple[tuple[str, ...], str]]:
        """Return for each stage the digests of its weights for the shot, and the same as JSON."""
        shot, hashed = with_local_loras(shot), []
        for stage in stages:
            digests = tuple(self._digest(str(file)) for file in stage.weight_files(self._params[stage.name], shot))
            hashed.append((digests, _json(digests)))
        return hashed


def is_result_of(plan: ShotPlan, record: Mapping[str, Any]) -> bool:
    """Return whether the plan would make the shot of this record again.

    `record` is the content of `shot.json`. Apart from equal keys, this is true if only `min_identity` and `max_tries` differ,
    and the plan would keep the same try: that one reaches the new minimum, and those before it do not.
    """
    if record["key"] == plan.key:
        return True
    if plan.key_text is None or record["likeness"] is None:
        return False
    shot, kept, likeness = record["shot"], record["tries"], record["likeness"]
    old, new = shot["min_identity"], plan.shot.min_identity
    if record["key"] != _key_with_rule(plan.key_text, old, shot["max_tries"]):
        return False
    # Earlier tries were below the old minimum.
    if kept > 1 and (new is None or new < old or kept > plan.shot.max_tries):
        return False
    measured = (likeness["image"], likeness["clip_mean"]) if plan.shot.generate_video else (likeness["image"],)
    return new is None or all(value is not None and value >= new for value in measured)


def _key_with_rule(key_text: str, min_identity: float | None, max_tries: int) -> str:
    # The number of tries is part of the rule: a shot that fails after two may succeed after three.
    rule = "" if min_identity is None else f",{_json(min_identity)},{max_tries}"
    return _sha256(f"{key_text}{rule}]")


@cache
def _fields_of(stage: type[Stage[Any]], uses_identity: bool) -> tuple[str, ...]:
    """Return the fields that the stage reads, sorted."""
    return tuple(sorted((*stage.reads, *stage.identity_fields) if uses_identity else stage.reads))


@cache
def _plain_fields(fields_of_stages: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], Callable[[Shot], tuple[Any, ...]]]:
    """Return the plain fields among these and those of a start image, and what gets their values from a shot."""
    names = tuple({*START_FIELDS, *chain.from_iterable(fields_of_stages)} - NOT_PLAIN_FIELDS)
    # `steps.flux` names a nested field.
    return names, attrgetter(*names)


@cache
def _weight_fields(stages: tuple[type[Stage[Any]], ...]) -> tuple[str, ...]:
    """Return the fields that determine the weights of these stages, each once."""
    return tuple(dict.fromkeys(field for stage in stages for field in stage.weight_fields))


def _object(fields: Iterable[str], values: Mapping[str, str]) -> str:
    """Return the JSON object with these fields, which are sorted. `values`: field -> its value as JSON."""
    return "{" + ",".join([f'"{field}":{values[field]}' for field in fields]) + "}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
