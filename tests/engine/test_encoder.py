"""Encoder actor: the next director can use it after a director has crashed."""

import asyncio
import os
import time
from contextlib import suppress
from unittest.mock import AsyncMock, Mock

import numpy as np
import pytest
import ray

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.calls import ENCODER
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.encoder import CONTROL, Encoder
from vidgen_ray.engine.messages import OUTPUT, Call
from vidgen_ray.engine.shell import Shell
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.layout import Layout

pytestmark = pytest.mark.usefixtures("local_ray")

TIMEOUT_S = 60


class HangingDisk(OutputFolder):
    """Folder on which shots whose id starts with `hang` hang, until the file `released` exists."""

    def draft(self, plan):
        if plan.shot.id.startswith("hang"):
            self.root.joinpath("hangs").touch()
            while not self.root.joinpath("released").exists():
                time.sleep(0.02)  # polls: files do not send events
        return super().draft(plan)


@pytest.fixture
def config(tiny, tmp_path):
    outputs = HangingDisk(tmp_path)
    outputs.prepare()
    return EngineConfig("test", tiny, outputs, {})


def plan_of(make_shot, name):
    shot = make_shot(id=name, width=64, height=64, generate_video=False)
    return ShotPlan(shot=shot, steps=(Step(stage="flux", key=64 * "0", weights=()),), key=64 * "0")


ARTEFACTS = {"image": np.zeros((64, 64, 3), np.uint8)}


async def write(actor, config, plan):
    """Write a shot as a director that has just started."""
    shell = Shell(config, Layout("fused", (), encoders=1, window=1), Mock(), Mock(over=AsyncMock()))
    shell.add("e", ENCODER, actor)

    async def write(session):
        return await session.commit("write", plan, ARTEFACTS, (), None)

    try:
        async with asyncio.timeout(TIMEOUT_S):
            return (await shell.call(Call(0, 0, plan.shot.id, (OUTPUT,), timeout_s=TIMEOUT_S), write)).record
    finally:
        shell.close()


def test_records_have_the_cpu_seconds_of_the_process(config, make_shot, monkeypatch):
    monkeypatch.setattr(os, "nice", lambda _: None)
    encoder = Encoder(config)
    start_s = encoder._counted_s
    plans = [plan_of(make_shot, name) for name in ("one", "two")]
    written = [encoder.write(number, plan, ARTEFACTS, (), None) for number, plan in enumerate(plans)]
    seconds = [record.encode_s for _, record in written]
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(encoder._counted_s - start_s)
    assert "encode_s" not in written[0][1].model_dump()


@pytest.mark.parametrize("ends", [False, True], ids=["hangs", "ends soon"])
def test_call_of_a_crashed_director_does_not_block_the_next_one(config, make_shot, ends):
    class StaleEncoder(Encoder):
        stale_call_s = TIMEOUT_S if ends else 0.5

    actor = ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={CONTROL: 1})(StaleEncoder).remote(config)

    async def scenario():
        crashed = asyncio.create_task(write(actor, config, plan_of(make_shot, "hangs")))
        async with asyncio.timeout(TIMEOUT_S):
            while not config.outputs.root.joinpath("hangs").exists():
                await asyncio.sleep(0.02)  # polls: files do not send events
        crashed.cancel()
        with suppress(asyncio.CancelledError):
            await crashed
        pid = (await actor.place.remote()).pid
        if ends:
            config.outputs.root.joinpath("released").touch()
        record = await write(actor, config, plan_of(make_shot, "later"))
        assert record.shot.id == "later"
        assert ((await actor.place.remote()).pid == pid) == ends, "a process with a call that hangs is replaced"
        if ends:
            # The crashed director's shot was closed, and it can begin no other.
            assert (await actor.begin.remote(1, plan_of(make_shot, "late"), ARTEFACTS)).session_lost

    asyncio.run(scenario())
    ray.kill(actor)
