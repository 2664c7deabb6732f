"""Limits of requests: rate and size of jobs for each API key, and memory that concurrent requests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from vidgen_ray.online.api_error import ApiError, too_many_requests
from vidgen_ray.online.server_settings import Limits
from vidgen_ray.shot import Shot


class RequestRateLimiter:
    """Counter of each key's requests per minute, in this process. With N API replicas a key may send N times as many."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def check(self, key_id: str, limits: Limits) -> None:
        """Count a request. Raises ApiError 429 over the limit."""
        allowed = RateLimitItemPerMinute(limits.requests_per_minute)
        if not self._limiter.hit(allowed, key_id):
            wait_s = self._limiter.get_window_stats(allowed, key_id).reset_time - time.time()
            message = f"More than {limits.requests_per_minute} requests in a minute with this key"
            raise too_many_requests(message, "rate_limit_exceeded", max(0.05, wait_s))


def check_size(limits: Limits, shot: Shot, count: int = 1) -> None:
    """Raises ApiError 400 if the models would draw more pixels for `count` such shots than the limit allows."""
    frames = shot.clip_frames if shot.generate_video else 1
    total, allowed = shot.width * shot.height * frames * count, limits.pixel_frames
    if total > allowed:
        results = f" x {count} results" if count > 1 else ""
        raise ApiError(
            400,
            f"{shot.width} x {shot.height} pixels x {frames} frames{results} is {total}, "
            f"must be at most {allowed} for this key. Request fewer frames, fewer results or a smaller size.",
            code="too_large",
            param="num_frames" if shot.generate_video else "size",
        )


T = TypeVar("T")
DECODE_THREADS = 2


class ByteBudget:
    """Bytes that coroutines of one event loop share, first come, first served. Waiting ones occupy no thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._free_bytes = limit_bytes
        self._changed = asyncio.Condition()
        # Only the first in the queue waits for bytes. Otherwise small requests could keep a large one waiting forever.
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def reserve(self, count: int) -> AsyncIterator[None]:
        """Reserve `count` bytes inside the block, and wait until they are free. More than the limit counts as the limit."""
        count = min(count, self._limit_bytes)
        async with self._turn, self._changed:
            await self._changed.wait_for(lambda: self._free_bytes >= count)
            self._free_bytes -= count
        try:
            yield
        finally:
            self._free_bytes += count
            # A cancelled request must wake the next one, too.
            await asyncio.shield(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class Decoder:
    """Runs functions that decode images, as many at once as the memory allows, in a few threads of its own.

    malloc keeps freed memory for the thread that allocated it. In the threads of all requests that could exceed the limit.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._memory = ByteBudget(limit_bytes)
        self._threads = ThreadPoolExecutor(DECODE_THREADS, "decode")

    async def run(self, memory_bytes: int, decode: Callable[[], T]) -> T:
        """Wait for `memory_bytes` bytes, call `decode` and return its result."""
        async with self._memory.reserve(memory_bytes):
            return await asyncio.get_running_loop().run_in_executor(self._threads, decode)
