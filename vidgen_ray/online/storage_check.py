"""Check that a server can write its files and its database."""

from __future__ import annotations

import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.online.store.store import JobStore
from vidgen_ray.outputs.disk_space import is_disk_full, low_space
from vidgen_ray.outputs.folder import OutputFolder

RESULT_VALID_S = 2.0
"""Seconds for which a result is reused, because anyone may ask for it."""
TEST_FILE = "write-test"
TEST_BYTES = 4096


class StorageCheck:
    """Writes to the output folder and to the store. Thread-safe."""

    def __init__(self, store: JobStore, outputs: OutputFolder) -> None:
        self._store = store
        self._outputs = outputs
        self._lock = threading.Lock()
        self._problem: str | None = None
        self._checked_at: float | None = None

    def problem(self) -> str | None:
        """Return a sentence that tells why jobs cannot be stored or finished, without paths. `None` if they can be. Blocks."""
        with self._lock:
            if self._checked_at is None or time.monotonic() - self._checked_at > RESULT_VALID_S:
                self._problem = self._output_problem() or self._store_problem()
                self._checked_at = time.monotonic()
            return self._problem

    def _output_problem(self) -> str | None:
        storage = self._outputs.storage
        try:
            if storage.local is not None and (free := low_space(storage.local)):
                return f"The disk of the output folder is almost full: {free}. Delete files, or set retention_s."
            storage.write(TEST_FILE, bytes(TEST_BYTES))
            storage.delete(TEST_FILE)
        except OSError as error:
            return f"The output folder cannot be written: {error.strerror or type(error).__name__}."
        return None

    def _store_problem(self) -> str | None:
        try:
            folder = self._store.folder
            if folder is not None and (free := low_space(folder)):
                return f"The disk of the database is almost full: {free}."
            self._store.write_nothing()
        except (SQLAlchemyError, OSError) as error:
            return f"The database {'is full' if is_disk_full(str(error)) else 'does not respond'}."
        return None
