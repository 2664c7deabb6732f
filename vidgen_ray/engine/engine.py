"""Engine: renders shots with the workers and encoders of a layout. A window limits the shots in progress.

Renderer: renders shots with one engine after another. If an engine cannot render a shot, because its layout has no worker for a
stage or has lost the last one with a node, the shot waits for an engine with another layout. Used by batch runs and the server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine import messages as m
from vidgen_ray.engine.callbacks import guarded
from vidgen_ray.engine.calls import ShotFailed
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.fleet import Fleet, MoreSlots
from vidgen_ray.engine.processes import State, is_encoder
from vidgen_ray.engine.recording import Recorder
from vidgen_ray.engine.route import CHUNK_BYTES
from vidgen_ray.engine.shell import OnProgress, Shell
from vidgen_ray.engine.shots import MAX_CHUNKS_AHEAD, Shots
from vidgen_ray.engine.status import EngineObserver, Snapshot, Utilization
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.engine.supervision import NODE_LOST
from vidgen_ray.graph import chunked_stages_of, clip_length
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.planner.cluster import Label
from vidgen_ray.planner.layout import Layout, WorkerSpec
from vidgen_ray.render.step_runner import chunk_frames_of, chunk_result_bytes
from vidgen_ray.shot import Shot

ENGINE = "engine"
"""Stage of the failure of an engine that has failed itself."""
OBJECT_STORE_SHARE = 0.4
"""Share of Ray's object store that shots in progress may fill. Above it, Ray starts to spill to disk."""


class Window:
    """Limit on concurrent shots. First come, first served. Use it inside an event loop."""

    def __init__(self, shots: int, max_bytes: float) -> None:
        """`shots`: maximum number of shots. `max_bytes`: maximum of their bytes; one shot may exceed it if it is alone."""
        self._shots = shots
        self._max_bytes = max_bytes
        self._open = 0
        self._bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def shots(self) -> int:
        """Maximum number of shots."""
        return self._shots

    @property
    def in_progress(self) -> int:
        return self._open

    def resize(self, shots: int) -> None:
        """Change the maximum number of shots. If more are in progress, no shot is admitted until enough of them have ended."""
        self._shots = shots
        self._admit_waiting()

    @asynccontextmanager
    async def admit(self, size: int) -> AsyncIterator[None]:
        """Wait until there is room for a shot of `size` bytes, and occupy it during the block."""
        if self._waiting or not self._has_room(size):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((turn, size))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave(size)
                # Otherwise a shot that left the window in the meantime has removed the cancelled one.
                elif (turn, size) in self._waiting:
                    self._waiting.remove((turn, size))
                    self._admit_waiting()
                raise
        else:
            self._enter(size)
        try:
            yield
        finally:
            self._leave(size)

    def _has_room(self, size: int) -> bool:
        return self._open < self._shots and (not self._open or self._bytes + size <= self._max_bytes)

    def _enter(self, size: int) -> None:
        self._open += 1
        self._bytes += size

    def _leave(self, size: int) -> None:
        self._open -= 1
        self._bytes -= size
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][1]):
            turn, size = self._waiting.popleft()
            if not turn.done():
                self._enter(size)
                turn.set_result(None)


def object_store_bytes(shot: Shot, chunk_bytes: int) -> int:
    """Return the most bytes of raw frames that a shot in progress has in the object store. `chunk_bytes`: largest chunk."""
    image = 3 * shot.width * shot.height
    if not shot.generate_video:
        return image
    frames = image * shot.clip_frames
    if not chunked_stages_of(shot):
        return image + frames
    n_frames, _ = clip_length(shot)
    return image + frames + min(chunk_result_bytes(shot) * n_frames, chunk_bytes * (MAX_CHUNKS_AHEAD + 1))


