"""Machines to plan for: GPUs and their memory, CPUs, host memory; and the profile that suits their GPUs."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from vidgen_ray.errors import UsageError
from vidgen_ray.planner.cards import CARDS, GpuCard, card_named, card_reported_as, typical_card
from vidgen_ray.planner.speed_trials import CPU, settled
from vidgen_ray.profile import AUTO, Profile, load_profile

GB = 2**30
"""Bytes per GB, as used by GPU vendors and torch."""
ASSUMED_CPUS_PER_GPU = 16
"""CPUs per GPU for clusters given as text, which has no CPU counts."""
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Device files of NVIDIA's driver on Linux and on WSL2."""
POOL = re.compile(r"(?:(\d+)x)?(\d+)x(?:(\d+(?:\.\d+)?)GB|([A-Z][A-Z0-9-]*))", re.IGNORECASE)
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
    card: GpuCard | None = None
    """Kind of all its GPUs. `None` if unknown."""

    @property
    def assumed_card(self) -> GpuCard | None:
        """Kind of its GPUs: a typical one of their memory, if it is unknown. `None` without GPUs."""
        return self.card or (typical_card(max(self.gpus)) if self.gpus else None)

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
        """Key of the calibration for these GPUs, such as `H100` or, if their kind is unknown, `80 GB`; `cpu` without GPUs."""
        return " + ".join(self.kinds) or CPU

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the GPUs, such as `H100` or, if it is unknown, `80 GB`, those with most memory first."""
        return tuple(name for name, _ in self._counts())

    def with_room(self, room_gb: float) -> Cluster:
        """Return the cluster with as much less memory on each GPU."""
        nodes = (replace(node, gpus=tuple(max(0.0, gb - room_gb) for gb in node.gpus)) for node in self.nodes)
        return replace(self, nodes=tuple(nodes))

    @property
    def assumed_cards(self) -> tuple[GpuCard, ...]:
        """Distinct kinds of GPUs, the one that computes most in total first."""
        speeds: defaultdict[GpuCard, float] = defaultdict(float)
        for node in self.nodes:
            if card := node.assumed_card:
                speeds[card] += len(node.gpus) * card.tflop_per_s
        return tuple(sorted(speeds, key=lambda card: -speeds[card]))

    def __str__(self) -> str:
        """`8 x H100, 128 CPUs on 1 node`."""
        cards = [f"{count} x {name}" for name, count in self._counts()] or ["no GPU"]
        nodes = f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}"
        return f"{' + '.join(cards)}, {self.cpus:g} CPUs on {nodes}"

    def _counts(self) -> list[tuple[str, int]]:
        """Return names and numbers of the GPUs, those with most memory first."""
        counts: Counter[tuple[float, str]] = Counter()
        for node in self.nodes:
            for memory_gb in node.gpus:
                size = _nominal_gb(memory_gb)
                counts[size, node.card.name if node.card else f"{size:g} GB"] += 1
        return [(name, count) for (_, name), count in sorted(counts.items(), reverse=True)]


def _nominal_gb(memory_gb: float) -> float:
    """Return the nominal memory of a GPU for the memory reported by torch or the driver."""
    return next((float(gb) for gb in NOMINAL_GB if 11 / 12 * gb <= memory_gb <= gb), round(memory_gb, 1))


def parse_gpus(text: str) -> Cluster:
    """Parse a cluster. Raises UsageError.

    `8xL40S` is one node with 8 GPUs, `2x8x80GB` are two such nodes, `4x48GB+4xH100` is one node of each type. Each GPU
    comes with `ASSUMED_CPUS_PER_GPU` CPUs, which is stated in the notes.
    """
    nodes: list[Node] = []
    for part in text.replace(" ", "").split("+"):
        pool = POOL.fullmatch(part)
        if pool is None or not 0 < int(pool[2]) * int(pool[1] or 1) <= MAX_GPUS or float(pool[3] or 1) <= 0:
            raise UsageError(f"--gpus: got {text!r}, must be like 8xL40S, 8x80GB, 2x8x80GB (nodes of 8) or 4x48GB+4x80GB")
        card = card_named(pool[4]) if pool[4] else None
        if pool[4] and card is None:
            raise UsageError(f"--gpus: got {pool[4]!r}, must be a memory size such as 80GB or one of {', '.join(_names())}")
        gpus, memory_gb = int(pool[2]), card.memory_gb if card else float(pool[3])
        nodes += [Node((memory_gb,) * gpus, gpus * ASSUMED_CPUS_PER_GPU, None, card=card)] * int(pool[1] or 1)
    return Cluster(tuple(nodes), (f"--gpus does not specify CPUs: assuming {ASSUMED_CPUS_PER_GPU} per GPU",))


def _names() -> list[str]:
    return [card.name.replace(" GB", "GB").replace(" ", "-") for card in CARDS]


def this_machine() -> Cluster:
    """Return a cluster of this machine only."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    gpus = list(_local_gpus())
    card = card_reported_as(gpus[0][0]) if gpus else None
    return Cluster((Node(tuple(memory_gb for _, memory_gb in gpus), cpus, memory, card=card),))


def _local_gpus() -> Iterator[tuple[str, float]]:
    """Yield name and GB of memory of each GPU."""
    # Importing torch takes seconds. Without one of these device files it finds no GPUs.
    if not any(device.exists() for device in GPU_DEVICES):
        return
    import torch

    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        yield properties.name, properties.total_memory / GB


def profile_for(name_or_path: str, cluster: Callable[[], Cluster] = this_machine) -> Profile:
    """Load a profile with the options for these GPUs, and those that trials on them have accepted.

    `auto`: `gpu` on GPUs, `demo` without any.
    In a cluster with several kinds of GPUs, those of the kind that computes most in total decide. `cluster` is only called if
    it matters. Raises ProfileError.
    """
    found = cluster() if name_or_path == AUTO else None
    profile = load_profile(name_or_path if found is None else "gpu" if found.gpus else "demo")
    actors = profile.actors.values()
    has_sizes = bool(profile.smaller) or any(actor.smaller for actor in actors)
    if not has_sizes and not any(actor.trial_options for actor in actors):
        return profile
    found = found or cluster()
    if has_sizes and found.gpus:
        card = found.assumed_cards[0]
        profile = profile.for_size(ceil(min(gb for node in found.nodes if node.assumed_card == card for gb in node.gpus)))
    return settled(profile, found.kinds)
