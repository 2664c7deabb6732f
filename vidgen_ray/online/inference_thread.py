"""Where a replica computes: one thread, one piece of work at a time, that tells how far it is and can be told to end.

Knows nothing of stages. The event loop of the replica is free meanwhile, for health checks and the inputs of the next call.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from vidgen_ray.errors import Cancelled
from vidgen_ray.stages.progress import progress_callback

T = TypeVar("T")


class Progress(NamedTuple):
    """How far a call is. The first one of a call says that its work has begun."""

    stage: str
    step: int
    """Steps that are done: of denoising, or frames."""
    steps: int
    """0 where that is not known yet."""


class InferenceResult(NamedTuple, Generic[T]):
    """What a piece of work came to."""

    value: T


class InferenceThread:
    """Make it anywhere; use it inside of an event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="workbench")
        self._deadline: float | None = None

    async def work(self, work: Callable[[], T], stage: str, timeout_s: float) -> AsyncIterator[Progress | InferenceResult[T]]:
        """Run it after what was asked before: progress as it comes, from when it has begun, then what it came to.

        Where the caller goes away the work ends at its next step, or does not begin. Raises what the work raises.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Progress | None] = asyncio.Queue()
        unwanted = threading.Event()

        last: Progress | None = None

        def tell(stage: str, step: int, steps: int) -> None:
            nonlocal last
            if unwanted.is_set():
                raise Cancelled
            if (progress := Progress(stage, step, steps)) != last:
                last = progress
                loop.call_soon_threadsafe(news.put_nowait, progress)

        def in_thread() -> T:
            self._deadline = time.monotonic() + timeout_s
            try:
                tell(stage, 0, 0)
                with progress_callback(tell):
                    return work()
            finally:
                self._deadline = None

        running = loop.run_in_executor(self._thread, in_thread)
        running.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (progress := await news.get()) is not None:
                yield progress
            yield InferenceResult(running.result())
        finally:
            unwanted.set()
            running.cancel()
            running.add_done_callback(_heard)

    def overdue_s(self) -> float:
        """By how many seconds the work on the bench has outlasted its time; 0 where it has not."""
        deadline = self._deadline
        return 0.0 if deadline is None else max(0.0, time.monotonic() - deadline)


def _heard(running: asyncio.Future[T]) -> None:
    """Nobody waits for work that was told to end, so its error is no news."""
    with suppress(asyncio.CancelledError):
        running.exception()
