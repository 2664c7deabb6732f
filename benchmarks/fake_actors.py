"""Fake Ray actors in this process, and an event loop in simulated time, to measure an engine with more workers than fit here.

A call to a fake actor takes simulated seconds and no CPU time. The CPU time of the process is then the engine's own.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Generator
from itertools import count
from typing import Any, TypeVar

import ray

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


class FakeReference:
    """Reference of a result of a fake actor."""

    def __init__(self) -> None:
        self._future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def future(self) -> asyncio.Future[Any]:
        # Each caller may cancel its own.
        return asyncio.ensure_future(self._wait())

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        return await asyncio.shield(self._future)

    def resolve(self, value: Any) -> None:
        if not self._future.done():
            self._future.set_result(value)

    def fail(self, error: Exception) -> None:
        if not self._future.done():
            self._future.set_exception(error)
            self._future.exception()  # retrieved, so that asyncio does not log it


class _Method:
    def __init__(self, actor: FakeActor, name: str, n_results: int = 1) -> None:
        self._actor, self._name, self._n_results = actor, name, n_results

    def options(self, *, num_returns: int) -> _Method:
        return _Method(self._actor, self._name, num_returns)

    def remote(self, *args: Any) -> Any:
        references = [FakeReference() for _ in range(self._n_results)]
        self._actor.send(self._name, args, references)
        return references[0] if self._n_results == 1 else references


class FakeActor:
    """Handle of a fake worker or encoder. Calls run one after another, in order, and those of the control group at once."""

    _pids = count(1)

    def __init__(
        self, name: str, seconds: Callable[..., float], result: Callable[..., Any], *, node: str = "node", load_s: float = 0.0
    ) -> None:
        """`seconds` and `result` take the method's name and its arguments. With several results, `result` returns the call
        result first. An error that `result` raises is that of Ray.
        """
        self.name, self.node, self.load_s = name, node, load_s
        self.kills = 0
        self._seconds, self._result = seconds, result
        self._pid = next(self._pids)
        self._turn = asyncio.Lock()
        self._running: dict[asyncio.Task[None], list[FakeReference]] = {}

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(self, name)

    def send(self, method: str, args: tuple[Any, ...], references: list[FakeReference]) -> None:
        if method == "place":
            references[0].resolve(ActorPlace(self.node, self._pid, (), self.node))
        elif method in ("attach", "cancel", "progress", "activity"):
            references[0].resolve(None)
        else:
            task = asyncio.ensure_future(self._run(method, args, references))
            self._running[task] = references
            task.add_done_callback(lambda task: self._running.pop(task, None))

    async def load_failure(self) -> Failure | None:
        """Load the weights. Return the failure, if that is impossible."""
        await asyncio.sleep(self.load_s)
        return None

    async def _run(self, method: str, args: tuple[Any, ...], references: list[FakeReference]) -> None:
        if method == "load":
            references[0].resolve(await self.load_failure())
            return
        async with self._turn:
            await asyncio.sleep(self._seconds(method, *args))
        try:
            result = self._result(method, *args)
        except ray.exceptions.RayError as error:
            for reference in references:
                reference.fail(error)
            return
        if len(references) == 1:
            references[0].resolve(result)
            return
        for reference, value in zip(references, (*result[1:], result[0]), strict=True):
            reference.resolve(value)

    def kill(self) -> None:
        """End the process. The next one starts at once."""
        self.kills += 1
        self._pid = next(self._pids)
        running, self._running = self._running, {}
        for task, references in running.items():
            task.cancel()
            for reference in references:
                reference.fail(ray.exceptions.ActorUnavailableError("the process has crashed", None))


def kill(actor: FakeActor, *, no_restart: bool = True) -> None:
    """Stands for `ray.kill`."""
    actor.kill()
