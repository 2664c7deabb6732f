"""Write the results of a run: `manifest/*.parquet` and `failures.jsonl`.

During a run, rows and failed lines are written to part files, so that a killed process loses few of them and other processes
can read them; `failures.jsonl` itself may be the script of this run. `close` merges the parts with those of earlier runs. If it
is killed, the next run repeats the merge: rows that were already copied are recognised by their id. In memory are
the ids of all lines.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import PeriodicTask, number_of
from vidgen_ray.outputs.manifest import (
    REJECTED,
    REPLACED,
    SCHEMA,
    ManifestFile,
    ManifestRow,
    current_rows,
    delete_markers,
    is_damaged,
    manifest_files,
    read_index,
    rows_as_columns,
    write_marker,
)
from vidgen_ray.outputs.records import Failure, shot_path
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.shot import Shot
from vidgen_ray.system.cache_dir import sha256_of

FAILURES_FILE = "failures.jsonl"
"""The failed lines, as a script that can be rendered again. The field `failure` of each line has the reason."""
SCRIPTS = "scripts.json"
RAY_PACKAGE = re.compile(r".*/_ray_pkg_[^/]+/")
_PARTS = "failures"
PART_ROWS = 2_000
FLUSH_S = 30.0
"""Seconds between automatic flushes."""
FILE_ROWS = 100_000
SMALL_FILE_ROWS = 5_000
"""Files with fewer rows are merged with others."""


def script_name(storage: Storage, path: Path, *, record: Sequence[str] | None = None) -> str:
    """Return the name that a script has in the rows of an output folder: its file name, with folders if that is taken.

    `scripts.json` has the names with paths, digests and the commands that render them. A script has the name of an earlier one
    with its path, or with its file name and content. `record`: write it there, with this command. Raises SetupError if
    `scripts.json` is damaged.
    """
    if path.name == FAILURES_FILE:
        return FAILURES_FILE
    try:
        known = json.loads(storage.read(SCRIPTS) or b"{}")
        names = {each["path"]: name for name, each in known.items()}
        contents = {(posixpath.basename(name), each["sha256"]): name for name, each in known.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SetupError(f"{storage.place(SCRIPTS)}: is damaged; delete it if the folder has one script only") from None
    path = Path(os.path.abspath(path))
    # A link may lead to another file later.
    path = path.parent.resolve() / path.name
    # Each upload of the working directory of a Ray job has another path. A local output folder may move with its scripts.
    if (place := RAY_PACKAGE.sub("", str(path))) == str(path) and storage.local is not None:
        place = os.path.relpath(path, storage.local.resolve())
    sha256 = sha256_of(path) if path.is_file() else None
    name = names.get(place) or (contents.get((path.name, sha256)) if sha256 else None)
    if name is None:
        longer = ("/".join(path.parts[-number:]) for number in range(1, len(path.parts) + 1))
        name = next(name for name in longer if name not in known)
    entry = {"path": place, "sha256": sha256, "command": list(record or ())}
    if record is not None and known.get(name) != entry:
        storage.write(SCRIPTS, json.dumps({**known, name: entry}, indent=1))
    return name


class ManifestWriter:
    """Writes the manifest rows and failures of one run, in the order in which lines finish. `script`: see `script_name`.

    `options`: with which its failed lines are to be rendered again.
    Create it while the run holds the lease of the folder. Raises OSError if the storage fails.
    """

    def __init__(self, outputs: OutputFolder, run: str, script: str, options: Mapping[str, Any] | None = None) -> None:
        self._outputs = outputs
        self._options = options
        self._storage = outputs.storage
        self._run = run
        self._script = script
        self._lock = threading.Lock()
        """Held for a moment. While a file is written, which may hang, rows can be added: only `flush` and `close` write."""
        self._writing = threading.Lock()
        self._rows: list[ManifestRow] = []
        self._failed: list[str] = []
        self._row_parts = self._failed_parts = 1
        self._unwritten = False
        self._replaced_ids: list[str] = []
        write_marker(self._storage, run)
        self._flushing = PeriodicTask(FLUSH_S, self.flush)

    def add(self, row: ManifestRow, *, fields: Mapping[str, Any] | None = None, replaces: str | None = None) -> None:
        """Add the row of a finished line. Call once per line. `fields`: of a failed line, to render it again.

        `replaces` is the id of the line in an earlier run, if it differs. Never waits for the storage. Rows that cannot be
        written are kept and written later; `close` raises OSError if that fails.
        """
        with self._lock:
            self._rows.append(row)
            self._unwritten = True
            if fields is not None:
                self._failed.append(failed_line(row, fields, self._options))
            if replaces is not None:
                self._replaced_ids.append(replaces)
            # Once for each part: while nothing can be written, not for each row.
            is_part_full = len(self._rows) % PART_ROWS == 0 or (fields is not None and len(self._failed) % PART_ROWS == 0)
        if is_part_full:
            self._flushing.wake()

    def flush(self) -> None:
        """Write the rows added so far. Runs automatically every `FLUSH_S` seconds, and when a part is full."""
        with self._writing:
            if self._unwritten:
                self._write_parts()

    def discard(self) -> None:
        """Stop without merging: the lease of the folder was lost, and another run may be writing to it."""
        self._flushing.stop()

    def close(
        self, *, whole_script: bool = True, every_line_has_a_row: bool = False, every_shot_has_a_row: bool = True
    ) -> list[str]:
        """Merge this run with earlier ones: `manifest/` as `fate_of_rows` says, and only unresolved lines in `failures.jsonl`.

        Return the paths of damaged files, which were renamed so that the folder can be read as one table.

        `whole_script`: the script was read to its end, so earlier rejections of its lines are dropped unless repeated.
        `every_line_has_a_row`: the rows of this run are all lines that the script has now. Its earlier rows with other ids
        become `replaced`, and its earlier failures with other ids are dropped.
        `every_shot_has_a_row`: false if the run was interrupted, so shots may have been written that no row describes.
        """
        self._flushing.stop()
        self.flush()

        def is_resolved(reason: _Reason) -> bool:
            if reason.key in failures:
                return False
            was_read = whole_script and reason.script == self._script
            was_rechecked = was_read and (reason.stage == REJECTED or every_line_has_a_row)
            return was_rechecked or reason.id in seen or reason.id in replaced_ids

        names = manifest_files(self._storage)
        sources, damaged = [], []
        finished_runs = set[str]()
        replaced_ids, seen, failures = set(self._replaced_ids), set[str](), set[tuple[str, str]]()
        for name in names:
            is_own = name.startswith(f"manifest/{self._run}-")
            if (indexed := read_index(self._storage, name, seen)) is None:
                if is_damaged(self._storage, name):
                    damaged.append(name)
                continue
            file, index = indexed
            if not is_own:
                file = fate_of_rows(
                    self._storage,
                    file,
                    index,
                    self._script,
                    replaced_ids,
                    whole_script=whole_script,
                    every_line_has_a_row=every_line_has_a_row,
                )
            is_failed = file.current & _is(index, "status", "failed")
            failed = index.filter(pyarrow.array(is_failed if file.replaced is None else is_failed & ~file.replaced))
            failures.update(zip(failed.column("run").to_pylist(), failed.column("id").to_pylist(), strict=True))
            finished_runs |= _finished_runs(file, index)
            if is_own or _needs_merge(file):
                sources.append(file)
        _merge_failures(self._storage, is_resolved)
        # Damaged in a column that is not in the index.
        unreadable = [file.name for file in sources if file.current.any() and is_damaged(self._storage, file.name)]
        sources = [file for file in sources if file.name not in unreadable]
        damaged = [_hide(self._storage, name) for name in (*damaged, *unreadable)]
        _merge_rows(self._storage, self._run, sources[::-1])
        if every_shot_has_a_row:
            delete_markers(self._storage, self._run, min(finished_runs, key=number_of, default=None))
        return damaged

    def _write_parts(self) -> None:
        """Write the current part files. They are rewritten until they are full."""
        self._outputs.check_lease()
        with self._lock:
            rows, failed, self._unwritten = [*self._rows], [*self._failed], False
        try:
            self._write_part(rows, failed)
        except BaseException:
            self._unwritten = True
            raise

    def _write_part(self, rows: Sequence[ManifestRow], failed: Sequence[str]) -> None:
        if rows:
            table = pyarrow.Table.from_batches([rows_as_columns(rows)])
            content = io.BytesIO()
            pyarrow.parquet.write_table(table, content)
            self._storage.write(f"manifest/{self._run}-{self._row_parts:05d}.parquet", content.getvalue())
            if len(rows) >= PART_ROWS:
                with self._lock:
                    del self._rows[: len(rows)]
                self._row_parts += 1
                del table, content
                _release_memory()
        if failed:
            lines = to_utf8("".join(line + "\n" for line in failed))
            self._storage.write(f"{_PARTS}/{self._run}-{self._failed_parts:05d}.jsonl", lines)
            if len(failed) >= PART_ROWS:
                with self._lock:
                    del self._failed[: len(failed)]
                self._failed_parts += 1


def _hide(storage: Storage, name: str) -> str:
    """Rename a damaged file so that it is not read as part of the table. Return its new path."""
    folder, _, file = name.rpartition("/")
    hidden = f"{folder}/.damaged-{file}"
    storage.write(hidden, storage.read(name) or b"")
    storage.delete(name)
    return hidden


def _is(index: pyarrow.Table, name: str, *values: str) -> NDArray[np.bool_]:
    """Return for each row, (rows,), whether the column has one of these values."""
    column = pyarrow.compute.is_in(index.column(name), value_set=pyarrow.array(values, pyarrow.string()))
    return np.array(column.to_pylist(), bool)  # `to_numpy` imports pandas


def fate_of_rows(
    storage: Storage,
    file: ManifestFile,
    index: pyarrow.Table,
    script: str,
    replaced_ids: set[str],
    *,
    whole_script: bool,
    every_line_has_a_row: bool,
) -> ManifestFile:
    """Return which rows of an earlier run stay, and which become `replaced`, when a run of `script` ends.

    The rule: **a shot has one row, of the last run that read its line.** `read_index` has already left out rows whose id has a
    later one, in any script. Of the others only these change:

    - Rows with an id of `replaced_ids`, which the shots of this run had before: no row.
    - With `whole_script`, rejected lines of the script that it has corrected or does not have any more: no row.
    - With `every_line_has_a_row`, failed lines that the script does not have any more: no row; its finished shots: `replaced`.

    Failed lines with files of an earlier run are treated as finished shots: `gc` and `prune` find the files by the row. Lines
    after those that an interrupted run has read keep their rows. Rows of damaged files are lost, see `ManifestWriter.close`.
    """
    current = file.current & ~_is(index, "id", *replaced_ids) if replaced_ids else file.current
    gone = current & _is(index, "script", script) if whole_script else np.zeros(len(current), bool)
    if not every_line_has_a_row:
        gone &= _is(index, "failure_stage", REJECTED)
    if not gone.any():
        return file._replace(current=current)
    failed = gone & _is(index, "status", "failed")
    failed[failed] = ~_have_files(storage, index.column("id").filter(pyarrow.array(failed)).to_pylist())
    # Rows that are replaced already need no rewriting.
    replaced = gone & ~_is(index, "status", REPLACED) if every_line_has_a_row else None
    return file._replace(current=current & ~failed, replaced=replaced)


def _have_files(storage: Storage, ids: Sequence[str]) -> NDArray[np.bool_]:
    """Return for each id, (ids,), whether there is a folder of a shot with this id."""
    paths = [shot_path(id_) for id_ in ids]
    present = {f"{shard}/{name}" for shard in {posixpath.dirname(path) for path in paths} for name in storage.folders(shard)}
    return np.array([path in present for path in paths], bool)


def drop_rows(storage: Storage, run: str, ids: Set[str]) -> None:
    """Remove the rows with these ids from the manifest.

    `run` is part of the names of new files, which become the newest. Call it while holding the lease of the folder. Raises
    OSError if the storage fails.
    """
    seen, sources = set[str](), []
    for name in manifest_files(storage):
        if (indexed := read_index(storage, name, seen)) is None:
            continue
        file, index = indexed
        current = file.current & ~_is(index, "id", *ids)
        # A row that is not current would become so, if the newer one of its id is dropped from another file.
        if not current.all():
            sources.append(file._replace(current=current))
    _merge_rows(storage, run, sources[::-1])


def _finished_runs(file: ManifestFile, index: pyarrow.Table) -> set[str]:
    """Return the runs of the current rows with a finished shot."""
    is_finished = file.current & ~_is(index, "status", "failed")
    return set(index.column("run").filter(pyarrow.array(is_finished)).unique().to_pylist())


def _needs_merge(file: ManifestFile) -> bool:
    """Return whether a file of an earlier run must be rewritten: stale rows, or few rows."""
    is_unchanged = file.current.all() and (file.replaced is None or not file.replaced.any())
    return not (is_unchanged and len(file.current) >= SMALL_FILE_ROWS)


def _release_memory() -> None:
    # Otherwise the allocator keeps more than a hundred megabytes.
    pyarrow.default_memory_pool().release_unused()


def _merge_rows(storage: Storage, run: str, sources: list[ManifestFile]) -> None:
    """Copy the current rows of the sources into files of at most `FILE_ROWS` rows, and delete the sources."""
    free_rows, files = 0, 0
    with ExitStack() as target:
        for source in sources:
            for batch in current_rows(storage, source) if source.current.any() else ():
                while len(batch):
                    if not free_rows:
                        target.close()
                        files, free_rows = files + 1, FILE_ROWS
                        path = target.enter_context(storage.new_file(f"manifest/{run}-all-{files:05d}.parquet"))
                        writer = target.enter_context(pyarrow.parquet.ParquetWriter(path, SCHEMA))
                    writer.write_batch(batch.slice(0, free_rows))
                    written = min(free_rows, len(batch))
                    free_rows, batch = free_rows - written, batch.slice(written)
            _release_memory()
    for source in sources:
        storage.delete(source.name)


def fields_of(shot: Shot) -> dict[str, Any]:
    """Return the fields of a line that renders a shot again."""
    # The start frame of a continued shot is found again.
    return shot.model_dump(mode="json") | ({} if shot.continue_from is None else {"image": None})


def failed_line(row: ManifestRow, fields: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> str:
    """Return the line of `failures.jsonl`, without the newline, of a row with a failure. `options`: of the run."""
    reason: dict[str, Any] = {name: getattr(row, name) for name in ("id", "script", "line", "run")}
    reason |= {name: getattr(row, f"failure_{name}") for name in Failure.model_fields}
    if options is not None:
        reason["options"] = options
    try:
        # Values from Parquet and YAML scripts that JSON does not support, such as dates, are written as text.
        return json.dumps({**fields, "failure": reason}, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return json.dumps({"unreadable": repr(fields)[:10_000], "failure": reason}, ensure_ascii=False)


def to_utf8(text: str) -> bytes:
    """Encode as UTF-8. Lone surrogates, which malformed script lines may contain, are written as backslash escapes."""
    return text.encode("utf-8", "backslashreplace")


def _merge_failures(storage: Storage, is_resolved: Callable[[_Reason], bool]) -> None:
    """Merge the part files of all runs into `failures.jsonl` and drop resolved failures.

    The file is deleted if no failure is left.
    """
    parts = [f"{_PARTS}/{name}" for name in sorted(storage.files(_PARTS)) if name.endswith(".jsonl")]
    if FAILURES_FILE not in storage.files("") and not parts:
        return
    with storage.new_file(FAILURES_FILE) as path:
        with path.open("wb") as target:
            target.writelines(
                to_utf8(line + "\n") for line in _unresolved(_lines(storage, [FAILURES_FILE, *parts]), is_resolved)
            )
        is_empty = path.stat().st_size == 0
    for merged in [FAILURES_FILE, *parts] if is_empty else parts:
        storage.delete(merged)
    if parts and not storage.files(_PARTS):
        storage.delete_folder(_PARTS)


def _lines(storage: Storage, sources: Sequence[str]) -> Iterator[str]:
    """Yield the non-empty lines of all source files."""
    for source in sources:
        with (
            suppress(FileNotFoundError),
            storage.local_copy(source) as path,
            path.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file,
        ):
            yield from (line.rstrip("\n") for line in file if line.strip())


def failed_lines(storage: Storage, ids: Set[str] | None = None) -> list[str]:
    """Return the lines of `failures.jsonl` with these ids. Default: all lines."""

    def is_wanted(line: str) -> bool:
        return ids is None or ((reason := _reason(line)) is not None and reason.id in ids)

    return list(filter(is_wanted, _lines(storage, [FAILURES_FILE])))


def _unresolved(lines: Iterable[str], is_resolved: Callable[[_Reason], bool]) -> Iterator[str]:
    """Yield the lines whose failure still counts, and lines without a reason."""
    written = set[tuple[str, str]]()
    for line in lines:
        reason = _reason(line)
        if reason is None:
            yield line
            continue
        # A run that was killed during a merge may have left a line twice.
        if reason.key in written:
            continue
        written.add(reason.key)
        if not is_resolved(reason):
            yield line


class _Reason(NamedTuple):
    id: str
    script: object
    stage: object
    run: str

    @property
    def key(self) -> tuple[str, str]:
        return self.run, self.id


def _reason(line: str) -> _Reason | None:
    """Return the reason of a line, or `None` for a line that was added by hand."""
    try:
        reason = json.loads(line)["failure"]
        return _Reason(str(reason["id"]), reason["script"], reason["stage"], str(reason.get("run")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
