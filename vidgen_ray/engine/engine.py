"""Engine: renders shots with the workers and encoders of a layout. Used by batch runs and by the server.

All methods run in one event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.actor_client import ActorClient
from vidgen_ray.engine.chunks import chunk_frames_of
from vidgen_ray.engine.encoder_pool import EncoderPool
from vidgen_ray.engine.engine_config import EngineConfig
from vidgen_ray.engine.fleet import Fleet, MoreSlots
from vidgen_ray.engine.shot_runner import CHUNK_BYTES, ShotRunner
from vidgen_ray.engine.status import EngineObserver, Snapshot
from vidgen_ray.engine.window import OBJECT_STORE_SHARE, Window, object_store_bytes
from vidgen_ray.engine.worker_pool import NODE_LOST, ProgressCallback, WorkerPool
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.planner.cluster import Label
from vidgen_ray.planner.layout import Layout, WorkerSpec


class Engine:
    """Workers, encoders and the shots in progress. Create it inside the event loop."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        observer: EngineObserver,
        more_slots: MoreSlots | None = None,
        on_waiting: Callable[[str], None] = lambda _: None,
        max_shots: int | None = None,
    ) -> None:
        """`more_slots`: see `Fleet`. `on_waiting` gets what the fleet waits for, such as GPUs that another run uses.

        `max_shots`: maximum number of shots in progress. `None`: the window of the layout, in proportion to its workers.
        """
        chunk_frames = chunk_frames_of(config.profile, [config.stages[stage] for stage in layout.stages])
        self._layout = layout
        self._workers = WorkerPool(config, layout, observer)
        self._encoders = EncoderPool(config, str(self._workers.first_call), observer)
        self._runner = ShotRunner(config, self._workers, self._encoders, chunk_frames, observer)
        self._fleet = Fleet(config, self, more_slots)
        self._on_waiting = on_waiting
        store_bytes = ray.cluster_resources().get("object_store_memory", 0.0)
        self._max_shots = max_shots
        self.window = Window(max_shots or layout.window, OBJECT_STORE_SHARE * store_bytes)

    async def start(self, labels: Sequence[Label | None]) -> None:
        """Create the actors. Returns before they have loaded their weights. `labels`: see `fleet.labels_of`.

        Instead, another process can run the fleet. Then call `worker_started` and `encoder_started` for its actors.
        """
        await self._fleet.start(self._layout, labels)

    async def stop(self) -> None:
        """Stop the actors that `start` created. Shots in progress fail."""
        self._workers.close()
        self._encoders.close()
        await self._fleet.stop()

    async def holdings(self) -> str:
        """Return which GPUs and CPUs the actors that `start` created hold, and what is free."""
        return await self._fleet.holdings()

    def announce(self, plan: ShotPlan) -> None:
        """Tell that this shot will run, so that results which it shares with other shots are computed once."""
        self._runner.announce(plan)

    def withdraw(self, plan: ShotPlan) -> None:
        """Take back an announcement: the shot will not run."""
        self._runner.retire(plan)

    async def run(
        self,
        plan: ShotPlan,
        on_progress: ProgressCallback | None = None,
        on_admitted: Callable[[], None] = lambda: None,
    ) -> ShotRecord:
        """Render an announced shot and commit its files. Raises ShotFailed.

        Waits until the window has room for the shot, then calls `on_admitted`.
        """
        try:
            async with self.window.admit(object_store_bytes(plan.shot, CHUNK_BYTES)):
                on_admitted()
                return await self._runner.run(plan, on_progress)
        finally:
            self._runner.retire(plan)

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
        return self._workers.fatal_failure or self._encoders.fatal_failure

    @property
    def missing_stages(self) -> list[str]:
        """Stages of the layout that no worker can run now."""
        return self._workers.missing_stages

    def snapshot(self) -> Snapshot:
        """Return the status. Call it at regular intervals: utilizations are averages over the calls."""
        stages, gpus_busy = self._workers.sample_status()
        quarantined = (*self._workers.quarantined, *self._encoders.quarantined)
        return Snapshot(stages, gpus_busy, self.window.in_progress, quarantined)

    # Events of the fleet

    def worker_started(self, name: str, spec: WorkerSpec, actor: Any) -> None:
        """Use a worker. Calls of an earlier engine are stopped."""
        client = ActorClient(actor, name)
        client.send("attach", self._workers.first_call)
        self._workers.add(spec, client)
        self._resize_window()

    def worker_lost(self, name: str) -> None:
        self._workers.remove(name)
        self._resize_window()

    def _resize_window(self) -> None:
        """Adapt the window to the present workers: slots can start late, be added and be lost."""
        if self._max_shots is None:
            share = self._workers.count / len(self._layout.workers)
            self.window.resize(max(1, round(self._layout.window * share)))

    def encoder_started(self, name: str, actor: Any) -> None:
        self._encoders.add(ActorClient(actor, name))

    def encoder_lost(self, name: str) -> None:
        self._encoders.remove(name)

    def waiting(self, reason: str | None) -> None:
        if reason is not None:
            self._on_waiting(reason)
