"""Lease of an output folder. Prevents two runs, or a run and `vidgen gc`, from using the folder together.

A lease is a file that its run refreshes. If the run's process is in the PID namespace of this process, the lease expires
when that process ends, independent of clocks; otherwise when it was not refreshed for `STALE_AFTER_S`. In an object
store the lease is `OUT/.running`, created, refreshed and taken over by conditional requests: of several runs exactly one
gets it. On a disk it is `OUT/.running-<run>`, written before looking for those of other runs: at most one run gets the
folder, but two that start at the same moment may both be refused.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.storage import LocalStorage, Storage
from vidgen_ray.system.files import ProcessId, this_process

if TYPE_CHECKING:
    from obstore import UpdateVersion

    from vidgen_ray.outputs.object_storage import ObjectStorage, ObjectVersion

PREFIX = ".running"
REFRESH_S = 30.0
"""Seconds between refreshes of a lease."""
UNSURE_AFTER_S = 100.0
"""Seconds without a refresh after which a run does not rely on its lease, so that it stops before another one starts."""
STALE_AFTER_S = 120.0
"""Seconds without a refresh after which another run may take the lease."""
ATTEMPTS = 5
"""Attempts to take a lease while other runs change it at the same moment."""


class Holder(NamedTuple):
    """Content of a lease: the run and the process that hold the folder."""

    run: str
    host: str
    process: str
    """A `ProcessId`."""
    since: str
    """Start time of the run, ISO 8601 in UTC."""
    token: str
    """Random. Distinguishes leases of runs with the same name."""
    refreshes: int
    """Number of refreshes, so that every refresh changes the version of the object."""

    def to_json(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    def is_running(self) -> bool | None:
        """Return whether the process is running, or `None` if this process cannot know it."""
        process = ProcessId.parse(self.process)
        return None if process is None else process.is_running()


class Lease:
    """Lease of an output folder, held by this process.

    A background thread refreshes it, and sets `lost` if another run has taken it: the process must then stop. While the folder
    cannot be reached, and after a process was suspended, the lease is not sure: the process must not write until it is.
    """

    def __init__(self, url: str, file: _LeaseOnDisk | _LeaseObject, taken: float) -> None:
        """Take the time of the last write to `file` as `taken`, by `time.monotonic`, measured before the write."""
        self.lost = threading.Event()
        self.name = file.name
        """Name of the lease file in the output folder."""
        self._url = url
        self._file = file
        self._refreshed = taken

    @property
    def is_sure(self) -> bool:
        """True if no other run can have taken the lease."""
        return not self.lost.is_set() and time.monotonic() - self._refreshed <= UNSURE_AFTER_S

    def check(self) -> None:
        """Raise SetupError if the lease was lost, or if it is not sure and cannot be refreshed now."""
        if not self.is_sure:
            with suppress(OSError):
                self.refresh()
        if not self.is_sure:
            reason = (
                "its lease file was deleted or replaced"
                if self.lost.is_set()
                else f"it was suspended or could not reach the folder for more than {UNSURE_AFTER_S:.0f} s"
            )
            raise SetupError(
                f"output folder {self._url}: this run lost its lease and stopped, because {reason}. "
                "Finished shots are kept; run the same command to resume, when no other run is working in the folder"
            )

    def refresh(self) -> None:
        """Refresh the lease file, or set `lost`. Raises OSError if the storage fails."""
        # If this process is suspended during the refresh, the lease is not sure afterwards, and is refreshed again.
        started = time.monotonic()
        if self.lost.is_set() or not self._file.refresh():
            self.lost.set()
        else:
            self._refreshed = started


@contextmanager
def lease(storage: Storage, run: str) -> Iterator[Lease]:
    """Hold the lease of a folder during the block. Raises SetupError that names the run, if another run holds it.

    Nothing but a lease file is written or deleted before the lease is held.
    """
    started = time.monotonic()
    file = _take(storage, run)
    held = Lease(storage.url, file, started)
    refreshing = PeriodicTask(REFRESH_S, held.refresh)
    try:
        yield held
    finally:
        refreshing.stop()
        # If the file cannot be deleted, the lease expires.
        with suppress(OSError):
            file.release()


def _take(storage: Storage, run: str) -> _LeaseOnDisk | _LeaseObject:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    holder = Holder(run, os.uname().nodename, str(this_process()), since, secrets.token_hex(8), 0)
    if not isinstance(storage, LocalStorage):
        from vidgen_ray.outputs.object_storage import ObjectStorage

        assert isinstance(storage, ObjectStorage)
        return _LeaseObject(storage, holder)
    file = _LeaseOnDisk(storage, holder)
    try:
        _check_other_leases(storage, file.name)
    except BaseException:
        file.release()
        raise
    return file


class _LeaseOnDisk:
    """Lease file on a disk. Its name is used by this run only."""

    def __init__(self, storage: LocalStorage, holder: Holder) -> None:
        self.name = f"{PREFIX}-{holder.run}"
        self._storage = storage
        self._holder = holder
        storage.write(self.name, holder.to_json())

    def refresh(self) -> bool:
        """Refresh the lease. Return False, and write nothing, if it is no longer the lease of this run. Raises OSError."""
        if not self._is_ours():
            return False
        try:
            # Do not create the file again if another run has deleted it meanwhile.
            self._storage.touch(self.name)
        except FileNotFoundError:
            return False
        return True

    def release(self) -> None:
        """Delete the lease if it is still the lease of this run. Raises OSError."""
        if self._is_ours():
            self._storage.delete(self.name)

    def _is_ours(self) -> bool:
        # Raises OSError if the whole folder is gone: it may come back.
        os.stat(self._storage.local)
        stored = _parse(self._storage.read(self.name))
        return stored is not None and stored.token == self._holder.token


class _LeaseObject:
    """Lease in an object store, created and changed by conditional requests."""

    name = PREFIX

    def __init__(self, storage: ObjectStorage, holder: Holder) -> None:
        """Take the lease. Raises SetupError if another run holds it, or if the store ignores conditions."""
        self._storage = storage
        self._holder = holder
        self._version = self._taken()
        # A store that ignores the condition would have overwritten the lease of a run that started at the same moment.
        if storage.create(self.name, holder.to_json()) is not None:
            storage.delete(self.name)
            raise storage.conditions_unsupported()

    def _taken(self) -> UpdateVersion:
        content = self._holder.to_json()
        for _ in range(ATTEMPTS):
            stored = self._storage.read_version(self.name)
            if stored is None:
                version = self._storage.create(self.name, content)
            else:
                self._check_expired(stored)
                version = self._storage.replace(self.name, content, stored.version)
            version = version or self._version_if_ours()
            if version:
                return version
        raise SetupError(f"output folder {self._storage.url}: other runs are starting in it; try again")

    def _check_expired(self, stored: ObjectVersion) -> None:
        holder = _parse(stored.content)
        if holder is None or holder.is_running() is not False:
            _check_expired(self._storage, holder, self.name, self._now() - stored.modified)

    def _now(self) -> float:
        """Return the time by the clock of the store, which may differ from this machine's."""
        name = f".clock-{self._holder.token}"
        self._storage.write(name, "")
        try:
            return self._storage.files("")[name].modified
        finally:
            self._storage.delete(name)

    def _version_if_ours(self) -> UpdateVersion | None:
        stored = self._storage.read_version(self.name)
        holder = _parse(stored.content) if stored else None
        return stored.version if stored and holder and holder.token == self._holder.token else None

    def refresh(self) -> bool:
        """Refresh the lease. Return False if it is no longer the lease of this run. Raises OSError."""
        self._holder = self._holder._replace(refreshes=self._holder.refreshes + 1)
        # The condition also fails if this is the second attempt of a request whose response was lost.
        version = self._storage.replace(self.name, self._holder.to_json(), self._version) or self._version_if_ours()
        self._version = version or self._version
        return version is not None

    def release(self) -> None:
        """Delete the lease if it is still the lease of this run. Raises OSError."""
        if self._version_if_ours():
            self._storage.delete(self.name)


