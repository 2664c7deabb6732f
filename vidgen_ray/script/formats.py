"""Script formats: read .jsonl, .csv, .txt, .parquet and .yaml files, and folders, as lines of unvalidated fields.

Lines are read lazily, so memory use does not grow with the script. Only .yaml files are read as a whole."""

import base64
import csv
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from functools import partial
from itertools import chain
from math import isnan
from pathlib import Path
from typing import Any

from vidgen_ray.errors import SCHEMA_COMMAND, ScriptError, in_json, known_fields, shortened_value
from vidgen_ray.script.expansion import STYLE
from vidgen_ray.script.lines import (
    COMPRESSED,
    FAILURE_FIELD,
    NO_HEADER,
    TEXT_FIELDS,
    Columns,
    Header,
    Line,
    Lines,
    ScriptSettings,
    absolute_path,
    file_error,
    parse_field,
    parse_text_fields,
    text_lines,
    unreadable_line,
    with_absolute_paths,
)
from vidgen_ray.script.screenplay import read_screenplay
from vidgen_ray.shot import GUIDANCE_SCALES, ID_PATTERN, IMAGE_FIELDS, MATRIX, NESTED_FIELDS, Shot, number_fields

METADATA_PREFIX = "metadata."
"""A column `metadata.NAME` becomes an entry of `metadata`."""
PANDAS_INDEX = "__index_level_0__"
"""Column in which pandas stores its index."""
FIELDS = (*Shot.model_fields, STYLE, MATRIX, FAILURE_FIELD)
FLAT_SETTINGS = tuple(
    name for field in NESTED_FIELDS for key in GUIDANCE_SCALES for name in (f"{field}.{key}", f"{key}.{field}")
)
ScriptVersion = tuple[tuple[int, int, int, int], ...]
"""Inode, size in bytes and times in ns of each file that is read: of its last modification, and of its last change."""
DEFAULT_NAMES = Columns()
_MAX_NAMED = 5
"""Unknown columns that an error names."""


def is_known(column: str) -> bool:
    """Return whether a column is a field of a script line."""
    return column in FIELDS or column in FLAT_SETTINGS or column.startswith(METADATA_PREFIX)


def normal_name(column: str, columns: Columns = DEFAULT_NAMES) -> str:
    """Return the field that a column means: ` Negative Prompt ` is `negative_prompt`. Unknown columns are unchanged."""
    column = column.strip()
    column = columns.names.get(column, column)
    name = "_".join(column.lower().replace("-", " ").split())
    found = next((each for each in (column, name) if is_known(each)), column)
    return METADATA_PREFIX + column if columns.keep_unknown and not is_known(found) else found


