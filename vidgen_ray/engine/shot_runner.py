"""Run shots one by one through workers and encoders: a plan in, a record or failure out.

Checks the likeness of its result.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from itertools import count
from typing import Any, NamedTuple

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.engine.calls import (
    OUTPUT,
    CallResult,
    group_chunked_steps,
    group_steps,
    ordered_window,
)
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.retries import InputsLost, Kind, ShotFailed, drop_frames
from vidgen_ray.engine.scheduler import CHUNK_LOAD, COMMIT_LOAD, Work
from vidgen_ray.engine.status import Attempt, EngineObserver, Progress
from vidgen_ray.engine.worker_pool import ProgressCallback, RemoteArtefacts, WorkerPool
from vidgen_ray.graph import STAGE_BY_NAME, chunked_stages_of, clip_growth, clip_length, is_chunked
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.render.step_runner import (
    LIKENESS,
    LikenessTooLow,
    StepFailed,
    best_try,
    check_likeness,
    chunk_unit,
    clip_chunks,
    join_records,
)
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts

CHUNK_BYTES = 128 << 20
"""Largest result of a chunk in raw frames, if one call of the network does not make more: 4 frames of 4096x2304."""
MAX_CACHED_FACES = 32
"""Face features kept in Ray's object store, for later shots with the same photos."""
MAX_RESTARTS = 10
"""Restarts of a shot whose artefacts were lost with a process or node."""
LOCAL_LEAD = 2
"""Clips that an encoder on the clip's node may have open more than another encoder and still be preferred."""


Written = tuple[CallResult, ShotRecord | None]
"""Result of the call that commits a shot, and the record. `None` if it failed."""


class ProcessedChunk(NamedTuple):
    """Chunk of a clip after its chunked stages."""

    records: tuple[StepRecord, ...]
    artefacts: Any
    """Reference in Ray's object store."""
    is_last: bool


class EncoderSession(NamedTuple):
    """The calls that write one shot on one encoder. All raise ActorCallFailed."""

    encoder: ActorClient
    number: int
    timeout_s: float
    """Timeout of each call."""

    async def run(self, method: str, *args: Any) -> CallResult:
        result: CallResult = await self._call(method, *args)
        return self._checked(result)

    async def commit(self, method: str, *args: Any) -> Written:
        written: Written = await self._call(method, *args)
        self._checked(written[0])
        return written

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            return await self.encoder.call(method, self.number, *args, stage=OUTPUT, timeout_s=self.timeout_s)
        except ActorCallFailed as failed:
            # The storage may hang.
            failed.kind = Kind.WRITE if failed.error == "TimedOut" else failed.kind
            raise

    def _checked(self, result: CallResult) -> CallResult:
        if result.session_lost:
            raise ActorCallFailed("WorkerDied", "the encoder restarted", Kind.NOT_RUN, self.encoder.location)
        return result


class StepResults(NamedTuple):
    """Results of some steps of a shot."""

    records: tuple[StepRecord, ...]
    artefacts: RemoteArtefacts
    likeness: Artefacts

    def shared(self) -> StepResults:
        """Return the results for another shot that reuses them. Its records count as cached."""
        free = {"cached": True, "gpu_seconds": 0.0, "seconds": 0.0, "adapter_loads": 0, "price": None}
        return self._replace(records=tuple(record.model_copy(update=free) for record in self.records))


