"""Machines to plan for: GPUs with memory, speed and price, CPUs, host memory; and the profile that suits their GPUs.

Speeds are those of NVIDIA's data sheets and architecture white papers: dense tensor-core operations in 16 bits with sums in 32
bits, without sparsity. GeForce cards add in 32 bits at half the speed that is advertised: an eighth of the "AI TOPS" of the
RTX 40 series, which are sparse and of 8 bits, and a sixteenth of those of the RTX 50 series, which are of 4 bits.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from vidgen_ray.errors import UsageError
from vidgen_ray.planner.speed_trials import CPU, settled
from vidgen_ray.profile import AUTO, LOSSY, Profile, load_profile
from vidgen_ray.stages.memory_table import Workload


@dataclass(frozen=True, slots=True)
class GpuCard:
    """One kind of GPU."""

    name: str
    memory_gb: float
    """Memory in GB (2^30 bytes) that torch reports, which is less than the nominal one."""
    tflop_per_s: float
    """Peak of matrix products in 16 bits, in 10^12 floating-point operations per second."""
    gb_per_s: float
    """Bandwidth of its memory, in 10^9 bytes per second."""
    link_gb_per_s: float
    """Bandwidth from pinned host memory, in 10^9 bytes per second: PCIe 3, 4 or 5, or NVLink."""
    usd_per_hour: float
    """An order of magnitude, from cloud price lists of 2025 and 2026."""
    pattern: str
    """Regular expression that the name reported by the driver contains."""

    halved: bool = False
    """It adds in 32 bits at half the speed that it multiplies, which leaves its kernels more time to load numbers."""
    unified: bool = False
    """It has no memory of its own: it computes in that of the host."""
    spread: float = 0.0
    """Relative spread of planned seconds, if it is larger than `ASSUMED_SPREAD` by public figures; see docs/accuracy.md."""

    def seconds(self, work: Workload, share: float, factor: float = 1.0) -> float:
        """Return the seconds of the work.

        `share`: fraction of the peak that matrix products and convolutions reach. `factor`: of the GPU's part.
        """
        share = min(MAX_SHARE, share * HALVED_GAIN) if self.halved else share
        computing = (work.flop + work.float32_flop) / (self.tflop_per_s * 1e12 * share)
        moving = work.moved_bytes / (self.gb_per_s * 1e9 * BANDWIDTH_SHARE)
        return max(factor * (computing + moving), work.launch_s) + self.copy_seconds(work.linked_bytes)

    def copy_seconds(self, n_bytes: float) -> float:
        """Return the seconds of copying weights from pinned host memory to the GPU."""
        return n_bytes / (self.link_gb_per_s * 1e9)

    def share_of_peak(self, flop: float, seconds: float) -> float:
        """Return the fraction of the peak that these operations reach if they take these seconds."""
        return flop / (seconds * self.tflop_per_s * 1e12)


BANDWIDTH_SHARE = 0.8
"""Fraction of the memory bandwidth that normalisation, activation functions and copies reach."""
HALVED_GAIN, MAX_SHARE = 1.5, 0.9
"""Factor on the fraction of a halved peak, from published times of FLUX.1-dev on the RTX 4090, and the largest fraction."""
PCIE3, PCIE4, PCIE5, NVLINK_C2C, WITHIN_GB10 = 12, 25, 50, 350, 136
"""Bandwidths of copies to GPU memory, about 0.8 of the nominal ones. Within unified memory, a copy reads and writes it."""

CARDS = (
    GpuCard("T4", 14.6, 65, 320, PCIE3, 0.35, r"\bT4\b"),
    # The versions of 16 GB. PCIe has eight lanes: half the bandwidth.
    GpuCard("RTX 5060 Ti", 15.5, 47.4, 448, PCIE5 / 2, 0.12, r"RTX 5060 Ti", halved=True),
    GpuCard("RTX 4060 Ti", 15.6, 44.1, 288, PCIE4 / 2, 0.12, r"RTX 4060 Ti", halved=True),
    GpuCard("RTX 5070 Ti", 15.5, 87.9, 896, PCIE5, 0.25, r"RTX 5070 Ti", halved=True),
    GpuCard("RTX 4080", 15.7, 97.5, 717, PCIE4, 0.3, r"RTX 4080", halved=True),
    GpuCard("RTX 5080", 15.5, 112.6, 960, PCIE5, 0.35, r"RTX 5080", halved=True),
    GpuCard("A4500", 19.7, 94.6, 640, PCIE4, 0.25, r"RTX A4500"),
    GpuCard("L4", 22.0, 121, 300, PCIE4, 0.6, r"\bL4\b"),
    GpuCard("A10G", 22.0, 70, 600, PCIE4, 0.8, r"\bA10G\b", halved=True),
    GpuCard("A10", 22.1, 125, 600, PCIE4, 0.75, r"\bA10\b"),
    GpuCard("RTX 3090", 23.6, 71, 936, PCIE4, 0.25, r"RTX 3090", halved=True),
    GpuCard("A5000", 23.7, 111, 768, PCIE4, 0.3, r"RTX A5000"),
    GpuCard("RTX 4090 D", 23.6, 147.1, 1008, PCIE4, 0.5, r"RTX 4090 D", halved=True),
    GpuCard("RTX 4090", 23.6, 165.2, 1008, PCIE4, 0.5, r"RTX 4090", halved=True),
    GpuCard("RTX 5090", 31.4, 209.5, 1792, PCIE5, 0.8, r"RTX 5090", halved=True),
    GpuCard("A100 40 GB", 39.4, 312, 1555, PCIE4, 1.3, r"\bA100.*40"),
    GpuCard("A40", 44.4, 149.7, 696, PCIE4, 0.5, r"\bA40\b"),
    GpuCard("L40S", 44.4, 362, 864, PCIE4, 1.0, r"\bL40S\b"),
    GpuCard("A6000", 47.5, 154.8, 768, PCIE4, 0.6, r"RTX A6000"),
    GpuCard("RTX 6000 Ada", 47.4, 364.2, 960, PCIE4, 0.9, r"6000 Ada"),
    GpuCard("A100 80 GB", 79.2, 312, 2039, PCIE4, 1.8, r"\bA100"),
    GpuCard("H100 PCIe", 79.2, 756, 2039, PCIE5, 2.2, r"H100 PCIe"),
    GpuCard("H100", 79.2, 989, 3352, PCIE5, 2.5, r"H100(?!.*(NVL|PCIe))", spread=0.4),
    GpuCard("H100 NVL", 93.1, 835, 3938, PCIE5, 2.6, r"H100 NVL"),
    GpuCard("RTX PRO 6000", 95.0, 503.8, 1792, PCIE5, 1.8, r"RTX PRO 6000", spread=0.45),
    GpuCard("GH200", 94.5, 989, 4022, NVLINK_C2C, 2.5, r"GH200(?! 144G)"),
    # An eighth of what is advertised for sparse numbers of 4 bits: torch reaches 92. The machine's price over three years.
    GpuCard("GB10", 119.6, 125, 273, WITHIN_GB10, 0.15, r"\bGB10\b", unified=True),
    GpuCard("H200", 139.8, 989, 4915, PCIE5, 3.6, r"\bH200"),
    GpuCard("GH200 144 GB", 142.5, 989, 4900, NVLINK_C2C, 3.0, r"GH200 144G"),
    GpuCard("B200", 178.4, 2250, 8000, PCIE5, 5.5, r"\bB200"),
    # Its link is PCIe 6, which few hosts have.
    GpuCard("B300", 268.6, 2250, 8000, PCIE5, 6.5, r"\bB300"),
)
TYPICAL = ("RTX 4080", "A4500", "RTX 4090", "RTX 5090", "A100 40 GB", "L40S", "H100", "RTX PRO 6000", "H200", "B200")
"""Cards that stand for an unknown one of at most their memory, smallest first."""
_TYPICAL_CARDS = tuple(card for card in CARDS if card.name in TYPICAL)
H100 = next(card for card in CARDS if card.name == "H100")
"""Card for which seconds are computed if none is known."""
GB10 = next(card for card in CARDS if card.name == "GB10")
"""Card that stands for an unknown one with unified memory."""


def card_reported_as(name: str) -> GpuCard | None:
    """Return the card for the name that NVIDIA's driver or torch reports. `None` if it is not in the table.

    A laptop's GPU has the name of a faster card.
    """
    if "Laptop" in name:
        return None
    return next((card for card in CARDS if re.search(card.pattern, name)), None)


def card_named(text: str) -> GpuCard | None:
    """Return the card that a user names, such as `L40S`, `rtx4090` or `A100-80GB`. `None` if it is not in the table."""
    wanted = _plain(text)
    return next((card for card in CARDS if wanted in (_plain(card.name), _plain(card.name.removeprefix("RTX")))), None)


def typical_card(memory_gb: float) -> GpuCard:
    """Return the card that stands for one of which only the memory is known."""
    return next((card for card in _TYPICAL_CARDS if memory_gb <= card.memory_gb * 13 / 12), _TYPICAL_CARDS[-1])


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


GB = 2**30
"""Bytes per GB, as used by GPU vendors and torch."""
ASSUMED_CPUS_PER_GPU = 16
"""CPUs per GPU for clusters given as text, which has no CPU counts."""
WSL_DEVICE = Path("/dev/dxg")
GPU_DEVICES = (Path("/dev/nvidiactl"), WSL_DEVICE)
"""Device files of NVIDIA's driver on Linux and on WSL2."""
POOL = re.compile(r"(?:(\d+)x)?(\d+)x(?:(\d+(?:\.\d+)?)GB|([A-Z][A-Z0-9-]*))", re.IGNORECASE)
WITHOUT_X = re.compile(r"(\d+)?([A-Z][A-Z0-9-]*)", re.IGNORECASE)
"""GPUs by name, without the `x` between number and name."""
MAX_GPUS = 100_000
RAY_STORE_SHARE = 0.3
"""Part of a machine's memory that Ray's object store may take by default."""
OTHER_PROCESSES_GB = 6.0
"""Unified memory for Ray, driver, director and encoders. x264 takes 1.7 GB at 4096x2304; the rest is an assumption."""
NOMINAL_GB = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 180, 288)
"""Nominal memory sizes of GPUs. torch and the driver report different values, up to 1/12 less."""

