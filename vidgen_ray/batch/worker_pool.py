"""The workers of a run as one: a call goes to the worker that is right for it, and is tried again where that may help.

Lives in the director's event loop. What is called, and with what, it does not know.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, NamedTuple

import ray

from vidgen_ray.batch.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.batch.metrics import RunMetrics
from vidgen_ray.batch.run_config import RunConfig
from vidgen_ray.batch.run_progress import StageStatus
from vidgen_ray.batch.scheduler import Scheduler, Work, WorkerState
from vidgen_ray.engine.retries import ShotFailed
from vidgen_ray.engine.step_groups import CallResult
from vidgen_ray.graph import STAGES
from vidgen_ray.outputs.records import Failure
from vidgen_ray.stages.flux_model import FluxParams

BUSY_WINDOW = 30
"""Looks over which the busy share is taken."""


class RemoteArtefacts(NamedTuple):
    """Something in Ray's memory."""

    reference: Any
    by: WorkerState | None
    """The worker that made it, on whose machine it is."""


def lost_for_good(stage: str, lost: ActorCallFailed, attempts: int) -> Failure:
    """The failure of a shot whose last call was lost."""
    return Failure(stage=stage, error=lost.reason, message=str(lost), attempts=attempts, worker=lost.worker)


class WorkerPool:
    """Make it inside of the event loop."""

    def __init__(self, job: RunConfig, metrics: RunMetrics) -> None:
        self._attempts = job.attempts
        self._metrics = metrics
        specs = [worker for slot in job.layout.slots for worker in slot.workers]
        states = [WorkerState(spec, _adapters_kept(job)) for spec in specs]
        self._hands = {
            state: ActorClient(ray.get_actor(name), name) for state, name in zip(states, job.worker_names, strict=True)
        }
        self._scheduler = Scheduler(states, {stage.name: n for n, stage in enumerate(STAGES)})
        self._assigned: dict[Work, asyncio.Future[WorkerState]] = {}
        self._reviving: set[WorkerState] = set()
        self._given_up: dict[WorkerState, Failure] = {}
        self._fatal_failure: Failure | None = None
        self._running: deque[Counter[str]] = deque(maxlen=BUSY_WINDOW)
        self._gpus_at_work: deque[float] = deque(maxlen=BUSY_WINDOW)
        self._background: set[asyncio.Task[None]] = set()
        for state in states:
            self._revive(state)

    async def call(self, wanted: Work, timeout_s: float, method: str, *args: Any) -> tuple[CallResult, RemoteArtefacts]:
        """The answer of a worker, and what it gave; tried again on errors that another attempt may not meet.

        Raises ShotFailed, InputsLost. A call whose process crashed with other calls in progress is retried alone, so that one
        line never costs another line an attempt.
        """
        blamed, suspected = 0, False
        while True:
            # Each attempt is a work of its own.
            work = replace(wanted, alone=suspected)
            worker = await self._worker_for(work)
            hand = self._hands[worker]
            final = False
            try:
                answer, given = await hand.call(method, *args, stage=work.stage, timeout_s=timeout_s, num_returns=2)
                if answer.failure is None:
                    return answer, RemoteArtefacts(given, worker)
                failure, final = answer.failure, answer.final
                if answer.context_broken:
                    hand.restart()
                    self._lost(worker)
            except ActorCallFailed as lost:
                self._lost(worker)
                suspected |= lost.may_have_caused_crash
                if not lost.caused_crash:
                    continue
                failure = lost_for_good(work.stage, lost, blamed)
            finally:
                self._scheduler.done(worker, work)
                self._pump()
            blamed += 1
            self._metrics.step_failed(failure.stage, failure.error)
            if final or blamed + suspected >= self._attempts:
                raise ShotFailed(failure.model_copy(update={"attempts": blamed + suspected}))
            self._metrics.retried(work.stage)

    async def _worker_for(self, work: Work) -> WorkerState:
        if self._fatal_failure is not None:
            raise ShotFailed(self._fatal_failure)
        future: asyncio.Future[WorkerState] = asyncio.get_running_loop().create_future()
        self._assigned[work] = future
        self._scheduler.add(work)
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._scheduler.done(future.result(), work)
            self._scheduler.remove(work)
            raise
        finally:
            self._assigned.pop(work, None)

    def _pump(self) -> None:
        for worker, work in self._scheduler.assign():
            future = self._assigned.get(work)
            if future is None or future.done():
                self._scheduler.done(worker, work)
            else:
                future.set_result(worker)

    # Processes that die and come back

    def _lost(self, worker: WorkerState) -> None:
        """The process is gone; what waits for it goes to others until it is back."""
        if worker.live:
            self._scheduler.died(worker)
            self._revive(worker)

    def _revive(self, worker: WorkerState) -> None:
        if worker in self._reviving:
            return
        self._reviving.add(worker)
        self._in_background(self._wait_for(worker))

    async def _wait_for(self, worker: WorkerState) -> None:
        failure = await self._hands[worker].ready()
        self._reviving.discard(worker)
        if failure is None:
            worker.live = True
            self._pump()
            return
        self._given_up[worker] = failure
        # Weights that are not there are not there for the others either; a machine that kills processes is one of many.
        stages = worker.spec.stages
        if failure.error != "WorkerDied" or any(self._nobody_left_for(stage) for stage in stages):
            self._fatal_failure = failure
            for future in self._assigned.values():
                if not future.done():
                    future.set_exception(ShotFailed(failure))

    def _nobody_left_for(self, stage: str) -> bool:
        return all(worker in self._given_up for worker in self._hands if stage in worker.spec.stages)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # How it goes

    def look(self) -> tuple[dict[str, StageStatus], float | None]:
        """How each stage stands and the GPUs' busy share; called at regular intervals, over which shares are taken."""
        running = {worker: hand.running for worker, hand in self._hands.items()}
        self._running.append(Counter(stage for stage in running.values() if stage))
        with_gpu = [worker for worker in self._hands if worker.spec.gpus]
        if with_gpu:
            at_work = sum(worker.spec.gpus for worker in with_gpu if running[worker])
            self._gpus_at_work.append(at_work / sum(worker.spec.gpus for worker in with_gpu))
        stages = dict.fromkeys(stage for worker in self._hands for stage in worker.spec.stages)
        gpus_busy = sum(self._gpus_at_work) / len(self._gpus_at_work) if self._gpus_at_work else None
        return {stage: self._status(stage) for stage in stages}, gpus_busy

    def _status(self, stage: str) -> StageStatus:
        workers = sum(worker.live and stage in worker.spec.stages for worker in self._hands)
        running = [seen[stage] for seen in self._running]
        busy = sum(running) / len(running) / workers if workers else 0.0
        return StageStatus(self._scheduler.queued(stage), running[-1], workers, min(1.0, busy))


def _adapters_kept(job: RunConfig) -> int:
    """LoRAs that a worker with FLUX keeps on its weights."""
    flux = job.profile.actors.get("flux")
    return int(flux.options.get("adapters_kept", FluxParams.model_fields["adapters_kept"].default)) if flux else 0
