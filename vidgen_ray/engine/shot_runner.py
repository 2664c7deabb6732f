"""Run one shot after another through workers and encoders, with one plan in and one record or failure out.

Checks the likeness of its result.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.calls import OUTPUT, chunk_unit, clip_chunks, group_chunked_steps, group_steps, ordered_window
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.encoder_pool import ClipChunks, EncoderPool, ProcessedChunk
from vidgen_ray.engine.retries import InputsLost, Kind, ShotFailed
from vidgen_ray.engine.scheduler import CHUNK_LOAD, Work
from vidgen_ray.engine.status import EngineObserver, Progress
from vidgen_ray.engine.step_runner import LIKENESS, LikenessTooLow, StepFailed, best_try, check_likeness
from vidgen_ray.engine.worker_pool import ProgressCallback, RemoteArtefacts, WorkerPool
from vidgen_ray.graph import STAGE_BY_NAME, chunked_stages_of, clip_growth, clip_length, is_chunked
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts

CHUNK_BYTES = 128 << 20
"""Largest result of a chunk in raw frames, if one call of the network does not make more: 4 frames of 4096x2304."""
MAX_CACHED_FACES = 32
"""Face features kept in Ray's object store, for later shots with the same photos."""
MAX_RESTARTS = 10
"""Restarts of a shot whose artefacts were lost with a process or node."""


class StepResults(NamedTuple):
    """Results of some steps of a shot."""

    records: tuple[StepRecord, ...]
    artefacts: RemoteArtefacts
    likeness: Artefacts

    def shared(self) -> StepResults:
        """Return the results for another shot that reuses them. Its records count as cached."""
        free = {"cached": True, "gpu_seconds": 0.0, "seconds": 0.0, "adapter_loads": 0}
        return self._replace(records=tuple(record.model_copy(update=free) for record in self.records))


