"""The files that scripts come in, as lines of fields: .jsonl, .csv, .txt, .parquet, .yaml. Knows no shot.

Lines are read as they are asked for, so memory does not grow with the script; but a .yaml script is read whole.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vidgen_ray.errors import FieldError, ScriptError
from vidgen_ray.strict_yaml import StrictLoader

HEADER_FIELDS = ("title", "defaults", "characters", "shots")
TEXT_FIELDS = ("id", "prompt", "negative_prompt", "style_prompt", "character", "image", "identity", "upscaler")
"""Fields in which `7` is a word."""
TEXT_OR_LIST_FIELDS = ("face_image",)
"""Fields in which `7` is a word and `["a", "b"]` a list of two."""
CHARACTER_FIELDS = ("face_image", "face_index", "identity", "identity_strength", "lora", "trigger")
MAX_LINE = 2**24
"""Letters in a line of text."""
MAX_YAML_BYTES = 2**24
"""Reading YAML takes seventy times the memory of its text and two seconds a megabyte."""
ROWS_AT_ONCE = 1024
COLUMN_BUFFER_BYTES = 2**18
"""Read ahead in each column of a Parquet file."""
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What stands for bytes that are not UTF-8 when they are read with `surrogateescape`."""


@dataclass(frozen=True, slots=True)
class Line:
    """The fields of one shot as the file gives them."""

    number: int | None
    """Counted from 1 as an editor does; for Parquet the row, counted from 1."""
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
    return {name: _typed(name, value) for name, value in fields.items()}


def _typed(name: str, text: str) -> Any:
    value = text if name in TEXT_FIELDS else _cell(text)
    return text if name in TEXT_OR_LIST_FIELDS and not isinstance(value, list) else value


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
    try:
        text = repr(value)
    except RecursionError:
        text = "what is nested too deeply"
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


def _refused_encoding(path: Path, line: int | None) -> ScriptError:
    return ScriptError([FieldError(path.name, line, None, "bytes that are not UTF-8", "save the script as UTF-8")])


def _text_lines(path: Path) -> Iterator[str]:
    """Each line with its end, which is a line feed whatever the file has. Raises ScriptError where the text breaks off."""
    file = path.open(encoding="utf-8-sig", errors="surrogateescape")

    def lines() -> Iterator[str]:
        number = 0
        with file:
            try:
                while text := file.readline(MAX_LINE):
                    number += 1
                    if not text.isascii() and NOT_UTF8.search(text):
                        raise _refused_encoding(path, number)
                    if len(text) == MAX_LINE:
                        got, allowed = f"more than {MAX_LINE:,} letters", "a shot stands on a line of its own"
                        raise ScriptError([FieldError(path.name, number, None, got, allowed)])
                    yield text
            except OSError as error:
                raise _refused(path, f"no more than {number} lines", f"must be readable ({error.strerror})") from None

    return lines()


def _jsonl(path: Path) -> tuple[Header, Lines]:
    texts = _text_lines(path)

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip():
                yield number, _json_line(path, number, text.removesuffix("\n"))

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
    rows = csv.DictReader(_text_lines(path), strict=True)
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
        # With `pre_buffer`, a row group would be read whole, and a script is often one row group.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=COLUMN_BUFFER_BYTES, pre_buffer=False)
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
            for batch in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
                for row in _rows(batch):
                    number += 1
                    yield number, _parquet_row(path, number, row)
        except (pyarrow.ArrowException, OSError) as error:
            raise _refused(path, f"damaged data after row {number}", f"write the script again ({error})") from None

    return NO_HEADER, lines()


NO_PYTHON_VALUE = (UnicodeDecodeError, ValueError, OverflowError)
"""What pyarrow raises for text that is not UTF-8 or a time that Python cannot hold."""


def _rows(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a batch; for one that Python cannot hold the reason."""
    try:
        yield from batch.to_pylist()
    except NO_PYTHON_VALUE:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except NO_PYTHON_VALUE as error:
                yield error


def _parquet_row(path: Path, number: int, row: dict[str, Any] | Exception) -> Line | Unreadable:
    if isinstance(row, Exception):
        allowed = f"must be text, numbers, lists and structs ({row})"
        return Unreadable("", FieldError(path.name, number, None, "a row that cannot be read", allowed))
    return Line(number, _without_nulls(row), strict=True)


def _without_nulls(value: Any) -> Any:
    """Parquet has no missing fields, only null ones."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _yaml_with_lines(path: Path) -> tuple[Any, list[int]]:
    """The content and, where it is a set of fields with a list of `shots`, the line on which each of them begins."""
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        allowed = f"at most {MAX_YAML_BYTES:,}, for YAML is read whole; a .jsonl or .parquet script may be of any length"
        raise _refused(path, f"{size:,} bytes", allowed)
    try:
        loader = StrictLoader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
    except UnicodeDecodeError as error:
        raise _refused_encoding(path, error.object.count(b"\n", 0, error.start) + 1) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _refused(path, "something that is not YAML", " ".join(str(error).split())) from None
    fields = node.value if isinstance(node, yaml.MappingNode) else []
    shots = next((value for key, value in reversed(fields) if key.value == "shots"), None)
    return content, [shot.start_mark.line + 1 for shot in shots.value] if isinstance(shots, yaml.SequenceNode) else []


def _yaml(path: Path) -> tuple[Header, Lines]:
    content, starts = _yaml_with_lines(path)
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
        for number, shot in zip(starts, content["shots"], strict=True):
            if isinstance(shot, str):
                shot = {"prompt": shot}
            if isinstance(shot, dict):
                yield number, Line(number, shot, strict=True)
            else:
                allowed = "a shot is a prompt or a set of fields"
                yield number, Unreadable(str(shot), FieldError(path.name, number, None, shortened(shot), allowed))

    return Header(defaults, characters), lines()
