"""What a packing promises: the layout, seconds with a range, cost, disk, and what to know about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vidgen_ray.errors import TooExpensive, UsageError
from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.planner.demand import Demand
from vidgen_ray.planner.gpu_assignment import TURN_SHOTS
from vidgen_ray.planner.layout import Kind, Layout, Slot
from vidgen_ray.planner.prices import default_price
from vidgen_ray.planner.solver import DIRECTOR_CPUS, ENCODER_CPUS, SPARE_CPUS, FilledSlot, Packing

SHOTS_PER_SLOT = 3
"""In progress: one is worked on, one waits, one is on its way."""
START_SECONDS = 15.0
LOAD_GB_PER_S = 1.0
"""Weights from a disk."""


@dataclass(frozen=True, slots=True)
class ConsideredLayout:
    """A way to lay out the run, and what became of it."""

    kind: str
    shots_per_hour: float | None
    """None where it cannot be packed, or was not worked out."""
    reason: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout and what it promises."""

    layout: Layout
    nodes: tuple[int, ...]
    """For each slot of the layout the node of the cluster that it is planned on."""
    shares: tuple[Mapping[str, float], ...]
    """For each slot of the layout: stage -> share of the slot's time. Slots that hold different things reach the rate only
    where each keeps to these; a stage of share 0 is there for when there is nothing else to do."""
    shots: int
    shots_per_hour: float
    efficiency: float
    """Of all GPUs' time (on CPUs, of the slots' time), the share in which they compute. Without start and end."""
    seconds: float
    """Expected, from start to end, with the loading of the weights."""
    seconds_low: float
    seconds_high: float
    gpu_hours: float
    disk_bytes: float
    """Outputs and the stages' cache."""
    cost: float | None
    """In the currency of the price; none without GPUs or without a price."""
    bottleneck: str | None
    """The stage of which a second saved would help most."""
    stage_seconds: Mapping[str, float]
    """Of a mean shot."""
    considered: tuple[ConsideredLayout, ...]
    notes: tuple[str, ...]

    def check_cost(self, most: float | None) -> None:
        """Raises TooExpensive for more than that, UsageError where no price is known."""
        if most is None:
            return
        if self.cost is None:
            raise UsageError("--max-cost: no cost is known for this plan; a run on GPUs has one with --price PER_GPU_HOUR")
        if self.cost > most:
            raise TooExpensive(
                f"the plan costs {self.cost:,.2f} for {self.gpu_hours:,.1f} GPU-hours, --max-cost allows {most:,.2f}; "
                "render fewer shots, or with fewer steps, or allow more"
            )


@dataclass(frozen=True, slots=True)
class Timing:
    seconds: Mapping[str, float]
    """Stage -> of a mean shot."""
    spread: float
    unknown: tuple[str, ...]
    """Stages of which nobody told the seconds."""

    @property
    def shot_seconds(self) -> float:
        return sum(self.seconds.values())


def cpus_needed(layout: Layout) -> float:
    """CPUs of everything that a run with this layout starts."""
    return sum(slot.cpus for slot in layout.slots) + layout.encoders * ENCODER_CPUS + DIRECTOR_CPUS + SPARE_CPUS


