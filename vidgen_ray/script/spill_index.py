"""What is remembered of a script while it is checked: its ids and its refused lines, on disk beyond a few megabytes."""

import json
import pickle
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from vidgen_ray.errors import SetupError

MEMORY_KB = 16_000
"""Of ids; the rest is in a file that sqlite removes."""
MEMORY_BYTES = 1_000_000
"""Of refused lines."""


class ScriptIndex:
    """Empty at first, gone at the end of its `with` block. Its files are in TMPDIR: 60 bytes an id, refused lines whole.

    Raises SetupError where there is no room for them.
    """

    def __enter__(self) -> Self:
        # Without a name: a database of our own, in memory until it outgrows its cache. It is never read again after a
        # crash, so nothing is ever committed, flushed or journalled.
        self._ids = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{MEMORY_KB}"):
            self._ids.execute(f"PRAGMA {setting}")
        self._ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        self._ids.execute("BEGIN")
        self._refused = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ids.close()
        self._refused.close()
        if isinstance(error, sqlite3.Error):
            raise _no_room(error)

    def lines_of(self, ids: Sequence[str]) -> dict[str, int]:
        """Those of the ids that shots have, with the line of each."""
        found = self._ids.execute(
            "SELECT id, line FROM ids WHERE line IS NOT NULL AND id IN (SELECT value FROM json_each(?))", (json.dumps(ids),)
        )
        return dict(found)

    def add(self, lines: Mapping[str, int]) -> None:
        """Ids of shots, which nobody has so far, and the line of each."""
        self._ids.executemany("INSERT INTO ids VALUES (?, ?)", lines.items())

    def claim(self, line_id: str) -> bool:
        """Take an id for a refused line; whether it was free."""
        return self._ids.execute("INSERT OR IGNORE INTO ids VALUES (?, NULL)", (line_id,)).rowcount == 1

    def set_aside(self, refused: object) -> None:
        """Keep a refused line. Raises RecursionError for one that is nested too deeply."""
        try:
            self._refused.write(pickle.dumps(refused))
        except OSError as error:
            raise _no_room(error) from None

    def all_set_aside(self) -> Iterator[Any]:
        """The refused lines, in the order in which they came. No more can be set aside then."""
        end = self._refused.tell()
        self._refused.seek(0)
        while self._refused.tell() < end:
            yield pickle.load(self._refused)


def _no_room(error: Exception) -> SetupError:
    return SetupError(
        f"the folder for temporary files, {tempfile.gettempdir()}, cannot hold the ids and refused lines of the script "
        f"({error}); set TMPDIR to a folder with more room"
    )
