"""`OUT/.running-<run>`: that a run is working in the folder, so that no second one and no clean-up gets in its way.

A run touches its file while it lives. One that was killed holds the folder no longer: at once where its process was one of
this machine, else when its file has not been touched for STALE_AFTER_S.
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
STALE_AFTER_S = 120.0


class Lease(NamedTuple):
    """Who works in a folder."""

    run: str
    host: str
    pid: int
    since: str

    def is_dead_here(self) -> bool:
        """Whether its process was one of this machine and is gone."""
        return self.host == os.uname().nodename and not Path(f"/proc/{self.pid}").exists()


@contextmanager
def lease(storage: Storage, run: str) -> Iterator[Lease]:
    """Hold the folder. Raises SetupError, naming the run that holds it already."""
    mine = Lease(run, os.uname().nodename, os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
    path = f"{PREFIX}{run}"

    def touch() -> None:
        storage.write(path, json.dumps(mine._asdict()))

    # Ours first: of two that begin at once at least one sees the other.
    touch()
    try:
        _refuse_beside_others(storage, path)
        ticker = PeriodicTask(REFRESH_S, touch)
        try:
            yield mine
        finally:
            ticker.stop()
    finally:
        storage.delete(path)


def _refuse_beside_others(storage: Storage, mine: str) -> None:
    found = {name: file for name, file in storage.files("").items() if name.startswith(PREFIX)}
    # By the storage's clock alone, which may differ from this machine's.
    now = found[mine].modified
    for name, file in found.items():
        if name == mine:
            continue
        left_s = STALE_AFTER_S - (now - file.modified)
        other = _read(storage, name)
        if left_s <= 0 or (other is not None and other.is_dead_here()):
            storage.delete(name)
            continue
        run = name.removeprefix(PREFIX)
        who = f" (process {other.pid} on {other.host}, since {other.since})" if other else ""
        raise SetupError(
            f"output folder {storage.url}: run {run} is working in it{who}; wait until it has ended, stop it, "
            f"or use another folder. If it was killed on another machine, the folder is free in {left_s:.0f} s"
        )


def _read(storage: Storage, name: str) -> Lease | None:
    try:
        return Lease(**json.loads(storage.read(name) or b"{}"))
    except (ValueError, TypeError):
        return None