def estimate(
    kind: Kind,
    packing: Packing,
    demand: Demand,
    cluster: Cluster,
    timing: Timing,
    considered: tuple[ConsideredLayout, ...],
    price: float | None,
) -> Plan:
    """The plan of a packing for the shots of the demand."""
    held = [filled.holding for filled in packing.slots]
    slots = tuple(holding.slot() for holding in held)
    on_gpu = any(slot.has_gpu for slot in slots)
    # However many slots there are, a shot passes one stage after another.
    one_shot = timing.shot_seconds
    relative_cost = max(demand.shots / packing.rate, one_shot)
    # At the end slots run out of work one after another; half a shot is lost in the mean.
    drain = one_shot / 2 * (1 - 1 / demand.shots)
    weights_gb = sum(gb for _, gb in sorted({(a.position, a.gpu_gb + a.host_gb) for holding in held for a in holding.actors}))
    load = START_SECONDS + weights_gb / LOAD_GB_PER_S
    expected = load + relative_cost + drain
    gpu_hours = len(cluster.gpus) * expected / 3600 if on_gpu else 0.0
    per_hour, is_default = _price(cluster, price) if on_gpu else (None, False)
    units = len(cluster.gpus) if on_gpu else max(1, len(slots))
    return Plan(
        layout=Layout(kind, slots, packing.encoders, _window(slots, demand.shots)),
        nodes=tuple(filled.node for filled in packing.slots),
        shares=tuple(_of_stages(filled, timing) for filled in packing.slots),
        shots=demand.shots,
        shots_per_hour=packing.rate * 3600,
        efficiency=min(1.0, packing.rate * timing.shot_seconds / units),
        seconds=expected,
        seconds_low=relative_cost * (1 - timing.spread),
        seconds_high=load + (relative_cost + one_shot) * (1 + timing.spread),
        gpu_hours=gpu_hours,
        disk_bytes=demand.output_bytes + demand.cache_bytes,
        cost=None if per_hour is None else per_hour * expected / 3600,
        bottleneck=_bottleneck(packing, timing),
        stage_seconds=timing.seconds,
        considered=considered,
        notes=tuple(_notes(packing, cluster, timing, on_gpu, is_default)),
    )


def _of_stages(filled: FilledSlot, timing: Timing) -> dict[str, float]:
    shares = {}
    for actor in sorted(filled.holding.actors, key=lambda actor: actor.position):
        for stage in actor.stages:
            shares[stage] = round(filled.shares[actor.name] * timing.seconds[stage] / actor.seconds, 6)
    return shares


def _window(slots: Sequence[Slot], shots: int) -> int:
    """Enough that no slot waits for work; where stages take turns, that each turn finds its shots."""
    most = sum(2 * TURN_SHOTS if any(worker.turns for worker in slot.workers) else SHOTS_PER_SLOT for slot in slots)
    return max(1, min(most, shots))


def _price(cluster: Cluster, price: float | None) -> tuple[float | None, bool]:
    """Of an hour of all GPUs, and whether it is from the table."""
    if price is not None:
        return price * len(cluster.gpus), False
    prices = [default_price(memory) for memory in cluster.gpus]
    return (None, False) if None in prices else (sum(p for p in prices if p is not None), True)


def _bottleneck(packing: Packing, timing: Timing) -> str | None:
    """The longest stage of the actor with the fewest slots behind its seconds."""
    holders = Counter(actor for filled in packing.slots for actor in filled.holding.actors)
    if not holders:
        return None
    slowest = max(holders, key=lambda actor: (actor.seconds / holders[actor], -actor.position))
    return max(slowest.stages, key=lambda stage: timing.seconds[stage])


def _notes(packing: Packing, cluster: Cluster, timing: Timing, on_gpu: bool, default_price: bool) -> Iterator[str]:
    yield from cluster.notes
    if timing.unknown:
        yield f"the profile has no seconds of {', '.join(timing.unknown)}: taken as on an H100, until a run measures them"
    turning = {filled.node for filled in packing.slots if filled.holding.turning}
    if unknown := [node for node in turning if cluster.nodes[node].memory_gb is None]:
        most = max(sum(filled.holding.host_gb for filled in packing.slots if filled.node == node) for node in unknown)
        yield f"stages that take turns wait in host memory, {most:.4g} GB of a node, which is taken to be there"
    if on_gpu and (idle := len(cluster.gpus) - len(packing.slots)):
        yield f"{idle} of {len(cluster.gpus)} GPUs have nothing to do: too small, too few shots, or no CPUs for them"
    if default_price:
        yield "the price is from a table of common prices; say your own with --price or the profile's price_per_gpu_hour"
