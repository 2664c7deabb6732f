"""Lease of an output folder, `OUT/.running-<run>`. Prevents two runs, or a run and `vidgen gc`, from using it together.

A run refreshes its lease file periodically. The lease of a killed run expires immediately if its process was on this
machine, else when the file has not been refreshed for `STALE_AFTER_S`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.periodic import PeriodicTask
from vidgen_ray.outputs.storage import Storage

PREFIX = ".running-"
REFRESH_S = 30.0
"""Seconds between refreshes of a lease file."""
STALE_AFTER_S = 120.0
"""Seconds without a refresh after which a lease expires."""


class Lease(NamedTuple):
    """Content of a lease file: the run and the process that holds the folder."""

    run: str
    host: str
    pid: int
    since: str
    """Start time of the run, ISO 8601 in UTC."""

    def is_dead_here(self) -> bool:
        """Return whether the process ran on this machine and no longer exists."""
        return self.host == os.uname().nodename and not Path(f"/proc/{self.pid}").exists()


@contextmanager
def lease(storage: Storage, run: str) -> Iterator[Lease]:
    """Hold the lease of a folder during the block. Raises SetupError that names the run, if another run holds it."""
    own = Lease(run, os.uname().nodename, os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
    path = f"{PREFIX}{run}"

    def refresh() -> None:
        storage.write(path, json.dumps(own._asdict()))

    # Write our lease before looking for others: of two runs that start together, at least one sees the other.
    refresh()
    try:
        _check_other_leases(storage, path)
        refreshing = PeriodicTask(REFRESH_S, refresh)
        try:
            yield own
        finally:
            refreshing.stop()
    finally:
        storage.delete(path)


def _check_other_leases(storage: Storage, own: str) -> None:
    """Delete expired leases of other runs. Raises SetupError for one that has not expired."""
    leases = {name: file for name, file in storage.files("").items() if name.startswith(PREFIX)}
    # All times are by the clock of the storage, which may differ from this machine's.
    now = leases[own].modified
    for name, file in leases.items():
        if name == own:
            continue
        expires_in_s = STALE_AFTER_S - (now - file.modified)
        other = _read(storage, name)
        if expires_in_s <= 0 or (other is not None and other.is_dead_here()):
            storage.delete(name)
            continue
        run = name.removeprefix(PREFIX)
        holder = f" (process {other.pid} on {other.host}, since {other.since})" if other else ""
        raise SetupError(
            f"output folder {storage.url}: run {run} is working in it{holder}; wait until it ends, stop it, "
            f"or use another folder. If it was killed on another machine, its lease expires in {expires_in_s:.0f} s"
        )


def _read(storage: Storage, name: str) -> Lease | None:
    try:
        return Lease(**json.loads(storage.read(name) or b"{}"))
    except (ValueError, TypeError):
        return None
