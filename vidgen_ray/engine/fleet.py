"""Worker and encoder actors of an engine, in placement groups.

A slot is a placement group with one bundle. A bundle with one whole GPU owns that GPU: only the actors of the slot share it,
and a crashed actor restarts in the same bundle. With GPU fractions alone, Ray could put actors of two slots on one GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vidgen_ray.engine.encoder import encoder_class
from vidgen_ray.engine.engine_config import EngineConfig
from vidgen_ray.engine.worker import worker_class
from vidgen_ray.errors import SetupError
from vidgen_ray.planner import Cluster, Plan
from vidgen_ray.planner.cluster import Label
from vidgen_ray.planner.layout import Layout, WorkerSpec
from vidgen_ray.planner.solver import ENCODER_CPUS

CLOSE_TIMEOUT_S = 5.0
"""Seconds that workers may take to write their queued cache entries."""


class FleetListener(Protocol):
    """Callbacks of a fleet, in the event loop of the engine."""

    def worker_started(self, name: str, spec: WorkerSpec, actor: Any) -> None:
        """The actor of a worker was created. Its process may still start."""

    def worker_lost(self, name: str) -> None:
        """The worker is gone for good."""

    def encoder_started(self, name: str, actor: Any) -> None:
        """The actor of an encoder was created."""

    def waiting(self, reason: str | None) -> None:
        """The fleet waits for something, or not any more."""


def labels_of(chosen: Plan, cluster: Cluster) -> list[Label | None]:
    """Return for each slot the label of the node that it is planned on. `None` if all GPUs are alike.

    Raises SetupError if GPUs differ and Ray cannot tell them apart.
    """
    if len(frozenset().union(*(node.sizes_gb for node in cluster.nodes))) < 2:
        return [None] * len(chosen.nodes)
    nodes = [cluster.nodes[number] for number in chosen.nodes]
    if any(len(node.sizes_gb) > 1 for node in nodes):
        raise SetupError(
            f"{cluster}: Ray cannot distinguish GPUs of different sizes on one node. "
            "Set CUDA_VISIBLE_DEVICES to GPUs of one size, or start one Ray node per size."
        )
    if any(node.label is None for node in nodes):
        raise SetupError(f"{cluster}: --gpus does not say which node has which GPUs. Leave it out to detect them.")
    return [node.label for node in nodes]


class Fleet:
    """Actors of one engine. Use it inside the event loop."""

    def __init__(self, config: EngineConfig, listener: FleetListener) -> None:
        self._config = config
        self._listener = listener
        self._groups: list[Any] = []
        # Keep the handles: Ray stops an actor without handles.
        self._actors: list[Any] = []
        self._workers: list[Any] = []

    async def start(self, layout: Layout, labels: Sequence[Label | None]) -> None:
        """Create the actors of the layout. Returns without waiting for their processes. `labels`: see `labels_of`."""
        await asyncio.to_thread(self._create, layout, labels, asyncio.get_running_loop())

    def _create(self, layout: Layout, labels: Sequence[Label | None], loop: asyncio.AbstractEventLoop) -> None:
        workers, encoders = worker_class(), encoder_class()
        for number, (slot, label) in enumerate(zip(layout.slots, labels, strict=True)):
            bundle = {"CPU": slot.cpus, **({"GPU": 1} if slot.has_gpu else {})}
            group = placement_group([bundle], bundle_label_selector=[dict([label])] if label else None)
            self._groups.append(group)
            in_slot = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            for k, spec in enumerate(slot.workers):
                name = self._config.worker_name(number, k)
                options = {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "scheduling_strategy": in_slot, "name": name}
                actor = workers.options(**options).remote(self._config, spec)
                self._actors.append(actor)
                self._workers.append(actor)
                loop.call_soon_threadsafe(self._listener.worker_started, name, spec, actor)
        for number in range(layout.encoders):
            name = self._config.encoder_name(number)
            actor = encoders.options(num_cpus=ENCODER_CPUS, scheduling_strategy="SPREAD", name=name).remote(self._config)
            self._actors.append(actor)
            loop.call_soon_threadsafe(self._listener.encoder_started, name, actor)

    async def stop(self) -> None:
        """Kill the actors and remove the placement groups."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        # A worker that has crashed or hangs loses its queued cache entries.
        ray.wait([worker.close.remote() for worker in self._workers], num_returns=len(self._workers), timeout=CLOSE_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)
        for group in self._groups:
            remove_placement_group(group)
        self._actors, self._workers, self._groups = [], [], []
