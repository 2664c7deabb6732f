"""Script formats: read .jsonl, .csv, .txt, .parquet and .yaml files as lines of unvalidated fields.

Lines are read lazily, so memory use does not grow with the script. Only .yaml files are read as a whole.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vidgen_ray.errors import FieldError, ScriptError
from vidgen_ray.shot import Shot
from vidgen_ray.strict_yaml import StrictLoader

HEADER_FIELDS = ("title", "defaults", "characters", "shots")
TEXT_FIELDS = frozenset(name for name, field in Shot.model_fields.items() if field.annotation in (str, str | None))
"""Fields in which `7` is text."""
TEXT_OR_LIST_FIELDS = ("face_image",)
"""Fields in which `7` is text and `["a", "b"]` a list."""
CHARACTER_FIELDS = ("face_image", "face_index", "identity", "identity_strength", "lora", "trigger")
MAX_LINE = 2**24
"""Maximum number of characters in a line of a text file."""
MAX_YAML_BYTES = 2**24
"""Maximum size of a .yaml script. Parsing takes 70 times the memory of the file and 2 s per megabyte."""
PARQUET_BATCH_ROWS = 1024
COLUMN_BUFFER_BYTES = 2**18
"""Read-ahead buffer of each Parquet column."""
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Characters that `surrogateescape` substitutes for bytes that are not UTF-8."""


@dataclass(frozen=True, slots=True)
class Line:
    """Unvalidated fields of a script line."""

    number: int | None
    """Line number, from 1. For Parquet: row number, from 1. `None` for a shot that is not from a file."""
    fields: dict[str, Any]
    strict: bool
    """True if the format has types (JSON), false if all values are text (CSV)."""


@dataclass(frozen=True, slots=True)
class UnreadableLine:
    """Line that could not be parsed."""

    text: str
    error: FieldError


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a .yaml script: defaults and characters."""

    defaults: Mapping[str, Any]
    characters: Mapping[str, Mapping[str, Any]]


class _DuplicateField(Exception):
    """A JSON object contains a field twice."""

    def __init__(self, field: str) -> None:
        self.field = field


def parse_text_fields(fields: Mapping[str, str]) -> dict[str, Any]:
    """Parse field values given as text, in a CSV cell or on the command line."""
    return {name: _parse_field(name, value) for name, value in fields.items()}


def _parse_field(name: str, text: str) -> Any:
    value = text if name in TEXT_FIELDS else _parse_value(text)
    return text if name in TEXT_OR_LIST_FIELDS and not isinstance(value, list) else value


def _parse_value(text: str) -> Any:
    boolean = {"true": True, "false": False}.get(text.strip().lower())
    if boolean is not None:
        return boolean
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float | list | dict) else text


def shortened(value: object) -> str:
    """Return the value as an error message shows it, at most 80 characters long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a value that is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


Lines = Iterator[tuple[int, Line | UnreadableLine]]
NO_HEADER = Header({}, {})


