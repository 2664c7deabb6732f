"""Window: limits on shots in progress by number and by bytes."""

import asyncio
from contextlib import suppress

import pytest

from vidgen_ray.engine.engine import Window


class Shots:
    """Starts shots that stay in the window until they are released."""

    def __init__(self, window):
        self.window = window
        self.admitted = []
        self._released = {}
        self.tasks = {}

    async def start(self, name, size=1):
        self._released[name] = asyncio.Event()
        self.tasks[name] = asyncio.ensure_future(self._run(name, size))
        await self.settle()

    async def _run(self, name, size):
        async with self.window.admit(size):
            self.admitted.append(name)
            await self._released[name].wait()

    def release_now(self, name):
        self._released[name].set()

    async def release(self, name):
        self.release_now(name)
        await self.settle()

    async def cancel(self, name):
        self.tasks[name].cancel()
        with suppress(asyncio.CancelledError):
            await self.tasks[name]
        await self.settle()

    async def settle(self):
        for _ in range(5):
            await asyncio.sleep(0)


def test_number_of_shots_is_limited_first_come_first_served():
    async def scenario():
        shots = Shots(Window(2, 100))
        for name in "abcd":
            await shots.start(name)
        assert (shots.admitted, shots.window.in_progress) == (["a", "b"], 2)
        await shots.release("b")
        assert shots.admitted == ["a", "b", "c"]

    asyncio.run(scenario())


def test_resized_window_admits_waiting_shots_and_evicts_none():
    async def scenario():
        shots = Shots(Window(1, 100))
        for name in "abc":
            await shots.start(name)
        shots.window.resize(2)
        await shots.settle()
        assert shots.admitted == ["a", "b"]
        shots.window.resize(1)
        await shots.release("a")
        assert (shots.admitted, shots.window.in_progress) == (["a", "b"], 1)
        await shots.release("b")
        assert shots.admitted == ["a", "b", "c"]

    asyncio.run(scenario())


def test_bytes_are_limited_and_a_large_shot_is_not_overtaken():
    async def scenario():
        shots = Shots(Window(10, 100))
        await shots.start("a", 60)
        await shots.start("large", 60)
        await shots.start("small", 1)
        assert shots.admitted == ["a"]
        await shots.release("a")
        assert shots.admitted == ["a", "large", "small"]

    asyncio.run(scenario())


def test_shot_larger_than_the_window_runs_alone():
    async def scenario():
        shots = Shots(Window(10, 100))
        await shots.start("huge", 1000)
        await shots.start("b", 1)
        assert shots.admitted == ["huge"]
        await shots.release("huge")
        assert shots.admitted == ["huge", "b"]

    asyncio.run(scenario())


def test_cancelled_shots_free_their_place():
    async def scenario():
        shots = Shots(Window(1, 100))
        for name in "abcd":
            await shots.start(name)
        await shots.cancel("b")
        await shots.cancel("a")
        assert (shots.admitted, shots.window.in_progress) == (["a", "c"], 1)
        # A shot leaves the window and the next one is cancelled in the same step of the loop.
        shots.release_now("c")
        shots.tasks["d"].cancel()
        await shots.settle()
        assert shots.window.in_progress == 0
        with pytest.raises(asyncio.CancelledError):
            await shots.tasks["d"]

    asyncio.run(scenario())


def test_cancelled_large_shot_lets_later_ones_in():
    async def scenario():
        shots = Shots(Window(10, 100))
        await shots.start("a", 60)
        await shots.start("large", 60)
        await shots.start("small", 1)
        await shots.cancel("large")
        assert shots.admitted == ["a", "small"]

    asyncio.run(scenario())
