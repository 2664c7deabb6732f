"""Other systems that run the same stages: one module per system, with a function `(gpus, gpu_memory_gb, shots, run_folder)`.

Each function is called in a new process. It returns when all shots are committed, and raises an error if that is impossible.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A way to run another system."""

    module: str
    function: str
    packages: tuple[str, ...]
    """Distributions that it needs."""


PEERS: dict[tuple[str, str], Peer] = {
    ("plain_ray_data", "five pools"): Peer("benchmarks.peers.plain_ray_data", "run", ("ray",)),
    ("hand_sized_ray_data", "four pools"): Peer("benchmarks.peers.hand_sized_ray_data", "run", ("ray",)),
    ("colocated_ray_data", "colocated"): Peer("benchmarks.peers.colocated_ray_data", "run", ("ray",)),
    ("fused_ray_data", "fused"): Peer("benchmarks.peers.fused_ray_data", "run", ("ray",)),
    ("xenna", "by hand"): Peer("benchmarks.peers.xenna", "run_by_hand", ("cosmos-xenna",)),
    ("xenna", "autoscaled"): Peer("benchmarks.peers.xenna", "run_autoscaled", ("cosmos-xenna",)),
    ("rayorch", "by hand"): Peer("benchmarks.peers.rayorch", "run", ("rayorch",)),
}
"""(system, layout) -> function."""
