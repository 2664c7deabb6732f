"""Shot runner with fake actors in simulated time: the calls that a shot takes."""

from unittest.mock import AsyncMock, Mock

import pytest

from benchmarks.fake_actors import FakeActorClient, run_in_simulated_time
from tests.engine.test_worker_pool import config
from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine import shot_runner
from vidgen_ray.engine.calls import ENCODER, CallResult
from vidgen_ray.engine.shot_runner import ShotRunner
from vidgen_ray.engine.worker_pool import WorkerPool
from vidgen_ray.graph import stages_of
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.planner.layout import Layout, Slot, WorkerSpec
from vidgen_ray.shot import Shot

ALL = ("flux", "svd", "realesrgan")
FRAMES = 8
CHUNK_FRAMES = 4


def calls_of_a_clip(workers):
    """Return the methods that are called to render a clip on workers with these stages, and the stages of its record."""
    shot = Shot(id="a", prompt="a ball", seed=1, num_frames=FRAMES, scale=2)
    steps = tuple(Step(stage=stage.name, key=stage.name, weights=()) for stage in stages_of(shot))
    plan = ShotPlan(shot=shot, steps=steps, key="shot")
    slots = tuple(Slot((WorkerSpec(stages, cpus=1, gpus=1),), 0.0) for stages in workers)
    layout = Layout("fused", slots, encoders=1, window=1)
    called = []

    def respond(method, *args):
        called.append(method)
        if method in ("begin", "add"):
            return CallResult()
        if method in ("write", "commit"):
            (records,) = (arg for arg in args if isinstance(arg, tuple))
            return CallResult(), ShotRecord.model_construct(stages=records)
        names = (*args[2], *args[3]) if method == "run_clip" else args[2]
        records = (StepRecord(stage=n, key=n, weights=(), seconds=1, gpu_seconds=1, cached=False) for n in names)
        return CallResult(tuple(records)), *(["output"] * (2 if method == "run_clip" else 1))

    async def render():
        observer = Mock()
        pool = WorkerPool(config(), layout, observer, Mock(over=AsyncMock()))
        for number, slot in enumerate(slots):
            pool.add(slot.workers[0], FakeActorClient(f"worker-{number}", lambda *_: 1.0, respond))
        pool.add(ENCODER, FakeActorClient("encoder", lambda *_: 1.0, respond))
        return await ShotRunner(config(), pool, {"realesrgan": CHUNK_FRAMES}, observer).run(plan)

    record, _ = run_in_simulated_time(render())
    return called, [step.stage for step in record.stages]


@pytest.mark.parametrize(
    ("workers", "calls"),
    [
        pytest.param([ALL, ALL], ["run_clip", "write"], id="all stages on each worker"),
        pytest.param([ALL, ("flux",)], ["run", "run_clip", "write"], id="another worker takes FLUX"),
        pytest.param([ALL, ("realesrgan",)], ["run", "run_chunk", "write"], id="another worker takes upscaling"),
    ],
)
def test_clip_of_one_chunk_takes_one_call_unless_workers_share_the_stages(workers, calls):
    assert calls_of_a_clip(workers) == (calls, list(ALL))


def test_chunks_run_in_calls_of_their_own(monkeypatch):
    monkeypatch.setattr(shot_runner, "CHUNK_BYTES", 1)
    called, stages = calls_of_a_clip([ALL])
    assert sorted(called) == ["add", "begin", "commit", "run", "run_chunk", "run_chunk"]
    assert stages == list(ALL)
