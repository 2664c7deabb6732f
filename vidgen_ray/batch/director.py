"""The one operator that Ray Data streams the lines through. It leads every shot from worker to worker; no picture passes it.

A shot that fails is a result, not an exception, so no neighbour is lost. A shot may be rendered twice (an actor or a node
died), so every side effect is idempotent.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from itertools import count, groupby
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from vidgen_ray.batch.board import BoardHandle
from vidgen_ray.batch.hand import CallLost, Hand, InputsLost
from vidgen_ray.batch.job import Job
from vidgen_ray.batch.metrics import RunMetrics
from vidgen_ray.batch.scheduler import CHUNK_LOAD, Scheduler, Work, WorkerState
from vidgen_ray.batch.spool import Errand, Outcome, read_part
from vidgen_ray.batch.watcher import Snapshot, StageStatus
from vidgen_ray.batch.worker import Answer
from vidgen_ray.graph import STAGES, ShotPlan, Step
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord
from vidgen_ray.stages.flux_model import FluxParams
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.realesrgan import RealESRGANStage, frame_chunks
from vidgen_ray.steps import StepFailed

CHUNKS_AHEAD = 3
"""Of one clip beyond the encoder. Enlarged frames lie outside of Ray Data's accounting, so the bound is ours."""
FACES_REMEMBERED = 32
"""Features of the last photos stay in Ray's memory, for the shots that come with the same ones."""
STARTS_OVER = 10
"""How often a shot begins again because a node went with its pictures."""
ENCODE_TIMEOUT_S = 1800.0
POST_S = 1.0
BUSY_WINDOW = 30
"""Posts over which the busy share is taken."""
OUTPUT = "output"
"""Stage of what goes wrong while files are written."""


T = TypeVar("T")


