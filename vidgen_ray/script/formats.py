"""Script formats: read .jsonl, .csv, .txt, .parquet and .yaml files, and folders, as lines of unvalidated fields.

Lines are read lazily, so memory use does not grow with the script. Only .yaml files are read as a whole."""

import base64
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import isnan
from pathlib import Path
from typing import Any

from vidgen_ray.errors import SCHEMA_COMMAND, ScriptError, known_fields, shortened
from vidgen_ray.script.expansion import MATRIX, STYLE
from vidgen_ray.script.lines import (
    FAILURE_FIELD,
    NO_HEADER,
    Header,
    Line,
    Lines,
    file_error,
    parse_text_fields,
    text_lines,
    unreadable_line,
)
from vidgen_ray.script.screenplay import read_yaml
from vidgen_ray.shot import NESTED_FIELDS, STAGES_WITH_STEPS, Shot

METADATA_PREFIX = "metadata."
"""A column `metadata.NAME` becomes an entry of `metadata`."""
PANDAS_INDEX = "__index_level_0__"
"""Column in which pandas stores its index."""
FIELDS = (*Shot.model_fields, STYLE, MATRIX, FAILURE_FIELD)
FLAT_SETTINGS = tuple(
    name for field in NESTED_FIELDS for stage in STAGES_WITH_STEPS for name in (f"{field}.{stage}", f"{stage}.{field}")
)
ScriptVersion = tuple[tuple[int, int, int], ...]
"""Inode, size in bytes and modification time in ns of each file that is read."""
MAX_NAMED = 5
"""Unknown columns that an error names."""


def is_known(column: str) -> bool:
    """Return whether a column is a field of a script line."""
    return column in FIELDS or column in FLAT_SETTINGS or column.startswith(METADATA_PREFIX)


def normal_name(column: str) -> str:
    """Return the field that a column means: ` Negative Prompt ` is `negative_prompt`. Unknown columns are unchanged."""
    column = column.strip()
    if is_known(column):
        return column
    name = "_".join(column.lower().replace("-", " ").split())
    return name if is_known(name) else column


def check_columns(path: Path, columns: Sequence[str], *, with_prompt: bool = True) -> None:
    """Raise ScriptError, once for the whole file, if columns are unknown or occur twice.

    `with_prompt`: one of the columns must be the prompt. Then the error says so if it is missing, as in a table without names.
    """
    if duplicates := [name for name, count in Counter(columns).items() if count > 1]:
        raise file_error(path, f"the column {duplicates[0][:40]!r} twice", "must appear only once")
    if unknown := [name for name in columns if not is_known(name)]:
        named = ", ".join(repr(name[:40]) for name in unknown[:MAX_NAMED]) + (", ..." if len(unknown) > MAX_NAMED else "")
        more = f"; a column {METADATA_PREFIX}{unknown[0][:40] or 'NAME'} is copied to the manifest"
        allowed = known_fields(unknown[0], FIELDS) + more
        if with_prompt and "prompt" not in columns:
            allowed = (
                f"columns must be named after fields, in the first row of a .csv, one of them prompt; see {SCHEMA_COMMAND}"
            )
        raise file_error(path, f"unknown column{'s' if len(unknown) > 1 else ''} {named}", allowed)


