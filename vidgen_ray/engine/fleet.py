"""Start the actors of a run as the layout says, and stop them when the run ends.

A slot is a placement group with one bundle. A bundle with one whole GPU owns that GPU: only the actors of the slot share it,
and a crashed actor restarts in the same bundle. With GPU fractions alone, Ray could put actors of two slots on one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from vidgen_ray.engine.engine_config import RunConfig
from vidgen_ray.batch.run_state import RunState, RunStateHandle, run_state_name
from vidgen_ray.engine.worker import MAX_CONCURRENT_CALLS, Encoder, Worker
from vidgen_ray.errors import SetupError
from vidgen_ray.planner import Cluster, Plan
from vidgen_ray.planner.cluster import Label
from vidgen_ray.planner.solver import ENCODER_CPUS

_RESTARTS: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0}
"""Ray restarts the process. The director decides about retries."""


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


@contextmanager
def start_actors(config: RunConfig, labels: Sequence[Label | None]) -> Iterator[RunStateHandle]:
    """Start the workers, the encoders and the run state, and stop them when the block ends.

    `labels`: for each slot the label that its node must have. Returns without waiting for the weights to load. The actors are
    found by the names in `config`.
    """
    groups: list[Any] = []
    # Keep the handles for the whole run: Ray stops an actor without handles.
    actors: list[Any] = []
    try:
        # On the driver's node, so that it lives as long as the driver.
        driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        run_state_class = ray.remote(RunState).options(
            name=run_state_name(config.run), num_cpus=0, scheduling_strategy=driver_node, max_restarts=-1
        )
        run_state: RunStateHandle = run_state_class.remote()
        worker_class, encoder_class = ray.remote(Worker), ray.remote(Encoder)
        worker_options: dict[str, Any] = {"max_concurrency": MAX_CONCURRENT_CALLS, **_RESTARTS}
        for number, (slot, label) in enumerate(zip(config.layout.slots, labels, strict=True)):
            bundle = {"CPU": slot.cpus, **({"GPU": 1} if slot.has_gpu else {})}
            group = placement_group([bundle], bundle_label_selector=[dict([label])] if label else None)
            groups.append(group)
            in_slot = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            for k, spec in enumerate(slot.workers):
                options = {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "scheduling_strategy": in_slot, **worker_options}
                actors.append(worker_class.options(name=config.worker_name(number, k), **options).remote(config, spec))
        for name in config.encoder_names:
            options = {"num_cpus": ENCODER_CPUS, "scheduling_strategy": "SPREAD", **_RESTARTS}
            actors.append(encoder_class.options(name=name, **options).remote(config))
        for actor in actors:
            # Start loading now, before the director is up.
            actor.load.remote()
        actors.append(run_state)
        yield run_state
    finally:
        for actor in actors:
            ray.kill(actor)
        for group in groups:
            remove_placement_group(group)