class ShotRunner:
    """Runs shots, any number at a time. Create it inside the event loop."""

    def __init__(
        self,
        config: EngineConfig,
        workers: WorkerPool,
        chunk_frames: Mapping[str, int],
        observer: EngineObserver,
    ) -> None:
        """`chunk_frames`: chunked stage -> frames per call."""
        self._config = config
        self._workers = workers
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
        rejected: list[LikenessTooLow] = []
        for attempt in (plan, *plan.again):
            try:
                return await self._run_attempt(attempt, order, on_progress)
            except LikenessTooLow as reason:
                error = type(reason).__name__
                self._observer.step_failed(LIKENESS, error)
                number = len(rejected) + 1
                self._observer.attempt_ended(
                    Attempt(
                        plan.shot.id or "", LIKENESS, number, "too low", time.time(), 0.0, 0.0, "", None, error, str(reason)
                    )
                )
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
                drop_frames(lost)
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
        load = self._workers.load_of(names[0])
        work = Work(names[0], order, adapters, load, near=artefacts.by, shot=plan.shot.id or "")
        timeout_s = self._config.timeout_s(plan.shot, *names)
        chunked = tuple(name for name in names if is_chunked(name))
        if chunked:
            args = plan, names, names[: -len(chunked)], chunked, artefacts.reference
            call = self._workers.call(work, timeout_s, "run_clip", *args, num_returns=3, on_progress=on_progress)
        else:
            call = self._workers.call(work, timeout_s, "run", plan, names, names, artefacts.reference, on_progress=on_progress)
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
        near_load = LOCAL_LEAD * COMMIT_LOAD
        work = Work(OUTPUT, order, load=COMMIT_LOAD, near=artefacts.by, near_load=near_load, shot=plan.shot.id or "")

        async def write(encoder: ActorClient, session: int) -> Written:
            call = EncoderSession(encoder, session, self._config.commit_timeout_s(plan.shot))
            if not chunked:
                return await call.commit("write", plan, artefacts.reference, records, artefacts.clip)
            committed = False
            try:
                written = await self._write_chunks(call, plan, order, artefacts, records, on_progress)
                committed = written[1] is not None
            finally:
                if not committed:
                    encoder.send("cancel", session)
            return written

        (_, written), _ = await self._workers.run(work, write)
        record: ShotRecord = written
        self._count(record.stages[len(records) :])
        if any(scale > 1 for scale, _ in clip_growth(plan.shot).values()):
            n_frames, _ = clip_length(plan.shot)
            self._observer.frames_upscaled(n_frames)
        return record

    async def _write_chunks(
        self,
        call: EncoderSession,
        plan: ShotPlan,
        order: int,
        artefacts: RemoteArtefacts,
        records: tuple[StepRecord, ...],
        on_progress: ProgressCallback | None,
    ) -> Written:
        """Write a clip whose chunks any free workers process meanwhile. Returns the first failure of the encoder."""
        chunks = self._cut(plan.shot)
        opened: asyncio.Future[CallResult] | None = None
        if len(chunks) > 1:
            # Chunks are processed while the image and the original clip are written.
            opened = asyncio.ensure_future(call.run("begin", plan, artefacts.reference))
        chunk_records = []
        try:
            async with aclosing(self._processed(plan, order, chunks, artefacts, on_progress)) as processed:
                async for chunk in processed:
                    chunk_records.append(chunk.records)
                    if opened is not None and (begun := await opened).failure is not None:
                        return begun, None
                    if not chunk.is_last:
                        added = await call.run("add", chunk.artefacts)
                        if added.failure is not None:
                            return added, None
                        continue
                    all_records = (*records, *join_records(chunk_records))
                    if opened is None:
                        return await call.commit("write", plan, artefacts.reference, all_records, chunk.artefacts)
                    return await call.commit("commit", all_records, chunk.artefacts)
        finally:
            if opened is not None:
                opened.cancel()
        raise AssertionError("no chunk is the last one")

    def _processed(
        self,
        plan: ShotPlan,
        order: int,
        chunks: Sequence[slice],
        artefacts: RemoteArtefacts,
        on_progress: ProgressCallback | None,
    ) -> AsyncGenerator[ProcessedChunk]:
        """Yield the chunks of a clip in order, after their chunked stages."""
        calls = group_chunked_steps(plan, self._workers.can_fuse)
        n_frames, _ = clip_length(plan.shot)
        frames_done = 0

        async def process(chunk: slice) -> ProcessedChunk:
            nonlocal frames_done
            cut: slice | None = chunk
            current = artefacts
            share = (chunk.stop - chunk.start) / n_frames
            records: tuple[StepRecord, ...] = ()
            for steps in calls:
                names = tuple(step.stage for step in steps)
                work = Work(names[0], order, load=CHUNK_LOAD, near=current.by, shot=plan.shot.id or "")
                timeout_s = self._config.timeout_s(plan.shot, *names)
                result, current = await self._workers.call(
                    work, timeout_s, "run_chunk", plan, names, names, cut, current.reference, share=share
                )
                records, cut = records + result.records, None
            frames_done += chunk.stop - chunk.start
            if on_progress is not None:
                on_progress(Progress(calls[-1][-1].stage, frames_done, n_frames))
            return ProcessedChunk(records, current.reference, is_last=chunk.stop >= n_frames)

        return ordered_window(chunks, process)
