"""Why something cannot be packed, in words that name what is missing."""

from __future__ import annotations

from dataclasses import replace

from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.planner.gpu_assignment import CONTEXT_GB, EPSILON, Assignments
from vidgen_ray.planner.solver import DIRECTOR_CPUS, ENCODER_CPUS, SPARE_CPUS, PackingProblem, pack

PLENTY = 1e6
"""CPUs that are enough for anything."""


def reason(wanted: PackingProblem, allowed: Assignments, cluster: Cluster) -> str:
    """For what `pack` has refused."""
    on_gpu = [actor for actor in wanted.actors if actor.gpu_gb]
    largest = max(cluster.gpus, default=0.0)
    for actor in on_gpu:
        if actor.gpu_gb + CONTEXT_GB > largest + EPSILON:
            has = f"the largest GPU has {largest:.4g} GB" if cluster.gpus else "there is no GPU"
            return f"{_need(actor.stages)} {actor.gpu_gb + CONTEXT_GB:.4g} GB of a GPU's memory, {has}"
    if pack(wanted, allowed, _boundless(cluster, cpus=PLENTY)) is None:
        together = sum(actor.gpu_gb for actor in on_gpu) + CONTEXT_GB
        return f"the stages need {together:.4g} GB together, the largest of {len(cluster.gpus)} GPUs has {largest:.4g} GB"
    if pack(wanted, allowed, _boundless(cluster)) is not None:
        has = ", ".join(f"{node.memory_gb:.4g}" for node in cluster.nodes if node.memory_gb is not None)
        waiting = " while others have the GPU's" if on_gpu else ""
        weights = sum(actor.gpu_gb + actor.host_gb for actor in wanted.actors)
        return f"stages need host memory{waiting}, up to {weights:.4g} GB a worker; the nodes have {has} GB"
    worker = max(actor.cpus for actor in wanted.actors)
    return (
        f"a worker needs up to {worker:g} CPUs, beside {ENCODER_CPUS:g} for an encoder and {DIRECTOR_CPUS + SPARE_CPUS:g} for "
        f"the director and Ray; the nodes have {', '.join(f'{node.cpus:g}' for node in cluster.nodes)}"
    )


def _boundless(cluster: Cluster, cpus: float | None = None) -> Cluster:
    """The cluster with all the host memory that anybody wants, and so many CPUs a node if they are given."""
    nodes = (replace(node, cpus=node.cpus if cpus is None else cpus, memory_gb=None) for node in cluster.nodes)
    return replace(cluster, nodes=tuple(nodes))


def _need(stages: tuple[str, ...]) -> str:
    return f"stage {stages[0]} needs" if len(stages) == 1 else f"stages {' and '.join(stages)} need"
