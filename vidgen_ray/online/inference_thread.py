"""Thread that runs the models of a replica: one function at a time, with progress, cancellation and an overdue check.

Independent of stages. The event loop of the replica stays free for health checks and for the inputs of the next call.
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
    """Progress of a call. The first one of a call means that its execution has started."""

    stage: str
    step: int
    """Completed denoising steps or frames."""
    steps: int
    """Total number of steps. 0 if not known yet."""


class InferenceResult(NamedTuple, Generic[T]):
    """Return value of the function."""

    value: T


class InferenceThread:
    """A single inference thread. `run` must be called inside an event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._deadline: float | None = None

    async def run(
        self, function: Callable[[], T], stage: str, timeout_s: float
    ) -> AsyncIterator[Progress | InferenceResult[T]]:
        """Run a function after all earlier ones. Yield its progress from its start on, then its result.

        If the caller closes the generator, the function stops at its next step or does not start. Raises what the function
        raises.
        """
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Progress | None] = asyncio.Queue()
        cancelled = threading.Event()
        last: Progress | None = None

        def on_progress(stage: str, step: int, steps: int) -> None:
            nonlocal last
            if cancelled.is_set():
                raise Cancelled
            if (progress := Progress(stage, step, steps)) != last:
                last = progress
                loop.call_soon_threadsafe(updates.put_nowait, progress)

        def in_thread() -> T:
            self._deadline = time.monotonic() + timeout_s
            try:
                on_progress(stage, 0, 0)
                with progress_callback(on_progress):
                    return function()
            finally:
                self._deadline = None

        running = loop.run_in_executor(self._thread, in_thread)
        running.add_done_callback(lambda _: updates.put_nowait(None))
        try:
            while (progress := await updates.get()) is not None:
                yield progress
            yield InferenceResult(running.result())
        finally:
            cancelled.set()
            running.cancel()
            running.add_done_callback(_ignore_error)

    def overdue_s(self) -> float:
        """Return by how many seconds the running function exceeds its timeout. 0 if it does not."""
        deadline = self._deadline
        return 0.0 if deadline is None else max(0.0, time.monotonic() - deadline)


def _ignore_error(running: asyncio.Future[T]) -> None:
    """Retrieve the error of a cancelled function, so that asyncio does not log it."""
    with suppress(asyncio.CancelledError):
        running.exception()
