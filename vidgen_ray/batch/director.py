"""The one operator that Ray Data streams the lines through. It leads every shot from worker to worker; no picture passes it.

A shot that fails is a result, not an exception, so no neighbour is lost. A shot may be rendered twice (an actor or a node
died), so every side effect is idempotent.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Coroutine, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from itertools import chain, count
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from vidgen_ray.batch.encoder_pool import Chunks, EncoderPool
from vidgen_ray.batch.metrics import RunMetrics
from vidgen_ray.batch.run_config import RunConfig
from vidgen_ray.batch.run_progress import Snapshot
from vidgen_ray.batch.run_state import RunStateHandle
from vidgen_ray.batch.scheduler import CHUNK_LOAD, Work
from vidgen_ray.batch.task_files import ShotTask, TaskResult, read_part
from vidgen_ray.batch.worker_pool import RemoteArtefacts, WorkerPool
from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.chunks import chunk_unit, clip_chunks, ordered_window
from vidgen_ray.engine.likeness_check import LIKENESS, LikenessTooLow, best_attempt, check_likeness
from vidgen_ray.engine.retries import InputsLost, ShotFailed
from vidgen_ray.engine.step_groups import OUTPUT, group_chunked_steps, group_steps
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.graph import STAGE_BY_NAME, chunked_stages_of
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord
from vidgen_ray.stages.base import Artefacts

CHUNK_BYTES = 128 << 20
"""Largest result of a chunk in raw frames, if one call of the network does not make more: 4 frames of 4096x2304."""
FACES_REMEMBERED = 32
"""Features of the last photos stay in Ray's memory, for the shots that come with the same ones."""
STARTS_OVER = 10
"""How often a shot begins again because a node went with its pictures."""
POST_S = 1.0


T = TypeVar("T")


class StepResults(NamedTuple):
    """What some steps of a shot came to."""

    records: tuple[StepRecord, ...]
    emitted: RemoteArtefacts
    likeness: Artefacts

    def shared(self) -> StepResults:
        """The same for a shot that has it from another one."""
        free = {"cached": True, "gpu_seconds": 0.0, "seconds": 0.0, "adapter_loads": 0}
        return self._replace(records=tuple(record.model_copy(update=free) for record in self.records))


