"""Process that owns the workers and encoders of a server.

It does nothing else, so that they survive a crash of the director: loading weights takes minutes. Ray stops them when this
process ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vidgen_ray.engine import actor_start, fleet
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.fleet import Fleet, FleetListener, labels_of, placed_more_slots
from vidgen_ray.engine.ray_cluster import LiveCluster, live_cluster
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.choose_layout import Plan
from vidgen_ray.planner.cluster import Cluster, Label
from vidgen_ray.planner.layout import Layout, WorkerSpec

log = logging.getLogger("ray.serve")

REPLAN_POLL_S = 10.0
"""Seconds between two checks whether a stage has no worker."""


@dataclass(frozen=True, slots=True)
class Actors:
    """Present workers and encoders of a server."""

    owner: str
    """Identifies the process that owns them. A restarted one has other actors."""
    version: int
    """Increases with every change."""
    workers: dict[str, tuple[WorkerSpec, Any]]
    """Name -> stages and actor, also of encoders."""
    layout: Layout | None = None
    """Layout of these workers. `None` if there is none yet."""
    generation: int = 0
    """Number of this layout. With the next one, all workers and encoders are new."""
    waiting: str | None = None
    """Reason why the fleet waits. `None` if it does not wait."""


class Workers(FleetListener):
    """Runs the fleet of a server. Create it inside an event loop."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        labels: Sequence[Label | None],
        stage_seconds: Mapping[str, float] | None = None,
        make_plan: Callable[[Cluster], Plan] | None = None,
    ) -> None:
        """`labels`: see `fleet.labels_of`. `stage_seconds`: stage -> mean seconds per shot, to add slots for GPUs that become
        free; `None` adds none. `make_plan` plans another layout if the last worker with a stage is lost with its node; with
        `None`, the server waits for another node.
        """
        # Actors of a crashed predecessor may still have their names.
        owner = secrets.token_hex(4)
        self._config = config
        self._changed = asyncio.Event()
        self._actors = Actors(owner, 0, {})
        self._loads: dict[str, asyncio.Task[Failure | None]] = {}
        self._starting = asyncio.create_task(self._start_first(layout, labels, stage_seconds, make_plan))

    async def _start_first(
        self,
        layout: Layout,
        labels: Sequence[Label | None],
        stage_seconds: Mapping[str, float] | None,
        make_plan: Callable[[Cluster], Plan] | None,
    ) -> None:
        # Ray keeps those of a process that crashed, because it starts the same actor again.
        await asyncio.to_thread(fleet.remove_leaked_groups)
        await self._start(layout, labels, stage_seconds)
        self._replanning = None if make_plan is None else asyncio.create_task(self._replan_if_incomplete(make_plan))
        await self._wait_until_ready()

    async def ready(self) -> None:
        """Wait until every stage has a worker with loaded weights. Raises SetupError if no worker can load those of a stage."""
        await asyncio.shield(self._starting)

    async def start_state(self) -> tuple[bool, str | None]:
        """Return whether every stage has had a worker, and what the fleet waits for. Raises what `ready` does."""
        await self.check_health()
        return self._starting.done(), self._actors.waiting

    async def check_health(self) -> None:
        """Raise SetupError if no worker could load the weights of a stage."""
        if self._starting.done():
            self._starting.result()

    async def _start(self, layout: Layout, labels: Sequence[Label | None], stage_seconds: Mapping[str, float] | None) -> None:
        """Start the fleet of a layout."""
        self._layout, self._labels, self._grows = layout, list(labels), stage_seconds is not None
        self._cancel_loads()
        # A fleet that waits for other users of the cluster gets as much time as one that waits for a lost node. If the settings
        # name the GPUs, Ray's autoscaler may still start them.
        self._replan_at = time.monotonic() + fleet.LAST_LOST_AFTER_S if self._grows else math.inf
        generation = self._actors.generation + 1
        self._change(workers={}, layout=layout, generation=generation, waiting=None)
        more = None if stage_seconds is None else partial(placed_more_slots, stage_seconds)
        name = f"{self._config.name}-{self._actors.owner}-{generation}"
        self._fleet = Fleet(replace(self._config, name=name), self, more)
        await self._fleet.start(layout, labels)

    async def stop(self) -> None:
        """Stop the workers and encoders."""
        self._starting.cancel()
        await asyncio.wait([self._starting])
        await self._fleet.stop()

    async def actors(self, owner: str, version: int) -> Actors | None:
        """Return the workers and encoders, when they are ready. `None` if the caller has this version of this owner already."""
        await self.ready()
        return None if (owner, version) == (self._actors.owner, self._actors.version) else self._actors

    async def add_copy(self) -> None:
        """Request GPUs for a copy of the layout, unless workers still load. See `Fleet.request_copy`."""
        if all(load.done() for load in self._loads.values()):
            self._fleet.request_copy()

    async def newest_copy(self) -> frozenset[str]:
        """Return the names of the workers and encoders of the newest copy. Empty if there is none."""
        return self._fleet.newest_copy

    async def release(self, names: frozenset[str]) -> None:
        """Stop the workers and encoders of a copy, which must have no calls."""
        self._fleet.release(names)

    # Lost stages

    async def _replan_if_incomplete(self, make_plan: Callable[[Cluster], Plan]) -> None:
        """Start another layout when a stage has had no worker for too long."""
        last_reason = None
        while True:
            await asyncio.sleep(REPLAN_POLL_S)
            if not self._missing_stages() or time.monotonic() < self._replan_at:
                continue
            try:
                await self._start_other_layout(make_plan)
            # The nodes that are left are too few, or one has just been lost. Others may come.
            except (SetupError, ProfileError) as error:
                if str(error) != last_reason:
                    last_reason = str(error)
                    log.warning("no other layout: %s", error)
            # Supervision must continue after any error, such as a restart of Ray's head process.
            except Exception:
                log.warning("cannot plan another layout, trying again", exc_info=True)

    async def _start_other_layout(self, make_plan: Callable[[Cluster], Plan]) -> None:
        """Replace the layout by one for the nodes that are left, unless it is the same. Raises what `make_plan` raises."""
        total = (await asyncio.to_thread(live_cluster)).total
        chosen = await asyncio.to_thread(make_plan, total)
        # A worker may have started while the layout was planned.
        missing = self._missing_stages()
        if not missing or (chosen.layout.slots, labels_of(chosen, total)) == (self._layout.slots, self._labels):
            return
        log.warning("no worker is left for %s: starting another layout", ", ".join(missing))
        self._cancel_loads()
        await self._fleet.stop()
        # Without the GPUs of other users of the cluster, if it fits on the rest.
        live: LiveCluster = await asyncio.to_thread(live_cluster)
        chosen, cluster = await asyncio.to_thread(live.plan, make_plan)
        await self._start(chosen.layout, labels_of(chosen, cluster), chosen.stage_seconds if self._grows else None)

    def _missing_stages(self) -> list[str]:
        """Return the stages of the layout that no worker holds, started or not."""
        held = {stage for spec, _ in self._actors.workers.values() for stage in spec.stages}
        return [stage for stage in self._layout.stages if stage not in held]

    # Loading

    async def _wait_until_ready(self) -> None:
        while missing := [stage for stage in self._layout.stages if not self._is_ready(stage)]:
            for stage in missing:
                self._check_loadable(stage)
            self._changed.clear()
            await self._changed.wait()

    def _is_ready(self, stage: str) -> bool:
        return any(load.done() and load.result() is None for load in self._loads_of(stage))

    def _check_loadable(self, stage: str) -> None:
        """Raise SetupError if no worker of the layout can load the stage."""
        failures = [load.result() for load in self._loads_of(stage) if load.done()]
        if len(failures) < sum(stage in spec.stages for spec in self._layout.workers):
            return
        if (failure := failures[0]) is not None:
            # A single line, because Ray Serve shows it at the end of its own message.
            raise SetupError(f"{failure.stage}: {failure.message}")

    def _cancel_loads(self) -> None:
        """Stop waiting for workers that are about to be stopped: that they end then is no failure to load."""
        for load in self._loads.values():
            load.cancel()
        self._loads = {}

    def _loads_of(self, stage: str) -> list[asyncio.Task[Failure | None]]:
        return [load for name, load in self._loads.items() if stage in self._actors.workers[name][0].stages]

    # Events of the fleet

    def worker_started(self, name: str, spec: WorkerSpec, actor: Any) -> None:
        self._change(workers={**self._actors.workers, name: (spec, actor)})
        self._loads[name] = asyncio.ensure_future(self._load(name, actor))
        self._loads[name].add_done_callback(lambda _: self._changed.set())

    def worker_lost(self, name: str) -> None:
        if (load := self._loads.pop(name, None)) is not None:
            load.cancel()
        self._change(workers={other: worker for other, worker in self._actors.workers.items() if other != name})
        # The fleet has waited for another node.
        self._replan_at = time.monotonic()

    def waiting(self, reason: str | None) -> None:
        self._change(waiting=reason)
        if reason is not None:
            log.warning(reason)

    def _change(self, **changes: Any) -> None:
        self._actors = replace(self._actors, version=self._actors.version + 1, **changes)

    async def _load(self, name: str, actor: Any) -> Failure | None:
        failure = await actor_start.start(actor, name)
        if failure is not None:
            log.warning("%s cannot load its weights: %s", name, failure.message)
        return failure
