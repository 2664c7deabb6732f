"""Window: limits on shots in progress by number and by bytes."""

import asyncio

from vidgen_ray.engine.engine import Window


class Shots:
    """Shots that stay in a window until they are released."""

    def __init__(self, shots):
        self.window = Window(shots, 100)
        self.admitted = ""
        self._released, self._tasks = {}, {}

    async def start(self, names, size=1):
        for name in names:
            self._released[name] = asyncio.Event()
            self._tasks[name] = asyncio.ensure_future(self._run(name, size))
            await self.settle()

    async def _run(self, name, size):
        async with self.window.admit(size):
            self.admitted += name
            await self._released[name].wait()

    async def end(self, *, released="", cancelled=""):
        """Release and cancel shots in the same step of the loop."""
        for name in released:
            self._released[name].set()
        for name in cancelled:
            self._tasks[name].cancel()
        await self.settle()

    async def settle(self):
        for _ in range(8):
            await asyncio.sleep(0)


def test_number_of_shots_is_limited_first_come_first_served_and_can_change():
    async def scenario():
        shots = Shots(2)
        await shots.start("abcdef")
        assert (shots.admitted, shots.window.in_progress) == ("ab", 2)
        await shots.end(released="b")
        assert shots.admitted == "abc"
        shots.window.resize(3)
        await shots.settle()
        assert shots.admitted == "abcd"
        shots.window.resize(2)
        await shots.end(released="a")
        assert (shots.admitted, shots.window.in_progress) == ("abcd", 2), "no shot is evicted"

    asyncio.run(scenario())


def test_bytes_are_limited_and_a_large_shot_runs_alone_and_is_not_overtaken():
    async def scenario():
        shots = Shots(10)
        await shots.start("a", 60)
        await shots.start("L", 1000)
        await shots.start("s")
        for ended, admitted in (("", "a"), ("a", "aL"), ("L", "aLs")):
            await shots.end(released=ended)
            assert shots.admitted == admitted

    asyncio.run(scenario())


def test_cancelled_shots_free_their_place():
    async def scenario():
        shots = Shots(1)
        await shots.start("abcd")
        await shots.end(cancelled="b")
        await shots.end(cancelled="a")
        assert (shots.admitted, shots.window.in_progress) == ("ac", 1)
        await shots.end(released="c", cancelled="d")
        assert (shots.admitted, shots.window.in_progress) == ("ac", 0)
        shots = Shots(10)
        await shots.start("aL", 60)
        await shots.start("s")
        await shots.end(cancelled="L")
        assert shots.admitted == "as"

    asyncio.run(scenario())
