"""Director of a run: the operator of Ray Data that sends every shot from worker to worker. Images never pass through it.

A failed shot is a result, not an exception, so that other shots are not lost. A shot may be rendered twice after a crash, so
all side effects are idempotent.
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

from vidgen_ray.engine.encoder_pool import Chunks, EncoderPool
from vidgen_ray.engine.run_metrics import RunMetrics
from vidgen_ray.engine.engine_config import RunConfig
from vidgen_ray.batch.run_progress import Snapshot
from vidgen_ray.batch.run_state import RunStateHandle
from vidgen_ray.engine.scheduler import CHUNK_LOAD, Work
from vidgen_ray.batch.task_files import ShotTask, TaskResult, read_part
from vidgen_ray.engine.worker_pool import RemoteArtefacts, WorkerPool
from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.chunks import chunk_unit, clip_chunks, ordered_window
from vidgen_ray.engine.likeness_check import LIKENESS, LikenessTooLow, best_attempt, check_likeness
from vidgen_ray.engine.retries import InputsLost, ShotFailed
from vidgen_ray.engine.step_groups import OUTPUT, group_chunked_steps, group_steps
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.graph import STAGE_BY_NAME, chunked_stages_of, clip_growth
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord
from vidgen_ray.stages.base import Artefacts

CHUNK_BYTES = 128 << 20
"""Largest result of a chunk in raw frames, if one call of the network does not make more: 4 frames of 4096x2304."""
MAX_CACHED_FACES = 32
"""Face features kept in Ray's object store, for later shots with the same photos."""
MAX_RESTARTS = 10
"""Restarts of a shot whose artefacts were lost with a node."""
STATUS_INTERVAL_S = 1.0
"""Seconds between two status reports to the driver."""


T = TypeVar("T")


class StepResults(NamedTuple):
    """Results of some steps of a shot."""

    records: tuple[StepRecord, ...]
    artefacts: RemoteArtefacts
    likeness: Artefacts

    def shared(self) -> StepResults:
        """Return the results for another shot that reuses them. Its records count as cached."""
        free = {"cached": True, "gpu_seconds": 0.0, "seconds": 0.0, "adapter_loads": 0}
        return self._replace(records=tuple(record.model_copy(update=free) for record in self.records))


