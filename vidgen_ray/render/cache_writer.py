"""Stage cache of one process: which results are kept, and a background thread that writes them.

Reading is immediate. Encoding a PNG or an FFV1 clip takes CPU time that a process with a GPU should not wait for.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vidgen_ray.graph import is_chunked
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.planner.layout import Layout
from vidgen_ray.stages.base import Artefacts

log = logging.getLogger(__name__)

CacheMode = Literal["none", "images", "all"]
DEFAULT_CACHE: CacheMode = "images"
"""A clip takes most of the space and CPU time of the cache, and is only read again if nothing but its upscaling changes."""
KEPT: dict[CacheMode, frozenset[str]] = {
    "none": frozenset(),
    "images": frozenset({"face", "image", "image_likeness", "clip_likeness"}),
    "all": frozenset({"face", "image", "image_likeness", "frames", "clip_likeness"}),
}
"""Artefacts that each mode keeps."""
MAX_QUEUED_BYTES = 256 * 2**20
"""Results that wait to be written, as arrays: five clips of 25 frames at 1024x576."""
KEPT_FREE_BYTES, KEPT_FREE_SHARE = 50 * 10**9, 0.1
"""Caching stops when less of the disk is free than both of these, to leave room for outputs."""
WRITER_NICENESS = 10
"""Added to the niceness of the thread, so that the thread that feeds the GPU gets its CPU core first."""
_CLOSE_TIMEOUT_S = 30.0
"""Seconds that an ending process waits for queued results."""


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Results that the processes of a run keep in the stage cache, and limits."""

    mode: CacheMode = DEFAULT_CACHE
    max_bytes: int | None = None
    """Bytes that one process may add to the cache. `None`: until the disk is almost full, see `KEPT_FREE_BYTES`."""
    wait: bool = False
    """Write each result before the next step starts, for readers that expect it at once, such as `--keep stages`."""

    def open(self, cache: StageCache) -> CacheWriter | None:
        """Return the cache of this process. `None` if it neither reads nor writes the cache."""
        return None if self.mode == "none" else CacheWriter(cache, self)


def cache_settings(mode: CacheMode, keep_stages: bool, *, max_bytes: int | None = None, wait: bool = False) -> CacheSettings:
    """Return the settings for a mode. `--keep stages` copies its files from the cache, so it needs the images at once."""
    return CacheSettings("images" if keep_stages and mode == "none" else mode, max_bytes, wait or keep_stages)


def bytes_per_worker(cache_gb: float | None, layout: Layout) -> int | None:
    """Divide the limit of a run's cache, in GB of 10^9 bytes, among the workers whose results can be cached."""
    if cache_gb is None:
        return None
    writers = sum(not all(is_chunked(stage) for stage in worker.stages) for worker in layout.workers)
    return int(cache_gb * 1e9 / max(1, writers))


class CacheWriter:
    """Reads and writes the stage cache for one process. Close it when the process ends, to write what is queued."""

    def __init__(self, cache: StageCache, settings: CacheSettings) -> None:
        self._cache = cache
        self._settings = settings
        self._changed = threading.Condition()
        self._queue: deque[tuple[str, Artefacts]] = deque()
        self._queued_bytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._written_bytes = 0
        self._stopped = self._failed = False

    def get(self, key: str, names: Iterable[str]) -> Artefacts | None:
        """Return a cached result with the artefacts `names`, or `None`."""
        return self._cache.get(key, names)

    def drop(self, key: str) -> None:
        """Delete a wrong entry."""
        self._cache.drop([key])

    def put(self, key: str, artefacts: Artefacts) -> None:
        """Store a result of a stage, soon. Its arrays become read-only.

        A result is dropped if its artefacts are not kept in this mode, if too much is queued, or if the cache is full or cannot
        be written. The cache is optional, so nothing is raised.
        """
        if self._stopped or not artefacts.keys() <= KEPT[self._settings.mode]:
            return
        if self._settings.wait:
            self._write(key, artefacts)
            return
        size = _freeze(artefacts)
        with self._changed:
            # A clip that is larger than the limit is accepted if nothing else waits.
            if self._closed or (self._queue and self._queued_bytes + size > MAX_QUEUED_BYTES):
                log.debug("stage cache: %s is not cached: %d bytes are waiting to be written", key[:12], self._queued_bytes)
                return
            self._queue.append((key, artefacts))
            self._queued_bytes += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_queued, name="stage-cache", daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._changed.notify_all()

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Write what is queued, for at most `timeout_s` seconds. Later results are dropped. Safe to call twice."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _write_queued(self) -> None:
        # On Linux this is the niceness of the calling thread only.
        os.setpriority(os.PRIO_PROCESS, 0, WRITER_NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                # It stays in the queue while it is written, because its memory is in use.
                key, artefacts = self._queue[0]
            self._write(key, artefacts)
            with self._changed:
                self._queue.popleft()
                self._queued_bytes -= _size(artefacts)

    def _write(self, key: str, artefacts: Artefacts) -> None:
        if self._stopped:
            return
        try:
            if reason := self._limit():
                self._stopped = True
                log.warning("stage cache: %s; further results are not cached", reason)
                return
            self._written_bytes += self._cache.put(key, artefacts)
        # For example a full disk. Any other error must not end the thread either.
        except Exception as error:
            level = logging.DEBUG if self._failed else logging.WARNING
            self._failed = True
            log.log(level, "stage cache: the result %s is not cached: %s", key[:12], error)

    def _limit(self) -> str | None:
        """Return which limit of the cache's size is reached, or `None`."""
        limit = self._settings.max_bytes
        if limit is not None:
            return f"it has reached its limit of {limit / 1e9:g} GB in this process" if self._written_bytes >= limit else None
        folder = self._cache.folder
        if folder is None:
            return None
        disk = shutil.disk_usage(folder)
        if disk.free < min(KEPT_FREE_BYTES, KEPT_FREE_SHARE * disk.total):
            return f"only {disk.free / 1e9:.3g} of {disk.total / 1e9:.3g} GB are free at {folder}"
        return None


def _freeze(artefacts: Artefacts) -> int:
    """Make the arrays read-only, so that no later stage can change what is queued. Return their size in bytes."""
    for value in artefacts.values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
    return _size(artefacts)


def _size(artefacts: Artefacts) -> int:
    return sum(value.nbytes for value in artefacts.values() if isinstance(value, np.ndarray))
