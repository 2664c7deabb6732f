"""Renderer: renders shots with one engine after another. Used by batch runs and by the server.

If the engine cannot render a shot, because its layout has no worker for a stage or has lost the last one with a node, the shot
waits for an engine with another layout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.engine import Engine
from vidgen_ray.engine.retries import ShotFailed
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.engine.worker_pool import ProgressCallback
from vidgen_ray.outputs.records import ShotRecord

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
        self._reports = asyncio.ensure_future(self._report_status())

    @property
    def engine(self) -> Engine | None:
        """The present engine. `None` before the first shot."""
        return self._engine

    def announce(self, plan: ShotPlan) -> None:
        """Tell that this shot will run, so that results which it shares with other shots are computed once."""
        if self._engine is not None:
            self._engine.announce(plan)

    async def render(
        self,
        plan: ShotPlan,
        on_progress: ProgressCallback | None = None,
        on_admitted: Callable[[], object] = lambda: None,
    ) -> ShotRecord:
        """Render an announced shot and commit its files. Raises ShotFailed, and what `make_engine` raises.

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

    async def _report_status(self) -> None:
        while True:
            if self._engine is not None:
                self._on_status(self._engine.snapshot())
            await asyncio.sleep(STATUS_INTERVAL_S)
