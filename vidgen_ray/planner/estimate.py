"""Estimate of a packing: layout, duration with a range, cost, disk space and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vidgen_ray.errors import TooExpensive, UsageError
from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.planner.demand import Demand
from vidgen_ray.planner.gpu_assignment import SHOTS_PER_SWAP
from vidgen_ray.planner.layout import Kind, Layout, Slot
from vidgen_ray.planner.prices import default_price
from vidgen_ray.planner.solver import (
    DIRECTOR_CPUS,
    ENCODER_CPUS,
    SPARE_CPUS,
    FilledSlot,
    Packing,
    host_gb_of_nodes,
    parallel_loads,
)

SHOTS_PER_SLOT = 3
"""Shots in progress per slot: one running, one queued and one in transfer."""
START_SECONDS = 15.0
"""Seconds to start the processes."""
LOAD_GB_PER_S = 1.0
"""Rate at which weights are loaded from disk."""


@dataclass(frozen=True, slots=True)
class ConsideredLayout:
    """A layout that was considered, with its rate or the reason why it was not used."""

    kind: str
    shots_per_hour: float | None
    """`None` if the layout does not fit or was not evaluated."""
    reason: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout and its estimates."""

    layout: Layout
    nodes: tuple[int, ...]
    """Index of the planned node in the cluster, per slot of the layout."""
    shares: tuple[Mapping[str, float], ...]
    """Stage -> share of the slot's time, per slot of the layout. If slots hold different stages, the rate is only reached if
    each slot keeps to its shares. A stage with share 0 runs only if the slot has nothing else to do."""
    shots: int
    shots_per_hour: float
    efficiency: float
    """Share of the time of all GPUs (or of all slots, on CPUs) in which they compute, without the start and end of the run."""
    seconds: float
    """Expected duration of the run, including loading the weights."""
    seconds_low: float
    seconds_high: float
    """Range of the expected duration."""
    gpu_hours: float
    output_bytes: float
    """Size of the outputs, without the stage cache."""
    cache_bytes: Mapping[str, float]
    """Value of `--cache` -> size of the stage cache."""
    cost: float | None
    """Cost in the currency of the price. `None` without GPUs or without a price."""
    bottleneck: str | None
    """Stage that limits the rate."""
    stage_seconds: Mapping[str, float]
    """Stage -> mean seconds per shot."""
    considered: tuple[ConsideredLayout, ...]
    notes: tuple[str, ...]
    """Assumptions and hints, to be shown with the plan."""

    def check_cost(self, max_cost: float | None) -> None:
        """Raise TooExpensive if the cost exceeds `max_cost`, UsageError if the cost is unknown. `None` disables the check."""
        if max_cost is None:
            return
        if self.cost is None:
            raise UsageError("--max-cost: the cost of this plan is unknown; pass --price PER_GPU_HOUR for a run on GPUs")
        if self.cost > max_cost:
            raise TooExpensive(
                f"the plan costs {self.cost:,.2f} for {self.gpu_hours:,.1f} GPU-hours, --max-cost allows {max_cost:,.2f}; "
                "render fewer shots, use fewer steps, or raise --max-cost"
            )


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per shot and their uncertainty."""

    seconds: Mapping[str, float]
    """Stage -> mean seconds per shot."""
    spread: float
    """Relative standard deviation of the sum."""
    assumed: tuple[str, ...]
    """Stages without calibration or seconds in the profile."""

    @property
    def shot_seconds(self) -> float:
        return sum(self.seconds.values())


def cpus_needed(layout: Layout) -> float:
    """Return the CPUs of all processes of a run with this layout."""
    return sum(slot.cpus for slot in layout.slots) + layout.encoders * ENCODER_CPUS + DIRECTOR_CPUS + SPARE_CPUS


def estimate(
    kind: Kind,
    packing: Packing,
    demand: Demand,
    cluster: Cluster,
    timing: Timing,
    considered: tuple[ConsideredLayout, ...],
    price: float | None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the plan of a packing for the shots of the demand. `notes`: further notes."""
    assignments = [filled.assignment for filled in packing.slots]
    slots = tuple(filled.assignment.slot(max(cluster.nodes[filled.node].gpus, default=0.0)) for filled in packing.slots)
    on_gpu = any(slot.has_gpu for slot in slots)
    # A single shot runs its stages one after another, regardless of the number of slots.
    one_shot = timing.shot_seconds
    render_seconds = max(demand.shots / packing.rate, one_shot)
    # At the end of a run, slots become idle one after another: on average they lose half a shot.
    drain_seconds = one_shot / 2 * (1 - 1 / demand.shots)
    actors = {(actor.position, actor.gpu_gb + actor.host_gb) for assignment in assignments for actor in assignment.actors}
    load_seconds = START_SECONDS + sum(gb for _, gb in sorted(actors)) / LOAD_GB_PER_S
    expected = load_seconds + render_seconds + drain_seconds
    gpu_hours = len(cluster.gpus) * expected / 3600 if on_gpu else 0.0
    per_hour, is_default = _price(cluster, price) if on_gpu else (None, False)
    units = len(cluster.gpus) if on_gpu else max(1, len(slots))
    return Plan(
        layout=Layout(kind, slots, packing.encoders, _window(slots, demand.shots), parallel_loads(packing, cluster)),
        nodes=tuple(filled.node for filled in packing.slots),
        shares=tuple(_stage_shares(filled, timing) for filled in packing.slots),
        shots=demand.shots,
        shots_per_hour=packing.rate * 3600,
        efficiency=min(1.0, packing.rate * timing.shot_seconds / units),
        seconds=expected,
        seconds_low=render_seconds * (1 - timing.spread),
        seconds_high=load_seconds + (render_seconds + one_shot) * (1 + timing.spread),
        gpu_hours=gpu_hours,
        output_bytes=demand.output_bytes,
        cache_bytes={
            "none": 0.0,
            "images": demand.image_cache_bytes,
            "all": demand.image_cache_bytes + demand.clip_cache_bytes,
        },
        cost=None if per_hour is None else per_hour * expected / 3600,
        bottleneck=_bottleneck(packing, timing),
        stage_seconds=timing.seconds,
        considered=considered,
        notes=(*_notes(packing, cluster, timing, on_gpu, is_default), *notes),
    )


