"""Rows of a data set, as SQL over the tables of an output folder: which clips it has, and their columns and captions."""

from __future__ import annotations

import re
from string import Formatter
from typing import Literal

import duckdb

from vidgen_ray.dataset.tables import IN_SCRIPT_ORDER, run_query, selection
from vidgen_ray.errors import UsageError
from vidgen_ray.licences import ALLOWED, Requirement
from vidgen_ray.outputs.manifest import SCHEMA
from vidgen_ray.safety import DECLARED_BASES

Kind = Literal["image", "video", "hd", "clip"]
KINDS: dict[Kind, list[str]] = {"image": ["image"], "video": ["video"], "hd": ["hd_video"], "clip": ["hd_video", "video"]}
"""Kind of files -> columns with their paths, of which the first that is not null counts."""
FINISHED = "clips WHERE status = 'done'"
REJECTED = f"{FINISHED} AND verdict = 'reject'"
INTERNAL = re.compile(
    r"run|team|submission_id|status|last_run|cut_tokens|lora_loads|failure_.*|ended_at|committed_at|consent|clip|clip_sha256"
    r"|(image|video|hd_video)(_sha256|_bytes)?|hd_width|hd_height|crop_.*|siblings|person|face_.*|start_image|last_image|pose"
    r"|note|who|reviewed_at"
)
"""Columns of `clips` that a data set does not have: internal ones, files of this machine, and what reviewers wrote."""
OWN_COLUMNS = ("split", "file_name", "video", "image")
"""Columns of data sets beside those of `new`. Scores of the same name get another one."""


def choose(
    database: duckdb.DuckDBPyConnection, where: str | None, best: str | None, cleared: Requirement | None, kind: Kind | None
) -> Kind:
    """Create the table `chosen` of ids, and `refused` and `missing` of ids with reasons. Return the kind of files.

    Rejected clips are left out. Without a kind, it is `clip`, or `image` if no shot has a clip. Raises UsageError for SQL.
    """
    wanted = f"({where or 'true'}\n) AND status = 'done' AND verdict IS DISTINCT FROM 'reject'"
    selected = run_query(database, selection(wanted, best, ("id",))).read_all()
    database.register("selected", selected)
    database.execute("CREATE TABLE chosen AS SELECT id FROM selected")
    database.unregister("selected")
    problem = "NULL"
    if cleared is not None:
        uses, bases = (", ".join(map(_text, values)) for values in (ALLOWED[cleared], DECLARED_BASES))
        licences = "array_to_string(list_transform(licences, lambda x: coalesce(x, 'unknown')), ', ')"
        problem = f"""CASE WHEN coalesce(commercial_use, 'unknown') NOT IN ({uses}) THEN
                concat('commercial use: ', coalesce(commercial_use, 'unknown'), '; licences: ', coalesce({licences}, 'unknown'))
            WHEN len(face_image) > 0 AND coalesce(consent.basis, '') NOT IN ({bases}) THEN
                'shows a person (face photo) without declared consent' END"""
    database.execute(f"CREATE TABLE refused AS SELECT id, {problem} AS reason FROM clips SEMI JOIN chosen USING (id)")
    database.execute("DELETE FROM refused WHERE reason IS NULL; DELETE FROM chosen WHERE id IN (SELECT id FROM refused)")
    if kind is None:
        kind = (
            "clip"
            if count(database, "clips SEMI JOIN chosen USING (id) WHERE coalesce(hd_video, video) IS NOT NULL")
            else "image"
        )
    database.execute(
        f"""CREATE TABLE missing AS SELECT id, 'has no {kind}' AS reason FROM clips SEMI JOIN chosen USING (id)
        WHERE coalesce({", ".join(KINDS[kind])}, NULL) IS NULL"""
    )
    database.execute("DELETE FROM chosen WHERE id IN (SELECT id FROM missing)")
    return kind


def nothing_chosen(database: duckdb.DuckDBPyConnection, kind: Kind) -> UsageError:
    """Return the error of an empty selection."""
    done, rejected, refused, missing = (count(database, table) for table in (FINISHED, REJECTED, "refused", "missing"))
    return UsageError(
        f"no clip to export: of {done:,} finished shots, {done - rejected - refused - missing:,} are not selected by --where "
        f"or --best, {rejected:,} are rejected, {refused:,} are refused by --cleared, {missing:,} have no {kind}"
    )


def count(database: duckdb.DuckDBPyConnection, table: str) -> int:
    """Return the number of rows of a table or of what follows `FROM`."""
    ((number,),) = database.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(number)


