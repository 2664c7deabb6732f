"""Export of an output folder as a data set: the rows that it has, and what a call writes and removes.

`DEST/.vidgen/` has the state: `rows.parquet` (the exported rows), `export.json` (settings, and the counts of the last call that
changed something) and, during a call, `pending.json` (files, or ids of rows in Lance, that may differ from the rows). A call
compares the exported rows with those of the output folder. `DEST` is a valid data set at each moment, and a killed call is
completed by the next one.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow
import pyarrow.parquet
import ray
from more_itertools import batched
from pyarrow import compute
from pydantic import BaseModel, ConfigDict

from vidgen_ray.batch.line_planner import MAX_TASKS, on_this_node, own_context
from vidgen_ray.dataset.data_card import write_card
from vidgen_ray.dataset.export_formats import (
    METADATA,
    PROPERTIES,
    SHARD_ENDING,
    Format,
    Target,
    Transcode,
    append_to_lance,
    caption_file,
    delete_from_lance,
    write_block,
)
from vidgen_ray.dataset.export_rows import REJECTED, Kind, choose, count, load_rows, nothing_chosen, quoted
from vidgen_ray.dataset.export_splits import SplitKey, assign_splits
from vidgen_ray.dataset.tables import open_tables
from vidgen_ray.engine.ray_cluster import connected
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.licences import Requirement
from vidgen_ray.outputs.folder import REQUESTS_AT_ONCE
from vidgen_ray.outputs.lease import Lease, lease
from vidgen_ray.outputs.manifest import opened
from vidgen_ray.outputs.storage import URL, Storage, is_disk_full, storage_at

STATE = ".vidgen"
ROWS, EXPORT, PENDING = (f"{STATE}/{name}" for name in ("rows.parquet", "export.json", "pending.json"))
REFUSED = "refused.jsonl"
CHECKPOINT_S = 60.0
"""Seconds after which the rows of written clips are stored, for a call that is killed later."""
BLOCK_ROWS, SLOW_BLOCK_ROWS = 500, 16
"""Clips of a task that links them, and of one that reads or encodes them."""
CHUNK_BLOCKS = 20
"""Tasks after which the lease is checked."""
PACKAGES = ("vidgen-ray", "duckdb", "pyarrow", "ray")
PRIVATE = ("note", "who", "team", "submission_id")
"""Columns of `clips` that are not stored, because data sets are published."""
DONE = {
    **dict.fromkeys(("id", "split", "file", "sample", "signature", "content", "exported_sha256"), "VARCHAR"),
    **{f"exported_{name}": "BIGINT" for name in ("bytes", "width", "height", "num_frames")},
    **{f"exported_{name}": "DOUBLE" for name in ("fps", "duration_s")},
}
"""Columns of the table `done`. `signature` changes with the row or its clip, `content` with the clip."""
FILE_NAME = "parse_filename(file) AS file_name"
"""SQL of the column that `videofolder` has beside the others."""


class ExportSettings(BaseModel):
    """Settings of a data set."""

    model_config = ConfigDict(frozen=True)

    format: Format = "videofolder"
    files: Kind | None = None
    """`clip`: the upscaled clip of a shot, otherwise its clip. `None`: `clip`, or `image` if no shot has a clip."""
    splits: dict[str, float] = {"train": 1.0}
    """Name -> share of the clips, in order."""
    split_by: tuple[SplitKey, ...] = ("prompt", "character")
    transcode: Transcode = Transcode()
    where: str | None = None
    best: str | None = None
    cleared: Requirement | None = None
    caption: str = "{prompt}"
    shard_mb: int = 500
    """Size of new shards in millions of bytes of clips, which the last clip of a shard may not exceed."""

    def fixed(self) -> ExportSettings:
        """Return the settings that stay the same in all calls, with the defaults of the others."""
        return ExportSettings(**{name: getattr(self, name) for name in ("format", "files", "splits", "split_by", "transcode")})

    def options(self) -> list[str]:
        """Return the options of the command for settings other than the defaults."""
        values = self.model_dump(exclude_defaults=True, exclude={"files", "transcode"}) | self.transcode.model_dump(
            exclude_none=True
        )
        if "splits" in values:
            values["split"] = ",".join(f"{name}={share:g}" for name, share in values.pop("splits").items())
        if "split_by" in values:
            values["split_by"] = ",".join(values["split_by"])
        kind = [] if self.files in (None, "clip") else [f"--{self.files}"]
        return [*kind, *(text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value)))]


@dataclass
class ExportReport:
    """Result of a call."""

    dest: str
    format: Format
    up_to_date: bool = False
    """Nothing was written."""
    splits: dict[str, int] = field(default_factory=dict)
    """Name -> clips that the data set has now."""
    counts: dict[str, int] = field(default_factory=dict)
    """Clips that this call added, changed, removed and left unchanged, and those that are rejected or cannot be read."""
    removed: list[dict[str, str]] = field(default_factory=list)
    """Id and reason of each clip that this call removed. The same for the next two."""
    refused: list[dict[str, str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    """Selected shots without a file, or with one that cannot be read or encoded."""
    seconds: float = 0


def export_folder(
    out: str,
    dest: str,
    settings: ExportSettings,
    *,
    address: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Make `dest` the data set of what the output folder has now.

    `address`: of a Ray cluster. Raises UsageError for settings that fit neither the folder nor what `dest` has, SetupError if
    another export is using `dest` or the disk is full, and OSError.
    """
    begin = time.monotonic()
    source, target = storage_at(out), storage_at(dest)
    _check_places(source, target)
    _read_state(target)
    if settings.format == "lance" and target.local is None:
        raise UsageError("--format lance: DEST must be a folder on a disk; copy it to the object store afterwards")
    try:
        with (
            lease(storage_at(_below(dest, STATE)), f"export-{secrets.token_hex(3)}") as held,
            open_tables(source) as database,
        ):
            report = _Export(source, target, settings, database, held, address, on_progress).run()
    except OSError as error:
        if is_disk_full(error):
            raise SetupError(f"{target.url}: the disk is full. Make room and run the same command to resume") from None
        raise
    report.seconds = round(time.monotonic() - begin, 3)
    return report


