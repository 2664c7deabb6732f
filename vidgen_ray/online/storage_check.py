"""Check that a server can write its files and its database."""

from __future__ import annotations

from threading import Lock

from cachetools import TTLCache, cached
from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.online.store.store import JobStore
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.storage import is_disk_full, low_space

RESULT_VALID_S = 2.0
"""Seconds for which a result is reused, because anyone may ask for it."""
TEST_FILE = "write-test"
TEST_BYTES = 4096


@cached(TTLCache(1, RESULT_VALID_S), key=lambda store, outputs: store, lock=Lock())
def storage_problem(store: JobStore, outputs: OutputFolder) -> str | None:
    """Return a sentence that tells why jobs cannot be stored or finished, without paths. `None` if they can be. Blocks."""
    return _output_problem(outputs) or _store_problem(store)


def _output_problem(outputs: OutputFolder) -> str | None:
    storage = outputs.storage
    try:
        if storage.local is not None and (free := low_space(storage.local)):
            return f"The disk of the output folder is almost full: {free}. Delete files, or set retention_s."
        storage.write(TEST_FILE, bytes(TEST_BYTES))
        storage.delete(TEST_FILE)
    except OSError as error:
        return f"The output folder cannot be written: {error.strerror or type(error).__name__}."
    return None


def _store_problem(store: JobStore) -> str | None:
    try:
        if store.folder is not None and (free := low_space(store.folder)):
            return f"The disk of the database is almost full: {free}."
        store.write_nothing()
    except (SQLAlchemyError, OSError) as error:
        return f"The database {'is full' if is_disk_full(str(error)) else 'does not respond'}."
    return None