def _check_other_leases(storage: Storage, own: str) -> None:
    """Delete the leases of other runs, all of which have expired. Raises SetupError, and deletes nothing, if one has not."""
    leases = {name: file for name, file in storage.files("").items() if name.startswith(PREFIX)}
    # All times are by the clock of the storage, which may differ from this machine's.
    now = leases.pop(own).modified
    for name, file in leases.items():
        _check_expired(storage, _parse(storage.read(name)), name, now - file.modified)
    for name in leases:
        storage.delete(name)


def _check_expired(storage: Storage, holder: Holder | None, name: str, age_s: float) -> None:
    """Raise SetupError if a lease has not expired. `holder`: its content, or `None` if that is damaged."""
    expires_in_s = STALE_AFTER_S - age_s
    is_running = holder.is_running() if holder else None
    if is_running is False or (is_running is None and expires_in_s <= 0):
        return
    run = holder.run if holder else name.removeprefix(f"{PREFIX}-")
    process = ProcessId.parse(holder.process) if holder else None
    details = f" (process {process.pid} on {holder.host}, since {holder.since})" if holder and process else ""
    expires = f". If it was killed in another container or on another machine, its lease expires in {expires_in_s:.0f} s"
    raise SetupError(
        f"output folder {storage.url}: run {run} is working in it{details}; wait until it ends, stop it, or use another folder"
        + ("" if is_running else expires)
    )


def _parse(content: bytes | None) -> Holder | None:
    try:
        return Holder(**json.loads(content or b"{}"))
    except (ValueError, TypeError):
        return None


class PeriodicTask:
    """Calls `action` every `interval_s` seconds in a daemon thread until `stop`.

    The first call comes after one interval. An OSError of `action` is ignored: the next call tries again.
    """

    def __init__(self, interval_s: float, action: Callable[[], object]) -> None:
        self._interval_s = interval_s
        self._action = action
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the calls. Waits for a call in progress; no further call starts."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            with suppress(OSError):
                self._action()
