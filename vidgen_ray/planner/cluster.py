"""Machines to plan for: GPUs and their memory, CPUs, host memory."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vidgen_ray.errors import UsageError

GB = 2**30
"""Bytes per GB, as used by GPU vendors and torch."""
ASSUMED_CPUS_PER_GPU = 16
"""CPUs per GPU for clusters given as text, which has no CPU counts."""
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Device files of NVIDIA's driver on Linux and on WSL2."""
POOL = re.compile(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)GB", re.IGNORECASE)
MAX_GPUS = 100_000
NOMINAL_GB = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 180)
"""Nominal memory sizes of GPUs. torch and the driver report different values, up to 1/12 less."""

Label = tuple[str, str]
"""Name and value of a Ray node label."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine."""

    gpus: tuple[float, ...]
    """GB of memory of each GPU."""
    cpus: float
    memory_gb: float | None
    """Host memory. `None` if unknown."""
    label: Label | None = None
    """Label that only nodes with these GPUs have. `None` if unknown."""

    @property
    def sizes_gb(self) -> frozenset[int]:
        """Distinct memory sizes of the GPUs, rounded to GB: two GPUs of the same type may differ by some MB."""
        return frozenset(map(round, self.gpus))


@dataclass(frozen=True, slots=True)
class Cluster:
    """All machines of a run."""

    nodes: tuple[Node, ...]
    notes: tuple[str, ...] = ()
    """Assumptions, to be shown with the plan."""

    @property
    def gpus(self) -> tuple[float, ...]:
        """GB of memory of each GPU, of all nodes."""
        return tuple(memory for node in self.nodes for memory in node.gpus)

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def card(self) -> str:
        """Key of the calibration for these GPUs, such as `80 GB`, or `cpu`."""
        return " + ".join(f"{size:g} GB" for size in sorted(set(map(_nominal, self.gpus)), reverse=True)) or "cpu"

    def __str__(self) -> str:
        """`8 x 80 GB, 128 CPUs on 1 node`."""
        cards = [f"{count} x {size:g} GB" for size, count in sorted(Counter(map(_nominal, self.gpus)).items())[::-1]]
        cards = cards or ["no GPU"]
        nodes = f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}"
        return f"{' + '.join(cards)}, {self.cpus:g} CPUs on {nodes}"


def _nominal(memory_gb: float) -> float:
    """Return the nominal memory of a GPU for the memory reported by torch or the driver."""
    return next((float(gb) for gb in NOMINAL_GB if 11 / 12 * gb <= memory_gb <= gb), round(memory_gb, 1))


def parse_gpus(text: str) -> Cluster:
    """Parse a cluster. Raises UsageError.

    `8x80GB` is one node with 8 GPUs, `2x8x80GB` are two such nodes, `4x48GB+4x80GB` is one node of each type. Each GPU
    comes with `ASSUMED_CPUS_PER_GPU` CPUs, which is stated in the notes.
    """
    nodes: list[Node] = []
    for part in text.replace(" ", "").split("+"):
        pool = POOL.fullmatch(part)
        if pool is None or not 0 < int(pool[2]) * int(pool[1] or 1) <= MAX_GPUS or float(pool[3]) <= 0:
            raise UsageError(f"--gpus: got {text!r}, must be like 8x80GB, 2x8x80GB (nodes of 8) or 4x48GB+4x80GB")
        gpus = int(pool[2])
        nodes += [Node((float(pool[3]),) * gpus, gpus * ASSUMED_CPUS_PER_GPU, None)] * int(pool[1] or 1)
    return Cluster(tuple(nodes), (f"--gpus does not specify CPUs: assuming {ASSUMED_CPUS_PER_GPU} per GPU",))


def this_machine() -> Cluster:
    """Return a cluster of this machine only."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return Cluster((Node(tuple(_local_gpus()), cpus, memory),))


def _local_gpus() -> Iterator[float]:
    # Importing torch takes seconds. Without one of these device files it finds no GPUs.
    if not any(device.exists() for device in GPU_DEVICES):
        return
    import torch

    for n in range(torch.cuda.device_count()):
        yield torch.cuda.get_device_properties(n).total_memory / GB
