"""Read .parquet scripts, and tables of Ray Data, with a shot per row.

Tables that pandas has written, and data sets of captioned images, are accepted.
"""

import base64
import os
from collections.abc import Callable, Iterator, Mapping
from math import isnan
from pathlib import Path
from typing import Any

from vidgen_ray.errors import FieldError
from vidgen_ray.invalid_fields import shortened
from vidgen_ray.script.columns import PANDAS_INDEX, check_columns, nest_metadata, normal_name
from vidgen_ray.script.lines import NO_HEADER, Header, Line, Lines, UnreadableLine, file_error
from vidgen_ray.shot import Shot

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
                    yield number, _parquet_row(path, number, row, names)
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


def _parquet_row(path: Path, number: int, row: dict[str, Any] | Exception, names: Mapping[str, str]) -> Line | UnreadableLine:
    if isinstance(row, Exception):
        allowed = f"must be text, numbers, lists or structs ({row})"
        return UnreadableLine("", FieldError(path.name, number, None, "a row that cannot be read", allowed))
    fields = {names[name]: value for name, value in row.items()}
    return Line(number, nest_metadata(plain_fields(fields)), strict=True)


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
            fields = plain_fields(row)
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