def load_rows(database: duckdb.DuckDBPyConnection, kind: Kind, caption: str, *, in_shards: bool) -> None:
    """Create the table `new` with the rows of `chosen`: the columns of the data set, and others whose names start with `_`.

    `_source` and `_bytes`: the file in the output folder. `_sample`: name of the clip, without dots in shards. `_place`: order.
    `_content` changes with the clip, `_signature` with the row, too. Raises UsageError for a caption with unknown names.
    """
    path, sha256, size = (
        f"coalesce({', '.join(f'{each}{end}' for each in KINDS[kind])}, NULL)" for end in ("", "_sha256", "_bytes")
    )
    columns = {"id": "id", "caption": _caption(database, caption), "prompt": "prompt", "sha256": sha256, "bytes": size}
    for side in ("width", "height"):
        # As `graph.file_sizes` cuts files that are not upscaled.
        cut = f"greatest(2, round_even(crop_{side} / if(upscale_video, scale, 1) / 2, 0) * 2)::BIGINT"
        is_hd = f"{kind in ('hd', 'clip')} AND hd_video IS NOT NULL"
        columns[side] = f"if({is_hd}, hd_{side}, if(crop_{side} IS NULL, {side}, least({side}, {cut})))"
    for name, type_ in (("num_frames", "BIGINT"), ("fps", "DOUBLE"), ("duration_s", "DOUBLE")):
        columns[name] = f"({'NULL' if kind == 'image' else name})::{type_}"
    columns["ai_generated"] = "true"
    columns |= {f"consent_{name}": f"consent.{name}" for name in ("subject", "basis", "reference")}
    for name in ("lora", "video_lora"):
        # Their paths reveal how a machine is set up.
        file = "{'file': parse_filename(x.path), 'weight': x.weight}"
        columns[name] = f"to_json(list_transform({name}, lambda x: {file}))::VARCHAR"
    own = {*columns, *OWN_COLUMNS}
    for name, type_, *_ in database.execute("DESCRIBE clips").fetchall():
        if not INTERNAL.fullmatch(name) and not (name in own and name in SCHEMA.names):
            columns[f"score_{name}" if name in own else name] = _flat(name, type_)
    sample = "if(contains(id, '.'), concat(replace(id, '.', '_'), '-', left(sha256(id), 8)), id)" if in_shards else "id"
    listed = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in columns.items())
    database.execute(
        f"""CREATE TABLE new AS
        WITH record AS (SELECT {listed} FROM clips SEMI JOIN chosen USING (id)),
        file AS (
            SELECT id, row_number() OVER ({IN_SCRIPT_ORDER}) AS _place, {path} AS _source, {size} AS _bytes, {sample} AS _sample
            FROM clips SEMI JOIN chosen USING (id)
        )
        SELECT record.*, file.* EXCLUDE (id), sha256(concat_ws(' ', _source, sha256, _bytes)) AS _content,
            sha256(concat(to_json(record), _source)) AS _signature
        FROM record JOIN file USING (id)"""
    )


def quoted(name: str) -> str:
    """Return the name of a column for SQL."""
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _flat(name: str, type_: str) -> str:
    """Return the SQL of a column as a boolean, an integer, a finite number or text, which all formats have."""
    column = quoted(name)
    if type_ in ("BOOLEAN", "VARCHAR", "BIGINT"):
        return column
    if type_ in ("TINYINT", "SMALLINT", "INTEGER", "UTINYINT", "USMALLINT", "UINTEGER"):
        return f"{column}::BIGINT"
    if type_ in ("FLOAT", "DOUBLE", "HUGEINT", "UBIGINT") or type_.startswith("DECIMAL"):
        return f"CASE WHEN isfinite({column}::DOUBLE) THEN {column}::DOUBLE END"
    return f"{column}::VARCHAR" if type_.startswith(("TIMESTAMP", "DATE", "JSON")) else f"to_json({column})::VARCHAR"


def _caption(database: duckdb.DuckDBPyConnection, template: str) -> str:
    """Return the SQL of captions."""
    columns = [name for name, *_ in database.execute("DESCRIBE clips").fetchall()]
    found = "SELECT DISTINCT unnest(json_keys(metadata)) AS key FROM clips SEMI JOIN chosen USING (id) ORDER BY key"
    keys = [f"metadata.{key}" for (key,) in database.execute(found).fetchall()]
    parts = ["''"]
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"--caption: got {template!r}: {error}; braces that are text are written twice") from None
    for text, name, form, conversion in fields:
        parts.append(_text(text))
        if name is None:
            continue
        if name in columns:
            parts.append(f"{quoted(name)}::VARCHAR")
        else:
            # `metadata.a.b` is `b` of `a`.
            path = name.split(".")
            if ".".join(path[:2]) not in keys or '"' in name:
                raise UsageError(f"--caption: unknown name {{{name}}}, must be one of {', '.join([*keys, *columns])}")
            parts.append(f"json_extract_string(metadata, {_text('$' + ''.join(f'.{quoted(part)}' for part in path[1:]))})")
        if form or conversion:
            raise UsageError(f"--caption: got {{{name}}} with a format, must be a name in braces")
    return f"concat({', '.join(parts)})"
