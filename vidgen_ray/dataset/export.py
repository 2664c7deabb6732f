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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from glob import has_magic
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb
import pyarrow
import pyarrow.parquet
import ray
from more_itertools import batched
from pyarrow import compute
from rich.progress import Progress

from vidgen_ray.batch.line_planner import MAX_TASKS, on_this_node, own_context
from vidgen_ray.cli.commands import note
from vidgen_ray.dataset.data_card import ROWS, STATE, write_card
from vidgen_ray.dataset.export_formats import (
    PROPERTIES,
    SHARD_ENDING,
    Target,
    append_to_lance,
    caption_file,
    delete_from_lance,
    write_block,
)
from vidgen_ray.dataset.export_rows import (
    FINISHED,
    REJECTED_ROWS,
    ExportSettings,
    assign_splits,
    choose,
    load_rows,
    row_count,
)
from vidgen_ray.dataset.tables import columns_of, open_tables, quoted, write_parquet
from vidgen_ray.dataset.trainer_files import apply_rules, groups_in_words, write_trainer_files
from vidgen_ray.engine.ray_cluster import connected
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.outputs.lease import Lease, lease
from vidgen_ray.outputs.manifest import opened
from vidgen_ray.outputs.storage import REQUESTS_AT_ONCE, Storage, is_disk_full, storage_at
from vidgen_ray.system.console import Console
from vidgen_ray.system.quantities import count
from vidgen_ray.trainers import parse_target

PENDING = ".vidgen/pending.json"
CHECKPOINT_S = 60.0
"""Seconds after which the rows of written clips are stored, for a call that is killed later."""
_BLOCK_ROWS, SLOW_BLOCK_ROWS = 500, 16
"""Clips of a task that links them, and of one that reads or encodes them."""
CHUNK_BLOCKS = 20
"""Tasks after which the lease is checked."""
_PACKAGES = ("vidgen-ray", "duckdb", "pyarrow", "ray")
PRIVATE = ("note", "who", "team", "submission_id")
"""Columns of `clips` that are not stored, because data sets are published. Of photos and images, only file names are."""
_DONE = {
    **dict.fromkeys(("id", "split", "file", "sample", "signature", "content", "exported_sha256"), "VARCHAR"),
    **{f"exported_{name}": "BIGINT" for name in ("bytes", "width", "height", "num_frames")},
    **{f"exported_{name}": "DOUBLE" for name in ("fps", "duration_s")},
}
"""Columns of the table `done`. `signature` changes with the row or its clip, `content` with the clip."""


