"""Commands that make a data set of an output folder."""

from __future__ import annotations

import csv
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated

import pyarrow.parquet
import typer
from rich.console import Console
from rich.table import Table

from vidgen_ray.cli.command_help import LOOK, in_group
from vidgen_ray.cli.options import JsonOption, OutArgument, local_path
from vidgen_ray.dataset.tables import open_tables, run_query
from vidgen_ray.errors import UsageError
from vidgen_ray.outputs.storage import storage_at
from vidgen_ray.report.shot_text import value_text
from vidgen_ray.system.files import new_file

SHOWN_ROWS = 100
"""Rows of a query that are printed as a table."""


@in_group(LOOK)
def query(
    out: OutArgument,
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="Query over the tables clips, manifest, scores and reviews (DuckDB's SQL).")
    ],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all rows as CSV.")] = False,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", parser=local_path, help="Write all rows to this Parquet file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Query the results of an output folder with SQL.

    `clips` has a row per shot with its settings, scores and review. `DESCRIBE clips` lists the columns.
    """
    if as_csv + as_json + (parquet is not None) > 1:
        raise UsageError("--csv, --json and --parquet: only one can be given")
    with open_tables(storage_at(out)) as database:
        result = run_query(database, sql)
        if parquet is not None:
            with new_file(parquet) as path, pyarrow.parquet.ParquetWriter(path, result.schema) as file:
                for batch in result:
                    file.write_batch(batch)
            return
        rows = (row for batch in result for row in batch.to_pylist())
        if as_json:
            typer.echo("[" + ",\n".join(json.dumps(row, default=str) for row in rows) + "]")
        elif as_csv:
            table = csv.writer(sys.stdout, lineterminator="\n")
            table.writerow(result.schema.names)
            for row in rows:
                table.writerow(
                    json.dumps(value, default=str) if isinstance(value, list | dict) else value for value in row.values()
                )
        else:
            first = list(islice(rows, SHOWN_ROWS + 1))
            shown = Table(*result.schema.names, box=None)
            for row in first[:SHOWN_ROWS]:
                shown.add_row(*("" if value is None else value_text(value) for value in row.values()))
            console = Console(markup=False, highlight=False)
            console.print(shown)
            if len(first) > SHOWN_ROWS:
                left = sum(1 for _ in rows)
                typer.echo(f"{left + 1:,} more rows; --csv, --json or --parquet FILE give all", err=True)
