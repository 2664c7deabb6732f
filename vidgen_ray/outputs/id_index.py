"""A set of ids that is kept on disk when it outgrows a few megabytes."""

import json
import sqlite3
from collections.abc import Iterable, Sequence

CACHE_KB = 8_000
"""Memory for the set, in KiB. The rest is on disk."""


class IdIndex:
    """Set of strings for millions of entries, in a temporary SQLite database that is deleted on `close`.

    Look-ups and insertions take many ids per call. Not thread-safe: callers must serialize access.
    """

    def __init__(self) -> None:
        # The empty name creates a private temporary database that spills to disk. It need not survive a crash.
        self._db = sqlite3.connect("", check_same_thread=False)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KB}"):
            self._db.execute(f"PRAGMA {setting}")
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def add(self, ids: Iterable[str]) -> None:
        """Add ids. Ids that are already in the set are ignored."""
        self._db.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((id_,) for id_ in ids))

    def intersection(self, ids: Sequence[str]) -> set[str]:
        """Return the members of `ids` that are in the set."""
        rows = self._db.execute("SELECT id FROM ids WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(ids),))
        return {id_ for (id_,) in rows}

    def add_new(self, ids: Sequence[str]) -> list[bool]:
        """Add `ids`. Return for each one whether it is new: neither in the set nor earlier in `ids`."""
        known = self.intersection(ids)
        is_new = []
        for id_ in ids:
            is_new.append(id_ not in known)
            known.add(id_)
        self.add(id_ for id_, new in zip(ids, is_new, strict=True) if new)
        return is_new

    def close(self) -> None:
        """Delete the database."""
        self._db.close()