class BatchDirector:
    """Renders parts of the script and emits the result of each line as soon as it is known.

    After a director crash, Ray runs its parts again and skips as many results as it had received. So a restarted director emits
    those lines first, in their earlier order, which the run state records.
    """

    def __init__(self, config: RunConfig, run_state: RunStateHandle) -> None:
        self._config = config
        self._run_state = run_state
        self._stopping = False
        # Only an earlier director can have finished shots of its parts.
        self._look_up_finished = ray.get_runtime_context().was_current_actor_reconstructed and not config.fresh
        # An event loop of its own: Ray Data returns the results of an async operator only when the whole part is finished.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._in_loop(self._start()).result()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        for part in batch["part"]:
            before = ray.get(self._run_state.emitted.remote(str(part)))
            if self._stopping and not before:
                continue
            lines = read_part(self._config.outputs, str(part))
            tasks = [ShotTask.from_line(line) for line in lines]
            faces = Counter(step.key for task in tasks for step in task.plan.steps if STAGE_BY_NAME[step.stage].shared)
            self._in_loop(self._add_faces(faces)).result()
            running = [self._in_loop(self._run_task(task)) for task in tasks]
            for number in chain(before, _in_order_of_completion(running, exclude=before)):
                result = running[number].result()
                # The run was stopped before this line started.
                if result is None and number not in before:
                    continue
                if number not in before:
                    ray.get(self._run_state.mark_emitted.remote(str(part), number))
                texts = {"part": str(part), "line": lines[number], "result": result.to_line() if result else ""}
                row: dict[str, NDArray[Any]] = {name: np.array([text], object) for name, text in texts.items()}
                yield row | {"number": np.array([number]), "line_count": np.array([len(lines)])}
            self._in_loop(self._remove_faces(faces)).result()

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self) -> None:
        self._metrics = RunMetrics(self._config.profile.name)
        self._workers = WorkerPool(self._config, self._metrics)
        self._encoders = EncoderPool(self._config, self._metrics)
        self._shared: OrderedDict[str, asyncio.Task[StepResults]] = OrderedDict()
        self._faces: Counter[str] = Counter()
        self._window = asyncio.Semaphore(self._config.layout.window)
        self._orders = count()
        self._in_progress = 0
        self._status_reporter = asyncio.ensure_future(self._report_status())

    async def _add_faces(self, faces: Counter[str]) -> None:
        """Add the number of shots of a part per face: content key -> shots."""
        self._faces += faces

    async def _remove_faces(self, faces: Counter[str]) -> None:
        """Subtract the shots of a finished part. There may be as many photos as lines."""
        self._faces -= faces

    # Shots

    async def _run_task(self, task: ShotTask) -> TaskResult | None:
        async with self._window:
            if self._stopping:
                return None
            self._in_progress += 1
            try:
                result = TaskResult(await self._render(task.plan))
            except ShotFailed as failed:
                result = TaskResult(failed.failure)
            # A bug in vidgen fails the shot, not the run.
            except Exception as error:
                result = TaskResult(StepFailed("director", error).failure())
            finally:
                self._in_progress -= 1
        self._metrics.shot_ended("failed" if isinstance(result.result, Failure) else "done")
        return result

    async def _render(self, plan: ShotPlan) -> ShotRecord:
        if self._look_up_finished:
            done = None
            # If the storage fails, render the shot again. The result is the same.
            with suppress(OSError):
                done = await asyncio.to_thread(self._config.outputs.find_finished, plan, self._config.keep_stages)
            if done is not None:
                return done.record()
        order = next(self._orders)
        rejected = []
        for attempt in (plan, *plan.again):
            try:
                return await self._attempt(attempt, order)
            except LikenessTooLow as reason:
                self._metrics.step_failed(LIKENESS, type(reason).__name__)
                rejected.append(reason)
        failure = StepFailed(LIKENESS, best_attempt(rejected)).failure()
        raise ShotFailed(failure.model_copy(update={"attempts": len(rejected)}))

    async def _attempt(self, plan: ShotPlan, order: int) -> ShotRecord:
        """Render with one seed. Raises LikenessTooLow as soon as the likeness is known to be too low."""
        for _ in range(MAX_RESTARTS):
            try:
                return await self._run_steps(plan, order)
            except InputsLost as lost:
                self._metrics.retried(OUTPUT)
                reason = lost
                for step in plan.steps:
                    if step.key in self._shared and self._shared[step.key].done():
                        del self._shared[step.key]
        raise ShotFailed(StepFailed(OUTPUT, reason).failure().model_copy(update={"attempts": MAX_RESTARTS}))

    async def _run_steps(self, plan: ShotPlan, order: int) -> ShotRecord:
        records: tuple[StepRecord, ...] = ()
        artefacts = RemoteArtefacts({}, None)
        for steps in group_steps(plan, self._config.layout.can_fuse, share_features=self._face_is_shared(plan)):
            done = await self._shared_steps(plan, order, steps, artefacts)
            records, artefacts = records + done.records, done.artefacts
            check_likeness(plan.shot, done.likeness)
        return await self._write(plan, order, artefacts, records)

    def _face_is_shared(self, plan: ShotPlan) -> bool:
        """Return whether other shots, or later attempts of this shot, need the features of its face."""
        keys = [step.key for step in plan.steps if STAGE_BY_NAME[step.stage].shared]
        return bool(plan.again) or any(self._faces[key] > 1 or key in self._shared for key in keys)

    async def _shared_steps(
        self, plan: ShotPlan, order: int, steps: tuple[Step, ...], artefacts: RemoteArtefacts
    ) -> StepResults:
        """Run these steps, or reuse the results of another shot that is running the same steps."""
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
        for oldest in kept[: max(0, len(kept) - MAX_CACHED_FACES)]:
            del self._shared[oldest]

    async def _steps(self, plan: ShotPlan, order: int, steps: tuple[Step, ...], artefacts: RemoteArtefacts) -> StepResults:
        names = tuple(step.stage for step in steps)
        adapters = frozenset(lora.path for name in names for lora in STAGE_BY_NAME[name].active_loras(plan.shot))
        work = Work(names[0], order, adapters, near=artefacts.by)
        timeout_s = sum(self._timeout_s(name) for name in names)
        result, output = await self._workers.call(work, timeout_s, "run", plan, names, artefacts.reference)
        for record in result.records:
            self._metrics.step_ended(record.stage, record.seconds, record.cached)
            self._metrics.adapter_loads(record.adapter_loads)
        return StepResults(result.records, output, result.likeness)

    def _timeout_s(self, stage: str) -> float:
        return self._config.profile.actor_of(self._config.stages[stage]).timeout_s

    async def _write(
        self, plan: ShotPlan, order: int, artefacts: RemoteArtefacts, records: tuple[StepRecord, ...]
    ) -> ShotRecord:
        chunked = chunked_stages_of(plan.shot)
        written = await self._encoders.write(
            plan, artefacts.reference, records, (lambda: self._chunks(plan, order, artefacts)) if chunked else None
        )
        for record in written.stages[len(records) :]:
            self._metrics.step_ended(record.stage, record.seconds, False)
        scale, frame_factor = clip_growth(plan.shot).get("hd_frames", (1, 1))
        if scale > 1:
            self._metrics.frames_upscaled(plan.shot.num_frames * frame_factor)
        return written

    def _chunks(self, plan: ShotPlan, order: int, artefacts: RemoteArtefacts) -> Chunks:
        """Process the clip's chunks on any free workers. Yields records and results in order."""
        calls = group_chunked_steps(plan, self._config.layout.can_fuse)

        async def process(chunk: slice) -> tuple[tuple[StepRecord, ...], Any]:
            cut: slice | None = chunk
            current = artefacts
            records: tuple[StepRecord, ...] = ()
            for steps in calls:
                names = tuple(step.stage for step in steps)
                work = Work(names[0], order, load=CHUNK_LOAD, near=current.by)
                timeout_s = sum(map(self._timeout_s, names))
                result, current = await self._workers.call(work, timeout_s, "run_chunk", plan, names, cut, current.reference)
                records, cut = records + result.records, None
            return records, current.reference

        unit = chunk_unit(plan.shot, self._config.chunk_frames)
        return ordered_window(clip_chunks(plan.shot, unit, CHUNK_BYTES), process)

    # Status

    async def _report_status(self) -> None:
        """Publish the status at regular intervals, and read the stop flag."""
        while True:
            snapshot = Snapshot(*self._workers.sample_status(), self._in_progress)
            self._metrics.snapshot(snapshot)
            with suppress(ray.exceptions.RayActorError):
                self._stopping |= await self._run_state.publish.remote(snapshot)
            await asyncio.sleep(STATUS_INTERVAL_S)


def _in_order_of_completion(running: Sequence[Future[Any]], exclude: Collection[int]) -> Iterator[int]:
    """Yield the index of each future as it completes, except for the excluded ones."""
    numbers = {future: number for number, future in enumerate(running) if number not in exclude}
    return (numbers[future] for future in as_completed(numbers))