def check_columns(
    path: Path, columns: Sequence[str], *, with_prompt: bool = True, row: Mapping[str, str | None] | None = None
) -> None:
    """Raise ScriptError, once for the whole file, if columns are unknown or occur twice.

    `with_prompt`: one of the columns must be the prompt. Then the error says so if it is missing, as in a table without names.
    `row`: the first one, whose longest text is taken for the prompt in the advice.
    """
    if duplicates := [name for name, count in Counter(columns).items() if count > 1]:
        raise file_error(path, f"the column {duplicates[0][:40]!r} twice", "must appear only once")
    if unknown := [name for name in columns if not is_known(name)]:
        if unknown == [""]:
            allowed = "must have a name in the first row, or no cells; with pandas: to_csv(..., index=False)"
            raise file_error(path, "a column without a name", allowed)
        named = ", ".join(repr(name[:40]) for name in unknown[:_MAX_NAMED]) + (", ..." if len(unknown) > _MAX_NAMED else "")
        keep = f"--map {shlex.quote(f'{unknown[0]}=FIELD')} --keep-columns"
        allowed = f"{known_fields(unknown[0], FIELDS)}; add {keep}, which copies the other unknown ones to metadata"
        if with_prompt and "prompt" not in columns:
            longest = max(unknown, key=lambda name: len((row or {}).get(name) or ""))
            allowed = (
                "columns must be named after fields, in the first row of a .csv, one of them prompt: add "
                f"--map {shlex.quote(f'{longest}=prompt')} --keep-columns, which copies other unknown ones to metadata; "
                f"see {SCHEMA_COMMAND}"
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


def read_jsonl(path: Path, columns: Columns) -> tuple[Header, Lines]:
    texts = text_lines(path)
    is_renamed = columns != DEFAULT_NAMES

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip():
                line = _json_line(path.name, number, text.removesuffix("\n"))
                if is_renamed and not line.errors:
                    _rename(line, columns)
                yield line

    return NO_HEADER, lines()


def _rename(line: Line, columns: Columns) -> None:
    """Give the fields of a line the names that their columns mean."""
    fields = {normal_name(name, columns): value for name, value in line.fields.items()}
    if len(fields) < len(line.fields):
        line.reject(None, "two names for one field", "must be one of them")
    line.fields = nest_metadata(fields)


def _json_line(source: str, number: int, text: str) -> Line:
    try:
        value = _decode_json(text)
    except _DuplicateField as duplicate:
        return unreadable_line(source, number, "the field twice", "must appear only once", field=duplicate.field, text=text)
    except (ValueError, RecursionError) as error:
        allowed = f"must be a JSON object on one line ({error})"
        return unreadable_line(source, number, shortened_value(text), allowed, text=text)
    if not isinstance(value, dict):
        return unreadable_line(source, number, in_json(value), "must be a JSON object with at least a prompt", text=text)
    return Line(number, value)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _DuplicateField(next(name for name, count in counts.items() if count > 1))
    return out


_decode_json = json.JSONDecoder(object_pairs_hook=_reject_duplicates).decode


def read_txt(path: Path, columns: Columns) -> tuple[Header, Lines]:
    texts = text_lines(path)

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip() and not text.lstrip().startswith("#"):
                notes = (f"{path.name} line 1: is the first row of a table; name the file .csv",) if is_table(text) else ()
                yield Line(number, {"prompt": text.strip()}, strict=False, notes=notes if number == 1 else ())

    return NO_HEADER, lines()


def is_table(row: str) -> bool:
    """Return whether the first row of a text file names the columns of a table."""
    names = [[normal_name(cell) for cell in _cells(row, separator)] for separator in SEPARATORS]
    return any("prompt" in each and len(each) > 1 and all(map(is_known, each)) for each in names)


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""Separator -> its name in messages."""
SEPARATOR_LINE = re.compile(r"sep=([,;\t|])", re.IGNORECASE)
"""First line that spreadsheets write to state the separator."""
_NUMBERS = number_fields(Shot)
DIGITS = re.compile(r"\d+")
NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)
BOOLEAN_FIELDS = frozenset(name for name, field in Shot.model_fields.items() if field.annotation is bool)
NAMELESS = ("", METADATA_PREFIX)
"""Names of columns without a name, as they are and with `--keep-columns`."""
MISSING = frozenset(("nan", "NaN", "None", "null", "NULL", "NA", "N/A"))
"""Cells that tools write for missing numbers."""


def read_csv(path: Path, columns: Columns) -> tuple[Header, Lines]:
    """Return the rows. The separator is the one that splits the first row into the most known columns."""
    texts, opened = _quote_lines(text_lines(path))
    first = next(texts, "")
    stated = SEPARATOR_LINE.fullmatch(first.rstrip())
    if stated is not None:
        first = next(texts, "")

    def known_and_all(separator: str) -> tuple[int, int]:
        cells = _cells(first, separator)
        return sum(is_known(normal_name(cell, columns)) for cell in cells), len(cells)

    separator = max(SEPARATORS, key=known_and_all) if stated is None else stated[1]
    before = 0 if stated is None else 1
    second = next(texts, None)
    read = chain([first] if first else [], [] if second is None else [second], texts)
    rows = csv.DictReader(read, strict=True, delimiter=separator, skipinitialspace=True)
    try:
        names = [normal_name(name, columns) for name in rows.fieldnames or []]
    except csv.Error as error:
        raise file_error(path, "an invalid first row", f"must contain the column names ({error})") from None
    # Spreadsheets write separators for empty columns at the end of every row.
    while names and names[-1] in NAMELESS:
        names.pop()
    first_row = dict(enumerate(_cells(second or "", separator)))
    # Those between others are skipped, too. Their numbers replace their names.
    unused = [number for number, name in enumerate(names) if name in NAMELESS and not first_row.get(number, "").strip()]
    keys: list[Any] = [number if number in unused else name for number, name in enumerate(names)]
    check_columns(
        path,
        [key for key in keys if isinstance(key, str)],
        row={name: first_row.get(number) for number, name in enumerate(names)},
    )
    rows.fieldnames = keys
    may_be_missing = _NUMBERS | BOOLEAN_FIELDS

    def lines() -> Lines:
        end = before
        while True:
            begin = end + 1
            try:
                row = next(rows)
                end = rows.line_num + before
                begin = next((number for number in opened if number >= begin), end)
            except StopIteration:
                return
            except csv.Error as error:
                end = rows.reader.line_num + before
                quote = next((number for number in reversed(opened) if begin <= number < end), None)
                if quote is None:
                    yield unreadable_line(path.name, end, "an invalid row", f"must be CSV ({error})")
                else:
                    yield _open_quote(path, quote, end, error)
                continue
            finally:
                opened.clear()
            if end > begin and _hides_row(row, separator, names):
                inside = "rows of the table are inside of it; for a prompt with such lines, write a .jsonl or .yaml script"
                yield _open_quote(path, begin, end, inside)
                continue
            if any(cell.strip() for cell in row.pop(None, ())):
                text = separator.join(map(str, row.values()))
                allowed = f"must quote cells that contain {SEPARATORS[separator]}"
                yield unreadable_line(path.name, end, "more cells than columns", allowed, text=text)
                continue
            cells = {name: cell.strip() for name, cell in row.items() if cell is not None}
            if filled := [number for number in unused if cells.pop(number, "")]:
                allowed = "must have a name in the first row, or no cells"
                yield unreadable_line(path.name, end, f"a cell in column {filled[0] + 1}", allowed, text=str(cells))
                continue
            fields = {name: cell for name, cell in cells.items() if cell and not (cell in MISSING and name in may_be_missing)}
            if fields:
                yield Line(end, nest_metadata(parse_text_fields(fields)), strict=False)

    return NO_HEADER, lines()


def _open_quote(path: Path, begin: int, end: int, reason: object) -> Line:
    return unreadable_line(
        path.name,
        begin,
        f"a quote that opens here and takes in lines {begin} to {end}",
        f"must be closed in its cell ({reason})",
    )


def _hides_row(row: Mapping[Any, Any], separator: str, names: Sequence[str]) -> bool:
    """Return whether a line inside of a cell is a row of the table: with numbers in their columns, or an id like `row` has."""

    def is_row(text: str) -> bool:
        cells = dict(zip(names, map(str.strip, _cells(text, separator)), strict=False))
        numbers = [each for name, each in cells.items() if each and name in _NUMBERS]
        id_, own_id = (DIGITS.sub("0", str(each.get("id") or "").strip()) for each in (cells, row))
        is_like = bool(ID_PATTERN.fullmatch(id_)) and (bool(numbers) or id_ == own_id) if "id" in names else bool(numbers)
        return len(cells) == len(names) > 1 and is_like and all(map(NUMBER.fullmatch, numbers))

    return any(is_row(text) for cell in row.values() if isinstance(cell, str) for text in cell.split("\n")[1:])


def _quote_lines(texts: Iterator[str]) -> tuple[Iterator[str], list[int]]:
    """Return the lines, and a list that gets the number of each one which opens or closes a quoted cell of several lines."""
    numbers = list[int]()

    def lines() -> Iterator[str]:
        for number, text in enumerate(texts, start=1):
            if text.count('"') % 2:
                numbers.append(number)
            yield text

    return lines(), numbers


def _cells(row: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([row], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []


CAPTIONS = ("caption", "text")
"""Columns that are used as prompt if there is none, as in data sets of captioned images."""
ID_FIELDS = ("id", "continue_from")
JSON_FIELDS = Shot.model_fields.keys() - TEXT_FIELDS | {MATRIX}
"""Fields that are JSON if a table has text for them."""
PARQUET_BATCH_ROWS = 1024
COLUMN_BUFFER_BYTES = 2**18
"""Read-ahead buffer of each Parquet column."""


def read_parquet(path: Path, columns: Columns) -> tuple[Header, Lines]:
    import pyarrow
    import pyarrow.parquet

    check_no_extension_types(path)
    try:
        # `pre_buffer` would read whole row groups, and a script is often a single row group.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=COLUMN_BUFFER_BYTES, pre_buffer=False)
        found = file.schema_arrow.names
    # ValueError for names of columns that are not UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise file_error(path, "invalid Parquet", f"must be a readable Parquet file ({error})") from None
    names = {name: normal_name(name, columns) for name in found if name != PANDAS_INDEX}
    captions = [name for name in CAPTIONS if name in found] if "prompt" not in names.values() else []
    names |= {name: "prompt" if name == captions[0] else f"{METADATA_PREFIX}{name}" for name in captions}
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
        yield from batch.to_pylist(maps_as_pydicts="lossy")
    except CONVERSION_ERRORS:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist(maps_as_pydicts="lossy")[0]
            except CONVERSION_ERRORS as error:
                yield error


def _parquet_row(path: Path, number: int, row: dict[str, Any] | Exception, names: Mapping[str, str]) -> Line:
    if isinstance(row, Exception):
        allowed = f"must be text, numbers, lists or structs ({row})"
        return unreadable_line(path.name, number, "a row that cannot be read", allowed)
    fields = {names[name]: value for name, value in row.items()}
    return Line(number, nest_metadata(plain_fields(fields)))


def plain_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row of a table as .jsonl would have them, without missing ones: null, and NaN as pandas writes it.

    Numbers are ids, 0 and 1 are booleans, text is JSON where the field is not text. Other types than those of JSON are text.
    """
    fields = {name: value for name, value in row.items() if not _is_missing(value)}
    return {name: _field_of_table(name, value) for name, value in fields.items()}


def _field_of_table(name: str, value: Any) -> Any:
    if name in (*IMAGE_FIELDS, "face_image"):
        # {bytes, path} of an image in a data set of Hugging Face.
        return value
    value = _as_json(value)
    if name in ID_FIELDS and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.0f}" if float(value).is_integer() else str(value)
    if name in BOOLEAN_FIELDS and value in (0, 1):
        return bool(value)
    return parse_field(name, value) if name in JSON_FIELDS and isinstance(value, str) else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))


