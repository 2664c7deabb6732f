"""Worker pool of a run: send each call to a suitable worker, and retry it if another attempt may succeed.

Runs in the director's event loop. Independent of what is called.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, NamedTuple

import ray

from vidgen_ray.engine.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.engine.run_metrics import RunMetrics
from vidgen_ray.engine.engine_config import RunConfig
from vidgen_ray.batch.run_progress import StageStatus
from vidgen_ray.engine.scheduler import Scheduler, Work, WorkerState
from vidgen_ray.engine.retries import ShotFailed
from vidgen_ray.engine.step_groups import CallResult
from vidgen_ray.graph import STAGES, max_loras
from vidgen_ray.outputs.records import Failure

BUSY_WINDOW = 30
"""Snapshots (one per second) over which the utilization is averaged."""


class RemoteArtefacts(NamedTuple):
    """Artefacts in Ray's object store."""

    reference: Any
    by: WorkerState | None
    """Worker that produced them. They are on its node."""


def failure_of_call(stage: str, lost: ActorCallFailed, attempts: int) -> Failure:
    """Return the failure record of a shot whose call was lost."""
    return Failure(stage=stage, error=lost.reason, message=str(lost), attempts=attempts, worker=lost.worker)


class WorkerPool:
    """Worker pool of one run. Create it inside the event loop."""

    def __init__(self, config: RunConfig, metrics: RunMetrics) -> None:
        self._attempts = config.attempts
        self._metrics = metrics
        specs = [worker for slot in config.layout.slots for worker in slot.workers]
        states = [WorkerState(spec, max_loras(config.profile)) for spec in specs]
        self._clients = {
            state: ActorClient(ray.get_actor(name), name) for state, name in zip(states, config.worker_names, strict=True)
        }
        self._scheduler = Scheduler(states, {stage.name: n for n, stage in enumerate(STAGES)})
        self._assigned: dict[Work, asyncio.Future[WorkerState]] = {}
        self._starting: set[WorkerState] = set()
        self._failed_workers: dict[WorkerState, Failure] = {}
        self._fatal_failure: Failure | None = None
        self._running: deque[Counter[str]] = deque(maxlen=BUSY_WINDOW)
        self._gpu_utilization: deque[float] = deque(maxlen=BUSY_WINDOW)
        self._background: set[asyncio.Task[None]] = set()
        for state in states:
            self._watch_start(state)

    async def call(self, requested: Work, timeout_s: float, method: str, *args: Any) -> tuple[CallResult, RemoteArtefacts]:
        """Run a call on a worker. Return its result and a reference to its output.

        Errors that another attempt may avoid are retried. If a process crashes with several calls in progress, each of them is
        retried alone, so that one line never costs another line an attempt.
        Raises ShotFailed and InputsLost.
        """
        failed_attempts, crash_suspected = 0, False
        while True:
            # Each attempt needs its own Work object.
            work = replace(requested, alone=crash_suspected)
            worker = await self._worker_for(work)
            client = self._clients[worker]
            final = False
            try:
                result, output = await client.call(method, *args, stage=work.stage, timeout_s=timeout_s, num_returns=2)
                if result.failure is None:
                    return result, RemoteArtefacts(output, worker)
                failure, final = result.failure, result.final
                if result.context_broken:
                    client.restart()
                    self._mark_down(worker)
            except ActorCallFailed as lost:
                self._mark_down(worker)
                crash_suspected |= lost.may_have_caused_crash
                if not lost.caused_crash:
                    continue
                failure = failure_of_call(work.stage, lost, failed_attempts)
            finally:
                self._scheduler.finished(worker, work)
                self._assign_waiting()
            failed_attempts += 1
            self._metrics.step_failed(failure.stage, failure.error)
            if final or failed_attempts + crash_suspected >= self._attempts:
                raise ShotFailed(failure.model_copy(update={"attempts": failed_attempts + crash_suspected}))
            self._metrics.retried(work.stage)

    async def _worker_for(self, work: Work) -> WorkerState:
        if self._fatal_failure is not None:
            raise ShotFailed(self._fatal_failure)
        future: asyncio.Future[WorkerState] = asyncio.get_running_loop().create_future()
        self._assigned[work] = future
        self._scheduler.add(work)
        self._assign_waiting()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._scheduler.finished(future.result(), work)
            self._scheduler.remove(work)
            raise
        finally:
            self._assigned.pop(work, None)

    def _assign_waiting(self) -> None:
        for worker, work in self._scheduler.assign():
            future = self._assigned.get(work)
            if future is None or future.done():
                self._scheduler.finished(worker, work)
            else:
                future.set_result(worker)

    # Crashes and restarts

    def _mark_down(self, worker: WorkerState) -> None:
        """Mark a worker as down until its process is back. Waiting work goes to other workers."""
        if worker.live:
            self._scheduler.crashed(worker)
            self._watch_start(worker)

    def _watch_start(self, worker: WorkerState) -> None:
        if worker in self._starting:
            return
        self._starting.add(worker)
        self._in_background(self._wait_until_ready(worker))

    async def _wait_until_ready(self, worker: WorkerState) -> None:
        failure = await self._clients[worker].ready()
        self._starting.discard(worker)
        if failure is None:
            self._scheduler.started(worker)
            self._assign_waiting()
            return
        self._failed_workers[worker] = failure
        # Missing weights are missing for all workers. A node whose processes crash may be the only one.
        stages = worker.spec.stages
        if failure.error != "WorkerDied" or any(self._no_worker_left_for(stage) for stage in stages):
            self._fatal_failure = failure
            for future in self._assigned.values():
                if not future.done():
                    future.set_exception(ShotFailed(failure))

    def _no_worker_left_for(self, stage: str) -> bool:
        return all(worker in self._failed_workers for worker in self._scheduler.holders(stage))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # Status

    def sample_status(self) -> tuple[dict[str, StageStatus], float | None]:
        """Return the status of each stage and the GPU utilization. Both are averages over calls at regular intervals."""
        running = {worker: client.running for worker, client in self._clients.items()}
        self._running.append(Counter(stage for stage in running.values() if stage))
        with_gpu = [worker for worker in self._clients if worker.spec.gpus]
        if with_gpu:
            busy = sum(worker.spec.gpus for worker in with_gpu if running[worker])
            self._gpu_utilization.append(busy / sum(worker.spec.gpus for worker in with_gpu))
        stages = dict.fromkeys(stage for worker in self._clients for stage in worker.spec.stages)
        gpus_busy = sum(self._gpu_utilization) / len(self._gpu_utilization) if self._gpu_utilization else None
        return {stage: self._status(stage) for stage in stages}, gpus_busy

    def _status(self, stage: str) -> StageStatus:
        workers = sum(worker.live and stage in worker.spec.stages for worker in self._clients)
        running = [sample[stage] for sample in self._running]
        busy = sum(running) / len(running) / workers if workers else 0.0
        return StageStatus(self._scheduler.queued(stage), running[-1], workers, min(1.0, busy))