def nest_metadata(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn `{"metadata.scene": 4}` into `{"metadata": {"scene": 4}}`."""
    flat = [name for name in fields if name.startswith(METADATA_PREFIX)]
    if not flat:
        return fields
    out = {name: value for name, value in fields.items() if not name.startswith(METADATA_PREFIX)}
    metadata = out.get("metadata")
    out["metadata"] = {**(metadata if isinstance(metadata, dict) else {})}
    out["metadata"] |= {name.removeprefix(METADATA_PREFIX): fields[name] for name in flat}
    return out


class _DuplicateField(Exception):
    """A JSON object contains a field twice."""

    def __init__(self, field: str) -> None:
        self.field = field


def read_jsonl(path: Path) -> tuple[Header, Lines]:
    texts = text_lines(path)

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip():
                yield _json_line(path.name, number, text.removesuffix("\n"))

    return NO_HEADER, lines()


def _json_line(source: str, number: int, text: str) -> Line:
    try:
        value = json.loads(text, object_pairs_hook=_reject_duplicates)
    except _DuplicateField as duplicate:
        return unreadable_line(source, number, "the field twice", "must appear only once", field=duplicate.field, text=text)
    except (ValueError, RecursionError) as error:
        allowed = f"must be a JSON object on one line ({error})"
        return unreadable_line(source, number, shortened(text), allowed, text=text)
    if not isinstance(value, dict):
        return unreadable_line(source, number, shortened(value), "must be a JSON object with at least a prompt", text=text)
    return Line(number, value)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _DuplicateField(next(name for name, count in counts.items() if count > 1))
    return out


def read_txt(path: Path) -> tuple[Header, Lines]:
    texts = text_lines(path)

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip() and not text.lstrip().startswith("#"):
                yield Line(number, {"prompt": text.strip()}, strict=False)

    return NO_HEADER, lines()


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""Separator -> its name in messages."""


def read_csv(path: Path) -> tuple[Header, Lines]:
    """Return the rows. The separator is the one that splits the first row into the most known columns."""
    texts = text_lines(path)
    first = next(texts, "")
    separator = max(SEPARATORS, key=lambda each: sum(is_known(normal_name(cell)) for cell in _cells(first, each)))
    rows = csv.DictReader(chain([first] if first else [], texts), strict=True, delimiter=separator, skipinitialspace=True)
    try:
        columns = [normal_name(name) for name in rows.fieldnames or []]
    except csv.Error as error:
        raise file_error(path, "an invalid first row", f"must contain the column names ({error})") from None
    # Spreadsheets write separators for empty columns at the end of every row.
    while columns and not columns[-1]:
        columns.pop()
    check_columns(path, columns)
    rows.fieldnames = columns

    def lines() -> Lines:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield unreadable_line(path.name, rows.reader.line_num, "an invalid row", f"must be CSV ({error})")
                continue
            if any(cell.strip() for cell in row.pop(None, ())):
                text = separator.join(map(str, row.values()))
                allowed = f"must quote cells that contain {SEPARATORS[separator]}"
                yield unreadable_line(path.name, rows.line_num, "more cells than columns", allowed, text=text)
                continue
            fields = {name: cell.strip() for name, cell in row.items() if cell is not None and cell.strip()}
            if fields:
                yield Line(rows.line_num, nest_metadata(parse_text_fields(fields)), strict=False)

    return NO_HEADER, lines()


def _cells(row: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([row], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []


CAPTIONS = ("caption", "text")
"""Columns that are used as prompt if there is none, as in data sets of captioned images."""
INTEGER_FIELDS = frozenset(
    name for name, field in Shot.model_fields.items() if field.annotation in (int, int | None) or name == "scale"
)
PARQUET_BATCH_ROWS = 1024
COLUMN_BUFFER_BYTES = 2**18
"""Read-ahead buffer of each Parquet column."""


def read_parquet(path: Path) -> tuple[Header, Lines]:
    import pyarrow
    import pyarrow.parquet

    check_no_extension_types(path)
    try:
        # `pre_buffer` would read whole row groups, and a script is often a single row group.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=COLUMN_BUFFER_BYTES, pre_buffer=False)
        columns = file.schema_arrow.names
    # ValueError for names of columns that are not UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise file_error(path, "invalid Parquet", f"must be a readable Parquet file ({error})") from None
    names = {name: normal_name(name) for name in columns if name != PANDAS_INDEX}
    caption = next((name for name in CAPTIONS if name in names and "prompt" not in names.values()), None)
    if caption is not None:
        names[caption] = "prompt"
    check_columns(path, list(names.values()))

    def lines() -> Lines:
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
                for row in _rows(batch.select(list(names))):
                    number += 1
                    yield _parquet_row(path, number, row, names)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise file_error(path, f"invalid data after row {number}", f"must be a readable Parquet file ({error})") from None

    return NO_HEADER, lines()


def _base64_fragments(text: bytes) -> tuple[bytes, ...]:
    """Return the Base64 of a text inside a longer one, for each of the three positions that it may have."""
    fragments = []
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + text).rstrip(b"=")
        # Letters that also depend on the text before and after.
        fragments.append(encoded[(0, 2, 3)[shift] : len(encoded) - bool((shift + len(text)) % 3)])
    return tuple(fragments)


EXTENSION_NAME = b"ARROW:extension:name"
EXTENSION_MARKS = (EXTENSION_NAME, *_base64_fragments(EXTENSION_NAME))
"""Names of extension types in the metadata at the end of a file. pyarrow writes its schema in Base64."""


def check_no_extension_types(path: Path) -> None:
    """Raise ScriptError for columns with extension types, which may run code when pyarrow opens the file (CVE-2026-41486).

    Ray registers such types with pyarrow, so this comes before pyarrow opens the file. Raises OSError if it cannot be read.
    """
    with path.open("rb") as file:
        # The file ends with the metadata, its size and `PAR1`.
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        size = int.from_bytes(file.read(4), "little")
        file.seek(max(0, end - 8 - size))
        metadata = file.read(size)
    if any(mark in metadata for mark in EXTENSION_MARKS):
        raise file_error(path, "an extension type", "columns must be text, numbers, lists or structs")


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


def _parquet_row(path: Path, number: int, row: dict[str, Any] | Exception, names: Mapping[str, str]) -> Line:
    if isinstance(row, Exception):
        allowed = f"must be text, numbers, lists or structs ({row})"
        return unreadable_line(path.name, number, "a row that cannot be read", allowed)
    fields = {names[name]: value for name, value in row.items()}
    return Line(number, nest_metadata(plain_fields(fields)))


def plain_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row without missing ones: null, and NaN as pandas writes it.

    pandas stores a column of integers with gaps as floats: `7.0` becomes `7` in fields of integers.
    """
    fields: dict[str, Any] = _without_nulls(row)
    for name, value in [*fields.items()]:
        if isinstance(value, float):
            if isnan(value):
                del fields[name]
            elif name in INTEGER_FIELDS and value.is_integer():
                fields[name] = int(value)
    return fields


def table_lines(name: str, table: Any, to_fields: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Lines:
    """Yield the rows of a pyarrow table as lines without numbers. `to_fields` maps a row to the fields of a line.

    A row that cannot be read, or for which `to_fields` raises, is an unreadable line. `name`: of the data set, for messages.
    """
    for batch in table.to_batches():
        for row in _rows(batch):
            if isinstance(row, Exception):
                yield unreadable_line(name, 0, "a row that cannot be read", f"must be plain data ({row})")
                continue
            fields = plain_fields(row)
            try:
                yield Line(0, to_fields(fields) if to_fields else fields)
            # An error of the caller's function concerns this row only.
            except Exception as error:
                allowed = f"to_fields raised {type(error).__name__}: {error}"
                yield unreadable_line(name, 0, shortened(fields), allowed, text=shortened(fields))


def _without_nulls(value: Any) -> Any:
    """Remove null values, which stand for missing fields in Parquet."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA_FILE = "metadata.jsonl"
"""File of a Hugging Face image folder: a `file_name` and a caption per line."""


def read_folder(path: Path) -> tuple[Header, Lines]:
    """Return a line for each row of the Parquet files, otherwise for each image of the folder, in the order of their names.

    The caption of NAME.png is in NAME.txt, or in metadata.jsonl. Raises ScriptError for a folder without either.
    """
    if tables := sorted(path.rglob("*.parquet")):
        rows = chain.from_iterable(read_parquet(table)[1] for table in tables)
        return NO_HEADER, (replace(row, number=number) for number, row in enumerate(rows, start=1))
    if (path / METADATA_FILE).is_file():
        return NO_HEADER, _listed_images(path)
    images = sorted(each for each in path.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise file_error(
            path, "a folder without scripts", "must have .parquet files, or images with a caption each in NAME.txt"
        )
    return NO_HEADER, _captioned_images(path, images)


def _captioned_images(path: Path, images: list[Path]) -> Lines:
    for number, image in enumerate(images, start=1):
        caption = image.with_suffix(".txt")
        try:
            prompt = " ".join(caption.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            got, allowed = f"no caption for {image.name}", f"must be in {caption.name} ({why})"
            yield unreadable_line(path.name, number, got, allowed, field="prompt", text=image.name)
            continue
        yield Line(number, {"id": _id_of(image.stem), "prompt": prompt, "image": image.name})


def _listed_images(path: Path) -> Lines:
    _, lines = read_jsonl(path / METADATA_FILE)
    for line in lines:
        if line.errors:
            yield line
            continue
        fields = {normal_name(name): value for name, value in line.fields.items() if name not in ("file_name", *CAPTIONS)}
        try:
            check_columns(path / METADATA_FILE, list(fields), with_prompt=False)
        except ScriptError as error:
            (wrong,) = error.errors
            yield unreadable_line(METADATA_FILE, line.number, wrong.got, wrong.allowed, text=str(line.fields))
            continue
        image = line.fields.get("file_name")
        caption = next((line.fields[name] for name in CAPTIONS if name in line.fields), None)
        given = {"id": _id_of(Path(str(image)).stem), "image": image, "prompt": caption}
        fields = {**{name: value for name, value in given.items() if value is not None}, **fields}
        yield Line(line.number, nest_metadata(fields))


def _id_of(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:120] or "image"


SPREADSHEET = "; save the sheet as .csv"
ADVICE = {".json": "; write one object per line to .jsonl", ".xlsx": SPREADSHEET, ".xls": SPREADSHEET, ".ods": SPREADSHEET}
"""Ending of a file that is not read -> what to do."""


def script_version(path: Path) -> ScriptVersion:
    """Return what identifies the content of a script. Of a folder: itself, its tables and its list of captions."""
    files = [path, *sorted(path.rglob("*.parquet")), path / METADATA_FILE] if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.exists()]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def open_script(path: Path, version: ScriptVersion | None = None) -> tuple[Header, Lines]:
    """Return the header and the lines of a script. Lines that cannot be parsed have an error.

    `version`: that of an earlier reading. Raises ScriptError if the file cannot be read, or has another version. The lines
    raise it at their end if the file has changed meanwhile.
    """
    readers = {
        ".jsonl": read_jsonl,
        ".csv": read_csv,
        ".tsv": read_csv,
        ".txt": read_txt,
        ".parquet": read_parquet,
        ".yaml": read_yaml,
        ".yml": read_yaml,
    }
    reader = read_folder if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        advice = ADVICE.get(path.suffix.lower(), "")
        raise file_error(path, f"file type {path.suffix!r}", f"must be one of {', '.join(sorted(readers))}{advice}")
    try:
        if not path.exists() or not (path.is_file() or path.is_dir()):
            raise file_error(path, str(path), "must be a file or a folder" if path.exists() else "must be an existing file")
        found = script_version(path)
        if version not in (None, found):
            raise _changed(path)
        header, lines = reader(path)
        return header, _unchanged(path, found, lines)
    except OSError as error:
        raise file_error(path, str(path), f"must be readable ({error.strerror})") from None


def _unchanged(path: Path, version: ScriptVersion, lines: Lines) -> Lines:
    """Yield the lines. Raises ScriptError at their end if the script was changed."""
    yield from lines
    if script_version(path) != version:
        raise _changed(path)


def _changed(path: Path) -> ScriptError:
    return file_error(
        path,
        "a script that was changed while it was read",
        "must stay as it is until its last line is read. Run the same command again; finished shots are skipped",
    )
