"""Limits on the memory that concurrent requests use together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

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
