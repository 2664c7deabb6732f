"""Tables of an output folder for SQL: `manifest`, `scores`, `reviews`, and `clips`, which joins them.

They are copied into a temporary database, so memory stays flat and a query sees one state of the folder, also during a run. The
database reads and writes no other file.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow
import pyarrow.parquet

from vidgen_ray.cli.commands import note
from vidgen_ray.errors import UsageError
from vidgen_ray.outputs.manifest import FILE_COLUMNS, SCHEMA, check_has_manifest, manifest_batches, opened, score_files
from vidgen_ray.outputs.reviews import read_reviews
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.script.expansion import CHOSEN, LINE_PROMPT, MATRIX_NUMBER, STYLE
from vidgen_ray.shot import MATRIX
from vidgen_ray.system.quantities import count

DIGEST = "clip_sha256"
"""Column that joins the tables: sha256 of the clip before upscaling, or of the image of a shot without a clip."""
MEMORY_LIMIT = "1GB"
"""Memory of the database. More is kept on disk."""
CAPTION = "caption"
"""Scorer whose files `vidgen caption` writes."""
_TABLES = ("clips", "manifest", "scores", "reviews")
NUMBERS = re.compile("DOUBLE|FLOAT|BOOLEAN|U?(BIG|SMALL|TINY)?INT(EGER)?")
"""DuckDB's types of scores that are compared and have a histogram."""
OWN_COLUMNS = ("clip", DIGEST, "character", "person", LINE_PROMPT, "factors", "siblings")
"""Columns of `clips` that no other table has."""
REVIEWS_SCHEMA = pyarrow.schema(
    [
        (DIGEST, pyarrow.string()),
        ("verdict", pyarrow.string()),
        ("stars", pyarrow.int64()),
        ("note", pyarrow.string()),
        ("who", pyarrow.string()),
        ("reviewed_at", pyarrow.timestamp("ms", "UTC")),
    ]
)
DIGEST_OF_ROW = f"coalesce({', '.join(f'm.{name}_sha256' for name in FILE_COLUMNS)})"
CLIPS = f"""
CREATE VIEW clips AS
SELECT
    m.*,
    coalesce({", ".join(f"m.{name}" for name in FILE_COLUMNS)}) AS clip,
    {DIGEST_OF_ROW} AS {DIGEST},
    m.metadata->>'character' AS character,
    coalesce(m.metadata->>'character', nullif(array_to_string(m.face_image, '+'), '')) AS person,
    coalesce(m.metadata->>'{LINE_PROMPT}', m.metadata->>'$.{MATRIX}.prompt', m.prompt) AS {LINE_PROMPT},
    json_merge_patch(coalesce(m.metadata->'{MATRIX}', '{{}}'), '{{"seed": null}}', coalesce(m.metadata->'{CHOSEN}', '{{}}'))
        AS factors,
    concat_ws(':', m.script, coalesce(m.line::VARCHAR, m.id), factors) AS siblings,
    s.* EXCLUDE ({DIGEST}),
    r.* EXCLUDE ({DIGEST})
FROM manifest m
LEFT JOIN scores s ON s.{DIGEST} = {DIGEST_OF_ROW}
LEFT JOIN reviews r ON r.{DIGEST} = {DIGEST_OF_ROW}
"""
SAME_PROMPT = rf"regexp_replace({LINE_PROMPT}, '\{{[^{{}}|]+\}}', '{{}}', 'g')"
"""SQL of a text that clips of one prompt share, also with other characters: those that the prompt names are `{{}}`."""
HAS_NO_LINE_PROMPT = f"""metadata->>'{LINE_PROMPT}' IS NULL AND metadata->>'$.{MATRIX}.prompt' IS NULL
    AND coalesce(metadata->>'character', metadata->>'{STYLE}', metadata->>'{CHOSEN}') IS NOT NULL"""
"""SQL: the clip was rendered before prompts of lines were recorded, and its own may differ from that of the line."""
IN_SCRIPT_ORDER = f"ORDER BY script, line, (metadata->>'{MATRIX_NUMBER}')::BIGINT, id"
"""Order of the rows of `clips`."""


