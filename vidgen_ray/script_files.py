"""The files that scripts come in, as lines of fields: .jsonl, .csv, .txt, .parquet, .yaml. Knows no shot."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vidgen_ray.errors import FieldError, ScriptError

HEADER_FIELDS = ("title", "defaults", "characters", "shots")
TEXT_FIELDS = ("id", "prompt", "negative_prompt", "style_prompt", "character", "image", "face_image", "upscaler")
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
class Unreadable:
    """A line of which no fields could be read."""

    text: str
    error: FieldError


@dataclass(frozen=True, slots=True)
class Header:
    """What a .yaml script says for all its shots."""

    defaults: Mapping[str, Any]
    characters: Mapping[str, Mapping[str, Any]]


class _FieldTwice(Exception):
    """A JSON object names a field twice."""

    def __init__(self, field: str) -> None:
        self.field = field


def typed(fields: Mapping[str, str]) -> dict[str, Any]:
    """Fields given as text, in a CSV cell or on a command line, with the types that the text spells."""
    return {name: value if name in TEXT_FIELDS else _cell(value) for name, value in fields.items()}


def _cell(text: str) -> Any:
    spelled = {"true": True, "false": False}.get(text.strip().lower())
    if spelled is not None:
        return spelled
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float | list | dict) else text


def shortened(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


Lines = Iterator[tuple[int, Line | Unreadable]]
NO_HEADER = Header({}, {})


def open_script(path: Path) -> tuple[Header, Lines]:
    """The header and, with their numbers, the lines; a line that cannot be read is an error in their midst.

    Raises ScriptError where the file as a whole cannot be read.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".parquet": _parquet, ".yaml": _yaml, ".yml": _yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _refused(path, f"a {path.suffix or 'nameless'} file", f"a script is one of {', '.join(sorted(readers))}")
    try:
        if not path.is_file():
            raise _refused(path, str(path), "must be a file" if path.exists() else "there is no such file")
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


def _json_line(path: Path, number: int, text: str) -> Line | Unreadable:
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice)
    except _FieldTwice as twice:
        return Unreadable(text, FieldError(path.name, number, twice.field, "the field twice", "each field stands once"))
    except (ValueError, RecursionError) as error:
        allowed = f"must be a JSON object on one line ({error})"
        return Unreadable(text, FieldError(path.name, number, None, shortened(text), allowed))
    if not isinstance(value, dict):
        allowed = "must be a JSON object with at least a prompt"
        return Unreadable(text, FieldError(path.name, number, None, shortened(value), allowed))
    return Line(number, value, strict=True)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise _FieldTwice(twice)
    return out


def _csv(path: Path) -> tuple[Header, Lines]:
    # Not splitlines: it would cut cells at signs that end no row, such as U+2028.
    rows = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
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
                yield number, Unreadable("", FieldError(path.name, number, None, "a broken row", f"must be CSV ({error})"))
                continue
            if None in row:
                text = ",".join(map(str, row.values()))
                too_many = FieldError(path.name, rows.line_num, None, "more cells than columns", "quote commas")
                yield rows.line_num, Unreadable(text, too_many)
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
    names = file.schema_arrow.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise _refused(path, f"the column {twice[0]!r} twice", "each column stands once")
    for field in file.schema_arrow:
        # Extension types may carry code to be run on reading (CVE-2026-41486).
        if isinstance(field.type, pyarrow.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
            raise _refused(path, f"an extension type in column {field.name}", "columns are text, numbers, lists and structs")

    def lines() -> Lines:
        number = 0
        try:
            for batch in file.iter_batches(1024):
                for row in range(batch.num_rows):
                    number += 1
                    yield number, _parquet_row(path, number, batch.slice(row, 1))
        except (pyarrow.ArrowException, OSError) as error:
            raise _refused(path, f"damaged data after row {number}", f"write the script again ({error})") from None

    return NO_HEADER, lines()


def _parquet_row(path: Path, number: int, row: Any) -> Line | Unreadable:
    try:
        return Line(number, _without_nulls(row.to_pylist()[0]), strict=True)
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        allowed = f"must be text, numbers, lists and structs ({error})"
        return Unreadable("", FieldError(path.name, number, None, "a row that cannot be read", allowed))


def _without_nulls(value: Any) -> Any:
    """Parquet has no missing fields, only null ones."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


class _StrictLoader(yaml.SafeLoader):
    """YAML without two of its traps: aliases, of which a few lines can make gigabytes, and fields that stand twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(path: Path) -> tuple[Header, Lines]:
    try:
        content = yaml.load(_text(path), _StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _refused(path, "something that is not YAML", " ".join(str(error).split())) from None
    if not isinstance(content, dict) or not isinstance(content.get("shots"), list):
        raise _refused(path, "no list of shots", "a .yaml script has `shots:`, a list, beside title, defaults and characters")
    if unknown := set(content) - set(HEADER_FIELDS):
        raise _refused(
            path, f"an unknown header field {sorted(unknown, key=str)[0]!r}", f"the header has {', '.join(HEADER_FIELDS)}"
        )
    defaults, characters = content.get("defaults") or {}, content.get("characters") or {}
    for name, value in (("defaults", defaults), ("characters", characters)):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _refused(path, f"{name}: {shortened(value)}", "must be a set of named fields")
    for name, character in characters.items():
        known = isinstance(character, dict) and set(character) <= set(CHARACTER_FIELDS)
        if not known or not isinstance(character.get("trigger", ""), str):
            raise _refused(
                path,
                f"character {name!r}: {shortened(character)}",
                f"a character has {', '.join(CHARACTER_FIELDS)}, the last as text",
            )

    def lines() -> Lines:
        for number, shot in enumerate(content["shots"], start=1):
            if isinstance(shot, str):
                shot = {"prompt": shot}
            if isinstance(shot, dict):
                yield number, Line(number, shot, strict=True)
            else:
                allowed = "a shot is a prompt or a set of fields"
                yield number, Unreadable(str(shot), FieldError(path.name, number, None, shortened(shot), allowed))

    return Header(defaults, characters), lines()