def open_script(path: Path) -> tuple[Header, Lines]:
    """Return the header and the numbered lines of a script. Lines that cannot be parsed are `UnreadableLine`.

    Raises ScriptError if the file cannot be read.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".parquet": _parquet, ".yaml": _yaml, ".yml": _yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _file_error(path, f"file type {path.suffix!r}", f"must be one of {', '.join(sorted(readers))}")
    try:
        if not path.is_file():
            raise _file_error(path, str(path), "must be a file" if path.exists() else "must be an existing file")
        return reader(path)
    except OSError as error:
        raise _file_error(path, str(path), f"must be readable ({error.strerror})") from None


def _file_error(path: Path, got: str, allowed: str) -> ScriptError:
    return ScriptError([FieldError(path.name, None, None, got, allowed)])


def _encoding_error(path: Path, line: int | None) -> ScriptError:
    return ScriptError([FieldError(path.name, line, None, "bytes that are not UTF-8", "save the script as UTF-8")])


def _text_lines(path: Path) -> Iterator[str]:
    """Yield the lines, each with its line end converted to a line feed. Raises ScriptError on a read error."""
    file = path.open(encoding="utf-8-sig", errors="surrogateescape")

    def lines() -> Iterator[str]:
        number = 0
        with file:
            try:
                while text := file.readline(MAX_LINE):
                    number += 1
                    if not text.isascii() and NOT_UTF8.search(text):
                        raise _encoding_error(path, number)
                    if len(text) == MAX_LINE:
                        got, allowed = f"more than {MAX_LINE:,} characters", "must be one shot per line"
                        raise ScriptError([FieldError(path.name, number, None, got, allowed)])
                    yield text
            except OSError as error:
                raise _file_error(path, f"a read error after line {number}", f"must be readable ({error.strerror})") from None

    return lines()


def _jsonl(path: Path) -> tuple[Header, Lines]:
    texts = _text_lines(path)

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip():
                yield number, _json_line(path, number, text.removesuffix("\n"))

    return NO_HEADER, lines()


def _json_line(path: Path, number: int, text: str) -> Line | UnreadableLine:
    try:
        value = json.loads(text, object_pairs_hook=_reject_duplicates)
    except _DuplicateField as duplicate:
        return UnreadableLine(text, FieldError(path.name, number, duplicate.field, "the field twice", "must appear only once"))
    except (ValueError, RecursionError) as error:
        allowed = f"must be a JSON object on one line ({error})"
        return UnreadableLine(text, FieldError(path.name, number, None, shortened(text), allowed))
    if not isinstance(value, dict):
        allowed = "must be a JSON object with at least a prompt"
        return UnreadableLine(text, FieldError(path.name, number, None, shortened(value), allowed))
    return Line(number, value, strict=True)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise _DuplicateField(next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i])))
    return out


def _check_unique(path: Path, columns: Sequence[str]) -> None:
    if duplicates := [name for name in columns if columns.count(name) > 1]:
        raise _file_error(path, f"the column {duplicates[0]!r} twice", "must appear only once")


def _csv(path: Path) -> tuple[Header, Lines]:
    rows = csv.DictReader(_text_lines(path), strict=True)
    try:
        columns = rows.fieldnames or []
    except csv.Error as error:
        raise _file_error(path, "an invalid first row", f"must contain the column names ({error})") from None
    _check_unique(path, columns)

    def lines() -> Lines:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                number = rows.reader.line_num
                invalid = FieldError(path.name, number, None, "an invalid row", f"must be CSV ({error})")
                yield number, UnreadableLine("", invalid)
                continue
            if None in row:
                text = ",".join(map(str, row.values()))
                allowed = "must quote cells that contain commas"
                too_many = FieldError(path.name, rows.line_num, None, "more cells than columns", allowed)
                yield rows.line_num, UnreadableLine(text, too_many)
                continue
            fields = {name: cell for name, cell in row.items() if cell not in (None, "")}
            yield rows.line_num, Line(rows.line_num, parse_text_fields(fields), strict=False)

    return NO_HEADER, lines()


def _txt(path: Path) -> tuple[Header, Lines]:
    texts = _text_lines(path)

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip() and not text.lstrip().startswith("#"):
                yield number, Line(number, {"prompt": text.strip()}, strict=False)

    return NO_HEADER, lines()


def _parquet(path: Path) -> tuple[Header, Lines]:
    import pyarrow
    import pyarrow.parquet

    try:
        # `pre_buffer` would read whole row groups, and a script is often a single row group.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=COLUMN_BUFFER_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise _file_error(path, "invalid Parquet", f"must be a readable Parquet file ({error})") from None
    _check_unique(path, file.schema_arrow.names)
    for field in file.schema_arrow:
        # Extension types may execute code when they are read (CVE-2026-41486).
        if isinstance(field.type, pyarrow.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
            allowed = "columns must be text, numbers, lists or structs"
            raise _file_error(path, f"an extension type in column {field.name}", allowed)

    def lines() -> Lines:
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
                for row in _rows(batch):
                    number += 1
                    yield number, _parquet_row(path, number, row)
        except (pyarrow.ArrowException, OSError) as error:
            raise _file_error(path, f"invalid data after row {number}", f"must be a readable Parquet file ({error})") from None

    return NO_HEADER, lines()


CONVERSION_ERRORS = (UnicodeDecodeError, ValueError, OverflowError)
"""Raised by pyarrow for text that is not UTF-8 and for times outside of Python's range."""