def _below(root: str, folder: str) -> str:
    """Return the path or URL of a folder in `root`."""
    if not URL.match(root):
        return str(Path(root, folder))
    path, question, options = root.partition("?")
    return f"{path.rstrip('/')}/{folder}{question}{options}"


def _check_places(source: Storage, dest: Storage) -> None:
    places = [f"{each.local.resolve() if each.local else each.url.rstrip('/')}/" for each in (source, dest)]
    if places[0].startswith(places[1]) or places[1].startswith(places[0]):
        raise UsageError(f"DEST: got {dest.url}, must not be inside the output folder, or the reverse")
    if dest.local is not None and dest.local.exists() and not dest.local.is_dir():
        raise UsageError(f"DEST: got {dest.url}, must be a folder")


def _read_state(dest: Storage) -> dict[str, Any] | None:
    """Return the content of `export.json`, or `None` for a new data set. Raises UsageError for a folder with other files."""
    if (content := dest.read(EXPORT)) is not None:
        state: dict[str, Any] = json.loads(content)
        return state
    if names := sorted(name for name in (*dest.files(""), *dest.folders("")) if not name.startswith(".")):
        raise UsageError(f"DEST: {dest.url} has other files, such as {names[0]!r}; export to a new or an empty folder")
    return None


class _Export:
    """One call. The table `new` is what the data set shall have, `done` what it has, `before` what it had."""

    def __init__(
        self,
        source: Storage,
        dest: Storage,
        settings: ExportSettings,
        database: duckdb.DuckDBPyConnection,
        held: Lease,
        address: str | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._source, self._dest, self._db, self._lease = source, dest, database, held
        self._address, self._on_progress = address, on_progress
        self._state = _read_state(dest)
        self._settings = settings
        self._ending = SHARD_ENDING.get(settings.format)
        self._pending = list[str]()
        self._failed = 0
        self._saved = time.monotonic()

    def run(self) -> ExportReport:
        settings, stored = self._settings, self._state or {}
        self._load_done()
        kind = choose(self._db, settings.where, settings.best, settings.cleared, settings.files or stored.get("files"))
        self._settings = settings = settings.model_copy(update={"files": kind})
        self._check_settings()
        load_rows(self._db, kind, settings.caption, in_shards=self._ending is not None)
        assign_splits(self._db, settings.splits, settings.split_by)
        was_killed = self._clean_up()
        self._plan_shards() if self._ending else self._plan_files()
        columns = self._rows("", *([FILE_NAME] if settings.format == "videofolder" else []))
        described = settings.model_dump(mode="json") | {
            "source": self._source.url,
            "columns": {field.name: str(field.type) for field in self._db.sql(columns).to_arrow_reader(1).schema},
            "refused": self._reasons("SELECT * FROM refused"),
        }
        is_same = all(stored.get(name) == value for name, value in described.items())
        if not is_same:
            # So that the next call knows the folder, and has work to do, if this one is killed.
            self._pend([])
            self._dest.write(EXPORT, _to_json(described))
        self._remove()
        self._write()
        return self._finish(described, is_same=is_same and not was_killed)

    def _load_done(self) -> None:
        self._db.execute(f"CREATE TABLE done ({', '.join(f'{name} {kind}' for name, kind in DONE.items())})")
        if Path(ROWS).name in self._dest.files(STATE):
            with opened(self._dest, ROWS) as file:
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=[*DONE]):
                    self._db.register("stored", pyarrow.Table.from_batches([batch]))
                    self._db.execute("INSERT INTO done BY NAME SELECT * FROM stored")
                    self._db.unregister("stored")
        self._db.execute("CREATE TABLE before AS SELECT id, signature FROM done")

    def _reasons(self, sql: str) -> list[dict[str, str]]:
        return [{"id": id_, "reason": reason} for id_, reason in self._db.execute(f"{sql} ORDER BY id").fetchall()]

    def _check_settings(self) -> None:
        """Raise UsageError if the settings do not mix with those of the data set in `dest`, or nothing is chosen."""
        given, state, dest = self._settings, self._state, self._dest.url
        if state is not None:
            if state["source"] != self._source.url:
                raise UsageError(f"DEST: {dest} has clips of {state['source']}; export to another folder")
            stored = ExportSettings.model_validate({name: state[name] for name in ExportSettings.model_fields})
            texts = [" ".join(each.fixed().options()) or "the default options" for each in (stored, given)]
            if stored.fixed() != given.fixed():
                raise UsageError(f"DEST: {dest} was exported with {texts[0]}, got {texts[1]}; export to another folder")
        # What the same call exported before may be gone or rejected.
        is_update = state is not None and all(state[name] == getattr(given, name) for name in ("where", "best", "cleared"))
        if not count(self._db, "chosen") and not (is_update and count(self._db, "done")):
            assert given.files is not None
            raise nothing_chosen(self._db, given.files)

    def _clean_up(self) -> bool:
        """Delete what a killed call left. Return whether there was one."""
        if (content := self._dest.read(PENDING)) is None:
            return False
        self._pending = json.loads(content)
        self._lease.check()
        key = "id" if self._settings.format == "lance" else "file"
        self._db.register("changed", pyarrow.table({key: pyarrow.array(self._pending, pyarrow.string())}))
        unknown = [name for (name,) in self._db.execute(f"SELECT {key} FROM changed ANTI JOIN done USING ({key})").fetchall()]
        # These may be newer than their rows.
        self._db.execute(f"UPDATE done SET signature = '', content = '' WHERE {key} IN (SELECT {key} FROM changed)")
        self._db.unregister("changed")
        if self._settings.format == "lance":
            for split in self._settings.splits:
                delete_from_lance(self._dest, split, unknown)
        else:
            self._delete_files(unknown)
        return True

    def _plan_files(self) -> None:
        """Create the tables `todo` of rows to write, and `stale` of clips that must go first."""
        is_lance, is_captions = self._settings.format == "lance", self._settings.format == "captions"
        file = (
            "splits.split || '.lance'"
            if is_lance
            else "concat(splits.split, '/', id, regexp_extract(_source, '[.][a-z0-9]+$'))"
        )
        same = "signature = _signature" if is_lance or is_captions else "content = _content"
        keeps = "coalesce(content = _content, false)" if is_captions else "false"
        self._db.execute(
            f"""CREATE TABLE todo AS SELECT id, {file} AS _file, {keeps} AS _keep, _place
            FROM new JOIN splits USING (id) LEFT JOIN done USING (id) WHERE coalesce({same}, false) = false"""
        )
        self._db.execute(
            "CREATE TABLE stale AS SELECT id, split, file FROM done WHERE id NOT IN (SELECT id FROM new) "
            "OR id IN (SELECT id FROM todo WHERE NOT _keep)"
        )

    def _plan_shards(self) -> None:
        """Create the same tables. A shard with a row that changed or went is written again; new rows get new shards."""
        db, limit = self._db, self._settings.shard_mb * 1e6
        changed = "SELECT file FROM done LEFT JOIN new USING (id) WHERE signature IS DISTINCT FROM _signature"
        db.execute(
            f"""CREATE TABLE todo AS SELECT id, file AS _file, false AS _keep, _place FROM done JOIN new USING (id)
            WHERE file IN ({changed})"""
        )
        # A shard that loses all rows goes as a file. Other rows go when their shard is written again.
        kept = "SELECT file FROM done SEMI JOIN new USING (id)"
        db.execute(f"CREATE TABLE stale AS SELECT id, split, file FROM done WHERE file NOT IN ({kept})")
        number, size = defaultdict[str, int](int), defaultdict[str, int](int)
        for split, file in db.execute("SELECT DISTINCT split, file FROM done").fetchall():
            number[split] = max(number[split], int(file.removesuffix(self._ending).rpartition("-")[2]) + 1)
        ids, files = [], []
        added = db.execute(
            "SELECT id, split, bytes FROM new JOIN splits USING (id) WHERE id NOT IN (SELECT id FROM done) ORDER BY _place"
        )
        while rows := added.fetchmany(10_000):
            for id_, split, n_bytes in rows:
                if size[split] and size[split] + n_bytes > limit:
                    number[split] += 1
                    size[split] = 0
                size[split] += n_bytes
                ids.append(id_)
                files.append(f"{split}-{number[split]:06d}{self._ending}")
        text = pyarrow.string()
        db.register("added", pyarrow.table({"id": pyarrow.array(ids, text), "_file": pyarrow.array(files, text)}))
        db.execute("INSERT INTO todo SELECT id, _file, false, _place FROM added JOIN new USING (id)")
        db.unregister("added")

    def _pend(self, files: Sequence[str]) -> None:
        """Store the names of files that will change, beside those that have since the rows were stored."""
        self._pending = [*dict.fromkeys([*self._pending, *files])]
        self._lease.check()
        self._dest.write(PENDING, json.dumps(self._pending))

    def _remove(self) -> None:
        """Remove clips that changed or went: first from the metadata, then their files."""
        stale = self._db.execute("SELECT id, split, file FROM stale").fetchall()
        if not stale:
            return
        self._pend([id_ if self._settings.format == "lance" else file for id_, _, file in stale])
        self._db.execute("DELETE FROM done WHERE id IN (SELECT id FROM stale)")
        if self._settings.format == "lance":
            for split in self._settings.splits:
                delete_from_lance(self._dest, split, [id_ for id_, of, _ in stale if of == split])
            return
        self._write_metadata()
        self._delete_files([*dict.fromkeys(file for _, _, file in stale)])

    def _delete_files(self, files: Sequence[str]) -> None:
        with ThreadPoolExecutor(1 if self._dest.local else REQUESTS_AT_ONCE) as pool:
            list(pool.map(self._dest.delete, files))
            if self._settings.format == "captions":
                list(pool.map(self._dest.delete, map(caption_file, files)))

    def _write(self) -> None:
        """Write the clips of `todo` with tasks of Ray Data."""
        if not (total := count(self._db, "todo")):
            return
        target, written = Target(self._source, self._dest, self._settings.format, self._settings.transcode), 0
        with connected(self._address, cpus=1), own_context():
            for blocks in batched(self._blocks(), CHUNK_BLOCKS):
                key = "id" if self._settings.format == "lance" else "_file"
                self._pend([name for block in blocks for name in compute.unique(block[key]).to_pylist()])
                for results in _run_tasks(blocks, target):
                    self._record(results)
                    written += len(results)
                    self._on_progress(written, total)
                if time.monotonic() - self._saved > CHECKPOINT_S:
                    self._save()
                    self._pending, self._saved = [], time.monotonic()

    def _blocks(self) -> Iterator[pyarrow.Table]:
        """Yield the rows to write, a block per task: some rows, or all of a shard."""
        is_linked = (
            self._settings.format != "lance" and not self._settings.transcode and self._source.local and self._dest.local
        )
        # A connection of its own, because the other one is used meanwhile.
        rows = self._db.cursor().sql(
            f"""SELECT new.* EXCLUDE (_place, _content, _signature), split, _file, _keep
            FROM todo JOIN new USING (id) JOIN splits USING (id)
            ORDER BY {"_file" if self._ending else "split"}, todo._place"""
        )
        rest = None
        for batch in rows.to_arrow_reader(BLOCK_ROWS if self._ending or is_linked else SLOW_BLOCK_ROWS):
            table = pyarrow.Table.from_batches([batch])
            if not self._ending:
                yield table
                continue
            table = table if rest is None else pyarrow.concat_tables([rest, table])
            files = np.asarray(table["_file"])
            starts = [0, *(np.flatnonzero(files[1:] != files[:-1]) + 1).tolist()]
            yield from (table.slice(begin, end - begin) for begin, end in pairwise(starts))
            rest = table.slice(starts[-1])
        if rest is not None:
            yield rest

    def _record(self, results: pyarrow.Table) -> None:
        """Add written clips to `done`, and those without a file to `missing`. Raises OSError if a task failed."""
        if (failure := results.slice(0, 1).to_pylist()[0])["id"] is None:
            raise OSError(errno.ENOSPC if failure["is_full"] else errno.EIO, failure["problem"])
        db = self._db
        db.register("results", results)
        db.execute("INSERT INTO missing SELECT id, problem FROM results WHERE problem IS NOT NULL")
        self._failed += len(results) - results["problem"].null_count
        written_files = "SELECT DISTINCT _file FROM results JOIN todo USING (id)"
        db.execute("DELETE FROM done WHERE id IN (SELECT id FROM results)")
        if self._ending:
            # The rows that a shard does not have any more.
            db.execute(f"DELETE FROM done WHERE file IN ({written_files}) AND id NOT IN (SELECT id FROM todo)")
            empty = f"{written_files} GROUP BY _file HAVING count(*) FILTER (problem IS NULL) = 0"
            self._delete_files([file for (file,) in db.execute(empty).fetchall()])
        exported = ", ".join(f"results.{name} AS exported_{name}" for name in PROPERTIES)
        db.execute(
            f"""INSERT INTO done BY NAME
            SELECT id, split, _file AS file, {"_sample" if self._ending else "NULL"} AS sample, _signature AS signature,
                _content AS content, {exported}
            FROM results JOIN todo USING (id) JOIN new USING (id) JOIN splits USING (id) WHERE problem IS NULL"""
        )
        if self._settings.format == "lance":
            rows = db.sql(self._rows("JOIN results USING (id)", "results.content")).to_arrow_table()
            column = "image" if self._settings.files == "image" else "video"
            for split in compute.unique(rows["split"]).to_pylist():
                some = rows.filter(compute.equal(rows["split"], split))
                append_to_lance(self._dest, split, some.drop_columns("content"), column, some["content"].to_pylist())
        db.unregister("results")

    def _rows(self, joined: str = "", *first: str) -> str:
        """Return the SQL of the exported rows, as the data set has them, in order. `first`: further columns."""
        names = [name for name, *_ in self._db.execute("DESCRIBE new").fetchall() if not name.startswith("_")]
        listed = [f"exported_{name} AS {name}" if name in PROPERTIES else f"new.{quoted(name)}" for name in names]
        columns = ", ".join([*first, *listed, "done.split"])
        return f"SELECT {columns} FROM done JOIN new USING (id) {joined} ORDER BY _place"

    def _write_metadata(self) -> None:
        """Write the metadata of each split of `videofolder`, with the rows of `done`."""
        if self._settings.format != "videofolder":
            return
        for split in self._settings.splits:
            if count(self._db, f"done WHERE split = '{split}'"):
                rows = self._rows(f"WHERE done.split = '{split}'", FILE_NAME)
                self._write_rows(f"{split}/{METADATA}", rows)
            else:
                self._dest.delete(f"{split}/{METADATA}")

    def _write_rows(self, path: str, sql: str) -> None:
        self._lease.check()
        rows = self._db.sql(sql).to_arrow_reader(10_000)
        with self._dest.new_file(path) as tmp, pyarrow.parquet.ParquetWriter(tmp, rows.schema) as file:
            for batch in rows:
                file.write_batch(batch)

    def _save(self) -> None:
        """Store the rows that the data set has."""
        self._write_metadata()
        columns = []
        for name, *_ in self._db.execute("DESCRIBE clips").fetchall():
            if name not in ("id", "caption", *DONE, *PRIVATE):
                text = "::VARCHAR" if name in ("metadata", "factors") else ""
                columns.append(f"clips.{quoted(name)}{text} AS {quoted(name)}")
        self._write_rows(
            ROWS,
            f"SELECT id, {', '.join(columns)}, new.caption, done.* EXCLUDE (id) FROM done JOIN clips USING (id) "
            "JOIN (SELECT id, caption, _place FROM new) new USING (id) ORDER BY new._place",
        )

    def _finish(self, described: dict[str, Any], *, is_same: bool) -> ExportReport:
        """Store the state, unless this call changed nothing. Return the result."""
        report = ExportReport(self._dest.url, self._settings.format)
        # Their clips are the same. Other formats have written them.
        self._db.execute("UPDATE done SET signature = _signature FROM new WHERE done.id = new.id")
        report.refused = described["refused"]
        report.missing = self._reasons("SELECT * FROM missing")
        report.removed = self._reasons(
            """SELECT id, CASE WHEN status IS NULL THEN 'the output folder does not have the shot'
                WHEN status <> 'done' THEN status WHEN verdict = 'reject' THEN 'rejected'
                ELSE coalesce(refused.reason, missing.reason, 'not selected by --where or --best') END
            FROM (FROM before ANTI JOIN done USING (id)) LEFT JOIN clips USING (id) LEFT JOIN refused USING (id)
            LEFT JOIN missing USING (id)"""
        )
        both = "before JOIN done USING (id) WHERE before.signature"
        report.counts = {
            "added": count(self._db, "done ANTI JOIN before USING (id)"),
            "changed": count(self._db, f"{both} <> done.signature"),
            "removed": len(report.removed),
            "unchanged": count(self._db, f"{both} = done.signature"),
            "rejected": count(self._db, REJECTED),
            "failed": self._failed,
        }
        counted = self._db.execute("SELECT split, count(*) FROM done GROUP BY split").fetchall()
        report.splits = {name: dict(counted).get(name, 0) for name in self._settings.splits}
        stored = self._state or {}
        is_changed = any(report.counts[name] for name in ("added", "changed", "removed"))
        report.up_to_date = is_same and not is_changed and stored.get("missing") == report.missing
        if not report.up_to_date:
            self._save()
            state = {
                **described,
                "command": shlex.join(["vidgen", "export", self._source.url, self._dest.url, *self._settings.options()]),
                "versions": {name: version(name) for name in PACKAGES},
                **{name: getattr(report, name) for name in ("counts", "removed", "missing")},
            }
            if report.refused:
                self._dest.write(REFUSED, "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in report.refused))
            else:
                self._dest.delete(REFUSED)
            self._dest.write(EXPORT, _to_json(state))
            write_card(self._dest, self._source)
        self._dest.delete(PENDING)
        return report


def _run_tasks(blocks: Sequence[pyarrow.Table], target: Target) -> Iterator[pyarrow.Table]:
    """Yield the results of the tasks of Ray Data that write these blocks. They run where the folders are."""
    tasks: dict[str, Any] = {"num_cpus": 1}
    if target.source.local or target.dest.local:
        tasks = {**on_this_node(), "compute": ray.data.TaskPoolStrategy(size=min(MAX_TASKS, len(blocks), os.cpu_count() or 1))}
    written = ray.data.from_arrow(list(blocks)).map_batches(
        partial(write_block, target=target), batch_size=None, batch_format="pyarrow", **tasks
    )
    yield from written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _to_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
