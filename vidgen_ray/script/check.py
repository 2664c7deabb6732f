"""Check one line of a script: fill in defaults and characters, validate the fields and look for its files."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import JsonValue, TypeAdapter, ValidationError

from vidgen_ray.content_keys import CutText
from vidgen_ray.errors import (
    NOT_A_URL,
    URL_START,
    FieldError,
    MediaError,
    ScriptError,
    SetupError,
    explain,
    in_json,
    shortened_value,
)
from vidgen_ray.graph import STAGES, stages_of, uncropped_size
from vidgen_ray.limits import MAX_IMAGE_BYTES, MAX_LORA_BYTES, MAX_NESTING
from vidgen_ray.media.media_file import load_font, missing_letter
from vidgen_ray.outputs.folder import store_input
from vidgen_ray.safety import (
    DECLARED_BASES,
    DEFAULT_POLICY,
    EXAMPLE,
    NO_POLICY,
    TEXT_EXAMPLE,
    Consent,
    ContentPolicy,
    UnsafeContent,
    safety_of,
)
from vidgen_ray.script.expansion import (
    CHOSEN,
    LINE_PROMPT,
    MATRIX_NUMBER,
    STYLE,
    expand,
    is_expandable,
    normal_form,
    with_character,
    with_style,
)
from vidgen_ray.script.lines import (
    FAILURE_FIELD,
    NO_HEADER,
    PATH_FIELDS,
    Header,
    Line,
    ScriptSettings,
    WrongField,
    absolute_path,
    with_absolute_paths,
)
from vidgen_ray.shot import (
    DERIVED_FIELDS,
    ID_PATTERN,
    IMAGE_FIELDS,
    LORA_FIELDS,
    MATRIX,
    NESTED_FIELDS,
    LoraRef,
    Shot,
    derive_id,
    nest_flat_settings,
    wrong_defaults,
)
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.identity import identities
from vidgen_ray.system.cache_dir import cache_dir, digest
from vidgen_ray.video_models import MODEL_DEFAULTS, VIDEO_MODELS, is_per_model, per_model, without_other_models_defaults
from vidgen_ray.weights import resolve

INTEGER_FIELDS = {name for name, field in Shot.model_fields.items() if field.annotation in (int, int | None)}
INTEGER_FIELDS |= {"scale", "interpolation"}
_NAME = re.compile(rf"{ID_PATTERN.pattern}|[A-Za-z0-9._-]{{0,64}}:[A-Za-z0-9-]{{1,64}}")
"""Id of a shot, or name of a rejected line."""
HUB_REPOSITORY = re.compile(r"(hub:.*|hf:.*|[\w-][\w.-]*/[\w.-]+(?<!\.safetensors))")
"""Name of a repository of a model hub. Others are files."""
OUTER_LEVELS = 4
"""Nesting levels that a plan adds around a shot's metadata. JSON parsers limit the total depth."""
_METADATA = TypeAdapter(JsonValue)
SMALL_CROP = 0.25
"""A crop that keeps less than this share of the finished picture is noted: it may be meant in pixels before upscaling."""
CAPTION_PX = 24
"""Height of the letters for the check whether the font has them."""