class ShotRunner:
    """Runs shots, any number at a time. Create it inside the event loop."""

    def __init__(
        self,
        config: EngineConfig,
        workers: WorkerPool,
        encoders: EncoderPool,
        chunk_frames: Mapping[str, int],
        observer: EngineObserver,
    ) -> None:
        """`chunk_frames`: chunked stage -> frames per call."""
        self._config = config
        self._workers = workers
        self._encoders = encoders
        self._chunk_frames = chunk_frames
        self._observer = observer
        self._shared: OrderedDict[str, asyncio.Task[StepResults]] = OrderedDict()
        """Key of the last of some steps -> their results, running or kept for later shots."""
        self._announced: Counter[str] = Counter()
        """Key of a shared step, such as the features of a face -> announced shots that need it."""
        self._orders = count()

    def announce(self, plan: ShotPlan) -> None:
        """Tell that this shot will run, so that results which it shares with other shots are computed once."""
        self._announced.update(step.key for step in plan.steps if STAGE_BY_NAME[step.stage].shared)

    def retire(self, plan: ShotPlan) -> None:
        """Take back an announcement: the shot has ended."""
        for step in plan.steps:
            if STAGE_BY_NAME[step.stage].shared:
                self._announced[step.key] -= 1
                if self._announced[step.key] <= 0:
                    del self._announced[step.key]

    async def run(self, plan: ShotPlan, on_progress: ProgressCallback | None = None) -> ShotRecord:
        """Render a shot and commit its files. Raises ShotFailed.

        If the likeness is too low, the further tries of the plan follow, with other seeds.
        """
        order = next(self._orders)
        rejected = []
        for attempt in (plan, *plan.again):
            try:
                return await self._run_attempt(attempt, order, on_progress)
            except LikenessTooLow as reason:
                self._observer.step_failed(LIKENESS, type(reason).__name__)
                rejected.append(reason)
        failure = StepFailed(LIKENESS, best_try(rejected)).failure()
        raise ShotFailed(failure.model_copy(update={"attempts": len(rejected)}), Kind.INPUT)

    async def _run_attempt(self, plan: ShotPlan, order: int, on_progress: ProgressCallback | None) -> ShotRecord:
        """Render with one seed. Raises LikenessTooLow as soon as the likeness is known to be too low."""
        for _ in range(MAX_RESTARTS):
            try:
                return await self._run_steps(plan, order, on_progress)
            except InputsLost as lost:
                self._observer.retried(OUTPUT)
                reason = lost
                for step in plan.steps:
                    if step.key in self._shared and self._shared[step.key].done():
                        del self._shared[step.key]
        raise ShotFailed(StepFailed(OUTPUT, reason).failure().model_copy(update={"attempts": MAX_RESTARTS}))

    async def _run_steps(self, plan: ShotPlan, order: int, on_progress: ProgressCallback | None) -> ShotRecord:
        records: tuple[StepRecord, ...] = ()
        artefacts = RemoteArtefacts({}, None)
        calls = group_steps(plan, self._workers.can_fuse, share_features=self._shares_features(plan))
        if calls:
            calls[-1] += self._clip_steps(plan, calls[-1])
        for steps in calls:
            done = await self._shared_steps(plan, order, steps, artefacts, on_progress)
            records, artefacts = records + done.records, done.artefacts
            check_likeness(plan.shot, done.likeness)
        return await self._write(plan, order, artefacts, records, on_progress)

    def _clip_steps(self, plan: ShotPlan, last: tuple[Step, ...]) -> tuple[Step, ...]:
        """Return the chunked steps that run in the call of the `last` other steps: all of them, or none.

        They do so if the clip is a single chunk, which no other worker can share, and if no worker would have less to do.
        """
        calls = group_chunked_steps(plan, self._workers.can_fuse)
        # A clip whose likeness is too low is not processed.
        if len(calls) != 1 or plan.shot.min_identity is not None or len(self._cut(plan.shot)) > 1:
            return ()
        names = (step.stage for step in (*last, *calls[0]))
        return calls[0] if self._workers.only_together(*names) else ()

    def _cut(self, shot: Shot) -> list[slice]:
        """Return the chunks of a clip with chunked stages."""
        return clip_chunks(shot, chunk_unit(shot, self._chunk_frames), CHUNK_BYTES)

    def _shares_features(self, plan: ShotPlan) -> bool:
        """Return whether other shots, or later tries of this shot, need the features of its face."""
        keys = [step.key for step in plan.steps if STAGE_BY_NAME[step.stage].shared]
        return bool(plan.again) or any(self._announced[key] > 1 or key in self._shared for key in keys)

    async def _shared_steps(
        self,
        plan: ShotPlan,
        order: int,
        steps: tuple[Step, ...],
        artefacts: RemoteArtefacts,
        on_progress: ProgressCallback | None,
    ) -> StepResults:
        """Run these steps, or reuse the results of another shot that is running the same steps."""
        key = steps[-1].key
        # If the other shot fails or is cancelled, another one may have started since.
        while (task := self._shared.get(key)) is not None:
            try:
                return (await asyncio.shield(task)).shared()
            except (ShotFailed, InputsLost):
                if self._shared.get(key) is task:
                    del self._shared[key]
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if not task.cancelled() or (current is not None and current.cancelling()):
                    raise
                if self._shared.get(key) is task:
                    del self._shared[key]
        task = self._shared[key] = asyncio.ensure_future(self._run_call(plan, order, steps, artefacts, on_progress))
        try:
            return await task
        finally:
            self._forget_shared(key, task, keep=STAGE_BY_NAME[steps[-1].stage].shared)

    def _forget_shared(self, key: str, task: asyncio.Task[Any], *, keep: bool) -> None:
        failed = not task.done() or task.cancelled() or task.exception() is not None
        if failed or not keep:
            if self._shared.get(key) is task:
                del self._shared[key]
            return
        self._shared.move_to_end(key)
        kept = [k for k, t in self._shared.items() if t.done()]
        for oldest in kept[: max(0, len(kept) - MAX_CACHED_FACES)]:
            del self._shared[oldest]

    async def _run_call(
        self,
        plan: ShotPlan,
        order: int,
        steps: tuple[Step, ...],
        artefacts: RemoteArtefacts,
        on_progress: ProgressCallback | None,
    ) -> StepResults:
        names = tuple(step.stage for step in steps)
        adapters = frozenset(lora.path for name in names for lora in STAGE_BY_NAME[name].active_loras(plan.shot))
        work = Work(names[0], order, adapters, near=artefacts.by)
        timeout_s = self._config.timeout_s(plan.shot, *names)
        chunked = tuple(name for name in names if is_chunked(name))
        if chunked:
            others = names[: -len(chunked)]
            call = self._workers.call(
                work, timeout_s, "run_clip", plan, others, chunked, artefacts.reference, num_returns=3, on_progress=on_progress
            )
        else:
            call = self._workers.call(work, timeout_s, "run", plan, names, artefacts.reference, on_progress=on_progress)
        result, output = await call
        self._count(result.records)
        return StepResults(result.records, output, result.likeness)

    def _count(self, records: tuple[StepRecord, ...]) -> None:
        for record in records:
            self._observer.step_ended(record.stage, record.seconds, record.cached)
            self._observer.adapter_loads(record.adapter_loads)

    async def _write(
        self,
        plan: ShotPlan,
        order: int,
        artefacts: RemoteArtefacts,
        records: tuple[StepRecord, ...],
        on_progress: ProgressCallback | None,
    ) -> ShotRecord:
        chunked = chunked_stages_of(plan.shot) if artefacts.clip is None else ()
        if on_progress is not None:
            on_progress(Progress(chunked[-1].name if chunked else OUTPUT, 0, 0))
        node = artefacts.by.node if artefacts.by else None
        chunks = None
        if chunked:
            chunks = self._chunks(plan, order, artefacts, on_progress)
        elif artefacts.clip is not None:
            chunks = ClipChunks(1, partial(_only_chunk, artefacts.clip))
        written = await self._encoders.write(plan, artefacts.reference, records, chunks, node)
        self._count(written.stages[len(records) :])
        if any(scale > 1 for scale, _ in clip_growth(plan.shot).values()):
            n_frames, _ = clip_length(plan.shot)
            self._observer.frames_upscaled(n_frames)
        return written

    def _chunks(
        self, plan: ShotPlan, order: int, artefacts: RemoteArtefacts, on_progress: ProgressCallback | None
    ) -> ClipChunks:
        """Return the clip's chunks, which any free workers process."""
        calls = group_chunked_steps(plan, self._workers.can_fuse)
        last_stage = calls[-1][-1].stage
        n_frames, _ = clip_length(plan.shot)
        chunks = self._cut(plan.shot)

        def start() -> AsyncGenerator[ProcessedChunk]:
            frames_done = 0

            async def process(chunk: slice) -> ProcessedChunk:
                nonlocal frames_done
                cut: slice | None = chunk
                current = artefacts
                records: tuple[StepRecord, ...] = ()
                for steps in calls:
                    names = tuple(step.stage for step in steps)
                    work = Work(names[0], order, load=CHUNK_LOAD, near=current.by)
                    timeout_s = self._config.timeout_s(plan.shot, *names)
                    result, current = await self._workers.call(
                        work, timeout_s, "run_chunk", plan, names, cut, current.reference
                    )
                    records, cut = records + result.records, None
                frames_done += chunk.stop - chunk.start
                if on_progress is not None:
                    on_progress(Progress(last_stage, frames_done, n_frames))
                return ProcessedChunk(records, current.reference, is_last=chunk.stop >= n_frames)

            return ordered_window(chunks, process)

        return ClipChunks(len(chunks), start)


async def _only_chunk(clip: Any) -> AsyncGenerator[ProcessedChunk]:
    """Yield the only chunk of a clip that is processed already. Its records are among those of the other steps."""
    yield ProcessedChunk((), clip, is_last=True)
