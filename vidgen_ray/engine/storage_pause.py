"""Pause of a run while its output folder cannot be written: commits wait, and no shot and no process is blamed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vidgen_ray.engine.callbacks import guarded
from vidgen_ray.engine.messages import Kind
from vidgen_ray.errors import SetupError, StorageHangs, first_line
from vidgen_ray.system.threads import to_daemon_thread

MAX_WAIT_S = 1800.0
"""Default number of seconds that a run waits for its output folder."""
PROBE_INTERVAL_S = 5.0
PROBE_TIMEOUT_S = 30.0
"""Seconds after which a probe counts as failed. A network file system whose server is gone does not respond at all."""


class StoragePause:
    """Knows whether the output folder can be written, and lets commits wait until then. Create it inside the event loop."""

    def __init__(self, probe: Callable[[], str | None], max_wait_s: float, on_change: Callable[[str | None], None]) -> None:
        """`probe` returns why the folder cannot be written, or `None`; it may block.

        `on_change` gets the reason when a pause begins, and `None` when a file was written after it. `max_wait_s`: seconds
        without a written file until `over` raises.
        """
        self._probe = probe
        self._max_wait_s = max_wait_s
        self._on_change = guarded(on_change)
        self._since: float | None = None
        """Time of the first failure, or of a file written in the pause. `None`: nothing has failed since the last file."""
        self._probing: asyncio.Future[None] | None = None
        self._running_probe: asyncio.Future[str | None] | None = None
        """The probe that has not returned yet. There is one at a time: each may hang for as long as the storage does."""

    @property
    def active(self) -> bool:
        return self._probing is not None and not self._probing.done()

    def begin(self, reason: str) -> None:
        """Begin a pause. It ends when a probe succeeds."""
        if self._since is None:
            self._since = asyncio.get_running_loop().time()
            self._on_change(reason)
        # A pause that has taken too long ends the run.
        if self._probing is None or (self._probing.done() and self._probing.exception() is None):
            self._probing = asyncio.ensure_future(self._wait_until_writable(reason))

    async def over(self) -> None:
        """Wait until there is no pause. Raises SetupError if the folder could not be written for too long."""
        if self._probing is not None:
            await asyncio.shield(self._probing)

    async def is_cause(self, kind: Kind, reason: str) -> bool:
        """Return whether the storage is the cause of a failed write, as soon as it can be written again.

        Raises SetupError if it could not be written for too long.
        """
        if kind is not Kind.DISK_FULL and not self.active:
            return await self.writable_again()
        await self.wait(reason)
        return True

    async def writable_again(self) -> bool:
        """Return whether nothing could be written, as soon as it can be. Raises SetupError if that takes too long."""
        if (reason := await self.problem()) is None:
            return False
        await self.wait(reason)
        return True

    async def wait(self, reason: str) -> None:
        """Begin a pause, and wait until it is over. Raises SetupError if the folder could not be written for too long."""
        self.begin(reason)
        await self.over()

    def check(self) -> None:
        """Raise SetupError if the folder could not be written for too long."""
        if self._probing is not None and self._probing.done():
            self._probing.result()

    def written(self) -> None:
        """A shot was committed. In a pause, a write may succeed that began before it."""
        if self._since is None:
            return
        if self.active:
            self._since = asyncio.get_running_loop().time()
            return
        self._since = None
        self._on_change(None)

    async def problem(self) -> str | None:
        """Return why the folder cannot be written, or `None`."""
        probe = self._running_probe = self._running_probe or to_daemon_thread(self._probe)
        await asyncio.wait([probe], timeout=PROBE_TIMEOUT_S)
        if not probe.done():
            return f"no response for {PROBE_TIMEOUT_S:g} s"
        if self._running_probe is probe:
            self._running_probe = None
        if (error := probe.exception()) is not None:
            return f"{type(error).__name__}: {first_line(error)}"
        return probe.result()

    async def _wait_until_writable(self, reason: str | None) -> None:
        loop = asyncio.get_running_loop()
        while reason is not None:
            assert self._since is not None, "set by `begin`, and kept while the pause is active"
            waited_s = loop.time() - self._since
            if waited_s > self._max_wait_s:
                raise (SetupError if self._running_probe is None else StorageHangs)(
                    f"stopped, because no file could be written to the output folder for {waited_s:.0f} s ({reason}). "
                    "Finished shots are kept; run the same command again to resume"
                )
            await asyncio.sleep(PROBE_INTERVAL_S)
            reason = await self.problem()
