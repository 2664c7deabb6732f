"""Engine with fake actors in simulated time: its core, its shell, its shots and its window.

A fake actor takes no CPU time, so the CPU time of the process is the director's. The cost of Ray's calls is measured apart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from benchmarks.fake_actors import FakeActor, run_in_simulated_time
from benchmarks.simulated_scheduling import CHUNKS, SECONDS, SHOTS_PER_WORKER
from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.calls import ENCODER, CallResult
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.engine import Window
from vidgen_ray.engine.shell import Shell
from vidgen_ray.engine.shots import Shots
from vidgen_ray.engine.status import Attempt
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.planner.layout import Layout, Slot, WorkerSpec
from vidgen_ray.profile import ActorProfile, Profile
from vidgen_ray.shot import Shot

WORKERS_PER_NODE = 8
FRAMES = 25
CHUNK_FRAMES = 4
ENCODE_S = {"begin": 0.3, "add": 0.4, "commit": 0.5, "abandon": 0.0}
"""Encoder method -> seconds of a call. `commit` also encodes the last chunk."""
RAY_CALLS = 2000


class DirectorCost(NamedTuple):
    """Cost of a run."""

    cpu_ms_per_shot: float
    """CPU time of the director without Ray's calls."""
    calls_per_shot: float
    shots_per_simulated_s: float


class _NoObserver:
    def attempt_ended(self, attempt: Attempt) -> None: ...

    def step_ended(self, stage: str, seconds: float, cached: bool) -> None: ...

    def step_failed(self, stage: str, error_class: str) -> None: ...

    def retried(self, stage: str) -> None: ...

    def adapter_loads(self, n: int) -> None: ...

    def frames_upscaled(self, n: int) -> None: ...

    def quarantined(self, process: str, reason: str) -> None: ...


def plan_of(number: int) -> ShotPlan:
    """Return the plan of a shot of 25 frames that becomes 4096x2304."""
    shot = Shot(id=f"shot-{number:06d}", prompt=f"nothing, number {number}", seed=number, num_frames=FRAMES, scale=4)
    steps = tuple(Step(stage=stage.name, key=f"{number:032x}{n:032x}", weights=()) for n, stage in enumerate(stages_of(shot)))
    return ShotPlan(shot=shot, steps=steps, key=steps[-1].key)


def measure_director(specs: Sequence[WorkerSpec], shots: int) -> DirectorCost:
    """Run the shots on workers with these stages."""
    plans = [plan_of(number) for number in range(shots)]
    before = time.process_time()
    calls, simulated_s = run_in_simulated_time(_run(specs, plans))
    return DirectorCost(1000 * (time.process_time() - before) / shots, calls / shots, shots / simulated_s)


async def _run(specs: Sequence[WorkerSpec], plans: Sequence[ShotPlan]) -> int:
    calls = 0

    def seconds(method: str, *args: Any) -> float:
        nonlocal calls
        calls += 1
        if method in ENCODE_S:
            return ENCODE_S[method]
        names = args[2]
        return sum(SECONDS.get(name, 0.0) for name in names) / (CHUNKS if method == "run_chunk" else 1)

    def result(method: str, *args: Any) -> Any:
        if method == "commit":
            return CallResult(), ShotRecord.model_construct(stages=args[1])
        if method not in ("run", "run_chunk", "compare"):
            return CallResult()
        keys = {step.stage: step.key for step in args[1].steps}
        records = tuple(
            StepRecord(stage=name, key=keys[name], weights=(), seconds=SECONDS.get(name, 0.0), gpu_seconds=1.0, cached=False)
            for name in args[2]
        )
        return CallResult(records, differences=(0.0,) * len(args[4:])), None

    actors = {stage.actor: ActorProfile(weights="tiny") for stage in STAGE_BY_NAME.values()}
    profile = Profile(name="simulated", about="does nothing", actors=actors)
    config = EngineConfig("run", profile, OutputFolder(Path("unused")), STAGE_BY_NAME)
    observer = _NoObserver()
    slots = tuple(Slot((spec,), 0.0) for spec in specs)
    layout = Layout("fused", slots, encoders=len(specs), window=SHOTS_PER_WORKER * len(specs))
    storage = StoragePause(lambda: None, 0.0, lambda _: None)
    shell = Shell(config, layout, observer, storage)
    for n, spec in enumerate(specs):
        node = f"node-{n // WORKERS_PER_NODE}"
        shell.add(f"worker-{n}", spec, FakeActor(f"worker-{n}", seconds, result, node=node))
        shell.add(f"encoder-{n}", ENCODER, FakeActor(f"encoder-{n}", seconds, result, node=node))
    shots = Shots(config, layout, shell, {"realesrgan": CHUNK_FRAMES}, observer, storage)
    window = Window(layout.window, float("inf"))

    async def render(plan: ShotPlan) -> None:
        async with window.admit(1):
            await shots.render(plan)

    await asyncio.gather(*map(render, plans))
    shell.close()
    return calls


class _Echo:
    def run(self, number: int, plan: ShotPlan) -> tuple[CallResult, None]:
        return CallResult(), None


def measure_ray_call_ms() -> float:
    """Return the CPU milliseconds in the caller of one actor call with a plan and two results. Needs a connection to Ray."""
    actor = ray.remote(num_cpus=0)(_Echo).remote()
    plan = plan_of(1)

    async def calls() -> float:
        async def call(number: int) -> None:
            first, _ = actor.run.options(num_returns=2).remote(number, plan)
            await asyncio.wrap_future(first.future())

        await call(0)
        before = time.process_time()
        for start in range(0, RAY_CALLS, 100):
            await asyncio.gather(*(call(number) for number in range(start, start + 100)))
        return 1000 * (time.process_time() - before) / RAY_CALLS

    return asyncio.run(calls())
