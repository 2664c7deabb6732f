"""The machines that a plan is for: GPUs with their memory, CPUs, host memory."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vidgen_ray.errors import UsageError

GB = 2**30
"""What cards and torch call a GB."""
ASSUMED_CPUS_PER_GPU = 16
POOL = re.compile(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)GB", re.IGNORECASE)
MOST_GPUS = 100_000
SOLD_AS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 180)
"""GB of cards. What torch and the driver tell of one is up to a twelfth less, each something else."""


Label = tuple[str, str]
"""Of Ray's: name and value."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine."""

    gpus: tuple[float, ...]
    """GB of memory of each GPU."""
    cpus: float
    memory_gb: float | None
    """Of the host, for processes; none where it is not known."""
    label: Label | None = None
    """One that only nodes with these cards have; none where it is not known."""

    @property
    def sizes_gb(self) -> frozenset[int]:
        """Of its cards, each once: whole GB, for two of the same kind may differ by some MB."""
        return frozenset(map(round, self.gpus))


@dataclass(frozen=True, slots=True)
class Cluster:
    nodes: tuple[Node, ...]
    notes: tuple[str, ...] = ()
    """What had to be assumed, for people."""

    @property
    def gpus(self) -> tuple[float, ...]:
        """GB of memory of each GPU of all nodes."""
        return tuple(memory for node in self.nodes for memory in node.gpus)

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def card(self) -> str:
        """Under which name what was measured here is remembered: `80 GB`, or `cpu`."""
        return " + ".join(f"{size:g} GB" for size in sorted(set(map(_nominal, self.gpus)), reverse=True)) or "cpu"

    def __str__(self) -> str:
        """`8 x 80 GB, 128 CPUs on 1 node`."""
        cards = [f"{count} x {size:g} GB" for size, count in sorted(Counter(map(_nominal, self.gpus)).items())[::-1]]
        cards = cards or ["no GPU"]
        nodes = f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}"
        return f"{' + '.join(cards)}, {self.cpus:g} CPUs on {nodes}"


def _nominal(memory_gb: float) -> float:
    """What a card is sold as, by the memory that somebody told of it."""
    return next((float(gb) for gb in SOLD_AS if 11 / 12 * gb <= memory_gb <= gb), round(memory_gb, 1))


def parse_gpus(text: str) -> Cluster:
    """`8x80GB`: a node of 8 GPUs; `2x8x80GB`: two such nodes; `4x48GB+4x80GB`: a node of each kind. Raises UsageError.

    CPUs, which the text does not tell, are taken as many, and the notes say so.
    """
    nodes: list[Node] = []
    for part in text.replace(" ", "").split("+"):
        pool = POOL.fullmatch(part)
        if pool is None or not 0 < int(pool[2]) * int(pool[1] or 1) <= MOST_GPUS or float(pool[3]) <= 0:
            raise UsageError(f"--gpus: got {text!r}, must be like 8x80GB, 2x8x80GB (nodes of 8) or 4x48GB+4x80GB")
        each = int(pool[2])
        nodes += [Node((float(pool[3]),) * each, each * ASSUMED_CPUS_PER_GPU, None)] * int(pool[1] or 1)
    return Cluster(tuple(nodes), (f"CPUs are not told by --gpus: taken as {ASSUMED_CPUS_PER_GPU} a GPU",))


def this_machine() -> Cluster:
    """The machine that this process runs on."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return Cluster((Node(tuple(_gpus_here()), cpus, memory),))


def _gpus_here() -> Iterator[float]:
    # Without the driver's file there is nothing for torch to find, and importing it takes seconds.
    if not Path("/dev/nvidiactl").exists():
        return
    import torch

    for n in range(torch.cuda.device_count()):
        yield torch.cuda.get_device_properties(n).total_memory / GB
