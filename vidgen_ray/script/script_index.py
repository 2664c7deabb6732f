"""Index of a script's ids while it is read. Spills to disk beyond a few megabytes."""

import json
import sqlite3
import tempfile
from collections.abc import Container, Mapping, Sequence
from itertools import count
from types import TracebackType
from typing import Self

from vidgen_ray.errors import SetupError

MEMORY_KB = 16_000
"""Memory for ids, in kB. SQLite spills the rest to a temporary file."""


class ScriptIndex:
    """Ids of a script. A context manager: its temporary file exists until the end of the block.

    The file is in TMPDIR, with 60 bytes per id. Raises SetupError if TMPDIR is full.
    """

    def __enter__(self) -> Self:
        # The empty name creates a private database, in memory until it outgrows its cache. It is not needed after a
        # crash, so nothing is committed, flushed or journalled.
        self._ids = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{MEMORY_KB}"):
            self._ids.execute(f"PRAGMA {setting}")
        self._ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER NOT NULL) WITHOUT ROWID")
        self._ids.execute("BEGIN")
        self._last_numbers: dict[str, int] = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ids.close()
        if isinstance(error, sqlite3.Error):
            raise _disk_full(error)

    def lines_of(self, ids: Sequence[str]) -> dict[str, int]:
        """Return id -> line number of those ids that lines have."""
        rows = self._ids.execute("SELECT id, line FROM ids WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(ids),))
        return dict(rows)

    def add(self, lines: Mapping[str, int]) -> None:
        """Add new ids: id -> line number."""
        self._ids.executemany("INSERT INTO ids VALUES (?, ?)", lines.items())

    def unused_name(self, name: str, taken: Container[str]) -> str:
        """Return `name`, `name-2`, `name-3`, ... : the first that is neither in the index nor in `taken`."""
        # Without the counter, thousands of lines with the same default id would take quadratic time.
        for number in count(self._last_numbers.get(name, 1)):
            candidate = name if number == 1 else f"{name}-{number}"
            if candidate not in taken and not self.lines_of([candidate]):
                if number > 1:
                    self._last_numbers[name] = number
                return candidate
        raise AssertionError


def _disk_full(error: Exception) -> SetupError:
    return SetupError(
        f"temporary folder {tempfile.gettempdir()}: cannot store the ids of the script ({error}); "
        "set TMPDIR to a folder with more room"
    )
