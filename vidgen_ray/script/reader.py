"""Script reader: turns lines into validated shots.

Fills in defaults and characters and checks that files exist. Memory use does not grow with the script.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue, TypeAdapter, ValidationError

from vidgen_ray.errors import FieldError, ScriptError, SetupError
from vidgen_ray.script.formats import Line, UnreadableLine, open_script, shortened
from vidgen_ray.script.spill_index import ScriptIndex
from vidgen_ray.shot import ID_PATTERN, NESTED_FIELDS, LoraRef, Shot, derive_id, nest_flat_settings
from vidgen_ray.stages.identity import identities
from vidgen_ray.weights import resolve

FAILURE_FIELD = "failure"
"""Field that `failures.jsonl` adds to a line. Not a field of the shot."""
WINDOW_SHOTS = 512
"""Shots whose ids are looked up together."""
PATH_CACHE_SIZE = 4096
OUTER_LEVELS = 4
"""Nesting levels that a plan adds around a shot's metadata. JSON parsers limit the total depth."""
METADATA = TypeAdapter(JsonValue)


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """Invalid line, with all of its errors."""

    id: str
    script: str
    """Script of the line. For a line of failures.jsonl: the original script."""
    line: int
    """Line number, from 1."""
    fields: dict[str, Any]
    """Fields with defaults filled in and absolute paths, so that the line can be copied to another script."""
    errors: tuple[FieldError, ...]


class CheckedLine(NamedTuple):
    """Valid shot with its seed and absolute paths. A line with variants yields one for each variant."""

    shot: Shot
    line: int
    """Line number in the script, from 1."""
    replaces: str | None
    """Id under which the line failed in an earlier run, if it differs."""


@dataclass(frozen=True, slots=True)
class Script:
    """Valid shots and rejected lines of a script. Variants are separate shots."""

    source: str
    shots: tuple[Shot, ...]
    lines: Mapping[str, int]
    """Shot id -> line number, from 1."""
    rejected: tuple[RejectedLine, ...]
    replaces: Mapping[str, str]
    """Shot id -> id under which its line failed in an earlier run, if it differs."""

    @property
    def errors(self) -> list[FieldError]:
        """Errors of all rejected lines."""
        return [error for line in self.rejected for error in line.errors]


def iter_script(
    path: Path,
    *,
    run_seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    profile_defaults: Mapping[str, Any] | None = None,
) -> Iterator[CheckedLine | RejectedLine]:
    """Yield the valid shots of a script in order, then the rejected lines in order.

    Rejected lines come last because their ids must differ from those of all shots. Memory use does not grow with the
    script: ids and rejected lines are kept in TMPDIR. Only .yaml scripts are read as a whole.

    Missing fields are taken from the script's header, then from `defaults` (the command line), then from
    `profile_defaults`. Raises ScriptError, possibly after some lines, if the file cannot be read or has no lines.
    """
    header, lines = open_script(path)
    fallback = _merged(profile_defaults or {}, defaults or {}, header.defaults)
    context = _ScriptContext(path.name, path.parent, fallback, header.characters, run_seed)
    empty = True
    with ScriptIndex() as index:
        for window in _windows(_check_line(number, parsed, context) for number, parsed in lines):
            empty = False
            yield from _unique_shots(window, index)
        for name, rejected in groupby(index.rejected_lines(), _default_id):
            names = _numbered(name)
            for line in rejected:
                yield _with_unique_id(line, names, index)
    if empty:
        raise ScriptError([FieldError(path.name, None, None, "no lines", "must have at least one shot")])


def read_script(
    path: Path,
    *,
    run_seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    profile_defaults: Mapping[str, Any] | None = None,
) -> Script:
    """Read a script that fits into memory. See `iter_script`."""
    checked = list(iter_script(path, run_seed=run_seed, defaults=defaults, profile_defaults=profile_defaults))
    valid = [line for line in checked if isinstance(line, CheckedLine)]
    return Script(
        path.name,
        tuple(line.shot for line in valid),
        {line.shot.id: line.line for line in valid if line.shot.id},
        tuple(line for line in checked if isinstance(line, RejectedLine)),
        {line.shot.id: line.replaces for line in valid if line.shot.id and line.replaces},
    )


