"""GPU memory and work of the stages with their published weights: from sizes of shots to bytes and operations.

The table `memory_table.json` is written by `benchmarks/trace_memory.py`, which runs all networks at full size without weights.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from operator import add
from pathlib import Path
from typing import NamedTuple

TABLE_FILE = Path(__file__).with_name("memory_table.json")
FP8 = "fp8_storage"
"""Variant of a network whose weights are stored in 8 bits, and computed with in 16 or 8."""
LORA_RANK = 32
"""Rank of the LoRA in the table."""
TILES_PX = (512, 256)
"""Sides of the tiles of an autoencoder that are in the table, and that stages fall back to."""
RESULT_COPIES = 3
"""Copies of an image or a clip in uint8 in host memory: as it comes from the GPU, as Ray sends it, and the result of the call
before, which is sent meanwhile; or the passes of a clip, and what they are joined to."""
_MARGIN = 1.15
"""Factor on traced activations for workspaces of kernels and fragmentation. An assumption, not measured."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Memory of a stage in bytes."""

    weights: Mapping[str, int]
    """Part -> bytes that stay on the GPU between calls. Stages of an actor share parts of the same name."""
    peak: int
    """Further GPU memory during a call."""
    results: int = 0
    """Host memory for the results of calls."""
    host_weights: Mapping[str, int] = field(default_factory=dict)
    """Part -> bytes of weights that stay in host memory: those that run there, and those that leave the GPU in a call, of which
    a copy stays."""

    @property
    def host(self) -> int:
        """Host memory between calls and during one, without that of the process."""
        return sum(self.host_weights.values()) + self.results

    @property
    def total(self) -> int:
        """GPU memory during a call, without the CUDA context."""
        return sum(self.weights.values()) + self.peak


class Workload(NamedTuple):
    """Work from which the planner computes seconds on a card."""

    flop: float = 0.0
    """Floating-point operations of matrix products, convolutions and attention: a multiplication and an addition are two."""
    float32_flop: float = 0.0
    """Part of `flop` that is computed in 32 bits (TF32), at half the speed."""
    moved_bytes: float = 0.0
    """Bytes that all other operations read and write in GPU memory."""
    linked_bytes: float = 0.0
    """Bytes of weights copied from host memory to GPU memory."""
    launch_s: float = 0.0
    """Seconds that the CPU takes to start the kernels, for which the GPU waits if it is faster."""

    def __add__(self, other: Workload) -> Workload:  # type: ignore[override]
        return Workload(*map(add, self, other))

    def times(self, factor: float) -> Workload:
        return Workload(*[value * factor for value in self])

    @property
    def in_float32(self) -> Workload:
        """The same work in 32 bits, for a curve that was traced in 32 bits."""
        return self._replace(float32_flop=self.flop)

    @property
    def operations(self) -> float:
        """Size of the work: operations, and those that take a GPU as long as moving the bytes."""
        return self.flop + self.float32_flop + OPERATIONS_PER_BYTE * self.moved_bytes


OPERATIONS_PER_BYTE = 150.0
"""Operations that a GPU computes while it moves a byte: 100 to 250 on cards from the A100 to the H200, at half their peak."""
NO_WORK = Workload()