Label = tuple[str, str]
"""Name and value of a Ray node label."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine."""

    gpus: tuple[float, ...]
    """GB of memory of each GPU. Of a unified memory, what workers may take on GPU and host together."""
    cpus: float
    memory_gb: float | None
    """Host memory. `None` if unknown. The same as that of the GPU if it is unified."""
    label: Label | None = None
    """Label that only nodes with these GPUs have. `None` if unknown."""
    card: GpuCard | None = None
    """Kind of all its GPUs. `None` if unknown."""

    @classmethod
    def of_gpus(cls, gpus: Sequence[tuple[str, float | None]], cpus: float, memory_gb: float) -> Node:
        """Return the machine with these GPUs.

        `gpus`: name and GB of memory of each, `None` if it is unified or not reported. `memory_gb`: of the host, without Ray's
        object store if that of the GPU is unified.
        """
        card = card_reported_as(gpus[0][0]) if gpus else None
        # A driver may not report the memory of virtual GPUs.
        known = [(card.memory_gb if gb is None and card and not card.unified else gb) for _, gb in gpus]
        sizes = [gb for gb in known if gb is not None]
        if len(sizes) == len(gpus) and not (card and card.unified):
            return cls(tuple(sizes), cpus, memory_gb or None, card=card)
        pool_gb = max(0.0, memory_gb - OTHER_PROCESSES_GB)
        return cls((pool_gb,), cpus, pool_gb, card=card if card and card.unified else GB10)

    @property
    def is_unified(self) -> bool:
        """Return whether GPU and host have the same memory."""
        return self.card is not None and self.card.unified

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
                # torch and the driver report less than a card's nominal memory.
                size = next((float(gb) for gb in NOMINAL_GB if 11 / 12 * gb <= memory_gb <= gb), round(memory_gb, 1))
                counts[size, node.card.name if node.card else f"{size:g} GB"] += 1
        return [(name, count) for (_, name), count in sorted(counts.items(), reverse=True)]