def _check_line(number: int, parsed: Line | UnreadableLine, context: "_ScriptContext") -> "_LineChecker | RejectedLine":
    if isinstance(parsed, Line):
        return _LineChecker(parsed, context)
    fields = {"unreadable": parsed.text} if parsed.text else {}
    return RejectedLine("", context.source, number, fields, (parsed.error,))


def _windows(lines: Iterable["_LineChecker | RejectedLine"]) -> Iterator[list["_LineChecker | RejectedLine"]]:
    """Group lines into windows of about WINDOW_SHOTS shots."""
    window: list[_LineChecker | RejectedLine] = []
    ids = 0
    for line in lines:
        window.append(line)
        ids += len(line.shots) if isinstance(line, _LineChecker) else 1
        if ids >= WINDOW_SHOTS or len(window) >= WINDOW_SHOTS:
            yield window
            window, ids = [], 0
    if window:
        yield window


def _unique_shots(window: Iterable["_LineChecker | RejectedLine"], index: ScriptIndex) -> Iterator[CheckedLine]:
    """Yield the shots of these lines. Lines that are invalid or repeat an id are added to the index's rejected lines."""
    line_of = index.lines_of([shot_id for line in window if isinstance(line, _LineChecker) for shot_id in line.shots])
    new: dict[str, int] = {}
    for line in window:
        if isinstance(line, RejectedLine):
            _add_rejected(line, index)
            continue
        if duplicate := next((shot_id for shot_id in line.shots if shot_id in line_of), None):
            line.reject("id", repr(duplicate), f"line {line_of[duplicate]} has the same id; use unique ids, or variants")
        if not line.shots:
            _add_rejected(line.rejected(), index)
        for shot_id, shot in line.shots.items():
            new[shot_id] = line_of[shot_id] = line.number
            yield CheckedLine(shot, line.number, line.failed_as if line.failed_as != shot_id else None)
    index.add(new)


def _add_rejected(line: RejectedLine, index: ScriptIndex) -> None:
    try:
        index.add_rejected(line)
    except RecursionError:
        shallow = {name: value for name, value in line.fields.items() if not isinstance(value, dict | list)}
        index.add_rejected(replace(line, fields=shallow))


