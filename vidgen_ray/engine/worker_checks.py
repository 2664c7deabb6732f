"""Checks of workers whose calls succeed, for sick GPUs. Does not use Ray.

Canary checks: a worker repeats a call of another one. They find a GPU that computes other images than others of its kind. Two
that differ may both be well. A third one decides which of them is sick; without it, the difference is only logged.
Slow calls take much longer than expected, such as those of a GPU that has become slow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.calls import is_encoder
from vidgen_ray.engine.scheduler import Work, WorkerState
from vidgen_ray.stages.base import Artefacts, Frames

CANARY = "canary"
"""Stage of a check in the log."""
FIRST_CALLS = 20
"""Calls of a worker before its first check. So short runs have none."""
CHECK_CALLS = 200
"""Calls of a worker between two checks."""
BLOCK_PX = 32
MAX_DIFFERENCE = 48.0
"""Largest mean difference of a block of pixels, of 255, between two healthy workers: other kernels change details, a sick GPU
or damaged weights the image. Not measured on GPUs."""


def difference(result: Artefacts, other: Artefacts) -> float:
    """Return the largest mean difference of a block of BLOCK_PX x BLOCK_PX pixels, 0 to 255, between images and clips."""
    pairs = ((result[name], other[name]) for name in ("image", "frames") if name in result)
    return max((_largest(made, expected) for made, expected in pairs), default=0.0)


def _largest(made: Frames, expected: Frames) -> float:
    if made.ndim == 4:
        return max(map(_largest, made, expected))
    apart = np.abs(made.astype(np.int16) - expected).mean(axis=2)
    rows, columns = (np.arange(0, size, BLOCK_PX) for size in apart.shape)
    sums = np.add.reduceat(np.add.reduceat(apart, rows, axis=0), columns, axis=1)
    heights, widths = (np.diff(starts, append=size) for starts, size in zip((rows, columns), apart.shape, strict=True))
    return float((sums / np.outer(heights, widths)).max())


@dataclass(frozen=True, slots=True, eq=False)
class MadeCall:
    """A call that a worker has finished, with references to its input and output."""

    work: Work
    plan: ShotPlan
    steps: tuple[str, ...]
    inputs: Any
    output: Any
    by: WorkerState
    device: str
    """Kind of GPU on which it ran, with its driver."""


class Repeated(NamedTuple):
    """A call that was repeated for a check."""

    differences: tuple[float, ...]
    """For each output that it was compared with; see `difference`."""
    output: Any


class Canary:
    """Decides when workers are checked, and which one is sick. Use it inside an event loop."""

    def __init__(
        self,
        holders: Callable[[str], Collection[WorkerState]],
        repeat: Callable[[WorkerState, MadeCall, Sequence[Any]], Awaitable[Repeated | None]],
        on_sick: Callable[[WorkerState, MadeCall, bool], None],
    ) -> None:
        """`holders` returns the workers with a stage. `repeat` runs a call on a worker and compares its output with others; it
        returns `None` if that fails. `on_sick` gets a worker, the call that shows it, and whether the worker was found sick
        before, without a good result since.
        """
        self._holders = holders
        self._repeat = repeat
        self._on_sick = on_sick
        self._left: dict[WorkerState, int] = {}
        """Worker -> calls until its next check is due."""
        self._due: dict[WorkerState, None] = {}
        """Workers whose check is due, the first one first. Few: each finished call looks through them."""
        self._devices: dict[WorkerState, str] = {}
        self._found: set[WorkerState] = set()
        """Workers that the last check has found sick."""
        self._checks: set[asyncio.Task[None]] = set()

    def started(self, worker: WorkerState) -> None:
        """The process of a worker has started."""
        self._check_after(worker, 1 if worker in self._found else FIRST_CALLS)

    def finished(self, call: MadeCall) -> None:
        """Count a call, and let the worker repeat it whose check is due, if there is one."""
        if not call.by.live:
            # Its process is gone: it crashed since, or was found sick.
            return
        self._devices[call.by] = call.device
        self._left[call.by] -= 1
        if self._left[call.by] <= 0:
            self._due[call.by] = None
        due = next(self._peers(call, self._due), None)
        # A check keeps the output of a call in Ray's object store.
        if due is not None and len(self._checks) <= len(self._left) // CHECK_CALLS:
            self._check_after(due, CHECK_CALLS)
            check = asyncio.ensure_future(self._check(due, call))
            self._checks.add(check)
            check.add_done_callback(self._checks.discard)

    def forget(self, worker: WorkerState) -> None:
        """The worker is gone for good."""
        for table in (self._left, self._due, self._devices):
            table.pop(worker, None)
        self._found.discard(worker)

    def close(self) -> None:
        for check in self._checks:
            check.cancel()

    def _check_after(self, worker: WorkerState, calls: int) -> None:
        self._due.pop(worker, None)
        self._left[worker] = calls

    def _peers(self, call: MadeCall, workers: Iterable[WorkerState]) -> Iterator[WorkerState]:
        """Yield the live ones of these workers that are of the kind that has made the call, without its own."""
        others = (worker for worker in workers if worker.live and worker is not call.by)
        return (worker for worker in others if (worker.spec, self._devices.get(worker)) == (call.by.spec, call.device))

    async def _check(self, due: WorkerState, call: MadeCall) -> None:
        first = await self._repeat(due, call, [call.output])
        if first is None:
            self._due[due] = None
            return
        if first.differences[0] <= MAX_DIFFERENCE:
            self._found -= {due, call.by}
            self._check_after(call.by, CHECK_CALLS)
            return
        third = next((worker for worker in self._peers(call, self._holders(call.work.stage)) if worker is not due), None)
        decided = None if third is None else await self._repeat(third, call, [call.output, first.output])
        if decided is None:
            # A third worker may have finished a call by then.
            self._check_after(due, FIRST_CALLS)
            return
        maker_is_well, due_is_well = (each <= MAX_DIFFERENCE for each in decided.differences)
        sick = due if maker_is_well else call.by
        if maker_is_well != due_is_well and sick.live:
            again = sick in self._found
            self._found.add(sick)
            self._on_sick(sick, call, again)


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
        if running is not None and not is_encoder(worker.spec) and not worker.spec.server:
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
