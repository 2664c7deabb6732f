"""Other ways to run the same chain: one module a system, each a function `(gpus, gpu_memory_gb, shots, run_folder)`.

Each runs in a process of its own, ends when every shot is committed, and raises where it cannot.
"""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    module: str
    function: str
    packages: tuple[str, ...]
    """Distributions it needs."""


PEERS: dict[tuple[str, str], Peer] = {
    ("plain_ray_data", "five pools"): Peer("benchmarks.peers.plain_ray_data", "run", ("ray",)),
    ("hand_sized_ray_data", "four pools"): Peer("benchmarks.peers.hand_sized_ray_data", "run", ("ray",)),
    ("colocated_ray_data", "colocated"): Peer("benchmarks.peers.colocated_ray_data", "run", ("ray",)),
    ("fused_ray_data", "fused"): Peer("benchmarks.peers.fused_ray_data", "run", ("ray",)),
    ("xenna", "by hand"): Peer("benchmarks.peers.xenna", "run_by_hand", ("cosmos-xenna",)),
    ("xenna", "autoscaled"): Peer("benchmarks.peers.xenna", "run_autoscaled", ("cosmos-xenna",)),
    ("rayorch", "by hand"): Peer("benchmarks.peers.rayorch", "run", ("rayorch",)),
}
"""(system, layout) -> where it is."""
