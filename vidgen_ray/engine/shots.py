"""Render shots one by one with the calls of their routes: a plan in, a record or a failure out.

A shot waits in one place only, `Shell.call`: for a process, and for its result.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from itertools import count
from typing import Any

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.callbacks import GuardedObserver, guarded
from vidgen_ray.engine.calls import CallResult, ShotFailed
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.messages import OUTPUT, Call, Kind
from vidgen_ray.engine.route import COMMIT_LOAD, Route, RouteCall, Routes
from vidgen_ray.engine.shell import EncoderSession, Made, OnProgress, Shell, WorkerCall
from vidgen_ray.engine.status import Attempt, EngineObserver, Progress
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.graph import chunked_stages_of, clip_growth, clip_length
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.planner.layout import Layout
from vidgen_ray.render.step_runner import LIKENESS, LikenessTooLow, StepFailed, best_try, check_likeness, join_records
from vidgen_ray.shot import PRIORITIES, PRIORITY_STEP

MAX_KEPT_RESULTS = 32
"""Results, such as the features of a face, that are kept in Ray's object store for later shots with the same inputs."""
MAX_RESTARTS = 10
"""Restarts of a shot whose artefacts were lost with a process or node."""
LOCAL_LEAD = 2
"""Clips that an encoder on the clip's node may have open more than another encoder and still be preferred."""
MAX_CHUNKS_AHEAD = 3
"""Processed chunks of one clip that may wait for the encoder. They are raw frames in Ray's object store."""
FREE = {"cached": True, "gpu_seconds": 0.0, "seconds": 0.0, "adapter_loads": 0, "price": None}
"""Changes of a record whose step was computed for another shot."""


