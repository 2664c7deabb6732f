"""Read .csv scripts, with a shot per row."""

import csv
from pathlib import Path

from vidgen_ray.errors import FieldError
from vidgen_ray.script.lines import (
    NO_HEADER,
    Header,
    Line,
    Lines,
    UnreadableLine,
    check_unique,
    file_error,
    parse_text_fields,
    text_lines,
)


def read_csv(path: Path) -> tuple[Header, Lines]:
    rows = csv.DictReader(text_lines(path), strict=True)
    try:
        columns = rows.fieldnames or []
    except csv.Error as error:
        raise file_error(path, "an invalid first row", f"must contain the column names ({error})") from None
    check_unique(path, columns)

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