@dataclass
class ExportReport:
    """Result of a call."""

    dest: str
    format: str
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
    """Selected shots without a file, with one that cannot be read or encoded, or that the trainer would drop."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """For a trainer: number, shape and use of each group of equal clips."""
    cache: str | None = None
    """What to do before the trainer is started again, if it may have cached clips of an earlier call."""
    seconds: float = 0


def export_folder(out: str, dest: str, settings: ExportSettings, address: str | None = None) -> ExportReport:
    """Make `dest` the data set of what the output folder has now.

    Shows a progress bar. Raises UsageError for settings that fit neither the folder nor what `dest` has, SetupError if another
    export is using `dest` or the disk is full, and OSError.
    """
    begin = time.monotonic()
    source, target = storage_at(out), storage_at(dest)
    _check_places(source, target)
    _read_state(target)
    if (settings.format == "lance" or settings.trainer) and target.local is None:
        option = "--for" if settings.trainer else "--format lance"
        raise UsageError(f"{option}: DEST must be a folder on a disk; copy it to the object store afterwards")
    if settings.trainer and parse_target(settings.trainer).trainer.is_globbing:
        folder = str(Path(str(target.local)).resolve())
        if has_magic(folder):
            trainer = settings.trainer.partition(":")[0]
            raise UsageError(f"DEST: got {folder}, must have none of [ * ? in its path, which {trainer} takes as a pattern")
    try:
        with lease(target, f"export-{secrets.token_hex(3)}") as held, open_tables(source) as database:
            report = _Export(source, target, settings, database, held, address, _read_state(target)).run()
    except OSError as error:
        if is_disk_full(error):
            raise SetupError(f"{target.url}: the disk is full. Make room and run the same command to resume") from None
        raise
    report.seconds = round(time.monotonic() - begin, 3)
    return report


def _check_places(source: Storage, dest: Storage) -> None:
    places = [f"{each.local.resolve() if each.local else each.url.rstrip('/')}/" for each in (source, dest)]
    if places[0].startswith(places[1]) or places[1].startswith(places[0]):
        raise UsageError(f"DEST: got {dest.url}, must not be inside the output folder, or the reverse")
    if dest.local is not None and dest.local.exists() and not dest.local.is_dir():
        raise UsageError(f"DEST: got {dest.url}, must be a folder")


def _read_state(dest: Storage) -> dict[str, Any] | None:
    """Return the content of `export.json`, or `None` for a new data set. Raises UsageError for a folder with other files."""
    if (content := dest.read(STATE)) is not None:
        state: dict[str, Any] = json.loads(content)
        return state
    if names := sorted(name for name in (*dest.files(""), *dest.folders("")) if not name.startswith(".")):
        raise UsageError(f"DEST: {dest.url} has other files, such as {names[0]!r}; export to a new or an empty folder")
    return None


@dataclass
class _Export:
    """One call. The table `new` is what the data set shall have, `done` what it has, `before` what it had."""

    _source: Storage
    _dest: Storage
    _settings: ExportSettings
    _db: duckdb.DuckDBPyConnection
    _lease: Lease
    _address: str | None
    _state: dict[str, Any] | None
    _pending: list[str] = field(default_factory=list)
    _failed: int = 0
    _saved: float = field(default_factory=time.monotonic)

    def run(self) -> ExportReport:
        settings, stored = self._settings, self._state or {}
        self._load_done()
        kind = choose(self._db, settings, settings.files or stored.get("files"))
        by = settings.split_by or stored.get("split_by") or settings.default_split_by
        self._settings = settings = settings.model_copy(update={"files": kind, "split_by": tuple(by)})
        self._ending = SHARD_ENDING.get(settings.format)
        self._key = "id" if settings.format == "lance" else "file"
        self._check_settings()
        load_rows(self._db, kind, settings.caption, in_shards=self._ending is not None)
        if settings.trainer:
            apply_rules(self._db, settings.trainer, fit=settings.fit)
        train_all = settings.trainer is not None and "character" not in by
        places = assign_splits(self._db, settings.splits, by, stored.get("places"), train_all=train_all)
        was_killed = self._clean_up()
        self._plan_shards() if self._ending else self._plan_files()
        described = settings.model_dump(mode="json") | {
            "source": self._source.url,
            "columns": {field.name: str(field.type) for field in self._db.sql(self._rows()).to_arrow_reader(1).schema},
            "refused": self._reasons("SELECT * FROM refused"),
            "places": places,
            **({"dest": self._dest.url} if settings.trainer else {}),
        }
        is_same = all(stored.get(name) == value for name, value in described.items())
        if not is_same:
            # So that the next call knows the folder, and has work to do, if this one is killed.
            self._pend([])
            self._dest.write(STATE, json.dumps(described, indent=1, ensure_ascii=False))
        self._remove()
        self._write()
        return self._finish(described, is_same=is_same and not was_killed)

    def _load_done(self) -> None:
        self._db.execute(f"CREATE TABLE done ({', '.join(f'{name} {kind}' for name, kind in _DONE.items())})")
        if "rows.parquet" in self._dest.files(".vidgen"):
            with opened(self._dest, ROWS) as file:
                self._db.register("stored", pyarrow.parquet.read_table(file, columns=[*_DONE]))
            self._db.execute("INSERT INTO done BY NAME SELECT * FROM stored")
        self._forget_lost_files()
        self._db.execute("CREATE TABLE before AS SELECT id, signature FROM done")

    def _forget_lost_files(self) -> None:
        """Remove rows whose file was deleted, so that it is written again. Prints how many files are gone."""
        if self._settings.format == "lance":
            return
        files = [file for (file,) in self._db.execute("SELECT DISTINCT file FROM done ORDER BY file").fetchall()]
        folders = {file.rpartition("/")[0] for file in files}
        found = {f"{folder}/{name}".lstrip("/") for folder in folders for name in self._dest.files(folder)}
        has_captions = self._settings.format == "captions"
        lost = [file for file in files if file not in found or (has_captions and caption_file(file) not in found)]
        if lost:
            note(f"{count(len(lost), 'file')} of {self._dest.url} cannot be found, such as {lost[0]}; written again")
            self._db.register("lost", pyarrow.table({"file": lost}))
            self._db.execute("DELETE FROM done WHERE file IN (SELECT file FROM lost)")

    def _reasons(self, sql: str) -> list[dict[str, str]]:
        return [{"id": id_, "reason": reason} for id_, reason in self._db.execute(f"{sql} ORDER BY id").fetchall()]

    def _check_settings(self) -> None:
        """Raise UsageError if the settings do not mix with those of the data set in `dest`, or nothing is chosen."""
        given, state, dest = self._settings, self._state, self._dest.url
        if given.trainer and given.files == "image" and row_count(self._db, "chosen"):
            raise UsageError("--for: the selected shots have images, must be clips; --format captions exports images")
        if state is not None:
            if state["source"] != self._source.url:
                raise UsageError(f"DEST: {dest} has clips of {state['source']}; export to another folder")
            fixed = given.model_dump(mode="json", include={"format", "files", "splits", "split_by", "resize", "trainer"})
            for name, value in fixed.items():
                if state[name] != value:
                    raise UsageError(
                        f"DEST: {dest} was exported with {name} {state[name]}, got {value}; export to another folder"
                    )
        # What the same call exported before may be gone or rejected.
        is_update = state is not None and all(state[name] == getattr(given, name) for name in ("where", "best", "cleared"))
        if row_count(self._db, "chosen") or (is_update and row_count(self._db, "done")):
            return
        done, rejected, refused, missing = (
            row_count(self._db, table) for table in (FINISHED, REJECTED_ROWS, "refused", "missing")
        )
        raise UsageError(
            f"no clip to export: of {done:,} finished shots, {done - rejected - refused - missing:,} are not selected by "
            f"--where or --best, {rejected:,} are rejected, {refused:,} are refused by --cleared, {missing:,} have no "
            f"{given.files}"
        )

    def _clean_up(self) -> bool:
        """Delete what a killed call left. Return whether there was one."""
        if (content := self._dest.read(PENDING)) is None:
            return False
        self._pending = json.loads(content)
        self._lease.check()
        key = self._key
        self._db.register("changed", pyarrow.table({key: pyarrow.array(self._pending, pyarrow.string())}))
        unknown = [name for (name,) in self._db.execute(f"SELECT {key} FROM changed ANTI JOIN done USING ({key})").fetchall()]
        # These may be newer than their rows.
        self._db.execute(f"UPDATE done SET signature = '', content = '' WHERE {key} IN (SELECT {key} FROM changed)")
        self._delete(unknown)
        return True

    def _plan_files(self) -> None:
        """Create the tables `todo` of rows to write, and `stale` of clips that must go first."""
        is_lance = self._settings.format == "lance"
        # Trainers know the clips of their caches by name, so that of another clip or caption must be another one.
        content = "'-', left(sha256(concat_ws(' ', _content, new.caption, _encoded::VARCHAR)), 8), "
        content = content if self._settings.format == "captions" else ""
        name = ".lance'" if is_lance else f"/', _group, id, {content}regexp_extract(_source, '[.][a-z0-9]+$')"
        # Of `videofolder`, the metadata has the rows.
        same = "content = _content" if self._settings.format == "videofolder" else "signature = _signature"
        self._db.execute(
            f"""CREATE TABLE todo AS SELECT id, concat(splits.split, '{name}) AS _file, _place
            FROM new JOIN splits USING (id) LEFT JOIN done USING (id) WHERE coalesce({same}, false) = false"""
        )
        self._db.execute(
            "CREATE TABLE stale AS SELECT id, file FROM done WHERE id NOT IN (SELECT id FROM new) "
            "OR id IN (SELECT id FROM todo)"
        )

    def _plan_shards(self) -> None:
        """Create the same tables. A shard with a row that changed or went is written again; new rows get new shards."""
        db, begin = self._db, "(sum(bytes) OVER (PARTITION BY split ORDER BY _place) - bytes)"
        changed = "SELECT file FROM done LEFT JOIN new USING (id) WHERE signature IS DISTINCT FROM _signature"
        db.execute(
            f"CREATE TABLE todo AS SELECT id, file AS _file, _place FROM done JOIN new USING (id) WHERE file IN ({changed})"
        )
        # A shard that loses all rows goes as a file. Other rows go when their shard is written again.
        kept = "SELECT file FROM done SEMI JOIN new USING (id)"
        db.execute(f"CREATE TABLE stale AS SELECT id, file FROM done WHERE file NOT IN ({kept})")
        db.execute(
            f"""INSERT INTO todo
            WITH added AS (
                SELECT id, split, _place, {begin} // {max(1, self._settings.shard_mb * 1_000_000)} AS part
                FROM new JOIN splits USING (id) WHERE id NOT IN (SELECT id FROM done)
            ), last AS (SELECT split, max(regexp_extract(file, '-([0-9]+)[.]', 1)::BIGINT) AS last FROM done GROUP BY split)
            SELECT id, format('{{}}-{{:06d}}{self._ending}', split,
                coalesce(last, -1) + dense_rank() OVER (PARTITION BY split ORDER BY part)), _place
            FROM added LEFT JOIN last USING (split)"""
        )

    def _pend(self, files: Sequence[str]) -> None:
        """Store the names of files that will change, beside those that have since the rows were stored."""
        self._pending = [*dict.fromkeys([*self._pending, *files])]
        self._lease.check()
        self._dest.write(PENDING, json.dumps(self._pending))

    def _remove(self) -> None:
        """Remove clips that changed or went: first from the metadata, then their files."""
        if stale := [name for (name,) in self._db.execute(f"SELECT DISTINCT {self._key} FROM stale").fetchall()]:
            self._pend(stale)
            self._db.execute("DELETE FROM done WHERE id IN (SELECT id FROM stale)")
            self._write_metadata()
            self._delete(stale)

    def _delete(self, files: Sequence[str]) -> None:
        """Delete files, or rows of Lance with these ids."""
        if self._settings.format == "lance":
            for split in self._settings.splits:
                delete_from_lance(self._dest, split, files)
            return
        with ThreadPoolExecutor(1 if self._dest.local else REQUESTS_AT_ONCE) as pool:
            list(pool.map(self._dest.delete, files))
            if self._settings.format == "captions":
                list(pool.map(self._dest.delete, map(caption_file, files)))

    def _write(self) -> None:
        """Write the clips of `todo` with tasks of Ray Data."""
        if not (total := row_count(self._db, "todo")):
            return
        target, bar = Target(self._source, self._dest, self._settings), Progress(console=Console(stderr=True), transient=True)
        task = bar.add_task("Writing clips", total=total)
        with connected(self._address, cpus=1), own_context(), bar:
            for blocks in batched(self._blocks(), CHUNK_BLOCKS):
                key = self._key.replace("file", "_file")
                self._pend([name for block in blocks for name in compute.unique(block[key]).to_pylist()])
                for results in _run_tasks(blocks, target):
                    self._record(results)
                    bar.advance(task, len(results))
                if time.monotonic() - self._saved > CHECKPOINT_S:
                    self._save()
                    self._pending, self._saved = [], time.monotonic()

    def _blocks(self) -> Iterator[pyarrow.Table]:
        """Yield the rows to write, a block per task: some rows, or all of a shard."""
        db, settings = self._db.cursor(), self._settings
        columns = "new.* EXCLUDE (_place, _content, _signature), split, _file"
        rows = f"SELECT {columns} FROM new JOIN todo USING (id) JOIN splits USING (id)"
        if self._ending:
            for name in db.execute("SELECT DISTINCT _file FROM todo ORDER BY _file").fetchall():
                yield db.sql(f"{rows} WHERE _file = ? ORDER BY todo._place", params=name).to_arrow_table()
            return
        is_encoded = settings.resize or settings.fit
        is_linked = settings.format != "lance" and not is_encoded and self._source.local and self._dest.local
        size = _BLOCK_ROWS if is_linked else SLOW_BLOCK_ROWS
        for batch in db.sql(f"{rows} ORDER BY split, todo._place").to_arrow_reader(size):
            yield pyarrow.Table.from_batches([batch])

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
            self._delete([file for (file,) in db.execute(empty).fetchall()])
        exported = ", ".join(f"results.{name} AS exported_{name}" for name in PROPERTIES)
        db.execute(
            f"""INSERT INTO done BY NAME
            SELECT id, split, _file AS file, {"_sample" if self._ending else "NULL"} AS sample, _signature AS signature,
                _content AS content, {exported}
            FROM results JOIN todo USING (id) JOIN new USING (id) JOIN splits USING (id) WHERE problem IS NULL"""
        )
        if self._settings.format == "lance":
            column = "image" if self._settings.files == "image" else "video"
            for split in self._settings.splits:
                rows = self._rows(f"JOIN results USING (id) WHERE done.split = '{split}'", "results.content")
                if table := db.sql(rows).to_arrow_table():
                    append_to_lance(self._dest, split, table, column)

    def _rows(self, rest: str = "", *further: str) -> str:
        """Return the SQL of the exported rows, as the data set has them, in order. `further`: columns from `rest`."""
        first = ["parse_filename(file) AS file_name"] if self._settings.format == "videofolder" else []
        names = [name for name in columns_of(self._db, "new") if not name.startswith("_")]
        listed = [f"exported_{name} AS {name}" if name in PROPERTIES else f"new.{quoted(name)}" for name in names]
        columns = ", ".join([*first, *further, *listed, "done.split"])
        return f"SELECT {columns} FROM done JOIN new USING (id) {rest} ORDER BY _place"

    def _write_metadata(self) -> None:
        """Write the metadata of each split of `videofolder`, with the rows of `done`."""
        if self._settings.format != "videofolder":
            return
        for split in self._settings.splits:
            if row_count(self._db, f"done WHERE split = '{split}'"):
                self._write_rows(f"{split}/metadata.parquet", self._rows(f"WHERE done.split = '{split}'"))
            else:
                self._dest.delete(f"{split}/metadata.parquet")

    def _write_rows(self, path: str, sql: str) -> None:
        self._lease.check()
        rows = self._db.sql(sql).to_arrow_reader(10_000)
        with self._dest.new_file(path) as tmp:
            write_parquet(tmp, rows)

    def _save(self) -> None:
        """Store the rows that the data set has."""
        self._write_metadata()
        taken = ", ".join(f"'{name}'" for name in ("id", "caption", *_DONE, *PRIVATE))
        self._write_rows(
            ROWS,
            f"""WITH photo AS (
                SELECT id, unnest(face_image) AS path, parse_filename(path) AS name, generate_subscripts(face_image, 1) AS n
                FROM clips
            ), named AS (SELECT *, count(DISTINCT path) OVER (PARTITION BY name) AS paths FROM photo
            ), faces AS (
                SELECT id, list(if(paths > 1, left(sha256(path), 6) || '-', '') || name ORDER BY n) AS names
                FROM named GROUP BY id
            ), short AS (
                SELECT * REPLACE (metadata::VARCHAR AS metadata, factors::VARCHAR AS factors, names AS face_image,
                    parse_filename(start_image) AS start_image, parse_filename(last_image) AS last_image,
                    coalesce(character, array_to_string(names, '+')) AS person)
                FROM clips LEFT JOIN faces USING (id)
            ), rest AS (SELECT id AS _id, COLUMNS(lambda name: name NOT IN ({taken}, 'names')) FROM short)
            SELECT id, rest.* EXCLUDE (_id), new.caption, done.* EXCLUDE (id)
            FROM done JOIN rest ON id = _id JOIN new USING (id) ORDER BY _place""",
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
            "added": row_count(self._db, "done ANTI JOIN before USING (id)"),
            "changed": row_count(self._db, f"{both} <> done.signature"),
            "removed": len(report.removed),
            "unchanged": row_count(self._db, f"{both} = done.signature"),
            "rejected": row_count(self._db, REJECTED_ROWS),
            "failed": self._failed,
            **({"dropped": row_count(self._db, "shapes ANTI JOIN new USING (id)")} if self._settings.trainer else {}),
        }
        counted = self._db.execute("SELECT split, count(*) FROM done GROUP BY split").fetchall()
        report.splits = {name: dict(counted).get(name, 0) for name in self._settings.splits}
        report.groups = groups_in_words(self._db) if self._settings.trainer else []
        stored = self._state or {}
        is_changed = any(report.counts[name] for name in ("added", "changed", "removed"))
        report.up_to_date = is_same and not is_changed and stored.get("missing") == report.missing
        if self._settings.trainer and is_changed and row_count(self._db, "before"):
            report.cache = parse_target(self._settings.trainer).trainer.cache
        if not report.up_to_date:
            self._save()
            state = {
                **described,
                "command": shlex.join(["vidgen", "export", self._source.url, self._dest.url, *self._settings.options()]),
                "versions": {name: version(name) for name in _PACKAGES},
                **{name: getattr(report, name) for name in ("counts", "removed", "missing")},
            }
            self._dest.delete("refused.jsonl")
            if report.refused:
                lines = (f"{json.dumps(each, ensure_ascii=False)}\n" for each in report.refused)
                self._dest.write("refused.jsonl", "".join(lines))
            self._dest.write(STATE, json.dumps(state, indent=1, ensure_ascii=False))
            if self._settings.trainer:
                write_trainer_files(self._db, self._dest, self._settings.trainer, self._settings.splits)
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
