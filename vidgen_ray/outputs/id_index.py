"""A set of texts that may be a million: on disk beyond a few megabytes, gone with its owner."""

import json
import sqlite3
from collections.abc import Iterable, Sequence

CACHE_KB = 8_000


class IdIndex:
    """Answers for many texts at once. One thread at a time."""

    def __init__(self) -> None:
        # A database without a name is private, spills to a file of its own, and needs no promise to survive a crash.
        self._db = sqlite3.connect("", check_same_thread=False)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KB}"):
            self._db.execute(f"PRAGMA {setting}")
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def add(self, ids: Iterable[str]) -> None:
        self._db.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((id_,) for id_ in ids))

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of `ids` that were added."""
        rows = self._db.execute("SELECT id FROM ids WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(ids),))
        return {id_ for (id_,) in rows}

    def add_new(self, ids: Sequence[str]) -> list[bool]:
        """Add, and say of each whether it is met for the first time."""
        met = self.known(ids)
        first = []
        for id_ in ids:
            first.append(id_ not in met)
            met.add(id_)
        self.add(id_ for id_, is_first in zip(ids, first, strict=True) if is_first)
        return first

    def close(self) -> None:
        self._db.close()
