"""Download weights on every node of a Ray cluster, once per node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidgen_ray.weights.download import Hub, Pulled, pull_all


@dataclass(frozen=True, slots=True)
class NodeWeights:
    """Result of the downloads on one node."""

    node: str
    """Address of the node."""
    pulled: tuple[Pulled, ...]
    problems: tuple[str, ...]
    """One message per reference that failed."""


def pull_on_all_nodes(
    references: Sequence[tuple[str, Path | None]], hub: Hub, *, dry_run: bool, verify: bool
) -> list[NodeWeights]:
    """Download on every node of the connected Ray, into the node's own HF_HOME, with the node's own token.

    Nodes with a shared folder wait for each other and find the files complete.
    """
    task = ray.remote(num_cpus=0, max_retries=1)(pull_all)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    results = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            references, hub, dry_run=dry_run, verify=verify
        )
        for node in nodes
    ]
    found = []
    for node, result in zip(nodes, results, strict=True):
        try:
            pulled, problems = ray.get(result)
        except ray.exceptions.RayError as error:
            pulled, problems = (), (f"the node was lost during the download ({type(error).__name__}); run the command again",)
        found.append(NodeWeights(node["NodeManagerAddress"], pulled, problems))
    return found