def parse_gpus(text: str) -> Cluster:
    """Parse a cluster. Raises UsageError.

    `8xL40S` is one node with 8 GPUs, `2x8x80GB` are two such nodes, `4x48GB+4xH100` is one node of each type. Each GPU
    comes with `ASSUMED_CPUS_PER_GPU` CPUs, which is stated in the notes.
    """
    nodes: list[Node] = []
    for part in text.replace(" ", "").split("+"):
        pool = POOL.fullmatch(part)
        if pool is None or not 0 < int(pool[2]) * int(pool[1] or 1) <= MAX_GPUS or float(pool[3] or 1) <= 0:
            named = WITHOUT_X.fullmatch(part)
            meant = f"; did you mean {named[1] or 1}x{named[2]}?" if named and card_named(named[2]) else ""
            allowed = f"must be like 8xL40S, 8x80GB, 2x8x80GB (nodes of 8) or 4x48GB+4x80GB{meant}"
            raise UsageError(f"--gpus: got {text!r}, {allowed}")
        card = card_named(pool[4]) if pool[4] else None
        if pool[4] and card is None:
            names = ", ".join(card.name.replace(" GB", "GB").replace(" ", "-") for card in CARDS)
            raise UsageError(f"--gpus: got {pool[4]!r}, must be a memory size such as 80GB or one of {names}")
        gpus, machines, memory_gb = int(pool[2]), int(pool[1] or 1), card.memory_gb if card else float(pool[3])
        if card and card.unified:
            # A machine has one.
            node = Node.of_gpus([(card.name, None)], ASSUMED_CPUS_PER_GPU, memory_gb * (1 - RAY_STORE_SHARE))
            nodes += [node] * gpus * machines
        else:
            nodes += [Node((memory_gb,) * gpus, gpus * ASSUMED_CPUS_PER_GPU, None, card=card)] * machines
    return Cluster(tuple(nodes), (f"--gpus does not specify CPUs: assuming {ASSUMED_CPUS_PER_GPU} per GPU",))


