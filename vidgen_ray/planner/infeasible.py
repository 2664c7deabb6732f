"""Error message for a packing problem without a solution: which resource is missing."""

from __future__ import annotations

from dataclasses import replace

from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.planner.gpu_assignment import CONTEXT_GB, EPSILON, Candidates, needed_gb
from vidgen_ray.planner.solver import DIRECTOR_CPUS, ENCODER_CPUS, SPARE_CPUS, PackingProblem, host_gb_of_nodes, pack

UNLIMITED_CPUS = 1e6


def explain_infeasible(problem: PackingProblem, candidates: Candidates, cluster: Cluster) -> str:
    """Return why `pack` found no packing for the same arguments."""
    on_gpu = [actor for actor in problem.actors if actor.on_gpu]
    largest = max(cluster.gpus, default=0.0)
    for actor in on_gpu:
        if needed_gb([actor]) + CONTEXT_GB > largest + EPSILON:
            available = f"the largest GPU has {largest:.4g} GB" if cluster.gpus else "there is no GPU"
            return f"{_need(actor.stages)} {needed_gb([actor]) + CONTEXT_GB:.4g} GB of GPU memory, {available}"
    if pack(problem, candidates, _without_limits(cluster, cpus=UNLIMITED_CPUS)) is None:
        total_gb = needed_gb(on_gpu) + CONTEXT_GB
        return f"the stages need {total_gb:.4g} GB together, the largest of {len(cluster.gpus)} GPUs has {largest:.4g} GB"
    if pack(problem, candidates, _without_limits(cluster)) is not None:
        return _explain_host_memory(problem, candidates, cluster)
    worker_cpus = max(actor.cpus for actor in problem.actors)
    node_cpus = ", ".join(f"{node.cpus:g}" for node in cluster.nodes)
    return (
        f"a worker needs up to {worker_cpus:g} CPUs, in addition to {ENCODER_CPUS:g} for an encoder and "
        f"{DIRECTOR_CPUS + SPARE_CPUS:g} for the director and Ray; the nodes have {node_cpus}"
    )


def _explain_host_memory(problem: PackingProblem, candidates: Candidates, cluster: Cluster) -> str:
    """Return how much host memory the processes of the node that needs most would take, and what the nodes have."""
    packing = pack(problem, candidates, _without_limits(cluster))
    assert packing is not None
    needs = host_gb_of_nodes(packing)
    node = max(needs, key=lambda node: needs[node])
    slots = [filled.assignment for filled in packing.slots if filled.node == node]
    load_gb = max(assignment.load_gb for assignment in slots)
    while_loading = f" ({load_gb:.4g} GB of it for the largest weights, which pass through host memory)" if load_gb else ""
    available = ", ".join(f"{node.memory_gb:.4g}" for node in cluster.nodes if node.memory_gb is not None)
    return f"host memory: {needs[node]:.4g} GB are needed on one node{while_loading}; the nodes have {available} GB"


def _without_limits(cluster: Cluster, cpus: float | None = None) -> Cluster:
    """Return the cluster with unlimited host memory and, if `cpus` is not `None`, with that many CPUs per node."""
    nodes = (replace(node, cpus=node.cpus if cpus is None else cpus, memory_gb=None) for node in cluster.nodes)
    return replace(cluster, nodes=tuple(nodes))


def _need(stages: tuple[str, ...]) -> str:
    return f"stage {stages[0]} needs" if len(stages) == 1 else f"stages {' and '.join(stages)} need"