class Engine:
    """Workers, encoders and the shots in progress. Create it inside the event loop."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        observer: EngineObserver,
        storage: StoragePause,
        more_slots: MoreSlots | None = None,
        on_waiting: Callable[[str], None] = lambda _: None,
        recorder: Recorder | None = None,
    ) -> None:
        """`more_slots`: see `Fleet`. `on_waiting` gets what the fleet waits for, such as GPUs that another run uses."""
        chunk_frames = chunk_frames_of(config.profile, [config.stages[stage] for stage in layout.stages])
        self._layout = layout
        self._shell = Shell(config, layout, observer, storage, recorder)
        self._core = self._shell.core
        self._shots = Shots(config, layout, self._shell, chunk_frames, observer, storage)
        self._utilization = Utilization()
        self._fleet = Fleet(config, self, more_slots)
        self._on_waiting = guarded(on_waiting)
        self._waiting_for: str | None = None
        store_bytes = ray.cluster_resources().get("object_store_memory", 0.0)
        self.window = Window(layout.window, OBJECT_STORE_SHARE * store_bytes)

    async def start(self, labels: Sequence[Label | None]) -> None:
        """Create the actors. Returns before they have loaded their weights. `labels`: see `fleet.labels_of`.

        Instead, another process can run the fleet. Then call `worker_started` for its actors.
        """
        await self._fleet.start(self._layout, labels)

    async def stop(self) -> None:
        """Stop the actors that `start` created. Shots in progress fail."""
        self._shell.close()
        await self._fleet.stop()

    @property
    def held_gpus(self) -> int:
        """Number of GPUs that the actors that `start` created hold."""
        return self._fleet.held_gpus

    async def holdings(self) -> str:
        """Return which GPUs and CPUs the actors that `start` created hold, and what is free."""
        return await self._fleet.holdings()

    async def run(
        self,
        plan: ShotPlan,
        on_progress: OnProgress | None = None,
        on_admitted: Callable[[], object] = lambda: None,
    ) -> ShotRecord:
        """Render a shot and commit its files. Raises ShotFailed.

        Waits until the window has room for the shot, then calls `on_admitted`.
        """
        async with self.window.admit(object_store_bytes(plan.shot, CHUNK_BYTES * self._layout.group_size)):
            on_admitted()
            return await self._shots.render(plan, on_progress)

    def can_render(self, plan: ShotPlan) -> bool:
        """Return whether the layout has a worker for every stage of the shot, and has not lost the last one."""
        return not self.needs_other_layout and {step.stage for step in plan.steps} <= set(self._layout.stages)

    @property
    def needs_other_layout(self) -> bool:
        """True if the last worker with a stage is lost with its node."""
        return self.fatal_failure is not None and self.fatal_failure.stage == NODE_LOST

    @property
    def fatal_failure(self) -> Failure | None:
        """Failure after which no shot can be rendered. `None` if there is none."""
        if self._shell.error is not None:
            return Failure.of(ENGINE, self._shell.error)
        return self._core.fatal_failure

    @property
    def missing_stages(self) -> list[str]:
        """Stages of the layout that no worker can run now."""
        return [stage for stage in self._layout.stages if not self._core.table.live(stage)]

    def snapshot(self) -> Snapshot:
        """Return the status. Call it at regular intervals: utilizations are averages over the calls."""
        stages, gpus_busy = self._utilization.sample(self._core.table, self._core.queues.waiting)
        return Snapshot(stages, gpus_busy, self.window.in_progress, self._core.quarantined, self._waiting_for)

    # Events of the fleet

    def worker_started(self, name: str, spec: WorkerSpec, actor: Any) -> None:
        """Use a worker or an encoder. Calls of an earlier engine are stopped."""
        self._shell.add(name, spec, actor)
        self._resize_window()

    def worker_lost(self, name: str) -> None:
        self._shell.remove(name)
        self._resize_window()

    async def drain(self, names: Collection[str]) -> None:
        """Give these workers and encoders no more calls, and wait until they have none. Others must hold their stages."""
        for name in names:
            self._shell.remove(name, released=True)
        self._resize_window()
        await self._shell.until_unused(names)

    def not_placeable(self, reason: str) -> None:
        self._shell.tell(m.Unplaceable(reason))

    def _resize_window(self) -> None:
        """Adapt the window to the present workers: slots can start late, be added and be lost."""
        # A layout of encoders only writes start images.
        rows = self._core.table.rows.values()
        workers = sum(not is_encoder(row.spec) and row.state is not State.LEAVING for row in rows)
        share = workers / len(self._layout.workers) if self._layout.workers else 1.0
        self.window.resize(max(1, round(self._layout.window * share)))

    def waiting(self, reason: str | None) -> None:
        self._waiting_for = reason
        if reason is not None:
            self._on_waiting(reason)


MakeEngine = Callable[[ShotPlan], Awaitable[Engine]]
"""Starts an engine that can render a shot."""
STATUS_INTERVAL_S = 1.0
"""Seconds between two status reports."""


class Renderer:
    """Renders shots, any number at a time. Create it inside the event loop."""

    def __init__(
        self,
        on_status: Callable[[Snapshot], None],
        make_engine: MakeEngine | None = None,
    ) -> None:
        """`on_status` gets the status every second.

        `make_engine` is called while no shot runs, after the last engine was stopped. With `None`, the caller passes each
        engine to `use`.
        """
        self._on_status = on_status
        self._make_engine = make_engine
        self._engine: Engine | None = None
        self._running: set[asyncio.Future[ShotRecord]] = set()
        """Shots in the engine."""
        self._changed = asyncio.Event()
        """Set, and replaced, when there is another engine or when no shot runs."""
        self._starting: asyncio.Task[None] | None = None
        self._report = guarded(self._report_status)
        self._reports = asyncio.ensure_future(self._keep_reporting())

    @property
    def engine(self) -> Engine | None:
        """The present engine. `None` before the first shot."""
        return self._engine

    async def render(
        self,
        plan: ShotPlan,
        on_progress: OnProgress | None = None,
        on_admitted: Callable[[], object] = lambda: None,
    ) -> ShotRecord:
        """Render a shot and commit its files. Raises ShotFailed, and what `make_engine` raises.

        Calls `on_admitted` when the window of an engine has room for the shot, again with each engine.
        """
        while True:
            engine = await self._engine_for(plan)
            running = asyncio.ensure_future(engine.run(plan, on_progress, on_admitted))
            self._running.add(running)
            try:
                return await running
            except ShotFailed:
                if not engine.needs_other_layout:
                    raise
            except asyncio.CancelledError:
                # Otherwise its engine was stopped.
                if (caller := asyncio.current_task()) is None or caller.cancelling():
                    raise
            finally:
                self._running.discard(running)
                if not self._running:
                    self._notify()

    async def _engine_for(self, plan: ShotPlan) -> Engine:
        """Return an engine that can render the shot. Starts one, or waits for one."""
        while True:
            if self._engine is not None and self._engine.can_render(plan):
                return self._engine
            if self._starting is not None:
                await asyncio.wait([self._starting])
            elif self._make_engine is None or self._running:
                await self._changed.wait()
            else:
                self._starting = asyncio.ensure_future(self._start_engine(self._make_engine, plan))
                await asyncio.shield(self._starting)

    async def _start_engine(self, make_engine: MakeEngine, plan: ShotPlan) -> None:
        try:
            # It needs the GPUs of the present one.
            await self._stop_engine()
            await self.use(await make_engine(plan))
        finally:
            self._starting = None

    async def use(self, engine: Engine) -> None:
        """Render with this engine from now on. Shots that run in the previous one start again."""
        await self._stop_engine()
        self._engine = engine
        self._notify()

    async def stop(self) -> None:
        """Stop the engine. Shots in progress must have ended or been cancelled."""
        self._reports.cancel()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._stop_engine()

    async def _stop_engine(self) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            for running in self._running:
                running.cancel()
            await engine.stop()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _report_status(self) -> None:
        if self._engine is not None:
            self._on_status(self._engine.snapshot())

    async def _keep_reporting(self) -> None:
        while True:
            self._report()
            await asyncio.sleep(STATUS_INTERVAL_S)