def this_machine() -> Cluster:
    """Return a cluster of this machine only."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    gpus = list(_local_gpus())
    is_unified = any(gb is None for _, gb in gpus)
    return Cluster((Node.of_gpus(gpus, cpus, memory_gb * (1 - RAY_STORE_SHARE) if is_unified else memory_gb),))


def _local_gpus() -> Iterator[tuple[str, float | None]]:
    """Yield name and GB of memory of each GPU, `None` if it is unified."""
    # Importing torch takes seconds. Without one of these device files it finds no GPUs.
    if not any(device.exists() for device in GPU_DEVICES):
        return
    import torch

    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        yield properties.name, None if properties.is_integrated else properties.total_memory / GB


def profile_for(name_or_path: str, cluster: Callable[[], Cluster] = this_machine) -> Profile:
    """Load a profile with the options for these GPUs, and those that trials on them have accepted.

    `auto`: `gpu` on GPUs, `demo` without any. `auto-lossy`: the same with lossy options.
    In a cluster with several kinds of GPUs, those of the kind that computes most in total decide. `cluster` is only called if
    it matters. Raises ProfileError.
    """
    lossless = name_or_path.removesuffix(LOSSY)
    found = cluster() if lossless == AUTO else None
    profile = load_profile(lossless if found is None else "gpu" if found.gpus else "demo")
    actors = profile.actors.values()
    has_sizes = bool(profile.smaller) or any(actor.smaller for actor in actors)
    has_trials = any(actor.trial_options or actor.lossy_trial_options for actor in actors)
    if has_sizes or has_trials:
        found = found or cluster()
    if found and has_sizes and found.gpus:
        card = found.assumed_cards[0]
        smallest_gb = min(gb for node in found.nodes if node.assumed_card == card for gb in node.gpus)
        # What moves weights to the host on small GPUs gains nothing in unified memory.
        profile = profile.for_size(ceil(card.memory_gb if card.unified else smallest_gb))
    if lossless != name_or_path:
        profile = profile.allowing_loss()
    return settled(profile, found.kinds) if found and has_trials else profile
