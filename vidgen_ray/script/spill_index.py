"""Index of a script's ids and rejected lines while it is read. Spills to disk beyond a few megabytes."""

import json
import pickle
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from vidgen_ray.errors import SetupError

MEMORY_KB = 16_000
"""Memory for ids, in kB. SQLite spills the rest to a temporary file."""
MEMORY_BYTES = 1_000_000
"""Memory for rejected lines, in bytes. The rest is in a temporary file."""


class ScriptIndex:
    """Ids and rejected lines of a script. A context manager: its temporary files exist until the end of the block.

    The files are in TMPDIR: 60 bytes per id, and the complete rejected lines. Raises SetupError if TMPDIR is full.
    """

    def __enter__(self) -> Self:
        # The empty name creates a private database, in memory until it outgrows its cache. It is not needed after a
        # crash, so nothing is committed, flushed or journalled.
        self._ids = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{MEMORY_KB}"):
            self._ids.execute(f"PRAGMA {setting}")
        self._ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        self._ids.execute("BEGIN")
        self._rejected = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ids.close()
        self._rejected.close()
        if isinstance(error, sqlite3.Error):
            raise _disk_full(error)

    def lines_of(self, ids: Sequence[str]) -> dict[str, int]:
        """Return id -> line number of the ids that shots use."""
        rows = self._ids.execute(
            "SELECT id, line FROM ids WHERE line IS NOT NULL AND id IN (SELECT value FROM json_each(?))", (json.dumps(ids),)
        )
        return dict(rows)

    def add(self, lines: Mapping[str, int]) -> None:
        """Add unused ids of shots: id -> line number."""
        self._ids.executemany("INSERT INTO ids VALUES (?, ?)", lines.items())

    def claim(self, line_id: str) -> bool:
        """Reserve an id for a rejected line. Return false if the id is already used."""
        return self._ids.execute("INSERT OR IGNORE INTO ids VALUES (?, NULL)", (line_id,)).rowcount == 1

    def add_rejected(self, line: object) -> None:
        """Store a rejected line. Raises RecursionError if it is nested too deeply."""
        try:
            self._rejected.write(pickle.dumps(line))
        except OSError as error:
            raise _disk_full(error) from None

    def rejected_lines(self) -> Iterator[Any]:
        """Yield the rejected lines in order. No lines can be added after this."""
        end = self._rejected.tell()
        self._rejected.seek(0)
        while self._rejected.tell() < end:
            yield pickle.load(self._rejected)


def _disk_full(error: Exception) -> SetupError:
    return SetupError(
        f"temporary folder {tempfile.gettempdir()}: cannot store the ids and rejected lines of the script ({error}); "
        "set TMPDIR to a folder with more room"
    )
