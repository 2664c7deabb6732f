"""Scripts: .jsonl, .csv, .txt, .parquet and .yaml files become checked shots. All lines are checked before any is used."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vidgen_ray.errors import FieldError, ScriptError, SetupError
from vidgen_ray.shot import ID_PATTERN, LoraRef, Shot, derive_id, nest_flat_settings
from vidgen_ray.weights import resolve

FAILURE_FIELD = "failure"
"""What `failures.jsonl` adds to a line; ignored when that file is rendered again."""
HEADER_FIELDS = ("title", "defaults", "characters", "shots")
TEXT_FIELDS = ("id", "prompt", "negative_prompt", "style_prompt", "character")
"""Fields in which `7` is a word."""
CHARACTER_FIELDS = ("face_image", "lora", "trigger")


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line that cannot be rendered, with everything that is wrong with it."""

    id: str
    line: int
    raw: dict[str, Any]
    errors: tuple[FieldError, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """The shots of a script, variants written out, seeds and files filled in; and the lines that were refused."""

    source: str
    shots: tuple[Shot, ...]
    lines: Mapping[str, int]
    """Shot id -> the line it came from, counted from 1."""
    rejected: tuple[RejectedLine, ...]

    @property
    def errors(self) -> list[FieldError]:
        return [error for line in self.rejected for error in line.errors]


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    fields: dict[str, Any]
    strict: bool
    """Whether types are the file's own (JSON) or everything is text (CSV)."""


@dataclass(frozen=True, slots=True)
class _Header:
    defaults: Mapping[str, Any]
    characters: Mapping[str, Mapping[str, Any]]


class _BadLine(Exception):
    def __init__(self, error: FieldError) -> None:
        self.error = error


def read_script(
    path: Path,
    *,
    run_seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    profile_defaults: Mapping[str, Any] | None = None,
) -> Script:
    """Read and check a whole script.

    A field that a line leaves out comes from the script's header, then from `defaults` (the command line), then from
    `profile_defaults`. Raises ScriptError where the file cannot be read or holds no lines at all.
    """
    header, lines = _open(path)
    fallback = _merged(profile_defaults or {}, defaults or {}, header.defaults)
    shots: list[Shot] = []
    rejected: list[RejectedLine] = []
    where: dict[str, int] = {}
    count = 0
    for number, parsed in lines:
        count += 1
        if isinstance(parsed, FieldError):
            rejected.append(RejectedLine(f"line-{number}", number, {}, (parsed,)))
            continue
        checked = _check(path, parsed, fallback, header.characters)
        if isinstance(checked, tuple):
            rejected.append(RejectedLine(_id_for_report(parsed), number, parsed.fields, checked))
            continue
        for shot in _variants(checked):
            assert shot.id is not None
            if shot.id in where:
                allowed = f"line {where[shot.id]} has it already; give each an id of its own, or use variants"
                error = FieldError(path.name, number, "id", repr(shot.id), allowed)
                rejected.append(RejectedLine(f"line-{number}", number, parsed.fields, (error,)))
                break
            where[shot.id] = number
            shots.append(shot.with_seed(run_seed))
    if not count:
        raise ScriptError([FieldError(path.name, None, None, "no lines", "give at least one shot")])
    return Script(path.name, tuple(shots), where, tuple(rejected))


def check_shot(fields: Mapping[str, Any], source: str, profile_defaults: Mapping[str, Any], run_seed: int = 0) -> Shot:
    """One shot that does not come from a file. Raises ScriptError naming each wrong field."""
    line = _Line(0, dict(fields), strict=False)
    checked = _check(Path(source), line, profile_defaults, {}, base=Path.cwd())
    if isinstance(checked, tuple):
        raise ScriptError([FieldError(source, None, e.field, e.got, e.allowed) for e in checked])
    return checked.with_seed(run_seed)


def _check(
    path: Path,
    line: _Line,
    fallback: Mapping[str, Any],
    characters: Mapping[str, Mapping[str, Any]],
    base: Path | None = None,
) -> Shot | tuple[FieldError, ...]:
    base = base or path.parent

    def wrong(field: str | None, got: object, allowed: str) -> FieldError:
        return FieldError(path.name, line.number or None, field, _short(got), allowed)

    own = {k: v for k, v in line.fields.items() if k != FAILURE_FIELD}
    fields = _merged(fallback, own)
    if (name := fields.get("character")) is not None:
        if name not in characters:
            known = ", ".join(characters) or "none; characters stand in the header of a .yaml script"
            return (wrong("character", name, f"the script's characters are: {known}"),)
        fields = _as_character(fields, characters[name])
    try:
        shot = Shot.model_validate(fields, strict=line.strict)
    except ValidationError as error:
        return tuple(wrong(*_explained(detail)) for detail in error.errors(include_url=False))
    # What defaults change must not change the id, or a line would lose its seed with them.
    if shot.id is None:
        shot = shot.model_copy(update={"id": derive_id(own)})
    updates: dict[str, Any] = {}
    errors: list[FieldError] = []
    for field in ("image", "face_image"):
        if (value := getattr(shot, field)) is not None:
            file = base / Path(value).expanduser()
            if not file.is_file():
                errors.append(wrong(field, value, f"must be an existing file (looked for {file})"))
            updates[field] = str(file.absolute())
    loras = []
    for lora in shot.lora:
        try:
            # A built-in name stays a name: each machine builds its own copy.
            local = resolve(lora.path, base)
            loras.append(lora if lora.path.startswith("builtin:") else LoraRef(path=str(local), weight=lora.weight))
        except SetupError as error:
            errors.append(wrong("lora", lora.path, f"must be an existing .safetensors file ({error})"))
    updates["lora"] = tuple(loras)
    return tuple(errors) or shot.model_copy(update=updates)


def _variants(shot: Shot) -> Iterator[Shot]:
    if shot.variants == 1:
        yield shot
        return
    for number in range(shot.variants):
        # Variants of a line with a seed of its own take the seeds after it; without one, each is seeded by its id.
        seed = None if shot.seed is None else (shot.seed + number) % 2**32
        yield shot.model_copy(update={"id": f"{shot.id}-v{number}", "variants": 1, "seed": seed})


def _as_character(fields: dict[str, Any], character: Mapping[str, Any]) -> dict[str, Any]:
    out = {**{k: v for k, v in character.items() if k != "trigger"}, **fields}
    if trigger := character.get("trigger"):
        out["prompt"] = f"{trigger}, {fields.get('prompt', '')}"
    return out


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; `steps` and `guidance` are merged stage by stage."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in nest_flat_settings(dict(layer)).items():
            both = key in ("steps", "guidance") and isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = {**out[key], **value} if both else value
    return out


def typed(fields: Mapping[str, str]) -> dict[str, Any]:
    """Fields given as text, in a CSV cell or on a command line, with the types that the text spells."""
    return {name: value if name in TEXT_FIELDS else _cell(value) for name, value in fields.items()}


def _cell(text: str) -> Any:
    spelled = {"true": True, "false": False}.get(text.strip().lower())
    if spelled is not None:
        return spelled
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | list | dict) else text