class GaveUp(Exception):
    """A shot has failed for good."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure)


class Director:
    """Takes parts of the script, and gives what became of each of their lines, in the order of the lines.

    In order, since Ray runs a part again whose director died, and goes on after as many results as it had.
    """

    def __init__(self, job: Job, board: BoardHandle) -> None:
        self._job = job
        self._board = board
        self._stopping = False
        # Only a director before this one can have ended shots of its parts.
        self._look_first = ray.get_runtime_context().was_current_actor_reconstructed and not job.fresh
        # Shots are led by one thread. Ray Data gives what an async operator yields only when its whole part has ended.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._in_loop(self._begin()).result()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        for part in batch["part"]:
            lines = read_part(self._job.outputs, str(part))
            running = [self._in_loop(self._shot(Errand.from_line(line))) for line in lines]
            for number, (line, shot) in enumerate(zip(lines, running, strict=True)):
                outcome = shot.result()
                # None: the run stops, and the line was not begun; neither were those after it.
                if outcome is not None:
                    texts = {"part": str(part), "line": line, "outcome": outcome.to_line()}
                    row: dict[str, NDArray[Any]] = {name: np.array([text], object) for name, text in texts.items()}
                    yield row | {"number": np.array([number])}

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _begin(self) -> None:
        job = self._job
        specs = [worker for slot in job.layout.slots for worker in slot.workers]
        states = [WorkerState(spec, _adapters_kept(job)) for spec in specs]
        self._hands = {state: Hand(ray.get_actor(name), name) for state, name in zip(states, job.worker_names, strict=True)}
        self._encoders = [Hand(ray.get_actor(name), name) for name in job.encoder_names]
        self._clips_open: Counter[Hand] = Counter(dict.fromkeys(self._encoders, 0))
        self._scheduler = Scheduler(states, {stage.name: n for n, stage in enumerate(STAGES)})
        self._assigned: dict[Work, asyncio.Future[WorkerState]] = {}
        self._shared: OrderedDict[str, asyncio.Task[tuple[tuple[StepRecord, ...], Any]]] = OrderedDict()
        self._window = asyncio.Semaphore(job.layout.window)
        self._orders = count()
        self._in_progress = 0
        self._reviving: set[WorkerState] = set()
        self._given_up: dict[WorkerState, Failure] = {}
        self._hopeless: Failure | None = None
        self._metrics = RunMetrics(job.profile.name)
        self._heads: deque[Counter[str]] = deque(maxlen=BUSY_WINDOW)
        self._gpus_at_work: deque[float] = deque(maxlen=BUSY_WINDOW)
        self._background = {asyncio.ensure_future(self._post())}
        for state in states:
            self._revive(state)

    # A shot

    async def _shot(self, errand: Errand) -> Outcome | None:
        async with self._window:
            if self._stopping:
                return None
            self._in_progress += 1
            try:
                outcome = Outcome(await self._rendered(errand.plan))
            except GaveUp as gave_up:
                outcome = Outcome(gave_up.failure)
            # A mistake of ours costs the shot, not the run.
            except Exception as error:
                outcome = Outcome(StepFailed("director", error).failure())
            finally:
                self._in_progress -= 1
        self._metrics.shot_ended("failed" if isinstance(outcome.result, Failure) else "done")
        return outcome

    async def _rendered(self, plan: ShotPlan) -> ShotRecord:
        if self._look_first:
            done = await asyncio.to_thread(self._job.outputs.done, plan, self._job.keep_stages)
            if done is not None:
                return done.record()
        order = next(self._orders)
        for _ in range(STARTS_OVER):
            try:
                return await self._once_through(plan, order)
            except InputsLost as lost:
                self._metrics.retried(OUTPUT)
                reason = lost
                for step in plan.steps:
                    if step.key in self._shared and self._shared[step.key].done():
                        del self._shared[step.key]
        raise GaveUp(StepFailed(OUTPUT, reason).failure().model_copy(update={"attempts": STARTS_OVER}))

    async def _once_through(self, plan: ShotPlan, order: int) -> ShotRecord:
        records: tuple[StepRecord, ...] = ()
        artefacts: Any = {}
        for steps in self._calls_of(plan):
            fresh, artefacts = await self._shared_steps(plan, order, steps, artefacts)
            records += fresh
        return await self._written(plan, order, artefacts, records)

    def _calls_of(self, plan: ShotPlan) -> list[tuple[Step, ...]]:
        """The steps up to the clip, as calls: those of one actor together, in a fused layout all but the face's."""
        stages = self._job.stages
        fused = self._job.layout.kind == "fused"
        steps = (step for step in plan.steps if step.stage != RealESRGANStage.name)

        def actor(step: Step) -> str:
            return "" if fused and step.stage != InstantIDStage.name else stages[step.stage].actor

        return [tuple(together) for _, together in groupby(steps, key=actor)]

    async def _shared_steps(
        self, plan: ShotPlan, order: int, steps: tuple[Step, ...], artefacts: Any
    ) -> tuple[tuple[StepRecord, ...], Any]:
        """Records and artefacts of these steps, from the shot beside this one where that has the same keys."""
        key = steps[-1].key
        task = self._shared.get(key)
        if task is not None:
            with suppress(GaveUp):
                records, given = await asyncio.shield(task)
                return tuple(r.model_copy(update={"cached": True, "gpu_seconds": 0.0, "seconds": 0.0}) for r in records), given
        task = self._shared[key] = asyncio.ensure_future(self._steps(plan, order, steps, artefacts))
        try:
            return await task
        finally:
            self._forget_shared(key, task, keep=steps[-1].stage == InstantIDStage.name)

    def _forget_shared(self, key: str, task: asyncio.Task[Any], *, keep: bool) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed or not keep:
            if self._shared.get(key) is task:
                del self._shared[key]
            return
        self._shared.move_to_end(key)
        kept = [k for k, t in self._shared.items() if t.done()]
        for oldest in kept[: max(0, len(kept) - FACES_REMEMBERED)]:
            del self._shared[oldest]

    async def _steps(
        self, plan: ShotPlan, order: int, steps: tuple[Step, ...], artefacts: Any
    ) -> tuple[tuple[StepRecord, ...], Any]:
        names = tuple(step.stage for step in steps)
        adapters = frozenset(lora.path for lora in plan.shot.lora) if {"flux", "lora"} & set(names) else frozenset()
        work = Work(names[0], order, adapters)
        timeout_s = sum(self._timeout_s(name) for name in names)
        answer, given = await self._attempted(work, timeout_s, "run", plan, names, artefacts)
        for record in answer.records:
            self._metrics.step_ended(record.stage, record.seconds, record.cached)
            self._metrics.adapter_loads(record.adapter_loads)
        return answer.records, given

    def _timeout_s(self, stage: str) -> float:
        return self._job.profile.actor_of(self._job.stages[stage]).timeout_s

    # Files

    async def _written(self, plan: ShotPlan, order: int, artefacts: Any, records: tuple[StepRecord, ...]) -> ShotRecord:
        """Encode and commit, begun again where the encoder died."""
        blamed = 0
        while True:
            encoder = min(self._encoders, key=self._clips_open.__getitem__)
            self._clips_open[encoder] += 1
            try:
                return await self._encoded(encoder, plan, order, artefacts, records)
            except CallLost as lost:
                self._metrics.retried(OUTPUT)
                blamed += lost.blamed or lost.suspect
                if blamed >= self._job.attempts:
                    raise GaveUp(_failure(OUTPUT, lost, blamed)) from None
            finally:
                self._clips_open[encoder] -= 1

    async def _encoded(
        self, encoder: Hand, plan: ShotPlan, order: int, artefacts: Any, records: tuple[StepRecord, ...]
    ) -> ShotRecord:
        shot_id = plan.shot.id or ""
        try:
            await _accepted(encoder, "begin", plan, artefacts)
            upscaled = []
            if RealESRGANStage.applies(plan.shot):
                async for record, enlarged in self._chunks(plan, order, artefacts):
                    await _accepted(encoder, "add", shot_id, enlarged)
                    upscaled.append(record)
                self._metrics.frames_upscaled(plan.shot.num_frames)
                self._metrics.step_ended(RealESRGANStage.name, sum(record.seconds for record in upscaled), False)
            answer, reference = await encoder.call(
                "commit", shot_id, records, tuple(upscaled), stage=OUTPUT, timeout_s=ENCODE_TIMEOUT_S, num_returns=2
            )
            _check(answer)
            committed: ShotRecord = await reference
            return committed
        except BaseException:
            encoder.tell("abandon", shot_id)
            raise

    async def _chunks(self, plan: ShotPlan, order: int, artefacts: Any) -> AsyncIterator[tuple[StepRecord, Any]]:
        """The clip's chunks, enlarged by whoever is free, in order."""

        async def enlarged(cut: slice) -> tuple[StepRecord, Any]:
            work = Work(RealESRGANStage.name, order, load=CHUNK_LOAD)
            timeout_s = self._timeout_s(RealESRGANStage.name)
            answer, frames = await self._attempted(work, timeout_s, "upscale", plan, cut.start, cut.stop, artefacts)
            return answer.records[0], frames

        pending: deque[asyncio.Task[tuple[StepRecord, Any]]] = deque()
        try:
            for cut in frame_chunks(plan.shot.num_frames, self._job.frames_per_call):
                if len(pending) == CHUNKS_AHEAD:
                    yield await pending.popleft()
                pending.append(asyncio.ensure_future(enlarged(cut)))
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()

    # Calls to workers

    async def _attempted(self, wanted: Work, timeout_s: float, method: str, *args: Any) -> tuple[Answer, Any]:
        """The answer of a worker, tried again on errors that another attempt may not meet. Raises GaveUp, InputsLost.

        A work whose process died with others in hand is tried alone, so that no line pays for its neighbour.
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
                    return answer, given
                failure, final = answer.failure, answer.final
                if answer.wedged:
                    hand.restart()
                    self._lost(worker)
            except CallLost as lost:
                self._lost(worker)
                suspected |= lost.suspect
                if not lost.blamed:
                    continue
                failure = _failure(work.stage, lost, blamed)
            finally:
                self._scheduler.done(worker, work)
                self._pump()
            blamed += 1
            self._metrics.step_failed(failure.stage, failure.error)
            if final or blamed + suspected >= self._job.attempts:
                raise GaveUp(failure.model_copy(update={"attempts": blamed + suspected}))
            self._metrics.retried(work.stage)

    async def _worker_for(self, work: Work) -> WorkerState:
        if self._hopeless is not None:
            raise GaveUp(self._hopeless)
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
            self._hopeless = failure
            for future in self._assigned.values():
                if not future.done():
                    future.set_exception(GaveUp(failure))

    def _nobody_left_for(self, stage: str) -> bool:
        return all(worker in self._given_up for worker in self._hands if stage in worker.spec.stages)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # How it goes

    async def _post(self) -> None:
        """Tell the driver how the run stands, and hear whether it is to stop."""
        while True:
            snapshot = self._snapshot()
            self._metrics.snapshot(snapshot)
            with suppress(ray.exceptions.RayActorError):
                self._stopping |= await self._board.post.remote(snapshot)
            await asyncio.sleep(POST_S)

    def _snapshot(self) -> Snapshot:
        heads = {worker: hand.running for worker, hand in self._hands.items()}
        self._heads.append(Counter(stage for stage in heads.values() if stage))
        with_gpu = [worker for worker in self._hands if worker.spec.gpus]
        if with_gpu:
            at_work = sum(worker.spec.gpus for worker in with_gpu if heads[worker])
            self._gpus_at_work.append(at_work / sum(worker.spec.gpus for worker in with_gpu))
        stages = {}
        for stage in dict.fromkeys(stage for worker in self._hands for stage in worker.spec.stages):
            workers = sum(worker.live and stage in worker.spec.stages for worker in self._hands)
            running = [seen[stage] for seen in self._heads]
            busy = sum(running) / len(running) / workers if workers else 0.0
            stages[stage] = StageStatus(self._scheduler.queued(stage), running[-1], workers, min(1.0, busy))
        gpus_busy = sum(self._gpus_at_work) / len(self._gpus_at_work) if self._gpus_at_work else None
        return Snapshot(stages, gpus_busy, self._in_progress)


async def _accepted(encoder: Hand, method: str, *args: Any) -> None:
    _check(await encoder.call(method, *args, stage=OUTPUT, timeout_s=ENCODE_TIMEOUT_S))


def _check(answer: Answer) -> None:
    if answer.forgotten:
        raise CallLost("WorkerDied", "the encoder was started again", worker="encoder")
    if answer.failure is not None:
        raise GaveUp(answer.failure)


def _failure(stage: str, lost: CallLost, attempts: int) -> Failure:
    return Failure(stage=stage, error=lost.reason, message=str(lost), attempts=attempts, worker=lost.worker)


def _adapters_kept(job: Job) -> int:
    """LoRAs that a worker with FLUX keeps on its weights."""
    flux = job.profile.actors.get("flux")
    return int(flux.options.get("adapters_kept", FluxParams.model_fields["adapters_kept"].default)) if flux else 0