def _rows(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """Yield the rows of a batch. A row that cannot be converted to Python is yielded as its exception."""
    try:
        yield from batch.to_pylist()
    except CONVERSION_ERRORS:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except CONVERSION_ERRORS as error:
                yield error


def _parquet_row(path: Path, number: int, row: dict[str, Any] | Exception) -> Line | UnreadableLine:
    if isinstance(row, Exception):
        allowed = f"must be text, numbers, lists or structs ({row})"
        return UnreadableLine("", FieldError(path.name, number, None, "a row that cannot be read", allowed))
    return Line(number, _without_nulls(row), strict=True)


def table_lines(
    name: str, table: Any, to_fields: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Iterator[tuple[int, Line | UnreadableLine]]:
    """Yield the rows of a pyarrow table as lines without numbers. `to_fields` maps a row to the fields of a line.

    A row that cannot be read, or for which `to_fields` raises, is an UnreadableLine. `name`: of the data set, for messages.
    """
    for batch in table.to_batches():
        for row in _rows(batch):
            if isinstance(row, Exception):
                yield (
                    0,
                    UnreadableLine(
                        "", FieldError(name, None, None, "a row that cannot be read", f"must be plain data ({row})")
                    ),
                )
                continue
            fields = _without_nulls(row)
            try:
                yield 0, Line(None, to_fields(fields) if to_fields else fields, strict=True)
            # An error of the caller's function concerns this row only.
            except Exception as error:
                allowed = f"to_fields raised {type(error).__name__}: {error}"
                yield 0, UnreadableLine(shortened(fields), FieldError(name, None, None, shortened(fields), allowed))


def _without_nulls(value: Any) -> Any:
    """Remove null values, which stand for missing fields in Parquet."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _parse_yaml(path: Path) -> tuple[Any, list[int]]:
    """Return the content, and the line number of each entry of `shots`."""
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        allowed = f"must be at most {MAX_YAML_BYTES:,} bytes in YAML; .jsonl and .parquet scripts can be of any length"
        raise _file_error(path, f"{size:,} bytes", allowed)
    try:
        loader = StrictLoader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
    except UnicodeDecodeError as error:
        raise _encoding_error(path, error.object.count(b"\n", 0, error.start) + 1) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _file_error(path, "invalid YAML", " ".join(str(error).split())) from None
    fields = node.value if isinstance(node, yaml.MappingNode) else []
    shots = next((value for key, value in reversed(fields) if key.value == "shots"), None)
    return content, [shot.start_mark.line + 1 for shot in shots.value] if isinstance(shots, yaml.SequenceNode) else []


def _yaml(path: Path) -> tuple[Header, Lines]:
    content, line_numbers = _parse_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("shots"), list):
        raise _file_error(path, "no list of shots", "must have a list `shots`; title, defaults and characters are optional")
    if unknown := set(content) - set(HEADER_FIELDS):
        raise _file_error(
            path, f"an unknown header field {sorted(unknown, key=str)[0]!r}", f"must be one of {', '.join(HEADER_FIELDS)}"
        )
    defaults, characters = content.get("defaults") or {}, content.get("characters") or {}
    for name, value in (("defaults", defaults), ("characters", characters)):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _file_error(path, f"{name}: {shortened(value)}", "must be a mapping of names to values")
    for name, character in characters.items():
        valid = isinstance(character, dict) and set(character) <= set(CHARACTER_FIELDS)
        if not valid or not isinstance(character.get("trigger", ""), str):
            raise _file_error(
                path,
                f"character {name!r}: {shortened(character)}",
                f"must be a mapping with {', '.join(CHARACTER_FIELDS)}; trigger must be text",
            )

    def lines() -> Lines:
        for number, shot in zip(line_numbers, content["shots"], strict=True):
            if isinstance(shot, str):
                shot = {"prompt": shot}
            if isinstance(shot, dict):
                yield number, Line(number, shot, strict=True)
            else:
                allowed = "must be a prompt or a mapping of fields"
                yield number, UnreadableLine(str(shot), FieldError(path.name, number, None, shortened(shot), allowed))

    return Header(defaults, characters), lines()
