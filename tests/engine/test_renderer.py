"""Renderer: shots that an engine cannot render wait for another engine, whose start can fail or be stopped."""

import asyncio

import pytest

from vidgen_ray.engine.calls import ShotFailed
from vidgen_ray.engine.engine import Renderer
from vidgen_ray.outputs.records import Failure


def failed(message):
    return ShotFailed(Failure(stage="flux", error="Error", message=message, attempts=1, worker="w"))


class FakeEngine:
    """Engine that ends each shot when `end` is set. If `lost`, its last worker with a stage is lost with its node."""

    def __init__(self):
        self.lost, self.stopped, self.shots, self.end = False, False, [], asyncio.Event()

    @property
    def needs_other_layout(self):
        return self.lost

    def can_render(self, plan):
        return not self.lost

    async def run(self, plan, on_progress, on_admitted):
        self.shots.append(plan)
        on_admitted()
        await self.end.wait()
        if self.lost:
            raise failed("the node is lost")
        return plan.upper()

    async def stop(self):
        self.stopped = True


def run(scenario):
    """Run a coroutine function with a renderer and its engines. The one for the shot `large` does not start."""

    async def to_the_end():
        engines = []

        async def make(plan):
            await asyncio.sleep(0)
            if plan == "large":
                raise failed("fits on no GPU")
            engines.append(FakeEngine())
            return engines[-1]

        renderer = Renderer(lambda _: None, make)
        async with asyncio.timeout(60):
            await scenario(renderer, engines)
            await renderer.stop()
        assert all(engine.stopped for engine in engines)

    asyncio.run(to_the_end())


async def until(condition):
    while not condition():
        await asyncio.sleep(0)  # lets the other tasks run


def test_shots_of_a_lost_layout_are_rendered_by_the_next_engine():
    async def scenario(renderer, engines):
        shots = [asyncio.ensure_future(renderer.render(shot)) for shot in "ab"]
        await until(lambda: engines and len(engines[0].shots) == 2)
        engines[0].lost = True
        third = asyncio.ensure_future(renderer.render("c"))
        await asyncio.sleep(0)
        assert len(engines) == 1, "shots still run in the first engine"
        engines[0].end.set()
        await until(lambda: len(engines) == 2)
        assert engines[0].stopped
        engines[1].end.set()
        assert await asyncio.gather(*shots, third) == ["A", "B", "C"]
        assert len(engines) == 2

    run(scenario)


def test_engine_that_cannot_start_for_a_shot_fails_that_shot_only():
    async def scenario(renderer, engines):
        large, cancelled, small = (asyncio.ensure_future(renderer.render(shot)) for shot in ("large", "cancelled", "small"))
        with pytest.raises(ShotFailed, match="fits on no GPU"):
            await large
        await asyncio.sleep(0)
        cancelled.cancel()
        await until(lambda: engines)
        engines[0].end.set()
        assert await small == "SMALL"

    run(scenario)


def test_shots_run_again_in_an_engine_that_replaces_theirs_and_end_if_they_are_cancelled():
    async def scenario(renderer, engines):
        kept, cancelled = (asyncio.ensure_future(renderer.render(shot)) for shot in "ab")
        await until(lambda: engines and len(engines[0].shots) == 2)
        second = FakeEngine()
        await renderer.use(second)
        assert engines[0].stopped
        await until(lambda: len(second.shots) == 2)
        cancelled.cancel()
        second.end.set()
        assert await kept == "A"
        await asyncio.wait([cancelled])
        assert cancelled.cancelled()

    run(scenario)


def test_stop_ends_the_start_of_an_engine():
    ended = []

    async def never(plan):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(plan)

    async def scenario():
        renderer = Renderer(lambda _: None, never)
        rendering = asyncio.ensure_future(renderer.render("a"))
        await asyncio.sleep(0)
        rendering.cancel()
        await asyncio.wait([rendering])
        assert ended == [], "other shots may wait for the same start"
        await renderer.stop()
        assert ended == ["a"]

    asyncio.run(scenario())
