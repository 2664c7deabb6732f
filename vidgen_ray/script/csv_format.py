"""Read .csv and .tsv scripts, with a shot per row. Spreadsheets write them with commas, semicolons or tabs."""

import csv
from itertools import chain
from pathlib import Path

from vidgen_ray.errors import FieldError
from vidgen_ray.script.columns import check_columns, is_known, nest_metadata, normal_name
from vidgen_ray.script.lines import NO_HEADER, Header, Line, Lines, UnreadableLine, file_error, parse_text_fields, text_lines

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
                number = rows.reader.line_num
                invalid = FieldError(path.name, number, None, "an invalid row", f"must be CSV ({error})")
                yield number, UnreadableLine("", invalid)
                continue
            if any(cell.strip() for cell in row.pop(None, ())):
                text = separator.join(map(str, row.values()))
                allowed = f"must quote cells that contain {SEPARATORS[separator]}"
                too_many = FieldError(path.name, rows.line_num, None, "more cells than columns", allowed)
                yield rows.line_num, UnreadableLine(text, too_many)
                continue
            fields = {name: cell.strip() for name, cell in row.items() if cell is not None and cell.strip()}
            if fields:
                yield rows.line_num, Line(rows.line_num, nest_metadata(parse_text_fields(fields)), strict=False)

    return NO_HEADER, lines()


def _cells(row: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([row], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []
