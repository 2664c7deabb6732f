"""The processes of a run, each where the layout wants it, for as long as the run lasts.

A slot is a placement group of one bundle. A bundle with a whole GPU lies on one card, its actors' shares with it, and nobody
else's; an actor that dies starts again in the same bundle. Shares alone would let Ray put two actors of 0.4 on one card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from vidgen_ray.batch.run_config import RunConfig
from vidgen_ray.batch.run_state import RunState, RunStateHandle, board_name
from vidgen_ray.batch.worker import CALLS_AT_ONCE, Encoder, Worker
from vidgen_ray.errors import SetupError
from vidgen_ray.planner import Cluster, Plan
from vidgen_ray.planner.cluster import Label
from vidgen_ray.planner.solver import ENCODER_CPUS

_RESTARTS: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0}
"""The process comes back; whether its work is tried again is the director's decision."""


def labels_of(chosen: Plan, cluster: Cluster) -> list[Label | None]:
    """For each slot the label of the node that it is planned on; none where all cards are alike.

    Raises SetupError where cards differ and Ray cannot tell them apart.
    """
    if len(frozenset().union(*(node.sizes_gb for node in cluster.nodes))) < 2:
        return [None] * len(chosen.nodes)
    nodes = [cluster.nodes[number] for number in chosen.nodes]
    if any(len(node.sizes_gb) > 1 for node in nodes):
        raise SetupError(
            f"{cluster}: cards of several sizes in one machine cannot be told apart; "
            "let CUDA_VISIBLE_DEVICES name those of one size, or start Ray once for each size"
        )
    if any(node.label is None for node in nodes):
        raise SetupError(f"{cluster}: where which cards are is not told by --gpus; leave it out, so that the run looks")
    return [node.label for node in nodes]


@contextmanager
def start_actors(job: RunConfig, labels: Sequence[Label | None]) -> Iterator[RunStateHandle]:
    """Start the workers, the encoders and the board; end them with the block. `labels`: for each slot the one that its node
    must have.

    Weights are loaded meanwhile: nothing here waits. Actors are found by the names that the job gives them.
    """
    groups: list[Any] = []
    # Held for the whole run: an actor dies with the last handle to it.
    actors: list[Any] = []
    try:
        # Beside the driver, so that it is there as long as the driver is.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        boards = ray.remote(RunState).options(name=board_name(job.run), num_cpus=0, scheduling_strategy=here, max_restarts=-1)
        board: RunStateHandle = boards.remote()
        worker_class, encoder_class = ray.remote(Worker), ray.remote(Encoder)
        at_work: dict[str, Any] = {"max_concurrency": CALLS_AT_ONCE, **_RESTARTS}
        for number, (slot, label) in enumerate(zip(job.layout.slots, labels, strict=True)):
            bundle = {"CPU": slot.cpus, **({"GPU": 1} if slot.has_gpu else {})}
            group = placement_group([bundle], bundle_label_selector=[dict([label])] if label else None)
            groups.append(group)
            in_slot = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            for k, spec in enumerate(slot.workers):
                options = {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "scheduling_strategy": in_slot, **at_work}
                actors.append(worker_class.options(name=job.worker_name(number, k), **options).remote(job, spec))
        for name in job.encoder_names:
            options = {"num_cpus": ENCODER_CPUS, "scheduling_strategy": "SPREAD", **_RESTARTS}
            actors.append(encoder_class.options(name=name, **options).remote(job))
        for actor in actors:
            # Before anybody waits for it: the director is not there yet.
            actor.load.remote()
        actors.append(board)
        yield board
    finally:
        for actor in actors:
            ray.kill(actor)
        for group in groups:
            remove_placement_group(group)
