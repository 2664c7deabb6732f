"""The files that scripts come in, as lines of fields: .jsonl, .csv, .txt, .parquet, .yaml. Knows no shot."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vidgen_ray.errors import FieldError, ScriptError

HEADER_FIELDS = ("title", "defaults", "characters", "shots")
TEXT_FIELDS = ("id", "prompt", "negative_prompt", "style_prompt", "character")
"""Fields in which `7` is a word."""
CHARACTER_FIELDS = ("face_image", "lora", "trigger")


@dataclass(frozen=True, slots=True)
class Line:
    """The fields of one shot as the file gives them."""

    number: int | None
    """Counted from 1 as an editor does; for Parquet and YAML the shot, counted from 1."""
    fields: dict[str, Any]
    strict: bool
    """Whether types are the file's own (JSON) or everything is text (CSV)."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a .yaml script says for all its shots."""

    defaults: Mapping[str, Any]
    characters: Mapping[str, Mapping[str, Any]]


class _BadLine(Exception):
    def __init__(self, error: FieldError) -> None:
        self.error = error


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


def shortened(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


Lines = Iterator[tuple[int, Line | FieldError]]
NO_HEADER = Header({}, {})


def open_script(path: Path) -> tuple[Header, Lines]:
    """The header and, with their numbers, the lines; a line that cannot be read is an error in their midst.

    Raises ScriptError where the file as a whole cannot be read.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".parquet": _parquet, ".yaml": _yaml, ".yml": _yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _refused(path, f"a {path.suffix or 'nameless'} file", f"a script is one of {', '.join(sorted(readers))}")
    if not path.is_file():
        raise _refused(path, str(path), "there is no such file")
    try:
        return reader(path)
    except OSError as error:
        raise _refused(path, str(path), f"must be readable ({error.strerror})") from None


def _refused(path: Path, got: str, allowed: str) -> ScriptError:
    return ScriptError([FieldError(path.name, None, None, got, allowed)])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(path, f"bytes that are not UTF-8 at {error.start}", "save the script as UTF-8") from None


def _jsonl(path: Path) -> tuple[Header, Lines]:
    def lines() -> Lines:
        for number, text in enumerate(_text(path).split("\n"), start=1):
            if text.strip():
                yield number, _json_line(path, number, text)

    return NO_HEADER, lines()


def _json_line(path: Path, number: int, text: str) -> Line | FieldError:
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice)
    except _BadLine as bad:
        return FieldError(path.name, number, bad.error.field, bad.error.got, bad.error.allowed)
    except (ValueError, RecursionError) as error:
        return FieldError(path.name, number, None, shortened(text), f"must be a JSON object on one line ({error})")
    if not isinstance(value, dict):
        return FieldError(path.name, number, None, shortened(value), "must be a JSON object with at least a prompt")
    return Line(number, value, strict=True)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise _BadLine(FieldError("", None, twice, "the field twice", "each field stands once"))
    return out


def _csv(path: Path) -> tuple[Header, Lines]:
    rows = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
    try:
        columns = rows.fieldnames or []
    except csv.Error as error:
        raise _refused(path, "a broken first row", f"must name the columns ({error})") from None
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise _refused(path, f"the column {twice[0]!r} twice", "each column stands once")

    def lines() -> Lines:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                number = rows.reader.line_num
                yield number, FieldError(path.name, number, None, "a broken row", f"must be CSV ({error})")
                continue
            if None in row:
                yield rows.line_num, FieldError(path.name, rows.line_num, None, "more cells than columns", "quote commas")
                continue
            fields = {name: cell for name, cell in row.items() if cell not in (None, "")}
            yield rows.line_num, Line(rows.line_num, typed(fields), strict=False)

    return NO_HEADER, lines()


def _txt(path: Path) -> tuple[Header, Lines]:
    def lines() -> Lines:
        for number, text in enumerate(_text(path).split("\n"), start=1):
            if text.strip() and not text.lstrip().startswith("#"):
                yield number, Line(number, {"prompt": text.strip()}, strict=False)

    return NO_HEADER, lines()


def _parquet(path: Path) -> tuple[Header, Lines]:
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
                yield number, Line(number, _without_nulls(row), strict=True)

    return NO_HEADER, lines()


def _without_nulls(value: Any) -> Any:
    """Parquet has no missing fields, only null ones."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _yaml(path: Path) -> tuple[Header, Lines]:
    try:
        content = yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise _refused(path, "something that is not YAML", str(error)) from None
    if not isinstance(content, dict) or not isinstance(content.get("shots"), list):
        raise _refused(path, "no list of shots", "a .yaml script has `shots:`, a list, beside title, defaults and characters")
    if unknown := set(content) - set(HEADER_FIELDS):
        raise _refused(path, f"an unknown header field {sorted(unknown)[0]!r}", f"the header has {', '.join(HEADER_FIELDS)}")
    defaults, characters = content.get("defaults") or {}, content.get("characters") or {}
    for name, value in (("defaults", defaults), ("characters", characters)):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _refused(path, f"{name}: {shortened(value)}", "must be a set of named fields")
    for name, character in characters.items():
        if not isinstance(character, dict) or set(character) - set(CHARACTER_FIELDS):
            raise _refused(
                path, f"character {name!r}: {shortened(character)}", f"a character has {', '.join(CHARACTER_FIELDS)}"
            )

    def lines() -> Lines:
        for number, shot in enumerate(content["shots"], start=1):
            if isinstance(shot, str):
                shot = {"prompt": shot}
            if isinstance(shot, dict):
                yield number, Line(number, shot, strict=True)
            else:
                yield number, FieldError(path.name, number, None, shortened(shot), "a shot is a prompt or a set of fields")

    return Header(defaults, characters), lines()