def _default_id(line: RejectedLine) -> str:
    """Return the id of a line without one: `SCRIPT-line-NUMBER`."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(line.script).stem)[:60] or "script"
    return f"{stem}-line-{line.line}"


def _with_unique_id(line: RejectedLine, names: Iterator[str], index: ScriptIndex) -> RejectedLine:
    """Return the rejected line with a unique id, under which it gets its own manifest row."""
    own_id = line.fields.get("id")
    # If the line kept the id of a valid shot, rendering failures.jsonl would overwrite that shot's clip.
    is_taken = isinstance(own_id, str) and own_id in index.lines_of([own_id])
    line_id = next(name for name in chain([line.id] if line.id else [], names) if index.claim(name))
    return replace(line, id=line_id, fields={**line.fields, "id": line_id} if is_taken else line.fields)


def _numbered(name: str) -> Iterator[str]:
    """Yield `name`, `name-2`, `name-3`, ..."""
    yield name
    for number in count(2):
        yield f"{name}-{number}"


def check_shot(fields: Mapping[str, Any], source: str, profile_defaults: Mapping[str, Any], run_seed: int = 0) -> Shot:
    """Validate a shot that is not from a file. Raises ScriptError with an error for each invalid field."""
    context = _ScriptContext(source, Path.cwd(), _merged(profile_defaults), {}, run_seed)
    line = _LineChecker(Line(None, dict(fields), strict=False), context)
    if len(line.shots) > 1:
        line.reject("variants", str(len(line.shots)), "must be 1; only scripts can have variants")
    if line.errors:
        raise ScriptError(line.errors)
    (shot,) = line.shots.values()
    return shot


class _ScriptContext:
    """Settings shared by the lines of a script."""

    def __init__(
        self,
        source: str,
        folder: Path,
        fallback: Mapping[str, Any],
        characters: Mapping[str, Mapping[str, Any]],
        run_seed: int,
    ) -> None:
        self.source = source
        self.fallback = fallback
        self.characters = characters
        self.run_seed = run_seed
        self.locate = lru_cache(PATH_CACHE_SIZE)(partial(_locate, folder))
        """Path in a line -> absolute path, and true if the file exists."""


def _locate(folder: Path, path: str) -> tuple[str, bool]:
    # os.path, unlike pathlib, accepts unknown users in `~user` and paths that are too long.
    absolute = os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
    return absolute, os.path.isfile(absolute)


class _LineChecker:
    """Validates a line and fills in its defaults. The result is either shots or errors."""

    def __init__(self, line: Line, context: _ScriptContext) -> None:
        self.errors: list[FieldError] = []
        self.shots: dict[str, Shot] = {}
        """Id -> shot. Empty if there are errors."""
        self._line = line
        self._context = context
        own = dict(line.fields)
        failure = own.pop(FAILURE_FIELD, None)
        self._failure = failure if isinstance(failure, dict) else {}
        self._fields = _merged(context.fallback, own)
        if own.get("id") is None:
            # Derived from the line's own fields only: changed defaults must not change its id and seed.
            self._fields["id"] = derive_id(own)
        self._apply_character(own)
        shot = None if self.errors else self._validate()
        if shot is not None:
            shot = self._with_absolute_paths(shot)
        if shot is not None and not self.errors:
            self.shots = dict(_seeded_variants(shot, context.run_seed))

    def reject(self, field: str | None, got: str, allowed: str) -> None:
        """Add an error and drop the shots."""
        self.errors.append(FieldError(self._context.source, self._line.number, field, got, allowed))
        self.shots = {}

    @property
    def number(self) -> int:
        """Line number, from 1. 0 for a shot that is not from a file."""
        return self._line.number or 0

    @property
    def failed_as(self) -> str | None:
        """Id under which a line of failures.jsonl failed."""
        failed_id = self._failure.get("id")
        return failed_id if isinstance(failed_id, str) and ID_PATTERN.fullmatch(failed_id) else None

    def rejected(self) -> RejectedLine:
        """Return the line as a rejected line."""
        line_id = self._fields.get("id")
        own_id = line_id if isinstance(line_id, str) and ID_PATTERN.fullmatch(line_id) else ""
        script = self._failure.get("script")
        fields = {name: self._absolute_paths(name, value) for name, value in self._fields.items()}
        return RejectedLine(
            self.failed_as or own_id,
            script if isinstance(script, str) else self._context.source,
            self.number,
            fields,
            tuple(self.errors),
        )

    def _apply_character(self, own: Mapping[str, Any]) -> None:
        """Merge the fields of the line's character. They override the defaults, not the line's own fields."""
        name = self._fields.get("character")
        if name is None:
            return
        characters = self._context.characters
        if not isinstance(name, str) or name not in characters:
            names = ", ".join(characters) or "none; define characters in the header of a .yaml script"
            self.reject("character", shortened(name), f"must be one of the script's characters: {names}")
            return
        inherited = {field: value for field, value in characters[name].items() if field not in own and field != "trigger"}
        # The name is dropped: characters exist only in this script, but the line may move to failures.jsonl.
        self._fields = {**{field: value for field, value in self._fields.items() if field != "character"}, **inherited}
        trigger, prompt = characters[name].get("trigger"), self._fields.get("prompt")
        if trigger and isinstance(prompt, str) and prompt.strip():
            self._fields["prompt"] = f"{trigger}, {prompt}"

    def _validate(self) -> Shot | None:
        try:
            shot = Shot.model_validate(self._fields, strict=self._line.strict)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.reject(*explain(detail, Shot.model_fields))
            return None
        except (ValueError, RecursionError) as error:
            self.reject(None, "invalid values", f"must be plain JSON, not nested deeply ({error})")
            return None
        if shot.identity not in identities():
            self.reject("identity", shortened(shot.identity), f"must be one of {', '.join(identities())}")
        # Shots are sent between machines as JSON. `metadata` is the only field that may not survive it unchanged.
        if shot.metadata and not _is_plain_json(shot.metadata):
            allowed = "must be plain JSON, not nested deeply, without NaN, Infinity or invalid Unicode"
            self.reject("metadata", shortened(shot.metadata), allowed)
        return shot

    def _with_absolute_paths(self, shot: Shot) -> Shot:
        """Return the shot with absolute paths. Files that do not exist are errors of the line."""
        paths: dict[str, Any] = {}
        if shot.image is not None:
            paths["image"] = self._existing_file("image", shot.image)
        if shot.face_image:
            paths["face_image"] = tuple(self._existing_file("face_image", photo) for photo in shot.face_image)
        if shot.lora:
            paths["lora"] = tuple(map(self._existing_lora, shot.lora))
        return shot.model_copy(update=paths) if paths else shot

    def _existing_file(self, field: str, path: str) -> str:
        absolute, exists = self._context.locate(path)
        if not exists:
            self.reject(field, shortened(path), f"must be an existing file (looked for {absolute})")
        return absolute

    def _existing_lora(self, lora: LoraRef) -> LoraRef:
        is_weights = lora.path.endswith(".safetensors")
        # A built-in name is not resolved to a path, because each machine builds its own copy.
        if lora.path.startswith("builtin:") and is_weights:
            try:
                resolve(lora.path)
            except SetupError as error:
                self.reject("lora", shortened(lora.path), str(error))
            return lora
        absolute, exists = self._context.locate(lora.path)
        if not exists or not is_weights:
            self.reject("lora", shortened(lora.path), f"must be an existing .safetensors file (looked for {absolute})")
        return lora.model_copy(update={"path": absolute})

    def _absolute_paths(self, field: str, value: Any) -> Any:
        """Return a field's unvalidated value with absolute paths. Other fields are unchanged."""
        if field not in ("image", "face_image", "lora") or value is None:
            return value
        if isinstance(value, str):
            return value if value.startswith("builtin:") else self._context.locate(value)[0]
        if isinstance(value, list | tuple):
            return [item if isinstance(item, list | tuple) else self._absolute_paths(field, item) for item in value]
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return {**value, "path": self._absolute_paths(field, value["path"])}
        return value


