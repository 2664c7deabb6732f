"""The decision: which layout is fastest on these machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vidgen_ray.errors import ProfileError, SetupError, VidgenError
from vidgen_ray.planner import gpu_assignment
from vidgen_ray.planner.calibration import Calibration
from vidgen_ray.planner.cluster import Cluster, Node
from vidgen_ray.planner.demand import ENCODE_SECONDS, Demand, seconds_of
from vidgen_ray.planner.estimate import ConsideredLayout, Plan, Timing, estimate
from vidgen_ray.planner.gpu_assignment import Actor, Assignments
from vidgen_ray.planner.infeasible import reason
from vidgen_ray.planner.layout import Kind
from vidgen_ray.planner.solver import ENCODER_BUSY, Packing, PackingProblem, Sizes, pack
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Stage

TIE = 0.01
"""A layout that is faster by less than this is not worth its processes."""
LEAST_SECONDS = 1e-6
"""Of a stage, so that one without work is there all the same."""


def plan(
    profile: Profile,
    demand: Demand,
    cluster: Cluster,
    *,
    calibration: Mapping[str, Calibration] | None = None,
    price: float | None = None,
) -> Plan:
    """The fastest layout; the simplest of those within a hundredth of it. A layout that the profile asks for is taken.

    `calibration`: stage -> what it took on these cards before, in place of the profile's seconds. `price`: of a GPU-hour.
    Raises SetupError where the machines cannot hold what the script needs, ProfileError where the profile asks for
    the impossible. At least one shot.
    """
    if demand.shots < 1:
        raise ValueError("there is nothing to plan")
    price = profile.price_per_gpu_hour if price is None else price
    timing = _timing(profile, demand, calibration or {})
    actors = _actors(profile, demand, timing.seconds)
    encode_seconds = demand.encoded_mpx * ENCODE_SECONDS[profile.encode.preset] / demand.shots
    if not actors:
        # Nothing but files to write: every line brings its picture and wants no clip.
        rate = ENCODER_BUSY / max(encode_seconds, 1.0)
        return estimate("fused", Packing(rate, (), 1), demand, cluster, timing, (), price)
    on_gpu = any(actor.gpu_gb for actor in actors)
    slots_of = _gpu_slots if on_gpu else _cpu_slots(actors)
    wanted = PackingProblem(actors, encode_seconds, demand.shots, slots_of, profile.swap_gb_per_s)
    if on_gpu:
        kind, packing, considered = _on_gpus(profile, wanted, cluster)
    else:
        kind, packing, considered = _on_cpus(profile, wanted, cluster)
    return estimate(kind, packing, demand, cluster, timing, considered, price)


def _timing(profile: Profile, demand: Demand, calibration: Mapping[str, Calibration]) -> Timing:
    seconds: dict[str, float] = {}
    off, unknown = 0.0, []
    for stage in demand.stages:
        of_reference, spread, known = seconds_of(profile, stage, calibration)
        seconds[stage.name] = max(LEAST_SECONDS, of_reference * demand.relative_cost[stage.name] / demand.shots)
        off += spread * seconds[stage.name]
        if not known:
            unknown.append(stage.name)
    return Timing(seconds, min(0.9, off / sum(seconds.values())) if seconds else 0.0, tuple(unknown))


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


Found = tuple[Kind, Packing, tuple[ConsideredLayout, ...]]

WAYS: tuple[tuple[str, Kind, Callable[[Sequence[Actor]], Assignments]], ...] = (
    ("fused", "fused", gpu_assignment.fused),
    ("hybrid", "hybrid", gpu_assignment.hybrid),
    ("staged", "staged", gpu_assignment.staged),
    ("colocated", "colocated", gpu_assignment.colocated),
    ("hybrid with turns", "hybrid", gpu_assignment.hybrid_with_turns),
)
"""Name, kind of the layout and what its slots may hold; the simplest first."""


def _on_gpus(profile: Profile, wanted: PackingProblem, cluster: Cluster) -> Found:
    ways = [way for way in WAYS if profile.layout in ("auto", way[0])]
    packings: dict[str, Packing] = {}
    considered = []
    # A single shot is passed on from GPU to GPU where none holds everything.
    apart = replace(wanted, most_slots=max(wanted.most_slots, sum(1 for actor in wanted.actors if actor.gpu_gb)))
    most = min(len(cluster.gpus), wanted.most_slots) / wanted.seconds
    for name, _, allowed in ways:
        if packings and max(found.rate for found in packings.values()) >= most * (1 - TIE):
            considered.append(ConsideredLayout(name, None, "cannot be faster"))
            continue
        packing = pack(wanted if name in ("fused", "colocated") else apart, allowed(wanted.actors), cluster)
        if packing is None:
            considered.append(ConsideredLayout(name, None, reason(apart, allowed(wanted.actors), cluster)))
            continue
        packings[name] = packing
        considered.append(ConsideredLayout(name, packing.rate * 3600, None))
    if not packings:
        # The last way is the one that refuses least.
        raise _refused(profile, considered[-1].reason or "")
    best = max(packing.rate for packing in packings.values())
    name, kind = next((n, k) for n, k, _ in ways if n in packings and packings[n].rate >= best * (1 - TIE))
    return kind, packings[name], tuple(considered)


def _on_cpus(profile: Profile, wanted: PackingProblem, cluster: Cluster) -> Found:
    kind: Kind = "fused" if profile.layout == "auto" else profile.layout
    # Processes of one actor each share the whole run between them, so there is one slot of them.
    most = min(profile.cpu_workers or wanted.most_slots, wanted.most_slots) if kind == "fused" else 1
    wanted = replace(wanted, most_slots=most)
    allowed = gpu_assignment.fused(wanted.actors) if kind == "fused" else gpu_assignment.colocated(wanted.actors)
    packing = pack(wanted, allowed, cluster)
    if packing is None:
        raise _refused(profile, reason(wanted, allowed, cluster))
    if kind != "fused":
        cores = sum(filled.holding.cpus for filled in packing.slots)
        at_once = min(1 / max(actor.seconds for actor in wanted.actors), max(1.0, cores) / wanted.seconds)
        packing = replace(packing, rate=max(packing.rate, at_once))
    return kind, packing, (ConsideredLayout(kind, packing.rate * 3600, None),)


def _refused(profile: Profile, why: str) -> VidgenError:
    if profile.layout == "auto":
        return SetupError(f"profile {profile.name} cannot be packed on these machines: {why}")
    return ProfileError(
        f"profile {profile.name}, layout: {profile.layout} cannot be packed on these machines: {why}; with `layout: auto` the "
        "planner looks for another way"
    )