def _explained(detail: Any) -> tuple[str | None, object, str]:
    field = ".".join(str(part) for part in detail["loc"] if not isinstance(part, int)) or None
    if detail["type"] == "extra_forbidden":
        return field, "an unknown field", f"the fields are {', '.join(Shot.model_fields)}"
    if detail["type"] == "missing":
        return field, "nothing", "this field is required"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    got = "the line" if field is None else detail["input"]
    return field, got, message[0].lower() + message[1:]


def _short(value: object) -> str:
    text = value if isinstance(value, str) and value in ("nothing", "the line", "an unknown field") else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _id_for_report(line: _Line) -> str:
    given = line.fields.get("id")
    return given if isinstance(given, str) and ID_PATTERN.fullmatch(given) else f"line-{line.number}"


Lines = Iterator[tuple[int, _Line | FieldError]]
NO_HEADER = _Header({}, {})


def _open(path: Path) -> tuple[_Header, Lines]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".parquet": _parquet, ".yaml": _yaml, ".yml": _yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _refused(path, f"a {path.suffix or 'nameless'} file", f"a script is one of {', '.join(sorted(readers))}")
    if not path.is_file():
        raise _refused(path, str(path), "there is no such file")
    return reader(path)


def _refused(path: Path, got: str, allowed: str) -> ScriptError:
    return ScriptError([FieldError(path.name, None, None, got, allowed)])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(path, f"bytes that are not UTF-8 at {error.start}", "save the script as UTF-8") from None