@dataclass
class LineChecker:
    """Checks the lines of one script. Can be pickled, so that lines can be checked by several processes."""

    source: str
    """Name of the script, for messages."""
    folder: Path
    """Folder to which paths are relative."""
    fallback: Mapping[str, Any] = field(default_factory=dict)
    """Values of fields that a line does not set."""
    run_seed: int = 0
    header: Header = NO_HEADER
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are set on every shot after its checks."""
    policy: ContentPolicy = DEFAULT_POLICY
    """Rules for the content of lines."""
    script: str = ""
    """Name of the script in the output folder. Default: `source`."""
    inputs: Path | None = None
    """Folder for images that are inside of a table. Default: in the cache folder of this machine."""

    @staticmethod
    def of(settings: ScriptSettings, header: Header) -> "LineChecker":
        """Return the checker for a script. Raises ScriptError for wrong defaults and missing files in the header."""
        fallback = merged(settings.profile_defaults, settings.defaults, header.defaults)
        path = settings.path
        if twice := next((name for name in settings.characters if name in header.characters), None):
            allowed = "must not be in the file of --characters, too"
            raise ScriptError([FieldError(path.name, None, f"characters.{twice}", "a character twice", allowed)])
        header = replace(header, characters={**settings.characters, **header.characters})
        checker = LineChecker(
            path.name, settings.folder, fallback, settings.run_seed, header, settings.changes, settings.policy
        )
        checker._check_header()
        return checker

    def _check_header(self) -> None:
        """Raise ScriptError for wrong defaults of the header, and for files of its characters and styles that do not exist.

        Checked once, so that the mistake is not reported for every line.
        """
        header = self.header
        own = {name: value for name, value in header.defaults.items() if name not in ("character", STYLE)}
        wrong = [(f"defaults.{name}", got, allowed) for name, got, allowed in wrong_defaults(own, strict=True)]
        for name, named in (("character", header.characters), (STYLE, header.styles)):
            if (default := header.defaults.get(name)) is not None and normal_form(str(default)) not in named:
                wrong.append((f"defaults.{name}", shortened_value(default), f"must be one of {', '.join(named) or 'none'}"))
        sections = {"defaults": {"": header.defaults}, "characters": header.characters, "styles": header.styles}
        for section, named in sections.items():
            for name, fields in named.items():
                place = f"{section}.{name}" if name else section
                if not wrong:
                    errors = file_errors(fields, self.folder)
                    wrong += [(f"{place}.{error.field}", error.got, error.allowed) for error in errors]
        if wrong:
            raise ScriptError([FieldError(self.source, None, *each) for each in wrong])

    def check(self, line: Line) -> Line:
        """Set the shots or the errors of the line, and return it. It has no `id` yet unless it brings a valid one."""
        line.source, line.script, line.script_line = self.source, self.script or self.source, line.number
        if line.errors:
            return line
        # 24.0 is 24 in a field of integers: pandas and JavaScript write it so.
        own = {
            name: int(value) if name in INTEGER_FIELDS and isinstance(value, float) and value.is_integer() else value
            for name, value in line.fields.items()
        }
        if (deep := next((name for name, value in own.items() if is_deep(value)), None)) is not None:
            # The value stays out of all that follows: neither its repr nor its JSON can be relied on.
            line.fields = {"unreadable": shortened_value(deep)}
            line.reject(deep, "a value that is nested too deeply", f"must have at most {MAX_NESTING} levels")
            return line
        failure = own.pop(FAILURE_FIELD, None)
        _set_origin(line, failure)
        line.has_own_id = own.get("id") is not None
        own |= self._stored_images(own)
        if is_expandable(own):
            # As it is written, since a rejected line is one row.
            line.fields = self._with_defaults(line, own, "")
            try:
                for number, (fields, suffix, values, chosen) in enumerate(expand(own)):
                    place: dict[str, Any] = {LINE_PROMPT: values.get("prompt", own.get("prompt"))}
                    if values or chosen:
                        place |= {MATRIX: values or None, CHOSEN: chosen or None, MATRIX_NUMBER: number}
                    named = self._with_names(line, self._with_defaults(line, fields, suffix), fields, place)
                    self._add_shots(line, fields, named)
            except WrongField as error:
                line.reject(error.field, error.got, error.allowed)
        else:
            line.fields = self._with_names(line, self._with_defaults(line, own, ""), own)
            self._add_shots(line, own, line.fields)
        for name in PATH_FIELDS:
            if name in line.fields:
                line.fields[name] = with_absolute_paths(name, line.fields[name], partial(absolute_path, self.folder))
        own_id = line.fields.get("id")
        line.id = line.failed_as or (own_id if isinstance(own_id, str) and ID_PATTERN.fullmatch(own_id) else "")
        if failure:
            line.notes = ()
        if self.changes:
            line.shots = tuple(shot.model_copy(update=self.changes).cropped_to_aspect() for shot in line.shots)
        return line

    def _stored_images(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return paths of the images that are structs of bytes and a path, and the id of such a line."""
        structs = {name: own[name] for name in (*IMAGE_FIELDS, "face_image") if _holds_images(own.get(name))}
        if not structs:
            return {}
        folder = self.inputs or cache_dir() / "inputs"
        found: dict[str, Any] = {}
        for name, value in structs.items():
            paths = [_stored_image(folder, each) for each in (value if isinstance(value, list) else [value])]
            found[name] = paths if isinstance(value, list) else paths[0]
        # Names of stored files depend on their content only, their folder does not matter.
        named = {name: str(paths).replace(str(folder), "") for name, paths in found.items()}
        return found | {"id": own.get("id") or derive_id({**own, **named})}

    def _with_defaults(self, line: Line, own: Mapping[str, Any], suffix: str) -> dict[str, Any]:
        fields = merged(self.fallback, line.defaults, own)
        own_id = own.get("id")
        if own_id is None:
            # Derived from the line's own fields only: changed defaults must not change its id and seed.
            fields["id"] = derive_id(dict(own))
        elif suffix and isinstance(own_id, str):
            fields["id"] = own_id + suffix
        for name in NESTED_FIELDS:
            nested = own.get(name)
            for stage in nested if isinstance(nested, dict) else ():
                if f"{stage}.{name}" in own or f"{name}.{stage}" in own:
                    line.reject(f"{name}.{stage}", "two values", f"must be set once, as {name}.{stage} or in {name}")
        return fields

    def _with_names(
        self, line: Line, fields: dict[str, Any], own: Mapping[str, Any], place: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Return the fields with those of the character and the style. Their names and `place` are in the metadata only.

        They exist only in this script, but the line may move to failures.jsonl.
        """
        character, style = fields.pop("character", None), fields.pop(STYLE, None)
        line_prompt = place.get(LINE_PROMPT) or fields.get("prompt")
        try:
            fields, character = with_character(fields, own, self.header.characters, character)
            if style is not None:
                fields = with_style(fields, own, self.header.styles, style)
        except WrongField as error:
            line.reject(error.field, error.got, error.allowed)
            names = {"character": character, STYLE: style}
            return {**fields, **{name: value for name, value in names.items() if value is not None}}
        labels = {"scene": line.scene, "character": character, STYLE: style, **place}
        may_differ = any(labels.get(name) for name in ("character", STYLE, CHOSEN))
        labels[LINE_PROMPT] = line_prompt if may_differ and isinstance(line_prompt, str) else None
        labels = {name: label for name, label in labels.items() if label is not None}
        metadata = fields.get("metadata") or {}
        return {**fields, "metadata": {**labels, **metadata}} if labels and isinstance(metadata, dict) else fields

    def _add_shots(self, line: Line, own: Mapping[str, Any], fields: dict[str, Any]) -> None:
        shot = None if line.errors else self._validate(line, fields)
        if shot is not None:
            shot = self._with_consent(line, self._with_absolute_paths(line, shot))
        if shot is None or line.errors:
            return
        shots = list(_seeded_variants(shot, self.run_seed))
        known = {shot.id for shot in line.shots}
        if twice := next((variant.id for variant in shots if variant.id in known), None):
            line.reject("id", repr(twice), "two shots of this line have the same id; use values that differ more")
            return
        line.shots += tuple(shots)
        where = f"{self.source} line {line.number}" if line.number else self.source
        notes = [f"{where}, {name}: has no effect; {advice}" for name, advice in ignored_settings(own, shot)]
        if (kept := _cropped_share(shot)) < SMALL_CROP:
            whole = "x".join(map(str, uncropped_size(shot)))
            notes.append(f"{where}, crop_width, crop_height: keep {kept:.1%} of the finished {whole} pixels")
        if (letter := self._undrawable_letter(shot)) is not None:
            notes.append(
                f"{where}, caption: the font of films has no letter {letter!r}; burnt-in captions need a font that has it"
            )
        line.notes += tuple(note for note in notes if note not in line.notes)

    def _undrawable_letter(self, shot: Shot) -> str | None:
        """Return a letter of the shot's caption that the font of the script's film does not have."""
        caption = shot.metadata.get("caption")
        if not isinstance(caption, str):
            return None
        named = (self.header.film or {}).get("font")
        font = absolute_path(self.folder, named) if isinstance(named, str) else None
        try:
            return missing_letter(caption, load_font(None if font is None else Path(font), CAPTION_PX))
        except OSError:
            # `vidgen film` names a font that cannot be read.
            return None

    def _validate(self, line: Line, fields: dict[str, Any]) -> Shot | None:
        try:
            shot = Shot.model_validate(fields, strict=line.strict)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                field, got, allowed = explain(detail, Shot.model_fields)
                if detail["input"] is None and detail["type"] != "missing":
                    got = in_json(None)
                if detail["type"] == "string_type" and isinstance(detail["input"], bool):
                    allowed = "must be text; put it into quotes, since YAML reads on, off, yes and no as true and false"
                line.reject(field, got, allowed)
            return None
        except (ValueError, RecursionError) as error:
            line.reject(None, "invalid values", f"must be plain JSON, not nested deeply ({error})")
            return None
        if shot.identity not in identities():
            line.reject("identity", shortened_value(shot.identity), f"must be one of {', '.join(identities())}")
        self._check_texts(line, shot)
        if shot.continue_from is not None and shot.image is not None:
            line.reject("continue_from", shortened_value(shot.continue_from), "must not be set together with image")
        if shot.crop_width is not None or shot.crop_height is not None:
            for name, whole in zip(("crop_width", "crop_height"), uncropped_size(shot), strict=True):
                crop = getattr(shot, name)
                if crop is not None and crop > whole:
                    line.reject(name, str(crop), f"must be at most {whole}, the {name[5:]} of the finished clip or image")
        # Shots are sent between machines as JSON. `metadata` is the only field that may not survive it unchanged.
        if shot.metadata and not _is_plain_json(shot.metadata):
            allowed = "must be plain JSON, not nested deeply, without NaN, Infinity or invalid Unicode"
            line.reject("metadata", shortened_value(shot.metadata), allowed)
        return shot

    def _check_texts(self, line: Line, shot: Shot) -> None:
        """Texts that the safety checker refuses are errors of the line. What an image must not show may be named."""
        if self.policy.safety is None:
            return
        safety = safety_of(self.policy.safety)
        for name in ("prompt", "style_prompt", "motion_prompt"):
            if (text := getattr(shot, name)) is not None:
                try:
                    safety.check_prompt(text)
                except UnsafeContent as error:
                    line.reject(name, shortened_value(text), str(error))

    def _with_absolute_paths(self, line: Line, shot: Shot) -> Shot:
        """Return the shot with absolute paths. Files that do not exist are errors of the line."""
        paths: dict[str, Any] = {}
        for name in IMAGE_FIELDS:
            if (image := getattr(shot, name)) is not None:
                paths[name] = self._existing_file(line, name, image)
        if shot.face_image:
            paths["face_image"] = tuple(self._existing_file(line, "face_image", photo) for photo in shot.face_image)
        for name in LORA_FIELDS:
            if loras := getattr(shot, name):
                paths[name] = tuple(self._existing_lora(line, name, lora) for lora in loras)
                files = [lora.model_dump(exclude={"weight"}) for lora in paths[name]]
                if twice := next((file["path"] for file in files if files.count(file) > 1), None):
                    line.reject(name, shortened_value(twice), "is listed twice; list it once, with the sum of the weights")
        return shot.model_copy(update=paths) if paths else shot

    def _with_consent(self, line: Line, shot: Shot) -> Shot:
        """Return the shot with the consent to record. A face photo without one is an error of the line."""
        if not shot.face_image:
            # A LoRA or a start image may show the person of a declared consent, a text alone does not.
            is_kept = shot.consent is None or shot.all_loras or shot.has_start_image
            return shot if is_kept else shot.model_copy(update={"consent": None})
        if line.errors:
            return shot
        try:
            consent = consent_for_photos(shot.face_image, shot.consent, required=self.policy.require_consent)
        except WrongField as error:
            for_all = f"; for all lines: --consent {TEXT_EXAMPLE}" if error.field == "consent" and line.number else ""
            line.reject(error.field, error.got, f"{error.allowed}{for_all}")
            return shot
        return shot if consent == shot.consent else shot.model_copy(update={"consent": consent})

    def _locate(self, path: str) -> tuple[str, int | None]:
        """Return a path in a line as an absolute one, and the bytes of the file. `None` if it does not exist."""
        absolute = absolute_path(self.folder, path)
        try:
            status = os.stat(absolute)
        # ValueError for paths that cannot be encoded, OSError also for those that are too long.
        except (OSError, ValueError):
            return absolute, None
        return absolute, status.st_size if stat.S_ISREG(status.st_mode) else None

    def _existing_file(self, line: Line, field: str, path: str) -> str:
        absolute, size = self._locate(path)
        if size is None and (URL_START.match(path) or path.startswith("data:")):
            line.reject(field, shortened_value(path), NOT_A_URL)
        elif size is None:
            line.reject(field, shortened_value(path), f"must be an existing file (looked for {absolute})")
        else:
            _check_bytes(line, field, path, size, MAX_IMAGE_BYTES)
        return absolute

    def _existing_lora(self, line: Line, field: str, lora: LoraRef) -> LoraRef:
        is_weights = lora.path.endswith(".safetensors")
        # A built-in name is not resolved to a path, because each machine builds its own copy.
        if lora.path.startswith("builtin:") and is_weights:
            try:
                resolve(lora.path)
            except SetupError as error:
                line.reject(field, shortened_value(lora.path), str(error))
            return lora
        absolute, size = self._locate(lora.path)
        if size is None and URL_START.match(lora.path):
            line.reject(field, shortened_value(lora.path), NOT_A_URL)
        elif size is None and HUB_REPOSITORY.fullmatch(lora.path):
            allowed = "must be a .safetensors file; LoRAs are not read from a hub, download it first: hf download OWNER/NAME"
            line.reject(field, shortened_value(lora.path), allowed)
        elif size is None or not is_weights:
            line.reject(field, shortened_value(lora.path), f"must be an existing .safetensors file (looked for {absolute})")
        else:
            _check_bytes(line, field, lora.path, size, MAX_LORA_BYTES)
        return lora.model_copy(update={"path": absolute})


def _holds_images(value: Any) -> bool:
    each = value[0] if isinstance(value, list) and value else value
    return isinstance(each, dict) and each.keys() <= {"bytes", "path"}


def _stored_image(folder: Path, image: Mapping[str, Any]) -> Any:
    """Return the path of an image. Its bytes are written to the folder if it has any."""
    content = image.get("bytes")
    return str(store_input(folder, content, ".image")) if isinstance(content, bytes) else image.get("path")


def with_cut_prompts(line: Line, cut: Iterable[CutText], *, strict: bool) -> Line:
    """Return the line with notes about the prompts that text encoders cut. `strict`: reject it instead."""
    cut = tuple(cut)
    if strict and cut:
        line = replace(line)
        line.reject("prompt", "a prompt that is too long", "; ".join(dict.fromkeys(map(str, cut))))
        return line
    where = f"{line.source} line {line.number}" if line.number else line.source
    notes = dict.fromkeys(f"{where}, prompt: {each}" for each in cut)
    return replace(line, notes=(*line.notes, *notes)) if notes else line


def _set_origin(line: Line, failure: Any) -> None:
    """Set where a line of failures.jsonl comes from. `failure`: its field of this name."""
    if not isinstance(failure, dict):
        return
    if isinstance(script := failure.get("script"), str):
        line.script = script
        number = failure.get("line")
        line.script_line = number if isinstance(number, int) else line.number
    failed_id = failure.get("id")
    if isinstance(failed_id, str) and _NAME.fullmatch(failed_id):
        line.failed_as = failed_id


def file_errors(fields: Mapping[str, Any], folder: Path) -> tuple[FieldError, ...]:
    """Return the errors of those fields that name files. Relative paths are relative to `folder`."""
    files = {name: value for name, value in fields.items() if name in PATH_FIELDS}
    if not files:
        return ()
    return LineChecker("vidgen", folder, policy=NO_POLICY).check(Line(0, {"prompt": "any", **files})).errors


def _check_bytes(line: Line, field: str, path: str, size: int, limit: int) -> None:
    """Reject a file before it is hashed and read."""
    if size > limit:
        line.reject(field, shortened_value(path), f"has {size:,} bytes, must have at most {limit:,}")


def is_deep(value: Any) -> bool:
    """Return whether lists and mappings are nested in more than MAX_NESTING levels."""
    if not isinstance(value, dict | list):
        return False
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _cropped_share(shot: Shot) -> float:
    if shot.crop_width is None and shot.crop_height is None:
        return 1.0
    width, height = uncropped_size(shot)
    return (shot.crop_width or width) / width * (shot.crop_height or height) / height


def _is_plain_json(metadata: JsonValue) -> bool:
    """Return true if the metadata can be sent as JSON inside a plan."""
    for _ in range(OUTER_LEVELS):
        metadata = [metadata]
    try:
        return _METADATA.validate_json(_METADATA.dump_json(metadata)) == metadata
    except (ValueError, RecursionError):
        return False


def _seeded_variants(shot: Shot, run_seed: int) -> Iterator[Shot]:
    """Yield the shot of each variant."""
    assert shot.id is not None
    if shot.variants == 1:
        yield shot.with_seed(run_seed)
        return
    for number in range(shot.variants):
        # Variants use consecutive seeds from the line's seed. Without one, each seed is derived from the variant's id.
        seed = None if shot.seed is None else (shot.seed + number) % 2**32
        shot_id = f"{shot.id}-v{number}"
        yield shot.model_copy(update={"id": shot_id, "variants": 1, "seed": seed}).with_seed(run_seed)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge fields. Later layers win. `steps` and `guidance` are merged per stage, `metadata` per name.

    A layer with another `video_model` removes `num_frames` and `fps` of earlier layers, which are those of their model. Values
    per model are merged per model.
    """
    out: dict[str, Any] = {}
    for layer in filter(None, layers):
        fields = nest_flat_settings(dict(layer))
        out = without_other_models_defaults(out, fields)
        out |= {name: per_model(out, name) for name in MODEL_DEFAULTS if name in out and is_per_model(fields.get(name))}
        previous = {name: out[name] for name in (*NESTED_FIELDS, "metadata", *MODEL_DEFAULTS) if name in out and name in fields}
        out.update(fields)
        for name, settings in previous.items():
            if isinstance(settings, dict) and isinstance(fields[name], dict):
                out[name] = {**settings, **fields[name]}
    return out


_ADVICE = {
    "style_prompt": "set use_hunyuan_style to true, in mode quality",
    "style_strength": "set use_hunyuan_style to true, in mode quality",
    "lora_strength": "set lora, in mode quality",
    "min_identity": "set face_image",
    "max_tries": "set min_identity",
}
"""Field -> what to do."""
OF_THE_IMAGE = frozenset(("style_prompt", "style_strength", "lora_strength"))
"""Fields that a continued shot does not read."""
WITHOUT_NOTE = frozenset(("prompt", "negative_prompt", "seed", "width", "height", "metadata"))
"""Fields that stages read in nearly every shot, that concern what the chain starts from, or that have a use without a stage."""
STAGES_OF_FIELD: dict[str, list[type[Stage[Any]]]] = {}
for _stage in STAGES:
    for _field in (*_stage.reads, *_stage.identity_fields):
        STAGES_OF_FIELD.setdefault(_field, []).append(_stage)
_DEFAULTS = {name: field.default for name, field in Shot.model_fields.items()}
NOTED = frozenset(STAGES_OF_FIELD) - WITHOUT_NOTE
CHECKED = NOTED | {"min_identity", "max_tries", *NESTED_FIELDS}


def ignored_settings(own: Mapping[str, Any], shot: Shot) -> Iterator[tuple[str, str]]:
    """Yield field and advice for each field that the line sets to another value than the default, but its shot does not use."""
    if CHECKED.isdisjoint(own) and not any("." in name for name in own):
        return
    read = _fields_read(tuple([(stage, stage.uses_identity(shot)) for stage in stages_of(shot)]))
    for name in _set_fields(own):
        if name in NOTED and name not in read and not (name == "lora" and _has_lora(read, shot)):
            if shot.continue_from is not None and name in OF_THE_IMAGE:
                yield name, "the shot starts from the last frame of another one, which is not changed"
                continue
            yield name, _ADVICE.get(name) or _advice(name, shot)
    if own.get("min_identity") is not None and not shot.face_image:
        yield "min_identity", _ADVICE["min_identity"]
    if shot.max_tries > 1 and "max_tries" in own and shot.min_identity is None:
        yield "max_tries", _ADVICE["max_tries"]


def _advice(field: str, shot: Shot) -> str:
    """Return how a shot would read a field that its stages do not read."""
    stages = STAGES_OF_FIELD[field]
    if shot.generate_video and all(stage.name in VIDEO_MODELS for stage in stages):
        return f"set video_model to {' or '.join(stage.name for stage in stages)}"
    if not shot.face_image and any(stage in stages for stage in stages_of(shot)):
        return "set face_image"
    labels = ", ".join(dict.fromkeys(stage.label for stage in stages))
    return f"only these stages read it, and the shot passes none of them: {labels}"


def _set_fields(own: Mapping[str, Any]) -> Iterator[str]:
    for name, value in nest_flat_settings(dict(own)).items():
        if name in NESTED_FIELDS and isinstance(value, dict):
            yield from (f"{name}.{stage}" for stage, setting in value.items() if setting is not None)
        elif value is not None and name in _DEFAULTS and value != _DEFAULTS[name]:
            yield name


@cache
def _fields_read(passed: tuple[tuple[type[Stage[Any]], bool], ...]) -> frozenset[str]:
    """Return the fields that these stages read. True: together with those of its identity."""
    return frozenset(name for stage, uses in passed for name in (*stage.reads, *(stage.identity_fields if uses else ())))


def _has_lora(read: frozenset[str], shot: Shot) -> bool:
    """Return whether a stage reads the LoRAs of the shot under another name."""
    return any(getattr(shot, name) for name, fields in DERIVED_FIELDS.items() if "lora" in fields and name in read)


class ShippedPhoto(NamedTuple):
    """A photo that comes with vidgen."""

    subject: str
    name: str
    """File in `examples/faces`."""
    bytes: int
    side: int
    """Width and height in pixels."""
    pixels: str
    """sha256 of the RGB pixels, by which a copy is known that a program has decoded and written again."""


SHIPPED_PHOTOS = {
    "cb2d7d8680b3450e4851c19fb0471d5cb90f1089d097deddae60c4b88d5bd5bf": ShippedPhoto(
        "ada (drawn)", "ada.png", 9942, 256, "316893fb33d714187ac92bf939c1aa240cb9275e90a280d99f25d177384f29ca"
    ),
    "69b36e8e41819d71388d2c2a6632298dc3c868661c05f2bd97bdc7c578ae9190": ShippedPhoto(
        "bo (drawn)", "bo.png", 11332, 256, "2a354d0c7d85946e37a0e1a5c8aa16a8a9d5c340feb8553c7a2754af23c39144"
    ),
    "1bc8c08c652c7217fff665d60318ad464259f5ede9d693559578aeec0a601147": ShippedPhoto(
        "cleo (drawn)", "cleo.png", 11877, 256, "9b32e923716df1114f7f56ccfc4d96fe80e85af8eb7f208b080e0082315abfa4"
    ),
    "36857b6ad04ceb78e932c3b1cb37f902255afd53fa15eb2f228654ca34de43ad": ShippedPhoto(
        "dan (drawn)", "dan.png", 12217, 256, "0a1842a35113d9ac93925fe2384fc36b29d1f9ac19e39f454674af1fed9a4c04"
    ),
    "11bb779f62bc185ae7184a38d6ffbbc6395408231e90642e8bb9ba094f783427": ShippedPhoto(
        "eve (drawn)", "eve.png", 9252, 256, "512646bd7e32e00ac553008349792bd6f23f9faeda1adee1ce5af3a5736b543c"
    ),
    "370adb9cb9dd03ca911ea316fb227495e01095398bc1f71188a3995209b9c81a": ShippedPhoto(
        "Eileen Collins", "astronaut.jpg", 74962, 512, "1aa869c97ca028d3a740a3096ac7cad74e1185d121793b6f896fef3ff2382b62"
    ),
}
"""sha256 -> photo: drawn people, and a portrait in the public domain."""
SHIPPED_SIZES = {photo.bytes for photo in SHIPPED_PHOTOS.values()}
SHIPPED_SIDES = {(photo.side, photo.side) for photo in SHIPPED_PHOTOS.values()}
SHIPPED_PIXELS = {photo.pixels: photo for photo in SHIPPED_PHOTOS.values()}


def consent_for_photos(photos: Sequence[str], declared: Consent | None, *, required: bool) -> Consent | None:
    """Return the consent to record for face photos, which are paths: the declared one, or `demo` for shipped photos.

    Raises WrongField if there is none, unless consent is not `required`, and for the basis `demo` of other photos.
    """
    if declared is not None and declared.basis != "demo":
        return declared
    found = [_shipped(Path(photo)) for photo in photos]
    if required or declared is not None:
        # Only of photos that would be refused.
        found = [photo or _shipped_pixels(Path(path)) for photo, path in zip(found, photos, strict=True)]
    shipped = [photo for photo in found if photo is not None]
    if len(shipped) == len(found):
        subject = ", ".join(dict.fromkeys(photo.subject for photo in shipped))
        files = ", ".join(dict.fromkeys(photo.name for photo in shipped))
        return declared or Consent(subject=subject, basis="demo", reference=f"examples/faces: {files}")
    if declared is not None:
        raise WrongField(
            "consent.basis", "'demo'", f"is for the photos of vidgen only; must be one of {', '.join(DECLARED_BASES)}"
        )
    if required:
        raise WrongField("consent", "nothing", f"a face needs {EXAMPLE}; basis: {', '.join(DECLARED_BASES)}")
    return None


def _shipped(photo: Path) -> ShippedPhoto | None:
    """Return the shipped photo with the content of this file, or `None`. Hashes only files that have the size of one."""
    with suppress(OSError):
        if photo.stat().st_size in SHIPPED_SIZES:
            return SHIPPED_PHOTOS.get(digest(photo))
    return None


def _shipped_pixels(photo: Path) -> ShippedPhoto | None:
    """Return the shipped photo with the pixels of this image, or `None`. Decodes only images that have the size of one."""
    # Imported here: scripts without images need no pixels.
    from vidgen_ray.media.images import image_size, read_image

    with suppress(MediaError):
        if image_size(photo) in SHIPPED_SIDES:
            return SHIPPED_PIXELS.get(hashlib.sha256(read_image(photo).tobytes()).hexdigest())
    return None


def check_shot(
    fields: Mapping[str, Any],
    source: str,
    profile_defaults: Mapping[str, Any],
    run_seed: int = 0,
    *,
    policy: ContentPolicy = DEFAULT_POLICY,
) -> Shot:
    """Validate a shot that is not from a file. Raises ScriptError with an error for each invalid field."""
    checker = LineChecker(source, Path.cwd(), merged(profile_defaults), run_seed, policy=policy)
    line = checker.check(Line(0, dict(fields), strict=False))
    if len(line.shots) > 1:
        # A line of choices or a matrix is several shots without `variants`.
        field = "variants" if "variants" in fields else MATRIX if MATRIX in fields else "prompt"
        allowed = "must be one; choices {a|b}, a matrix and variants are for scripts (vidgen render)"
        line.reject(field, f"{len(line.shots)} shots", allowed)
    if line.errors:
        raise ScriptError(line.errors)
    return line.shot