@contextmanager
def open_tables(storage: Storage) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection with the tables of an output folder.

    `clips` has every row of `manifest`, with its scores and its review, and the columns `clip` (path of the file that is scored
    and reviewed), `clip_sha256`, `character`, `person` (the character, otherwise the face photos), `line_prompt` (the prompt
    without trigger, description, style and choices), `factors` (the values of the
    `matrix` of its line without the seed, and its choices, as JSON) and `siblings` (the same text for the shots of a line that
    differ only in their seed).
    Raises SetupError if the folder has no manifest.
    """
    check_has_manifest(storage)
    with tempfile.TemporaryDirectory(prefix="vidgen-tables-") as folder:
        database = duckdb.connect(Path(folder, "tables.duckdb"), config={"memory_limit": MEMORY_LIMIT})
        with database:
            # Dates are printed alike on all machines.
            database.execute("SET TimeZone = 'UTC'")
            database.execute("SET VARIABLE folder = ?", [storage.url])
            _load(database, "manifest", SCHEMA, manifest_batches(storage), "* REPLACE (metadata::JSON AS metadata)")
            reviews = [
                {**review.model_dump(exclude={"id", "at"}), "reviewed_at": review.at}
                for review in read_reviews(storage).values()
            ]
            _load(database, "reviews", REVIEWS_SCHEMA, iter([pyarrow.RecordBatch.from_pylist(reviews, schema=REVIEWS_SCHEMA)]))
            _load_scores(database, storage)
            database.execute(CLIPS)
            database.execute("SET enable_external_access = false; SET lock_configuration = true")
            yield database


def _load(
    database: duckdb.DuckDBPyConnection,
    table: str,
    schema: pyarrow.Schema,
    batches: Iterator[pyarrow.RecordBatch],
    columns: str = "*",
) -> None:
    """Create a table with the rows of the batches."""
    database.register("source", pyarrow.RecordBatchReader.from_batches(schema, batches))
    database.execute(f"CREATE TABLE {table} AS SELECT {columns} FROM source")
    database.unregister("source")


def _load_scores(database: duckdb.DuckDBPyConnection, storage: Storage) -> None:
    """Create the table `scores`: a row per clip, with the columns of the newest version of every scorer."""
    taken = {*SCHEMA.names, *REVIEWS_SCHEMA.names, *OWN_COLUMNS}
    joined = f"(SELECT NULL::VARCHAR AS {DIGEST} WHERE false)"
    database.execute("CREATE TABLE scorers (scorer VARCHAR, name VARCHAR)")
    for scorer, names in score_files(storage).items():
        for number, name in enumerate(names):
            with opened(storage, name) as file:
                table = pyarrow.parquet.read_table(file)
            database.register("source", table)
            begin = "INSERT INTO {} BY NAME" if number else "CREATE TABLE {} AS"
            database.execute(f"{begin.format(quoted(f'of_{scorer}'))} SELECT *, {number} AS part FROM source")
            database.unregister("source")
        columns = [name for name in table.schema.names if name != DIGEST]
        renamed = ", ".join(f"{quoted(name)} AS {quoted(f'{scorer}_{name}')}" for name in columns if name in taken)
        own = {f"{scorer}_{name}" if name in taken else name for name in columns}
        database.executemany("INSERT INTO scorers VALUES (?, ?)", [(scorer, name) for name in sorted(own)])
        taken |= own
        rows = (
            f"(SELECT * EXCLUDE (part){f' RENAME ({renamed})' if renamed else ''} FROM {quoted(f'of_{scorer}')} "
            f"QUALIFY row_number() OVER (PARTITION BY {DIGEST} ORDER BY part DESC) = 1)"
        )
        joined = f"{joined} FULL JOIN {rows} USING ({DIGEST})"
    database.execute(f"CREATE TABLE scores AS SELECT * FROM {joined}")


def columns_of(database: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
    """Return name -> type of the columns of a table."""
    return {name: kind for name, kind, *_ in database.execute(f"DESCRIBE {table}").fetchall()}


def quoted(name: str) -> str:
    """Return the name of a column or a table for SQL."""
    return '"' + name.replace('"', '""') + '"'


def run_query(database: duckdb.DuckDBPyConnection, sql: str) -> pyarrow.RecordBatchReader:
    """Return the result of a user's SQL. Raises UsageError, which names the columns that there are, also while it is read.

    Prints how many clips have no score in a column by which the query selects.
    """

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with _sql_errors(database):
            yield from result

    with _sql_errors(database):
        if (query := database.sql(sql)) is None:
            raise UsageError("SQL: must be a query, such as SELECT id, seconds FROM clips")
        for text in unscored(database, _selecting(database, sql)):
            note(text)
        result = query.to_arrow_reader()
    return pyarrow.RecordBatchReader.from_batches(result.schema, batches())


def write_parquet(path: Path, rows: pyarrow.RecordBatchReader) -> None:
    """Write the result of a query to a Parquet file, batch by batch."""
    with pyarrow.parquet.ParquetWriter(path, rows.schema) as file:
        for batch in rows:
            file.write_batch(batch)


@contextmanager
def _sql_errors(database: duckdb.DuckDBPyConnection) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        message, *_ = str(error).splitlines()
        unknown = re.search('column (?:named )?"([^"]+)"', message)
        if unknown and (text := without_score(database, unknown[1].lower())):
            raise UsageError(f"SQL: {text}") from None
        raise UsageError(f"SQL: {message}\n{_columns_text(database)}") from None


def without_score(database: duckdb.DuckDBPyConnection, name: str) -> str | None:
    """Return a text about a built-in score that no clip has, with the command that gives it. `None` for another name."""
    scorer = builtin_scores().get(name)
    if scorer is None or name in columns_of(database, "scores"):
        return None
    return f"no clip has {name} yet; run: {_score_command(database, scorer)}"


def builtin_scores() -> dict[str, str]:
    """Return column -> scorer."""
    from vidgen_ray.dataset.captions import COLUMNS
    from vidgen_ray.dataset.measurements import SCORERS
    from vidgen_ray.dataset.score_folder import NEIGHBOURS

    of = {name: each.name for each in SCORERS for name in each.columns}
    return of | dict.fromkeys(NEIGHBOURS, "neighbours") | dict.fromkeys(COLUMNS, CAPTION)


def _score_command(database: duckdb.DuckDBPyConnection, *scorers: str) -> str:
    """Return the command that gives scores to all clips, those of `scorers` among them."""
    ((folder,),) = database.execute("SELECT getvariable('folder')").fetchall()
    if CAPTION in scorers:
        return f"vidgen caption {shlex.quote(folder)}"
    own = "" if {*builtin_scores().values()}.issuperset(scorers) else ", with its --scorer if it is not of an installed package"
    return f"vidgen score {shlex.quote(folder)}{own}"


def _selecting(database: duckdb.DuckDBPyConnection, sql: str) -> set[str]:
    """Return the names of the columns in the conditions of a query, in small letters."""

    def names(node: object, inside: bool) -> Iterator[str]:
        if isinstance(node, dict):
            if inside and node.get("class") == "COLUMN_REF":
                yield node["column_names"][-1].lower()
            for key, value in node.items():
                yield from names(value, inside or key in ("where_clause", "having", "qualify"))
        elif isinstance(node, list):
            for value in node:
                yield from names(value, inside)

    ((parsed,),) = database.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    return set(names(json.loads(parsed), False))


def unscored(database: duckdb.DuckDBPyConnection, columns: Set[str] | None = None) -> list[str]:
    """Return texts about finished clips that were not measured, with the command that measures them.

    `columns`: names in small letters; only their scorers count. A score that a clip cannot have is none that is missing.
    """
    of = defaultdict[str, list[str]](list)
    for scorer, name in database.execute("SELECT scorer, name FROM scorers").fetchall():
        if columns is None or name.lower() in columns:
            of[scorer].append(name)
    if columns is None and not of:
        return [f"no clip has scores; run: {_score_command(database)}"]
    missing = defaultdict[tuple[int, bool], list[str]](list)
    finished, total = "clips WHERE status = 'done' AND clip IS NOT NULL", 0
    for scorer in of:
        without = f"{DIGEST} NOT IN (SELECT {DIGEST} FROM {quoted(f'of_{scorer}')})"
        found = database.execute(f"SELECT count(*), count(*) FILTER ({without}) FROM {finished}").fetchall()
        ((total, number),) = found
        missing[number, scorer == CAPTION].append(scorer)
    return [
        f"{number:,} of {count(total, 'clip')} {'has' if number == 1 else 'have'} no "
        + (f"scores of {', '.join(scorers)}" if columns is None else ", ".join(name for each in scorers for name in of[each]))
        + f"; run: {_score_command(database, *scorers)}"
        for (number, _), scorers in sorted(missing.items())
        if number
    ]


def select_ids(storage: Storage, where: str | None = None, best: str | None = None) -> list[str]:
    """Return the ids of the shots of `clips` for which an SQL expression holds, in the order of their scripts.

    `best`: SQL expression. Of each group of finished siblings, only the shot with the highest value is left; a shot without a
    value loses. Raises UsageError for invalid SQL.
    """
    with open_tables(storage) as database:
        selected = run_query(database, f"SELECT id FROM ({selection(where, best)}) {IN_SCRIPT_ORDER}")
        return [row["id"] for batch in selected for row in batch.to_pylist()]


def selection(where: str | None, best: str | None, columns: Sequence[str] = ("*",)) -> str:
    """Return the SQL that selects rows of `clips`. See `select_ids`."""
    sql = f"SELECT {', '.join(columns)} FROM clips WHERE ({where or 'true'}\n)"
    if best is None:
        return sql
    order = f"({best}\n) DESC NULLS LAST, id"
    return f"{sql} AND status = 'done' QUALIFY row_number() OVER (PARTITION BY siblings ORDER BY {order}) = 1"


def _columns_text(database: duckdb.DuckDBPyConnection) -> str:
    """Return a line per table with its columns. `clips` has those of the other tables, too."""
    lines = [f"{table} has the columns {', '.join(columns_of(database, table))}" for table in _TABLES[1:]]
    return "\n".join([*lines, f"clips has all of them and {', '.join(OWN_COLUMNS)}"])
