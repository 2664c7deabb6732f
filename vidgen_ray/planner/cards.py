"""GPUs: their memory, speed and price, from which the planner computes seconds and cost.

Speeds are those of NVIDIA's data sheets and architecture white papers: dense tensor-core operations in 16 bits with sums in 32
bits, without sparsity. GeForce cards add in 32 bits at half the speed that is advertised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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

    def seconds(self, work: Workload, share: float) -> float:
        """Return the seconds of the work. `share`: fraction of the peak that matrix products and convolutions reach."""
        computing = work.flop / (self.tflop_per_s * 1e12 * share)
        moving = work.moved_bytes / (self.gb_per_s * 1e9 * BANDWIDTH_SHARE)
        return computing + moving + self.copy_seconds(work.linked_bytes)

    def copy_seconds(self, n_bytes: float) -> float:
        """Return the seconds of copying weights from pinned host memory to the GPU."""
        return n_bytes / (self.link_gb_per_s * 1e9)

    def share_of_peak(self, work: Workload, seconds: float) -> float:
        """Return the fraction of the peak that work reaches if it takes these seconds."""
        return work.flop / (seconds * self.tflop_per_s * 1e12)


BANDWIDTH_SHARE = 0.8
"""Fraction of the memory bandwidth that normalisation, activation functions and copies reach."""
PCIE3, PCIE4, PCIE5, NVLINK_C2C = 12, 25, 50, 350

CARDS = (
    GpuCard("T4", 14.6, 65, 320, PCIE3, 0.35, r"\bT4\b"),
    GpuCard("RTX 4080", 15.7, 97.5, 717, PCIE4, 0.3, r"RTX 4080"),
    GpuCard("RTX 5080", 15.5, 112.6, 960, PCIE5, 0.35, r"RTX 5080"),
    GpuCard("A4500", 19.7, 94.6, 640, PCIE4, 0.25, r"RTX A4500"),
    GpuCard("L4", 22.0, 121, 300, PCIE4, 0.6, r"\bL4\b"),
    GpuCard("A10G", 22.0, 70, 600, PCIE4, 0.8, r"\bA10G\b"),
    GpuCard("A10", 22.1, 125, 600, PCIE4, 0.75, r"\bA10\b"),
    GpuCard("RTX 3090", 23.6, 71, 936, PCIE4, 0.25, r"RTX 3090"),
    GpuCard("A5000", 23.7, 111, 768, PCIE4, 0.3, r"RTX A5000"),
    GpuCard("RTX 4090", 23.6, 165.2, 1008, PCIE4, 0.5, r"RTX 4090"),
    GpuCard("RTX 5090", 31.4, 209.5, 1792, PCIE5, 0.8, r"RTX 5090"),
    GpuCard("A100 40 GB", 39.4, 312, 1555, PCIE4, 1.3, r"\bA100.*40"),
    GpuCard("A40", 44.4, 149.7, 696, PCIE4, 0.5, r"\bA40\b"),
    GpuCard("L40S", 44.4, 362, 864, PCIE4, 1.0, r"\bL40S\b"),
    GpuCard("A6000", 47.5, 154.8, 768, PCIE4, 0.6, r"RTX A6000"),
    GpuCard("RTX 6000 Ada", 47.4, 364.2, 960, PCIE4, 0.9, r"6000 Ada"),
    GpuCard("A100 80 GB", 79.2, 312, 2039, PCIE4, 1.8, r"\bA100"),
    GpuCard("H100 PCIe", 79.2, 756, 2039, PCIE5, 2.2, r"H100 PCIe"),
    GpuCard("H100", 79.2, 989, 3352, PCIE5, 2.5, r"H100(?!.*(NVL|PCIe))"),
    GpuCard("H100 NVL", 93.1, 835, 3938, PCIE5, 2.6, r"H100 NVL"),
    GpuCard("RTX PRO 6000", 95.0, 503.8, 1792, PCIE5, 1.8, r"RTX PRO 6000"),
    GpuCard("GH200", 94.5, 989, 4022, NVLINK_C2C, 2.5, r"GH200"),
    GpuCard("H200", 139.8, 989, 4915, PCIE5, 3.6, r"\bH200"),
    GpuCard("B200", 178.4, 2250, 8000, PCIE5, 5.5, r"\bB200"),
)
TYPICAL = ("RTX 4080", "A4500", "RTX 4090", "RTX 5090", "A100 40 GB", "L40S", "H100", "RTX PRO 6000", "H200", "B200")
"""Cards that stand for an unknown one of at most their memory, smallest first."""
_TYPICAL_CARDS = tuple(card for card in CARDS if card.name in TYPICAL)
H100 = next(card for card in CARDS if card.name == "H100")
"""Card for which seconds are computed if none is known."""


def card_reported_as(name: str) -> GpuCard | None:
    """Return the card for the name that NVIDIA's driver or torch reports. `None` if it is not in the table."""
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
