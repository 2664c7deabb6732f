"""Watch for calls that take much longer than expected, such as those of a GPU that has become slow. Does not use Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vidgen_ray.engine.calls import ENCODER
from vidgen_ray.engine.scheduler import Work, WorkerState

MIN_SLOW_S = 10.0
COPY_FACTOR, SLOW_FACTOR = 2.0, 5.0
"""A call that has run longer than both MIN_SLOW_S and a factor times its expected seconds is slow. With the first factor, it is
copied to a worker that has nothing to do. With the second one, the work behind it goes to other workers."""
TIMER_ERROR_S = 1e-3
"""Seconds by which timers may run early."""


class SlowCalls:
    """Watches the running call of each worker. Use it inside an event loop."""

    def __init__(
        self,
        expected_s: Callable[[Work], float],
        copy: Callable[[Work], None],
        recall: Callable[[WorkerState], None],
    ) -> None:
        """`copy` runs a call on an idle worker, too. `recall` gives the work that waits behind a call to other workers.

        Both are called again every MIN_SLOW_S seconds, as long as the call runs.
        """
        self._expected_s = expected_s
        self._copy = copy
        self._recall = recall
        self._watched: dict[WorkerState, tuple[Work, asyncio.TimerHandle]] = {}
        """Running call of each worker, and the timer of its next check."""

    def watch(self, worker: WorkerState) -> None:
        """Watch the call that the worker runs now. Call it after each change of its work."""
        running = next(iter(worker.assigned), None)
        if worker in self._watched:
            watched, timer = self._watched[worker]
            if watched is running:
                return
            timer.cancel()
            del self._watched[worker]
        # The sessions of an encoder run side by side, and wait for chunks of their clips. A job of a server is not repeated.
        if running is not None and worker.spec != ENCODER and not worker.spec.server:
            self._check_later(worker, running, asyncio.get_running_loop().time())

    def close(self) -> None:
        for _, timer in self._watched.values():
            timer.cancel()

    def _check_later(self, worker: WorkerState, running: Work, started: float) -> None:
        timer = asyncio.get_running_loop().call_later(MIN_SLOW_S, self._check, worker, running, started)
        self._watched[worker] = running, timer

    def _check(self, worker: WorkerState, running: Work, started: float) -> None:
        if next(iter(worker.assigned), None) is not running:
            return
        elapsed_s = asyncio.get_running_loop().time() - started + TIMER_ERROR_S
        expected_s = self._expected_s(running)
        if elapsed_s > max(MIN_SLOW_S, COPY_FACTOR * expected_s):
            self._copy(running)
        if elapsed_s > max(MIN_SLOW_S, SLOW_FACTOR * expected_s):
            self._recall(worker)
        self._check_later(worker, running, started)