class Shots:
    """Renders shots, any number at a time. Create it inside the event loop."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        shell: Shell,
        chunk_frames: Mapping[str, int],
        observer: EngineObserver,
        storage: StoragePause,
    ) -> None:
        """`chunk_frames`: chunked stage -> frames per call of its network."""
        self._routes = Routes(config, layout, chunk_frames)
        self._shell = shell
        self._observer = GuardedObserver(observer)
        self._storage = storage
        self._kept: OrderedDict[tuple[str, ...], Made] = OrderedDict()
        """Keys of a call -> its result, the last used one last."""
        self._orders = count()

    async def render(self, plan: ShotPlan, on_progress: OnProgress | None = None) -> ShotRecord:
        """Render a shot and commit its files. Raises ShotFailed.

        If the likeness is too low, the further tries of the plan follow, with other seeds.
        """
        on_progress = None if on_progress is None else guarded(on_progress)
        # No two shots have the same order.
        order = next(self._orders) + (PRIORITY_STEP + 0.5 if plan.shot.priority == PRIORITIES[0] else 0)
        rejected: list[LikenessTooLow] = []
        for each in (plan, *plan.again):
            try:
                return await self._with_restarts(each, order, on_progress)
            except LikenessTooLow as reason:
                error = type(reason).__name__
                self._observer.step_failed(LIKENESS, error)
                rejected.append(reason)
                times = time.time(), 0.0, 0.0
                self._observer.attempt_ended(
                    Attempt(plan.shot.id or "", LIKENESS, len(rejected), "too low", *times, "", None, error, str(reason))
                )
        failure = StepFailed(LIKENESS, best_try(rejected)).failure()
        raise ShotFailed(failure.model_copy(update={"attempts": len(rejected)}), Kind.INPUT)

    async def _with_restarts(self, plan: ShotPlan, order: float, on_progress: OnProgress | None) -> ShotRecord:
        """Render with one seed, again if inputs of a call are lost. Raises ShotFailed, and LikenessTooLow as soon as known."""
        for number in range(MAX_RESTARTS):
            try:
                return await self._run(plan, order, on_progress)
            except ShotFailed as failed:
                if failed.kind is not Kind.FOREIGN:
                    raise
                self._observer.retried(OUTPUT)
                # What was kept may be lost, too.
                for keys in [keys for keys in self._kept if any(step.key in keys for step in plan.steps)]:
                    del self._kept[keys]
                failure = failed.failure.model_copy(update={"attempts": number + 1})
        raise ShotFailed(failure)

    async def _run(self, plan: ShotPlan, order: float, on_progress: OnProgress | None) -> ShotRecord:
        route = self._routes(plan)
        records: tuple[StepRecord, ...] = ()
        made: Made | None = None
        for call in route.calls:
            made = await self._make(plan, order, call, made, on_progress)
            step_records = made.result.records
            if not made.is_first:
                step_records = tuple(record.model_copy(update=FREE) for record in step_records)
            self._count(step_records, on_progress)
            records += step_records
            check_likeness(plan.shot, made.result.likeness)
        return await self._write(plan, order, route, made, records, on_progress)

    async def _make(
        self, plan: ShotPlan, order: float, call: RouteCall, before: Made | None, on_progress: OnProgress | None
    ) -> Made:
        """Return the result of a call, or that of another shot with the same keys."""
        if (kept := self._kept.get(call.keys)) is not None:
            self._kept.move_to_end(call.keys)
            return kept
        asked = self._call_of(plan, order, call, before)._replace(is_shared=True, is_checked=True)
        chunked = call.chunked
        inputs = before.outputs[0] if before is not None else {}
        if chunked:
            worker_call = WorkerCall("run_clip", plan, (call.stages[: -len(chunked)], chunked, inputs), n_results=3)
        else:
            worker_call = WorkerCall("run", plan, (call.stages, inputs))
        made = await self._shell.call(asked, worker_call, on_progress)
        if call.keeps_result:
            self._kept[call.keys] = made._replace(is_first=False)
            while len(self._kept) > MAX_KEPT_RESULTS:
                self._kept.popitem(last=False)
        return made

    @staticmethod
    def _call_of(plan: ShotPlan, order: float, call: RouteCall, before: Made | None, share: float = 1.0) -> Call:
        """Return a call for the core. `share`: of the clip that it works on."""
        return Call(
            id=0,
            order=order,
            shot=plan.shot.id or "",
            stages=call.stages,
            keys=call.keys,
            costs=tuple(cost * share for cost in call.costs),
            timeout_s=call.timeout_s,
            load=call.load,
            adapters=call.adapters,
            near=before.process if before is not None else None,
            is_prefetched=plan.shot.priority != PRIORITIES[0],
        )

    def _count(self, records: Sequence[StepRecord], on_progress: OnProgress | None) -> None:
        if on_progress is not None and records:
            on_progress(Progress(records[-1].stage, 0, 0, sum(record.gpu_seconds for record in records)))
        for record in records:
            self._observer.step_ended(record.stage, record.seconds, record.cached)
            self._observer.adapter_loads(record.adapter_loads)

    # Files

    async def _write(
        self,
        plan: ShotPlan,
        order: float,
        route: Route,
        made: Made | None,
        records: tuple[StepRecord, ...],
        on_progress: OnProgress | None,
    ) -> ShotRecord:
        if on_progress is not None:
            on_progress(Progress(route.chunk_calls[-1].stages[-1] if route.chunk_calls else OUTPUT, 0, 0))
        near = made.process if made is not None else None
        call = Call(0, order, plan.shot.id or "", (OUTPUT,), timeout_s=route.commit_timeout_s, load=COMMIT_LOAD, near=near)

        async def write(session: EncoderSession) -> tuple[CallResult, ShotRecord | None]:
            if not route.chunk_calls:
                output, *clip = made.outputs if made is not None else ({},)
                return await session.commit("write", plan, output, records, clip[0] if clip else None)
            return await self._write_chunks(session, plan, order, route, made, records, on_progress)

        await self._storage.over()
        written = await self._shell.call(call._replace(near_load=LOCAL_LEAD * COMMIT_LOAD), write)
        record = written.record
        assert record is not None
        # Chunks have counted when they ended, and encoders use no GPU.
        self._count(record.stages[len(records) :], None)
        if chunked_stages_of(plan.shot) and any(scale > 1 for scale, _ in clip_growth(plan.shot).values()):
            n_frames, _ = clip_length(plan.shot)
            self._observer.frames_upscaled(n_frames)
        return record

    async def _write_chunks(
        self,
        session: EncoderSession,
        plan: ShotPlan,
        order: float,
        route: Route,
        made: Made | None,
        records: tuple[StepRecord, ...],
        on_progress: OnProgress | None,
    ) -> tuple[CallResult, ShotRecord | None]:
        """Write a clip whose chunks any free workers process meanwhile. Returns the first failure of the encoder."""
        output = made.outputs[0] if made is not None else {}
        opened: asyncio.Future[CallResult] | None = None
        if len(route.chunks) > 1:
            # Chunks are processed while the image and the original clip are written.
            opened = asyncio.ensure_future(session.run("begin", plan, output))
        chunk_records: list[tuple[StepRecord, ...]] = []
        try:
            async with aclosing(self._processed(plan, order, route, made, on_progress)) as processed:
                async for records_of_chunk, chunk in processed:
                    chunk_records.append(records_of_chunk)
                    if opened is not None and (begun := await opened).failure is not None:
                        return begun, None
                    if len(chunk_records) < len(route.chunks):
                        added = await session.run("add", chunk)
                        if added.failure is not None:
                            return added, None
                        continue
                    all_records = (*records, *join_records(chunk_records))
                    if opened is None:
                        return await session.commit("write", plan, output, all_records, chunk)
                    return await session.commit("commit", all_records, chunk)
        finally:
            if opened is not None:
                opened.cancel()
        raise AssertionError("a clip has at least one chunk")

    async def _processed(
        self, plan: ShotPlan, order: float, route: Route, made: Made | None, on_progress: OnProgress | None
    ) -> AsyncGenerator[tuple[tuple[StepRecord, ...], Any]]:
        """Yield the records and the output of each chunk of a clip, in order. At most MAX_CHUNKS_AHEAD of them are started."""
        n_frames, _ = clip_length(plan.shot)
        frames_done = 0

        async def process(chunk: slice) -> tuple[tuple[StepRecord, ...], Any]:
            nonlocal frames_done
            records: tuple[StepRecord, ...] = ()
            current, cut = made, chunk
            for call in route.chunk_calls:
                share = (chunk.stop - chunk.start) / n_frames
                asked = self._call_of(plan, order, call, current, share)
                inputs = current.outputs[0] if current is not None else {}
                first = cut if current is made else None
                worker_call = WorkerCall("run_chunk", plan, (call.stages, first, inputs))
                current = await self._shell.call(asked, worker_call, on_progress, is_followed=False)
                records += current.result.records
            assert current is not None
            frames_done += chunk.stop - chunk.start
            if on_progress is not None:
                gpu_seconds = sum(record.gpu_seconds for record in records)
                on_progress(Progress(route.chunk_calls[-1].stages[-1], frames_done, n_frames, gpu_seconds))
            return records, current.outputs[0]

        pending: deque[asyncio.Future[tuple[tuple[StepRecord, ...], Any]]] = deque()
        try:
            for chunk in route.chunks:
                if len(pending) == MAX_CHUNKS_AHEAD:
                    yield await pending.popleft()
                pending.append(asyncio.ensure_future(process(chunk)))
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()