def _jsonl(path: Path) -> tuple[_Header, Lines]:
    def lines() -> Lines:
        for number, text in enumerate(_text(path).split("\n"), start=1):
            if text.strip():
                yield number, _json_line(path, number, text)

    return NO_HEADER, lines()


def _json_line(path: Path, number: int, text: str) -> _Line | FieldError:
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice)
    except _BadLine as bad:
        return FieldError(path.name, number, bad.error.field, bad.error.got, bad.error.allowed)
    except (ValueError, RecursionError) as error:
        return FieldError(path.name, number, None, _short(text), f"must be a JSON object on one line ({error})")
    if not isinstance(value, dict):
        return FieldError(path.name, number, None, _short(value), "must be a JSON object with at least a prompt")
    return _Line(number, value, strict=True)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise _BadLine(FieldError("", None, twice, "the field twice", "each field stands once"))
    return out


def _csv(path: Path) -> tuple[_Header, Lines]:
    def lines() -> Lines:
        rows = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
        try:
            for row in rows:
                if None in row:
                    yield (
                        rows.line_num,
                        FieldError(path.name, rows.line_num, None, "more cells than columns", "quote commas"),
                    )
                    continue
                fields = {k: v for k, v in row.items() if v not in (None, "")}
                yield rows.line_num, _Line(rows.line_num, typed(fields), strict=False)
        except csv.Error as error:
            yield rows.line_num, FieldError(path.name, rows.line_num, None, "a broken row", f"must be CSV ({error})")

    return NO_HEADER, lines()


def _txt(path: Path) -> tuple[_Header, Lines]:
    def lines() -> Lines:
        for number, text in enumerate(_text(path).split("\n"), start=1):
            if text.strip() and not text.lstrip().startswith("#"):
                yield number, _Line(number, {"prompt": text.strip()}, strict=False)

    return NO_HEADER, lines()


def _parquet(path: Path) -> tuple[_Header, Lines]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _refused(path, "something that is not Parquet", f"write the script again ({error})") from None
    for field in file.schema_arrow:
        # Extension types may carry code to be run on reading (CVE-2026-41486).
        if isinstance(field.type, pyarrow.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
            raise _refused(path, f"an extension type in column {field.name}", "columns are text, numbers, lists and structs")

    def lines() -> Lines:
        number = 0
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, _Line(number, _without_nulls(row), strict=True)

    return NO_HEADER, lines()


def _without_nulls(value: Any) -> Any:
    """Parquet has no missing fields, only null ones."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _yaml(path: Path) -> tuple[_Header, Lines]:
    try:
        content = yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise _refused(path, "something that is not YAML", str(error)) from None
    if not isinstance(content, dict) or not isinstance(content.get("shots"), list):
        raise _refused(path, "no list of shots", "a .yaml script has `shots:`, a list, beside title, defaults and characters")
    if unknown := set(content) - set(HEADER_FIELDS):
        raise _refused(path, f"an unknown header field {sorted(unknown)[0]!r}", f"the header has {', '.join(HEADER_FIELDS)}")
    characters = content.get("characters") or {}
    for name, character in characters.items():
        if not isinstance(character, dict) or set(character) - set(CHARACTER_FIELDS):
            raise _refused(path, f"character {name!r}: {_short(character)}", f"a character has {', '.join(CHARACTER_FIELDS)}")

    def lines() -> Lines:
        for number, shot in enumerate(content["shots"], start=1):
            if isinstance(shot, str):
                shot = {"prompt": shot}
            if isinstance(shot, dict):
                yield number, _Line(number, shot, strict=True)
            else:
                yield number, FieldError(path.name, number, None, _short(shot), "a shot is a prompt or a set of fields")

    return _Header(content.get("defaults") or {}, characters), lines()
