"""Event loop of a director with fake actors: shots are coroutines, and each call waits for a worker of the scheduler.

Has no retries, encoders, records or files: the least that any director does per shot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.fake_actors import FakeActorClient, run_in_simulated_time
from benchmarks.simulated_scheduling import CHUNKS, POSITIONS, SECONDS, SHOTS_PER_WORKER, calls_of
from vidgen_ray.engine.chunks import ordered_window
from vidgen_ray.engine.scheduler import Scheduler
from vidgen_ray.engine.work import CHUNK_LOAD, Work, WorkerState
from vidgen_ray.planner.layout import WorkerSpec

WORKERS_PER_NODE = 8
TIMEOUT_S = 1800.0


class DirectorCost(NamedTuple):
    """Cost of a run."""

    cpu_ms_per_shot: float
    shots_per_simulated_s: float


class _Pool:
    """Worker pool without failures."""

    def __init__(self, specs: Sequence[WorkerSpec]) -> None:
        states = [WorkerState(spec, 4, node=str(n // WORKERS_PER_NODE)) for n, spec in enumerate(specs)]
        self._scheduler = Scheduler(states, POSITIONS)
        self._clients = {
            state: FakeActorClient(f"worker-{n}", lambda method, seconds: seconds, lambda method, seconds: None)
            for n, state in enumerate(states)
        }
        self._assigned: dict[Work, asyncio.Future[WorkerState]] = {}

    async def start(self) -> None:
        await asyncio.gather(*(client.ready() for client in self._clients.values()))
        for state in self._clients:
            self._scheduler.started(state)

    async def call(self, work: Work, seconds: float) -> WorkerState:
        """Run a call of this many seconds on a worker, and return the worker."""
        future = self._assigned[work] = asyncio.get_running_loop().create_future()
        self._scheduler.add(work)
        self._assign()
        worker = await future
        await self._clients[worker].call("run", seconds, stage=work.stage, timeout_s=TIMEOUT_S)
        self._scheduler.finished(worker, work)
        self._assign()
        return worker

    def _assign(self) -> None:
        for worker, work in self._scheduler.assign():
            self._assigned.pop(work).set_result(worker)


def measure_director(specs: Sequence[WorkerSpec], shots: int) -> DirectorCost:
    """Run the shots on workers with these stages."""
    before = time.process_time()
    _, simulated_s = run_in_simulated_time(_run(specs, shots))
    return DirectorCost(1000 * (time.process_time() - before) / shots, shots / simulated_s)


async def _run(specs: Sequence[WorkerSpec], shots: int) -> None:
    pool, window = _Pool(specs), asyncio.Semaphore(SHOTS_PER_WORKER * len(specs))
    steps = calls_of(specs)

    async def render(order: int) -> None:
        async with window:
            worker: WorkerState | None = None
            for stages in steps:
                seconds = sum(SECONDS[stage] for stage in stages)
                worker = await pool.call(Work(stages[0], order, near=worker), seconds)

            async def upscale(_: slice) -> None:
                work = Work("realesrgan", order, load=CHUNK_LOAD, near=worker)
                await pool.call(work, SECONDS["realesrgan"] / CHUNKS)

            async for _ in ordered_window((slice(n, n + 1) for n in range(CHUNKS)), upscale):
                pass

    await pool.start()
    await asyncio.gather(*(render(order) for order in range(shots)))