def _as_json(value: Any) -> Any:
    """Return a value as JSON has it. Missing entries of structs are left out."""
    if isinstance(value, dict):
        return {str(name): _as_json(each) for name, each in value.items() if not _is_missing(each)}
    if isinstance(value, list | tuple):
        return [None if _is_missing(each) else _as_json(each) for each in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value) if isinstance(value, timedelta | Decimal) else value


def table_lines(
    name: str,
    table: Any,
    to_fields: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    columns: Columns = DEFAULT_NAMES,
) -> Lines:
    """Yield the rows of a pyarrow table as lines without numbers. `to_fields` maps a row, with `None` for nulls, to fields.

    A row that cannot be read, or for which `to_fields` raises, is an unreadable line. `name`: of the data set, for messages.
    """
    for batch in table.to_batches():
        for row in _rows(batch):
            if isinstance(row, Exception):
                yield unreadable_line(name, 0, "a row that cannot be read", f"must be plain data ({row})")
                continue
            try:
                # With its nulls, as Ray Data, pandas and datasets pass a row to a function.
                line = Line(0, plain_fields(to_fields(dict(row)) if to_fields else row))
                _rename(line, columns)
                yield line
            # An error of the caller's function concerns this row only.
            except Exception as error:
                allowed = f"to_fields raised {type(error).__name__}: {error}"
                shown = shortened_value({column: value for column, value in row.items() if not _is_missing(value)})
                yield unreadable_line(name, 0, shown, allowed, text=shown)


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA_FILE = "metadata.jsonl"
"""File of a Hugging Face image folder: a `file_name` and a caption per line."""