def _stage_shares(filled: FilledSlot, timing: Timing) -> dict[str, float]:
    """Divide the share of each actor among its stages, in proportion to their seconds."""
    shares = {}
    for actor in sorted(filled.assignment.actors, key=lambda actor: actor.position):
        for stage in actor.stages:
            shares[stage] = round(filled.shares[actor.name] * timing.seconds[stage] / actor.seconds, 6)
    return shares


def _window(slots: Sequence[Slot], shots: int) -> int:
    """Return how many shots must be in progress so that no slot waits, and each turn of swapped stages is full."""
    shots_needed = sum(
        2 * SHOTS_PER_SWAP if any(worker.swap_groups for worker in slot.workers) else SHOTS_PER_SLOT for slot in slots
    )
    return max(1, min(shots_needed, shots))


def _price(cluster: Cluster, price: float | None) -> tuple[float | None, bool]:
    """Return the price of an hour of all GPUs, and whether it is from the table of default prices."""
    if price is not None:
        return price * len(cluster.gpus), False
    prices = [default_price(memory) for memory in cluster.gpus]
    return (None, False) if None in prices else (sum(p for p in prices if p is not None), True)


def _bottleneck(packing: Packing, timing: Timing) -> str | None:
    """Return the longest stage of the actor with the most seconds per slot."""
    holders = Counter(actor for filled in packing.slots for actor in filled.assignment.actors)
    if not holders:
        return None
    slowest = max(holders, key=lambda actor: (actor.seconds / holders[actor], -actor.position))
    return max(slowest.stages, key=lambda stage: timing.seconds[stage])


def _notes(packing: Packing, cluster: Cluster, timing: Timing, on_gpu: bool, default_price: bool) -> Iterator[str]:
    yield from cluster.notes
    if timing.assumed:
        yield f"the profile has no seconds of {', '.join(timing.assumed)}: assuming those of an H100 until a run measures them"
    if unknown := [gb for node, gb in host_gb_of_nodes(packing).items() if cluster.nodes[node].memory_gb is None]:
        yield f"the workers need up to {max(unknown):.4g} GB of host memory per node, which is assumed to be available"
    if on_gpu and (idle := len(cluster.gpus) - len(packing.slots)):
        yield f"{idle} of {len(cluster.gpus)} GPUs are idle: too little memory, too few shots, or too few CPUs"
    if default_price:
        yield "the price is an estimate; set it with --price or price_per_gpu_hour in the profile"
