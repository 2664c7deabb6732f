"""Writes down what became of each line of a run while it goes on: `manifest/*.parquet`, and `failures.jsonl` at its end.

While a run goes on its rows stand in parts, so that little is lost with a killed process and the run can be looked at.
`close` makes one account of them and those of earlier runs. Killed in between, it is repeated by the next run: whatever
was copied is told by its id. Memory does not grow with the number of lines.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pyarrow
import pyarrow.parquet

from vidgen_ray.outputs.failures import PARTS, FailedLine, Standing, encoded, failed_as, merge_failures
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.id_index import IdIndex
from vidgen_ray.outputs.manifest import REJECTED, SCHEMA, ManifestFile, ManifestRow, account_of, manifest_files, rows_that_hold
from vidgen_ray.outputs.periodic import PeriodicTask
from vidgen_ray.outputs.storage import Storage

PART_ROWS = 2_000
FLUSH_S = 30.0
FILE_ROWS = 100_000
SMALL_FILE_ROWS = 5_000
"""A file with fewer rows is put together with others."""


class ManifestWriter:
    """The account of one run. `script` is the name of the script it renders; rows are added in the order lines end."""

    def __init__(self, outputs: OutputFolder, run: str, script: str) -> None:
        self._storage = outputs.storage
        self._run = run
        self._script = script
        self._lock = threading.Lock()
        self._rows: list[ManifestRow] = []
        self._failed: list[str] = []
        self._row_parts = self._failed_parts = 1
        self._unwritten = False
        self._void = IdIndex()
        self._ticker = PeriodicTask(FLUSH_S, self.flush)

    def add(self, row: ManifestRow, *, failed: FailedLine | None = None, replaces: str | None = None) -> None:
        """Enter a line that ended: once for each. A failed one with what it takes to render it again.

        `replaces` is an id under which an earlier run accounted for the line. Rows that cannot be written now are kept, and
        written later; `close` raises OSError where they still cannot be.
        """
        with self._lock:
            self._rows.append(row)
            self._unwritten = True
            if failed is not None:
                self._failed.append(failed.as_json(self._run))
            if replaces is not None:
                self._void.add([replaces])
            if max(len(self._rows), len(self._failed)) >= PART_ROWS:
                with suppress(OSError):
                    self._write_parts()

    def flush(self) -> None:
        """Write what was added so far. Called every FLUSH_S seconds by itself."""
        with self._lock:
            if self._unwritten:
                self._write_parts()

    def close(self, *, whole_script: bool = True) -> None:
        """One account of this run and those before it: one row an id in `manifest/`, `failures.jsonl` without what is mended.

        `whole_script`: whether each line of the script was looked at, so that what it was refused for before, and is not now,
        is void.
        """
        self._ticker.stop()
        self.flush()
        rejected_by = self._script if whole_script else None
        names = manifest_files(self._storage)
        own = [name for name in names if name.startswith(f"manifest/{self._run}-")]
        sources = []
        with closing(self._void) as void, closing(IdIndex()) as seen, closing(IdIndex()) as failed:
            for name in [*own, *(name for name in names if name not in own)]:
                if (found := account_of(self._storage, name, seen)) is None:
                    continue
                account, index = found
                if name not in own:
                    account = _without_void(account, index, void, rejected_by)
                failed.add(_failed_rows(account, index))
                if name in own or _is_loose(account):
                    sources.append(account)
            merge_failures(self._storage, Standing(seen, failed, void, rejected_by))
        _merge_rows(self._storage, self._run, sources[::-1])

    def _write_parts(self) -> None:
        """Parts are written anew until they are full."""
        if self._rows:
            table = pyarrow.Table.from_pylist([vars(row) for row in self._rows], schema=SCHEMA)
            content = io.BytesIO()
            pyarrow.parquet.write_table(table, content)
            self._storage.write(f"manifest/{self._run}-{self._row_parts:05d}.parquet", content.getvalue())
            if len(self._rows) >= PART_ROWS:
                self._rows, self._row_parts = [], self._row_parts + 1
        if self._failed:
            lines = encoded("".join(line + "\n" for line in self._failed))
            self._storage.write(f"{PARTS}/{self._run}-{self._failed_parts:05d}.jsonl", lines)
            if len(self._failed) >= PART_ROWS:
                self._failed, self._failed_parts = [], self._failed_parts + 1
        self._unwritten = False


def _without_void(account: ManifestFile, index: pyarrow.Table, void: IdIndex, rejected_by: str | None) -> ManifestFile:
    """The account without ids that are void, and lines that the script had refused."""
    ids, scripts, stages = (index.column(name).to_pylist() for name in ("id", "script", "failure_stage"))
    gone = void.known(ids)
    rows = zip(account.holds, ids, scripts, stages, strict=True)
    return account._replace(
        holds=[holds and id_ not in gone and (script, stage) != (rejected_by, REJECTED) for holds, id_, script, stage in rows]
    )


def _failed_rows(account: ManifestFile, index: pyarrow.Table) -> Iterator[str]:
    runs, ids, states = (index.column(name).to_pylist() for name in ("run", "id", "status"))
    for holds, run, id_, status in zip(account.holds, runs, ids, states, strict=True):
        if holds and status == "failed":
            yield failed_as(run, id_)


def _is_loose(account: ManifestFile) -> bool:
    """Whether a file of an earlier run is to be written anew."""
    return not (all(account.holds) and account.is_current and len(account.holds) >= SMALL_FILE_ROWS)


def _merge_rows(storage: Storage, run: str, sources: list[ManifestFile]) -> None:
    """Put what holds of the sources into files of at most FILE_ROWS rows, and delete the sources."""
    room, files = 0, 0
    with ExitStack() as target:
        for source in sources:
            for batch in rows_that_hold(storage, source):
                while len(batch):
                    if not room:
                        target.close()
                        files, room = files + 1, FILE_ROWS
                        path = target.enter_context(storage.new_file(f"manifest/{run}-all-{files:05d}.parquet"))
                        writer = target.enter_context(pyarrow.parquet.ParquetWriter(path, SCHEMA))
                    writer.write_batch(batch.slice(0, room))
                    room, batch = room - min(room, len(batch)), batch.slice(min(room, len(batch)))
    for source in sources:
        storage.delete(source.name)
