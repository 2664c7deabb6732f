"""Markers `manifest/.open-<writer>` in an object store: from this time on, shots may differ from the manifest.

On a disk, the time of a shot's record shows whether its manifest row still holds. In an object store that would take a request
per shot, so rows are trusted if no marker is as new as their run. A run leaves a marker until it has a row for every shot that
it wrote. A writer without manifest rows leaves one for every shot. Names of writers begin with their start time, as runs do.
Nothing is written on a disk.

A server needs no marker: it derives the id of a shot from its content key, so it never changes a shot of a manifest row.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from vidgen_ray.outputs.storage import Storage

PREFIX = ".open-"
TIME_LETTERS = len("20260101T000000")


def write_marker(storage: Storage, writer: str) -> None:
    """Write the marker of a writer, such as a run."""
    if storage.local is None:
        storage.write(_path(writer), "")


def delete_markers(storage: Storage, run: str, oldest_run: str | None) -> None:
    """Delete the marker of a run, and those of writers that began before `oldest_run`, the oldest run with a finished shot."""
    if storage.local is None:
        for writer in open_writers(storage):
            if writer == run or oldest_run is None or _began(writer) < _began(oldest_run):
                storage.delete(_path(writer))


def open_writers(storage: Storage) -> Sequence[str]:
    """Return the writers that left a marker. Empty on a disk."""
    if storage.local is not None:
        return ()
    return [name.removeprefix(PREFIX) for name in storage.files("manifest") if name.startswith(PREFIX)]


def is_trusted(run: str, open_writers: Sequence[str]) -> bool:
    """Return whether the rows of a run hold, although the given writers have changed shots."""
    return all(run == writer or _began(run) > _began(writer) for writer in open_writers)


@contextmanager
def shot_without_row(storage: Storage) -> Iterator[None]:
    """Mark that the block may write a shot that gets no manifest row."""
    before = new_writer()
    write_marker(storage, before)
    yield
    # A run that began during the block may have read the old shot. It deletes only markers of writers that began before it.
    write_marker(storage, new_writer())
    if storage.local is None:
        storage.delete(_path(before))


def new_writer() -> str:
    """Return a new name of a writer, such as a run. Names sort by their time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def _path(writer: str) -> str:
    return f"manifest/{PREFIX}{writer}"


def _began(writer: str) -> str:
    return writer[:TIME_LETTERS]