class ShotWork(NamedTuple):
    """Work of a shot in a stage."""

    steps: Workload
    """The part that grows with the number of steps."""
    fixed: Workload = NO_WORK
    """The part that does not, such as text encoding and decoding."""
    shared: Workload = NO_WORK
    """The part of `fixed` that the GPUs of a group divide evenly."""

    @property
    def total(self) -> Workload:
        return self.steps + self.fixed

    def times(self, factor: float) -> ShotWork:
        return ShotWork(self.steps.times(factor), self.fixed.times(factor), self.shared.times(factor))


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a call."""

    network: str
    """The network that runs, which is alone on the GPU if the weights of all wait in host memory."""
    peak: int
    """Bytes of activations."""


def memory_of_phases(weights: Mapping[str, int], phases: Sequence[Phase], *, cpu_offload: bool, results: int) -> StageMemory:
    """Return the memory of a call. `cpu_offload`: weights are in host memory until a phase needs them."""
    if not cpu_offload:
        return StageMemory(weights, max(phase.peak for phase in phases), results)
    peak = max(weights[phase.network] + phase.peak for phase in phases)
    return StageMemory({}, peak, results, weights)


def offload_work(networks: Sequence[str], dtype: str, *, cpu_offload: bool) -> Workload:
    """Return the work of copying weights to the GPU for a call. `networks`: in order; one that runs again counts twice."""
    return Workload(linked_bytes=sum(weight_bytes(name, dtype) for name in networks) if cpu_offload else 0)


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """Traced sizes. All are in bytes, for 16 bits per number; curves whose name says so include parts in 32 bits."""

    versions: Mapping[str, str]
    """Package -> version with which the table was traced."""
    weights: Mapping[str, int]
    """Network -> bytes."""
    curves: Mapping[str, Sequence[tuple[int, int]]]
    """Name -> points (pixels times frames, bytes), in ascending order. A single point is a constant."""
    work: Mapping[str, Sequence[tuple[int, int, float, float]]]
    """Name -> terms of the polynomials of operations and of bytes that other operations move: exponent of the pixels, exponent
    of the frames, and both factors. They pass through the traced sizes."""

    def curve(self, name: str, pixels: int) -> float:
        """Return the bytes of a curve for a number of pixels: linear between points, and beyond them as between the nearest."""
        points = self.curves[name]
        if len(points) == 1:
            return points[0][1]
        right = min(max(bisect_left(points, (pixels,)), 1), len(points) - 1)
        (x0, before), (x1, after) = points[right - 1], points[right]
        return max(0.0, before + (after - before) * (pixels - x0) / (x1 - x0))

    def work_of(self, name: str, pixels: int, frames: float) -> Workload:
        """Return the work of a network for frames of this many pixels."""
        sizes = [(pixels**by_pixels * frames**by_frames, flop, moved) for by_pixels, by_frames, flop, moved in self.work[name]]
        return Workload(
            flop=sum(size * flop for size, flop, _ in sizes), moved_bytes=sum(size * moved for size, _, moved in sizes)
        )


@cache
def load_table() -> MemoryTable:
    """Return the table of this package."""
    content = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    curves = {name: tuple((x, y) for x, y in points) for name, points in content["curves"].items()}
    work = {name: tuple((a, b, flop, moved) for a, b, flop, moved in terms) for name, terms in content["work"].items()}
    return MemoryTable(content["versions"], content["weights"], curves, work)


def weight_bytes(network: str, dtype: str) -> int:
    """Return the bytes of a network's weights in this precision, or in that of its variant (`flux/transformer:fp8_storage`)."""
    return load_table().weights[network] * (2 if dtype == "float32" and ":" not in network else 1)


FLOAT32_FILES = frozenset(
    {
        *("wan/transformer", "wan/transformer_2", "wan/vae", "wan-ti2v/transformer", "wan-ti2v/vae"),
        *("svd/unet", "svd/vae", "svd/image_encoder", "hunyuan/text_encoder_2", "infusenet/net"),
    }
)
"""Networks whose published files have 32 bits per number. Wan 2.2 I2V-A14B has 126.2 GB, InfuseNet 11.8. SVD's files without
`fp16` in their names are read, as of all weights."""


def file_bytes(part: str, held_bytes: int) -> int:
    """Return the bytes of the files from which a part of the weights is read. `held_bytes`: of the part in memory.

    Weights that are held in 8 bits are read in full. Parts without files of their own count as they are held.
    """
    table = load_table().weights
    network = part if part in table else part.removesuffix("_2")
    if network not in table or part.endswith("/lora"):
        return held_bytes
    return table[network] * (2 if part in FLOAT32_FILES else 1)


def stored(network: str, quantize: str) -> str:
    """Return the name in the table of a network's weights with this quantisation."""
    return network if quantize == "none" else f"{network}:{FP8}"


def activation_bytes(curve: str, pixels: int, dtype: str) -> int:
    """Return the bytes of a curve with the margin. `pixels`: times frames, if the curve is one of clips."""
    return int(load_table().curve(curve, pixels) * _MARGIN * (2 if dtype == "float32" else 1))


@lru_cache(4096)
def network_work(curve: str, pixels: int = 0, frames: float = 1) -> Workload:
    """Return the work of one call for frames of this many pixels: those of the clip, or latent ones of a denoising network."""
    return load_table().work_of(curve, pixels, frames)