def _is_plain_json(metadata: JsonValue) -> bool:
    """Return true if the metadata can be sent as JSON inside a plan."""
    for _ in range(OUTER_LEVELS):
        metadata = [metadata]
    try:
        return METADATA.validate_json(METADATA.dump_json(metadata)) == metadata
    except (ValueError, RecursionError):
        return False


def _seeded_variants(shot: Shot, run_seed: int) -> Iterator[tuple[str, Shot]]:
    """Yield the id and the shot of each variant."""
    assert shot.id is not None
    if shot.variants == 1:
        yield shot.id, shot.with_seed(run_seed)
        return
    for number in range(shot.variants):
        # Variants use consecutive seeds from the line's seed. Without one, each seed is derived from the variant's id.
        seed = None if shot.seed is None else (shot.seed + number) % 2**32
        shot_id = f"{shot.id}-v{number}"
        yield shot_id, shot.model_copy(update={"id": shot_id, "variants": 1, "seed": seed}).with_seed(run_seed)


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge fields. Later layers win. `steps` and `guidance` are merged per stage."""
    out: dict[str, Any] = {}
    for layer in layers:
        fields = nest_flat_settings(dict(layer))
        previous = {name: out[name] for name in NESTED_FIELDS if name in out and name in fields}
        out.update(fields)
        for name, settings in previous.items():
            if isinstance(settings, dict) and isinstance(fields[name], dict):
                out[name] = {**settings, **fields[name]}
    return out


def explain(detail: Any, fields: Iterable[str]) -> tuple[str | None, str, str]:
    """Return the field, the value and what is allowed, from a pydantic error of a model with these fields."""
    # `lora.weight` and `steps.flux`. Only metadata is nested deeper, to any depth.
    field = ".".join([part for part in detail["loc"] if isinstance(part, str)][:2]) or None
    if detail["type"] == "extra_forbidden" and field and "." in field:
        return field, "an unknown field", f"{field.split('.')[0]} has no such field"
    if detail["type"] == "extra_forbidden":
        return field, "an unknown field", f"must be one of {', '.join(fields)}"
    if detail["type"] == "missing":
        return field, "nothing", "this field is required"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    got = "the line" if field is None else shortened(detail["input"])
    return field, got, message[:1].lower() + message[1:]