def read_folder(path: Path, columns: Columns) -> tuple[Header, Lines]:
    """Return a line for each row of the Parquet files, otherwise for each image of the folder, in the order of their names.

    The caption of NAME.png is in NAME.txt, or in metadata.jsonl. Raises ScriptError for a folder without either.
    """
    if tables := sorted(path.rglob("*.parquet")):
        return read_files(tables, path, columns)
    if (path / METADATA_FILE).is_file():
        return NO_HEADER, _listed_images(path, columns)
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


def _listed_images(path: Path, columns: Columns) -> Lines:
    _, lines = read_jsonl(path / METADATA_FILE, DEFAULT_NAMES)
    for line in lines:
        if line.errors:
            yield line
            continue
        given = {name: value for name, value in line.fields.items() if name not in ("file_name", *CAPTIONS)}
        fields = {normal_name(name, columns): value for name, value in given.items()}
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
_ADVICE = {".json": "; write one object per line to .jsonl", ".xlsx": SPREADSHEET, ".xls": SPREADSHEET, ".ods": SPREADSHEET}
"""Ending of a file that is not read -> what to do."""


READERS: dict[str, Callable[[Path, Columns], tuple[Header, Lines]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_txt,
    ".parquet": read_parquet,
    ".yaml": read_screenplay,
    ".yml": read_screenplay,
}
BINARY = (".parquet", ".yaml", ".yml")
"""Endings of files that are not read line by line, and so not if they are compressed."""


def _reader_of(path: Path) -> Callable[[Path, Columns], tuple[Header, Lines]]:
    """Return the reader of an existing file or folder. Raises ScriptError."""
    if path.is_dir():
        return read_folder
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix
    if inner in READERS and not (suffix in COMPRESSED and inner in BINARY):
        return READERS[inner]
    advice = _ADVICE.get(suffix, "; .gz and .zst of text are read, too" if suffix in COMPRESSED else "")
    raise file_error(path, f"file type {suffix!r}", f"must be one of {', '.join(sorted(READERS))}{advice}")


def read_files(files: Sequence[Path], base: Path, columns: Columns) -> tuple[Header, Lines]:
    """Return the lines of several files, numbered through. Their paths become relative to the folder `base`."""

    def lines() -> Lines:
        for file in files:
            header, rows = _reader_of(file)(file, columns)
            if header != NO_HEADER:
                raise file_error(file, "one of several scripts with a header", "must be rendered alone")
            for row in rows:
                if file.parent != base and not row.errors:
                    relative = partial(_relative_path, file.parent, base)
                    row.fields = {name: with_absolute_paths(name, value, relative) for name, value in row.fields.items()}
                yield row

    return NO_HEADER, (replace(row, number=number) for number, row in enumerate(lines(), start=1))


def _relative_path(folder: Path, base: Path, path: str) -> str:
    """Return a path relative to `folder` as one relative to `base`. Absolute ones, `~` and URLs are kept."""
    absolute = absolute_path(folder, path)
    return path if absolute == absolute_path(base, path) else os.path.relpath(absolute, base)


def script_version(script: ScriptSettings) -> ScriptVersion:
    """Return what identifies the content of a script. Of a folder: itself, its tables and its list of captions."""
    files = [file for path in script.files or (script.path,) for file in _files_of(path)]
    stats = [file.stat() for file in files if file.exists()]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def _files_of(path: Path) -> list[Path]:
    return [path, *sorted(path.rglob("*.parquet")), path / METADATA_FILE] if path.is_dir() else [path]


def open_script(script: ScriptSettings, version: ScriptVersion | None = None) -> tuple[Header, Lines]:
    """Return the header and the lines of a script. Lines that cannot be parsed have an error.

    `version`: that of an earlier reading. Raises ScriptError if the file cannot be read, or has another version. The lines
    raise it at their end if the file has changed meanwhile.
    """
    files = script.files or (script.path,)
    path = script.path
    try:
        for path in files:
            if not path.exists() or not (path.is_file() or path.is_dir()):
                allowed = "must be a file or a folder" if path.exists() else "must be an existing file"
                raise file_error(path, str(path), allowed)
            _reader_of(path)
        found = script_version(script)
        if version not in (None, found):
            raise _changed(script.path)
        reader = partial(read_files, files, script.folder) if script.files else partial(_reader_of(path), path)
        header, lines = reader(script.columns)
        return header, _unchanged(script, found, lines)
    except OSError as error:
        raise file_error(path, str(path), f"must be readable ({error.strerror})") from None


def _unchanged(script: ScriptSettings, version: ScriptVersion, lines: Lines) -> Lines:
    """Yield the lines. Raises ScriptError at their end if the script was changed."""
    yield from lines
    if script_version(script) != version:
        raise _changed(script.path)


def _changed(path: Path) -> ScriptError:
    return file_error(
        path,
        "a script that was changed while it was read",
        "must stay as it is until its last line is read. Run the same command again; finished shots are skipped",
    )
