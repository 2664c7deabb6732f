"""Fake actors in this process, and an event loop in simulated time, to measure a director with more workers than fit here.

A call to a fake actor takes simulated seconds and no CPU time. The CPU time of the process is then the director's own.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from vidgen_ray.engine.actor_client import ActorCallFailed, Ping
from vidgen_ray.engine.retries import Kind
from vidgen_ray.engine.worker import ActorPlace
from vidgen_ray.outputs.records import Failure

T = TypeVar("T")


TICK_S = 1e-6


class _SimulatedSelector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]  # the platform's class
    """Selector that advances the time instead of waiting for it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        # Without a timer, only another thread can continue: wait for it.
        events = super().select(None if timeout is None else 0)
        if not events and timeout:
            # A shorter time than the resolution of the clock would not advance it.
            self.now_s += max(timeout, TICK_S)
        return events


class SimulatedTimeLoop(asyncio.SelectorEventLoop):
    """Event loop whose clock jumps to the next timer as soon as nothing else is left to do. Ignores work in threads."""

    def __init__(self) -> None:
        self._simulated = _SimulatedSelector()
        super().__init__(self._simulated)

    def time(self) -> float:
        """Return the simulated seconds since the start."""
        return self._simulated.now_s


def run_in_simulated_time(main: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Run a coroutine. Return its result and the simulated seconds that it took."""
    loop = SimulatedTimeLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main), loop.time()


class FakeActorClient:
    """Client of a fake actor, with the interface of `ActorClient`. Calls run one after another, in order."""

    def __init__(
        self, name: str, seconds: Callable[..., float], result: Callable[..., Any], *, node: str = "node", load_s: float = 0.0
    ) -> None:
        """`seconds` and `result` take the method's name and its arguments. With several results, `result` returns a tuple."""
        self.name = name
        self.place: ActorPlace | None = None
        self.has_moved = False
        self._seconds, self._result, self._node, self.load_s = seconds, result, node, load_s
        self._calls: deque[str] = deque()
        self._turn = asyncio.Lock()

    async def ready(self) -> Failure | None:
        await asyncio.sleep(self.load_s)
        self.place = ActorPlace(self._node, 0, (), "")
        return None

    async def call(self, method: str, *args: Any, stage: str, timeout_s: float, num_returns: int = 1) -> Any:
        """Return the result after the call's simulated seconds. Raises ActorCallFailed after `timeout_s`."""
        self._calls.append(stage)
        try:
            async with self._turn:
                seconds = self._seconds(method, *args)
                await asyncio.sleep(min(seconds, timeout_s))
                if seconds > timeout_s:
                    message = f"{method} took longer than {timeout_s:g} s"
                    raise ActorCallFailed("TimedOut", message, Kind.ERROR, self.location)
        finally:
            self._calls.remove(stage)
        result = self._result(method, *args)
        if num_returns > 1 and len(result) != num_returns:
            raise ValueError(f"{method}: got {len(result)} results, must be {num_returns}")
        return result

    async def ping(self) -> Ping:
        return Ping.UP

    def send(self, method: str, *args: Any) -> Any:
        """Ignore the call, since a fake actor has no state. Return a future with the result `None`."""
        result: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        result.set_result(None)
        return result

    def cancel(self, number: int) -> None:
        """Do nothing: a call to a fake actor ends at its time."""

    def restart(self, *, blame_running: bool = False) -> None:
        """Do nothing: a fake actor does not crash."""

    def permanent_failure(self, reason: str) -> Failure:
        return Failure(stage="health", error="Quarantined", message=reason, attempts=1, worker=self.name)

    @property
    def running(self) -> str | None:
        return self._calls[0] if self._calls else None

    @property
    def node(self) -> str | None:
        return self.place.node if self.place else None

    @property
    def location(self) -> str:
        return f"{self.name} ({self._node})"
