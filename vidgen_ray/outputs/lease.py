"""Lease of an output folder. Prevents two runs, or a run and `vidgen gc`, from using the folder together.

A lease is a file that its run refreshes. If the run's process is in the PID namespace of this process, the lease expires
when that process ends; otherwise when this process has watched it for `STALE_AFTER_S` without a refresh. In an object
store the lease is `OUT/.running`, created, refreshed and taken over by conditional requests: of several runs exactly one
gets it. On a disk it is `OUT/.running-<run>`, written before looking for those of other runs: at most one run gets the
folder, but two that start at the same moment may both be refused.

Each lease has a larger number than those before it, which orders runs. `OUT/.lease-<number>` keeps the largest one so far.
Nothing here depends on the time of a clock.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vidgen_ray.errors import SetupError, VidgenError
from vidgen_ray.outputs.storage import GONE, LocalStorage, Storage
from vidgen_ray.system.files import ProcessId, this_process

if TYPE_CHECKING:
    from obstore import UpdateVersion

    from vidgen_ray.outputs.object_storage import ObjectStorage

_PREFIX = ".running"
NUMBER_PREFIX = ".lease-"
NUMBERED = re.compile(r"(?:\.open-)?(\d{6,})(?:-|$)")
"""Name of a run, or of its files in the manifest: begins with the number of its lease."""
REFRESH_S = 10.0
"""Seconds between refreshes of a lease."""
UNSURE_AFTER_S = 100.0
"""Seconds without a refresh after which a run does not rely on its lease, so that it stops before another one starts."""
STALE_AFTER_S = 120.0
"""Seconds without a refresh after which another run, which has watched the lease meanwhile, may take it."""
WATCH_INTERVAL_S = 1.0
STOP_S = 10.0
"""Seconds that the end of a run waits for a refresh, or another periodic call, in progress."""
_ATTEMPTS = 5
"""Attempts to take a lease while other runs change it at the same moment."""
log = logging.getLogger(__name__)


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


class LeaseLost(OSError):
    """Nothing was written, because the run does not hold the lease of the folder any more."""


class Fence(NamedTuple):
    """A lease, for the processes that write for its holder."""

    name: str
    token: str

    def check(self, storage: Storage) -> None:
        """Raise LeaseLost if the lease is no longer that of the run. Raises OSError if the storage fails."""
        stored = _parse(storage.read(self.name))
        if stored is None or stored.token != self.token:
            raise LeaseLost(f"output folder {storage.url}: the run does not hold its lease any more")


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
        self.fence = Fence(file.name, file.holder.token)
        self.run = file.holder.run
        """Name of the run. Starts with the number of the lease, so that names sort by it."""
        self.hangs = False
        """Set when the storage has not responded for too long. The process must not call it any more."""
        self._url = url
        self._file = file
        self._refreshed = taken

    @property
    def is_sure(self) -> bool:
        """True if no other run can have taken the lease."""
        return not (self.lost.is_set() or self.hangs) and time.monotonic() - self._refreshed <= UNSURE_AFTER_S

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
    file = _take(storage, run)
    held = Lease(storage.url, file, time.monotonic())
    refreshing = PeriodicTask(REFRESH_S, held.refresh)
    try:
        held.run = f"{_next_number(storage)}-{run}"
        # A run that has lost its lease before it got its number must not use it: it is larger than that of the new holder.
        held.refresh()
        held.check()
        yield held
    finally:
        refreshing.stop()
        # If the file cannot be deleted, the lease expires.
        with suppress(OSError):
            if not held.hangs:
                file.release()


def is_held(storage: Storage) -> bool | None:
    """Return whether a process holds the lease of a folder. `None` if its process is not in the namespace of this one."""
    names = [name for name in storage.files("") if name == _PREFIX or name.startswith(f"{_PREFIX}-")]
    running = [holder.is_running() if (holder := _parse(storage.read(name))) else None for name in names]
    return True if True in running else None if None in running else False


def last_number(storage: Storage) -> str:
    """Return the largest number of a lease of the folder, with leading zeros."""
    of_leases = (name.removeprefix(NUMBER_PREFIX) for name in storage.files("") if name.startswith(NUMBER_PREFIX))
    # Those of the manifest, in case hidden files were not copied.
    last = max(filter(str.isdecimal, of_leases), key=int, default="000000")
    return max((last, *(f"{number_of(name):06d}" for name in storage.files("manifest"))), key=int)


def number_of(run: str) -> int:
    """Return the number of the lease of a run, from its name or that of its file in the manifest. 0 without one."""
    found = NUMBERED.match(run)
    return int(found[1]) if found else 0


def in_order(run: str) -> tuple[int, str]:
    """Key by which names of runs, or of their files, sort from the oldest to the newest."""
    return number_of(run), run


def _next_number(storage: Storage) -> str:
    """Return a number that no other lease has, and which is larger than those of earlier leases."""
    token = secrets.token_bytes(8)
    while True:
        last = last_number(storage)
        number = f"{int(last) + 1:06d}"
        path = f"{NUMBER_PREFIX}{number}"
        # The response to the first attempt of a request may have been lost.
        if storage.create(path, token) or storage.read(path) == token:
            storage.delete(f"{NUMBER_PREFIX}{last}")
            return number


def _take(storage: Storage, run: str) -> _LeaseOnDisk | _LeaseObject:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    holder = Holder(run, os.uname().nodename, str(this_process()), since, secrets.token_hex(8), 0)
    if not isinstance(storage, LocalStorage):
        from vidgen_ray.outputs.object_storage import ObjectStorage

        assert isinstance(storage, ObjectStorage)
        return _LeaseObject(storage, holder)
    file = _LeaseOnDisk(storage, holder)
    try:
        file.wait_for_others()
    except BaseException:
        file.release()
        raise
    return file


class _LeaseOnDisk:
    """Lease file on a disk. Its name is used by this run only."""

    def __init__(self, storage: LocalStorage, holder: Holder) -> None:
        self.name = f"{_PREFIX}-{holder.run}"
        self.holder = holder
        self._storage = storage
        storage.write(self.name, holder.to_json())
        self._folder = self._place()

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
        """Return whether the lease is still that of this run. Raises OSError if the whole folder is gone: it may come back."""
        stored = _parse(self._storage.read(self.name))
        place = self._place()
        if stored is not None and stored.token == self.holder.token:
            self._folder = place
            return True
        if place != self._folder:
            raise FileNotFoundError(errno.ENOENT, GONE, self._storage.url)
        return False

    def _place(self) -> tuple[int, int]:
        """Return the device and the inode of the folder. Those of a mount point, and of a replaced folder, are others."""
        found = os.stat(self._storage.local)
        return found.st_dev, found.st_ino

    def wait_for_others(self) -> None:
        """Delete the leases of other runs when all have expired. Raises SetupError, and deletes nothing, if one does not."""

        def refreshed(name: str) -> object:
            # Another run that is starting must see that this one is alive.
            self.refresh()
            return self._storage.files("").get(name)

        others = [name for name in self._storage.files("") if name.startswith(_PREFIX) and name != self.name]
        for name in others:
            _wait_until_expired(self._storage, name, self._storage.read(name), partial(refreshed, name))
        for name in others:
            self._storage.delete(name)


class _LeaseObject:
    """Lease in an object store, created and changed by conditional requests."""

    name = _PREFIX

    def __init__(self, storage: ObjectStorage, holder: Holder) -> None:
        """Take the lease. Raises SetupError if another run holds it, or if the store ignores conditions."""
        self._storage = storage
        self.holder = holder
        self._version = self._taken()
        # A store that ignores the condition would have overwritten the lease of a run that started at the same moment.
        if storage.create(self.name, holder.to_json()) is not None:
            storage.delete(self.name)
            raise storage.conditions_unsupported()

    def _taken(self) -> UpdateVersion:
        content = self.holder.to_json()
        for _ in range(_ATTEMPTS):
            stored = self._storage.read_version(self.name)
            if stored is None:
                version = self._storage.create(self.name, content)
            else:
                _wait_until_expired(self._storage, self.name, stored.content, partial(self._storage.read_version, self.name))
                version = self._storage.replace(self.name, content, stored.version)
            version = version or self._version_if_ours()
            if version:
                return version
        raise SetupError(f"output folder {self._storage.url}: other runs are starting in it; try again")

    def _version_if_ours(self) -> UpdateVersion | None:
        stored = self._storage.read_version(self.name)
        holder = _parse(stored.content) if stored else None
        return stored.version if stored and holder and holder.token == self.holder.token else None

    def refresh(self) -> bool:
        """Refresh the lease. Return False if it is no longer the lease of this run. Raises OSError."""
        self.holder = self.holder._replace(refreshes=self.holder.refreshes + 1)
        # The condition also fails if this is the second attempt of a request whose response was lost.
        version = self._storage.replace(self.name, self.holder.to_json(), self._version) or self._version_if_ours()
        self._version = version or self._version
        return version is not None

    def release(self) -> None:
        """Delete the lease if it is still the lease of this run. Raises OSError."""
        if self._version_if_ours():
            self._storage.delete(self.name)


def _wait_until_expired(storage: Storage, name: str, content: bytes | None, version: Callable[[], object]) -> None:
    """Wait until a lease of another run has expired. Raises SetupError if it has not.

    `version` changes with each refresh. `None`: the lease was released.
    """
    holder = _parse(content)
    is_running = holder.is_running() if holder else None
    run = f"run {holder.run if holder else name.removeprefix(f'{_PREFIX}-')}"
    process = ProcessId.parse(holder.process) if holder else None
    if holder and process:
        run += f" (process {process.pid} on {holder.host}, since {holder.since})"
    if is_running is None:
        first = version()
        log.warning("output folder %s: waiting up to %.0f s to see if %s has ended", storage.url, STALE_AFTER_S, run)
        for _ in range(round(STALE_AFTER_S / WATCH_INTERVAL_S)):
            time.sleep(WATCH_INTERVAL_S)
            if (found := version()) != first:
                is_running = found is not None
                break
    if is_running:
        raise SetupError(
            f"output folder {storage.url}: {run} is working in it; wait until it ends, stop it, or use another folder"
        )


def _parse(content: bytes | None) -> Holder | None:
    try:
        return Holder(**json.loads(content or b"{}"))
    except (ValueError, TypeError):
        return None


class PeriodicTask:
    """Calls `action` every `interval_s` seconds, and after `wake`, in a daemon thread until `stop`.

    The first call comes after one interval. The next call tries again after an error of `action`, which is logged unless it is
    an OSError or a VidgenError.
    """

    def __init__(self, interval_s: float, action: Callable[[], object]) -> None:
        self._interval_s = interval_s
        self._action = action
        self._stopped = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let the next call come now, or after the one in progress."""
        self._woken.set()

    def stop(self) -> None:
        """Stop the calls. Waits up to `STOP_S` for a call in progress, which may hang; no further call starts."""
        self._stopped = True
        self._woken.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        while True:
            self._woken.wait(self._interval_s)
            self._woken.clear()
            if self._stopped:
                return
            try:
                self._action()
            except (OSError, VidgenError):
                pass
            except Exception:
                log.warning("a periodic task failed, trying again", exc_info=True)
