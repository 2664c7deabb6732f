"""The decision: which layout is fastest on these machines, and what it will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vidgen_ray.errors import ProfileError, SetupError, TooExpensive, UsageError, VidgenError
from vidgen_ray.layout import Kind, Layout, Slot
from vidgen_ray.planner import holdings
from vidgen_ray.planner.cluster import Cluster, Node
from vidgen_ray.planner.demand import ENCODE_SECONDS, Demand, seconds_of
from vidgen_ray.planner.holdings import TURN_SHOTS, Actor, Holdings
from vidgen_ray.planner.measured import Measured
from vidgen_ray.planner.packing import (
    DIRECTOR_CPUS,
    ENCODER_BUSY,
    ENCODER_CPUS,
    SPARE_CPUS,
    Filled,
    Packing,
    Sizes,
    Wanted,
    pack,
)
from vidgen_ray.planner.prices import default_price
from vidgen_ray.planner.refusal import reason
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Stage

TIE = 0.01
"""A layout that is faster by less than this is not worth its processes."""
LEAST_SECONDS = 1e-6
"""Of a stage, so that one without work is there all the same."""
SHOTS_PER_SLOT = 3
"""In progress: one is worked on, one waits, one is on its way."""
START_SECONDS = 15.0
LOAD_GB_PER_S = 1.0
"""Weights from a disk."""


@dataclass(frozen=True, slots=True)
class Considered:
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
    considered: tuple[Considered, ...]
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


def plan(
    profile: Profile,
    demand: Demand,
    cluster: Cluster,
    *,
    measured: Mapping[str, Measured] | None = None,
    price: float | None = None,
) -> Plan:
    """The fastest layout; the simplest of those within a hundredth of it. A layout that the profile asks for is taken.

    `measured`: stage -> what it took on these cards before, in place of the profile's seconds. `price`: of a GPU-hour.
    Raises SetupError where the machines cannot hold what the script needs, ProfileError where the profile asks for
    the impossible. At least one shot.
    """
    if demand.shots < 1:
        raise ValueError("there is nothing to plan")
    price = profile.price_per_gpu_hour if price is None else price
    timing = _timing(profile, demand, measured or {})
    actors = _actors(profile, demand, timing.seconds)
    encode_seconds = demand.encoded_mpx * ENCODE_SECONDS[profile.encode.preset] / demand.shots
    if not actors:
        # Nothing but files to write: every line brings its picture and wants no clip.
        rate = ENCODER_BUSY / max(encode_seconds, 1.0)
        return _promise("fused", Packing(rate, (), 1), demand, cluster, timing, (), price)
    on_gpu = any(actor.gpu_gb for actor in actors)
    wanted = Wanted(actors, encode_seconds, demand.shots, _gpu_slots if on_gpu else _cpu_slots(actors))
    if on_gpu:
        kind, packing, considered = _on_gpus(profile, wanted, cluster)
    else:
        kind, packing, considered = _on_cpus(profile, wanted, cluster)
    return _promise(kind, packing, demand, cluster, timing, considered, price)


def cpus_needed(layout: Layout) -> float:
    """CPUs of everything that a run with this layout starts."""
    return sum(slot.cpus for slot in layout.slots) + layout.encoders * ENCODER_CPUS + DIRECTOR_CPUS + SPARE_CPUS


@dataclass(frozen=True, slots=True)
class _Timing:
    seconds: Mapping[str, float]
    """Stage -> of a mean shot."""
    spread: float
    unknown: tuple[str, ...]
    """Stages of which nobody told the seconds."""

    @property
    def shot_seconds(self) -> float:
        return sum(self.seconds.values())


def _timing(profile: Profile, demand: Demand, measured: Mapping[str, Measured]) -> _Timing:
    seconds: dict[str, float] = {}
    off, unknown = 0.0, []
    for stage in demand.stages:
        of_reference, spread, known = seconds_of(profile, stage, measured)
        seconds[stage.name] = max(LEAST_SECONDS, of_reference * demand.work[stage.name] / demand.shots)
        off += spread * seconds[stage.name]
        if not known:
            unknown.append(stage.name)
    return _Timing(seconds, min(0.9, off / sum(seconds.values())) if seconds else 0.0, tuple(unknown))


def _actors(profile: Profile, demand: Demand, seconds: Mapping[str, float]) -> tuple[Actor, ...]:
    by_name: dict[str, list[type[Stage[Any]]]] = {}
    for stage in demand.stages:
        by_name.setdefault(stage.actor, []).append(stage)
    actors = []
    for position, (name, stages) in enumerate(by_name.items()):
        section = profile.actor_of(stages[0])
        on_gpu = section.device != "cpu"
        actors.append(
            Actor(
                name=name,
                stages=tuple(stage.name for stage in stages),
                position=position,
                seconds=sum(seconds[stage.name] for stage in stages),
                gpu_gb=section.memory_gb if on_gpu else 0.0,
                host_gb=0.0 if on_gpu else section.memory_gb,
                cpus=section.cpus,
                can_wait=all(stage.move is not Stage.move for stage in stages),
            )
        )
    return tuple(actors)


def _gpu_slots(node: Node) -> Mapping[float, int]:
    return Counter(node.gpus)


def _cpu_slots(actors: Iterable[Actor]) -> Sizes:
    """Shares of a machine: as many as have a core each, or what one of them asks for, but one in any case."""
    each = max(1.0, *(actor.cpus for actor in actors))
    return lambda node: {0.0: max(1, int(node.cpus / each))}


Found = tuple[Kind, Packing, tuple[Considered, ...]]

WAYS: tuple[tuple[str, Kind, Callable[[Sequence[Actor]], Holdings]], ...] = (
    ("fused", "fused", holdings.fused),
    ("hybrid", "hybrid", holdings.hybrid),
    ("staged", "staged", holdings.staged),
    ("colocated", "colocated", holdings.colocated),
    ("hybrid with turns", "hybrid", holdings.hybrid_with_turns),
)
"""Name, kind of the layout and what its slots may hold; the simplest first."""


def _on_gpus(profile: Profile, wanted: Wanted, cluster: Cluster) -> Found:
    ways = [way for way in WAYS if profile.layout in ("auto", way[0])]
    packings: dict[str, Packing] = {}
    considered = []
    # A single shot is passed on from GPU to GPU where none holds everything.
    apart = replace(wanted, most_slots=max(wanted.most_slots, sum(1 for actor in wanted.actors if actor.gpu_gb)))
    most = min(len(cluster.gpus), wanted.most_slots) / wanted.seconds
    for name, _, allowed in ways:
        if packings and max(found.rate for found in packings.values()) >= most * (1 - TIE):
            considered.append(Considered(name, None, "cannot be faster"))
            continue
        packing = pack(wanted if name in ("fused", "colocated") else apart, allowed(wanted.actors), cluster)
        if packing is None:
            considered.append(Considered(name, None, reason(apart, allowed(wanted.actors), cluster)))
            continue
        packings[name] = packing
        considered.append(Considered(name, packing.rate * 3600, None))
    if not packings:
        # The last way is the one that refuses least.
        raise _refused(profile, considered[-1].reason or "")
    best = max(packing.rate for packing in packings.values())
    name, kind = next((n, k) for n, k, _ in ways if n in packings and packings[n].rate >= best * (1 - TIE))
    return kind, packings[name], tuple(considered)


def _on_cpus(profile: Profile, wanted: Wanted, cluster: Cluster) -> Found:
    kind: Kind = "fused" if profile.layout == "auto" else profile.layout
    # Processes of one actor each share the whole run between them, so there is one slot of them.
    most = min(profile.cpu_workers or wanted.most_slots, wanted.most_slots) if kind == "fused" else 1
    wanted = replace(wanted, most_slots=most)
    allowed = holdings.fused(wanted.actors) if kind == "fused" else holdings.colocated(wanted.actors)
    packing = pack(wanted, allowed, cluster)
    if packing is None:
        raise _refused(profile, reason(wanted, allowed, cluster))
    if kind != "fused":
        cores = sum(filled.holding.cpus for filled in packing.slots)
        at_once = min(1 / max(actor.seconds for actor in wanted.actors), max(1.0, cores) / wanted.seconds)
        packing = replace(packing, rate=max(packing.rate, at_once))
    return kind, packing, (Considered(kind, packing.rate * 3600, None),)


def _refused(profile: Profile, why: str) -> VidgenError:
    if profile.layout == "auto":
        return SetupError(f"profile {profile.name} cannot be packed on these machines: {why}")
    return ProfileError(
        f"profile {profile.name}, layout: {profile.layout} cannot be packed on these machines: {why}; with `layout: auto` the "
        "planner looks for another way"
    )


def _promise(
    kind: Kind,
    packing: Packing,
    demand: Demand,
    cluster: Cluster,
    timing: _Timing,
    considered: tuple[Considered, ...],
    price: float | None,
) -> Plan:
    held = [filled.holding for filled in packing.slots]
    slots = tuple(holding.slot() for holding in held)
    on_gpu = any(slot.has_gpu for slot in slots)
    # What cannot be faster than one shot after another in one slot is not.
    one_shot = timing.shot_seconds
    work = max(demand.shots / packing.rate, one_shot)
    # At the end slots run out of work one after another; half a shot is lost in the mean.
    drain = one_shot / 2 * (1 - 1 / demand.shots)
    weights_gb = sum(gb for _, gb in sorted({(a.position, a.gpu_gb + a.host_gb) for holding in held for a in holding.actors}))
    load = START_SECONDS + weights_gb / LOAD_GB_PER_S
    expected = load + work + drain
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
        seconds_low=work * (1 - timing.spread),
        seconds_high=load + (work + one_shot) * (1 + timing.spread),
        gpu_hours=gpu_hours,
        disk_bytes=demand.output_bytes + demand.cache_bytes,
        cost=None if per_hour is None else per_hour * expected / 3600,
        bottleneck=_bottleneck(packing, timing),
        stage_seconds=timing.seconds,
        considered=considered,
        notes=tuple(_notes(packing, cluster, timing, on_gpu, is_default)),
    )


def _of_stages(filled: Filled, timing: _Timing) -> dict[str, float]:
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


def _bottleneck(packing: Packing, timing: _Timing) -> str | None:
    """The longest stage of the actor with the fewest slots behind its seconds."""
    holders = Counter(actor for filled in packing.slots for actor in filled.holding.actors)
    if not holders:
        return None
    slowest = max(holders, key=lambda actor: (actor.seconds / holders[actor], -actor.position))
    return max(slowest.stages, key=lambda stage: timing.seconds[stage])


def _notes(packing: Packing, cluster: Cluster, timing: _Timing, on_gpu: bool, default_price: bool) -> Iterator[str]:
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