class BatchDirector:
    """Takes parts of the script, and gives what became of each of their lines as soon as it is known.

    Ray runs a part again whose director died, and passes over as many results as it had. So those come first, in the order
    in which they were given before, which the board remembers.
    """

    def __init__(self, job: RunConfig, board: RunStateHandle) -> None:
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
            before = ray.get(self._board.emitted.remote(str(part)))
            if self._stopping and not before:
                continue
            lines = read_part(self._job.outputs, str(part))
            errands = [ShotTask.from_line(line) for line in lines]
            faces = Counter(step.key for errand in errands for step in errand.plan.steps if STAGE_BY_NAME[step.stage].shared)
            self._in_loop(self._expect(faces)).result()
            running = [self._in_loop(self._shot(errand)) for errand in errands]
            for number in chain(before, _as_they_end(running, besides=before)):
                outcome = running[number].result()
                # The run stops, and the line was not begun.
                if outcome is None and number not in before:
                    continue
                if number not in before:
                    ray.get(self._board.mark_emitted.remote(str(part), number))
                texts = {"part": str(part), "line": lines[number], "outcome": outcome.to_line() if outcome else ""}
                row: dict[str, NDArray[Any]] = {name: np.array([text], object) for name, text in texts.items()}
                yield row | {"number": np.array([number]), "of": np.array([len(lines)])}
            self._in_loop(self._expect_no_more(faces)).result()

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _begin(self) -> None:
        self._metrics = RunMetrics(self._job.profile.name)
        self._workers = WorkerPool(self._job, self._metrics)
        self._encoders = EncoderPool(self._job, self._metrics)
        self._shared: OrderedDict[str, asyncio.Task[StepResults]] = OrderedDict()
        self._faces: Counter[str] = Counter()
        self._window = asyncio.Semaphore(self._job.layout.window)
        self._orders = count()
        self._in_progress = 0
        self._posting = asyncio.ensure_future(self._post())

    async def _expect(self, faces: Counter[str]) -> None:
        """Note how many shots of a part want each face's features: key -> shots."""
        self._faces += faces

    async def _expect_no_more(self, faces: Counter[str]) -> None:
        """Forget those of a part that has ended: there may be as many photos as lines."""
        self._faces -= faces

    # A shot

    async def _shot(self, errand: ShotTask) -> TaskResult | None:
        async with self._window:
            if self._stopping:
                return None
            self._in_progress += 1
            try:
                outcome = TaskResult(await self._rendered(errand.plan))
            except ShotFailed as gave_up:
                outcome = TaskResult(gave_up.failure)
            # A mistake of ours costs the shot, not the run.
            except Exception as error:
                outcome = TaskResult(StepFailed("director", error).failure())
            finally:
                self._in_progress -= 1
        self._metrics.shot_ended("failed" if isinstance(outcome.result, Failure) else "done")
        return outcome

    async def _rendered(self, plan: ShotPlan) -> ShotRecord:
        if self._look_first:
            done = None
            # A storage that does not answer now has the shot rendered again, which is the same shot.
            with suppress(OSError):
                done = await asyncio.to_thread(self._job.outputs.find_finished, plan, self._job.keep_stages)
            if done is not None:
                return done.record()
        order = next(self._orders)
        unlike = []
        for attempt in (plan, *plan.again):
            try:
                return await self._tried(attempt, order)
            except LikenessTooLow as reason:
                self._metrics.step_failed(LIKENESS, type(reason).__name__)
                unlike.append(reason)
        failure = StepFailed(LIKENESS, best_attempt(unlike)).failure()
        raise ShotFailed(failure.model_copy(update={"attempts": len(unlike)}))

    async def _tried(self, plan: ShotPlan, order: int) -> ShotRecord:
        """One try, with one seed. Raises LikenessTooLow as soon as it is known to be."""
        for _ in range(STARTS_OVER):
            try:
                return await self._once_through(plan, order)
            except InputsLost as lost:
                self._metrics.retried(OUTPUT)
                reason = lost
                for step in plan.steps:
                    if step.key in self._shared and self._shared[step.key].done():
                        del self._shared[step.key]
        raise ShotFailed(StepFailed(OUTPUT, reason).failure().model_copy(update={"attempts": STARTS_OVER}))

    async def _once_through(self, plan: ShotPlan, order: int) -> ShotRecord:
        records: tuple[StepRecord, ...] = ()
        artefacts = RemoteArtefacts({}, None)
        for steps in group_steps(plan, self._job.layout.can_fuse, share_features=self._face_is_shared(plan)):
            done = await self._shared_steps(plan, order, steps, artefacts)
            records, artefacts = records + done.records, done.emitted
            check_likeness(plan.shot, done.likeness)
        return await self._written(plan, order, artefacts, records)

    def _face_is_shared(self, plan: ShotPlan) -> bool:
        """Whether others than this try of this shot want the features of its face."""
        face = plan.steps[0].key if plan.steps else ""
        return bool(plan.again) or self._faces[face] > 1 or face in self._shared

    async def _shared_steps(
        self, plan: ShotPlan, order: int, steps: tuple[Step, ...], artefacts: RemoteArtefacts
    ) -> StepResults:
        """These steps, or what they came to for the shot beside this one, where that has the same keys."""
        key = steps[-1].key
        task = self._shared.get(key)
        if task is not None:
            with suppress(ShotFailed):
                return (await asyncio.shield(task)).shared()
        task = self._shared[key] = asyncio.ensure_future(self._steps(plan, order, steps, artefacts))
        try:
            return await task
        finally:
            self._forget_shared(key, task, keep=STAGE_BY_NAME[steps[-1].stage].shared)

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

    async def _steps(self, plan: ShotPlan, order: int, steps: tuple[Step, ...], artefacts: RemoteArtefacts) -> StepResults:
        names = tuple(step.stage for step in steps)
        adapters = frozenset(lora.path for name in names for lora in STAGE_BY_NAME[name].active_loras(plan.shot))
        work = Work(names[0], order, adapters, near=artefacts.by)
        timeout_s = sum(self._timeout_s(name) for name in names)
        answer, emitted = await self._workers.call(work, timeout_s, "run", plan, names, artefacts.reference)
        for record in answer.records:
            self._metrics.step_ended(record.stage, record.seconds, record.cached)
            self._metrics.adapter_loads(record.adapter_loads)
        return StepResults(answer.records, emitted, answer.likeness)

    def _timeout_s(self, stage: str) -> float:
        return self._job.profile.actor_of(self._job.stages[stage]).timeout_s

    async def _written(
        self, plan: ShotPlan, order: int, artefacts: RemoteArtefacts, records: tuple[StepRecord, ...]
    ) -> ShotRecord:
        chunked = chunked_stages_of(plan.shot)
        written = await self._encoders.written(
            plan, artefacts.reference, records, (lambda: self._chunks(plan, order, artefacts)) if chunked else None
        )
        for record in written.stages[len(records) :]:
            self._metrics.frames_upscaled(plan.shot.num_frames)
            self._metrics.step_ended(record.stage, record.seconds, False)
        return written

    def _chunks(self, plan: ShotPlan, order: int, artefacts: RemoteArtefacts) -> Chunks:
        """Process the clip's chunks on any free workers. Yields records and results in order."""
        calls = group_chunked_steps(plan, self._job.layout.can_fuse)

        async def process(chunk: slice) -> tuple[tuple[StepRecord, ...], Any]:
            cut: slice | None = chunk
            current = artefacts
            records: tuple[StepRecord, ...] = ()
            for steps in calls:
                names = tuple(step.stage for step in steps)
                work = Work(names[0], order, load=CHUNK_LOAD, near=current.by)
                timeout_s = sum(map(self._timeout_s, names))
                answer, current = await self._workers.call(work, timeout_s, "run_chunk", plan, names, cut, current.reference)
                records, cut = records + answer.records, None
            return records, current.reference

        unit = chunk_unit(plan.shot, self._job.chunk_frames)
        return ordered_window(clip_chunks(plan.shot, unit, CHUNK_BYTES), process)

    # How it goes

    async def _post(self) -> None:
        """Tell the driver how the run stands, and hear whether it is to stop."""
        while True:
            snapshot = Snapshot(*self._workers.sample_status(), self._in_progress)
            self._metrics.snapshot(snapshot)
            with suppress(ray.exceptions.RayActorError):
                self._stopping |= await self._board.publish.remote(snapshot)
            await asyncio.sleep(POST_S)


def _as_they_end(running: Sequence[Future[Any]], besides: Collection[int]) -> Iterator[int]:
    """The numbers of those that run, as each ends, without some."""
    numbers = {future: number for number, future in enumerate(running) if number not in besides}
    return (numbers[ended] for ended in as_completed(numbers))
