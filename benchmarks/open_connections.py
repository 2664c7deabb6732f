"""Many HTTP clients in one thread: clients that poll a video, and event streams that stay open."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

START_TIMEOUT_S = 60.0


class Connections:
    """Clients of one server. `latencies_ms` are those of the polls."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.latencies_ms: list[float] = []
        self.events = 0
        """Lines of events that all streams have received."""
        self.open = 0
        """Clients that have received a response."""

    async def stream(self, path: str) -> None:
        """Receive an event stream until cancelled."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            await self._send(writer, path)
            await self._expect_success(reader)
            self.open += 1
            while line := await reader.readline():
                self.events += line.startswith(b"data:")
        finally:
            writer.close()

    async def poll(self, path: str, delay_s: float, interval_s: float) -> None:
        """Poll until cancelled, first after `delay_s`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.open += 1
        try:
            await asyncio.sleep(delay_s)
            while True:
                started = time.perf_counter()
                await self._send(writer, path)
                length = await self._expect_success(reader)
                await reader.readexactly(length)
                self.latencies_ms.append(1000 * (time.perf_counter() - started))
                await asyncio.sleep(max(0.0, interval_s - (time.perf_counter() - started)))
        finally:
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter, path: str) -> None:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n\r\n".encode())
        await writer.drain()

    async def _expect_success(self, reader: asyncio.StreamReader) -> int:
        """Read the head of a response and return its Content-Length, 0 for a stream. Raises RuntimeError."""
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        if " 200 " not in lines[0]:
            raise RuntimeError(f"a benchmark client got {lines[0]}")
        return next((int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")), 0)


@contextmanager
def running(connections: Connections, clients: list[Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Run the clients in a thread during the block, which starts when all are connected. Raises the error of a client."""
    loop = asyncio.new_event_loop()
    errors: list[BaseException] = []

    async def run_all() -> None:
        try:
            await asyncio.gather(*clients)
        except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
            errors.append(error)

    task = loop.create_task(run_all())

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + START_TIMEOUT_S
        while connections.open < len(clients) and not errors and time.monotonic() < until:
            time.sleep(0.05)
        yield
        if errors:
            raise errors[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
