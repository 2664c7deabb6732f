"""Ray Serve replica that owns the workers and encoders of a server.

It does nothing else, so that they survive a crash of the director: loading weights takes minutes. Ray stops them when this
process ends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vidgen_ray.engine.actor_client import ActorClient
from vidgen_ray.engine.engine_config import EngineConfig
from vidgen_ray.engine.fleet import Fleet, placed_more_slots
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.cluster import Label
from vidgen_ray.planner.layout import Layout, WorkerSpec

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Actors:
    """Present workers and encoders of a server."""

    owner: str
    """Identifies the process that owns them. A restarted one has other actors."""
    version: int
    """Increases with every change."""
    workers: dict[str, tuple[WorkerSpec, Any]]
    """Name -> stages and actor."""
    encoders: dict[str, Any]
    """Name -> actor."""


class Workers:
    """Runs the fleet of a server. Its replica is up as soon as every stage has a worker with loaded weights."""

    # Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self,
        config: EngineConfig,
        layout: Layout,
        labels: Sequence[Label | None],
        stage_seconds: Mapping[str, float] | None = None,
    ) -> None:
        """`labels`: see `fleet.labels_of`. `stage_seconds`: stage -> mean seconds per shot, to add slots for GPUs that become
        free; `None` adds none. Raises SetupError if no worker can load the weights of a stage.
        """
        # Actors of a crashed predecessor may still have their names.
        owner = secrets.token_hex(4)
        self._actors = Actors(owner, 0, {}, {})
        self._layout = layout
        self._loads: dict[str, asyncio.Task[Failure | None]] = {}
        self._changed = asyncio.Event()
        more = None if stage_seconds is None else partial(placed_more_slots, stage_seconds)
        self._fleet = Fleet(replace(config, name=f"{config.name}-{owner}"), self, more)
        await self._fleet.start(layout, labels)
        await self._wait_until_ready()

    async def actors(self, owner: str, version: int) -> Actors | None:
        """Return the workers and encoders. `None` if the caller has this version of this owner already."""
        return None if (owner, version) == (self._actors.owner, self._actors.version) else self._actors

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
            # A single line, because Serve shows it at the end of its own message.
            raise SetupError(f"{failure.stage}: {failure.message}")

    def _loads_of(self, stage: str) -> list[asyncio.Task[Failure | None]]:
        return [load for name, load in self._loads.items() if stage in self._actors.workers[name][0].stages]

    # Events of the fleet

    def worker_started(self, name: str, spec: WorkerSpec, actor: Any) -> None:
        self._change(workers={**self._actors.workers, name: (spec, actor)})
        self._loads[name] = asyncio.ensure_future(self._load(name, actor))
        self._loads[name].add_done_callback(lambda _: self._changed.set())

    def worker_lost(self, name: str) -> None:
        self._loads.pop(name).cancel()
        self._change(workers={other: worker for other, worker in self._actors.workers.items() if other != name})

    def encoder_started(self, name: str, actor: Any) -> None:
        self._change(encoders={**self._actors.encoders, name: actor})

    def waiting(self, reason: str | None) -> None:
        if reason is not None:
            log.warning(reason)

    def _change(self, **changes: Any) -> None:
        self._actors = replace(self._actors, version=self._actors.version + 1, **changes)

    async def _load(self, name: str, actor: Any) -> Failure | None:
        failure = await ActorClient(actor, name).ready()
        if failure is not None:
            log.warning("%s cannot load its weights: %s", name, failure.message)
        return failure
