"""Choose the fastest layout for a profile, a demand and a cluster."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

from vidgen_ray.errors import ProfileError, SetupError, VidgenError
from vidgen_ray.planner import gpu_assignment
from vidgen_ray.planner.calibration import Calibration
from vidgen_ray.planner.cluster import Cluster, Node
from vidgen_ray.planner.demand import ENCODE_SECONDS, Demand, seconds_of, total_seconds
from vidgen_ray.planner.estimate import ConsideredLayout, Plan, Timing, estimate
from vidgen_ray.planner.gpu_assignment import Actor, Candidates
from vidgen_ray.planner.infeasible import explain_infeasible
from vidgen_ray.planner.layout import Kind
from vidgen_ray.planner.memory import ActorMemory, actors_of, reference_shots
from vidgen_ray.planner.solver import ENCODER_BUSY, Packing, PackingProblem, SlotsOfNode, pack
from vidgen_ray.profile import Profile

TIE = 0.01
"""Relative gain in rate below which the simpler layout is preferred."""
MIN_SECONDS = 1e-6
"""Minimum seconds of a stage, so that a stage without work still gets a worker."""


def plan(
    profile: Profile,
    demand: Demand,
    cluster: Cluster,
    *,
    calibration: Mapping[str, Calibration] | None = None,
    price: float | None = None,
) -> Plan:
    """Return the plan with the fastest layout, or with the simplest one that is at most 1% slower.

    Uses the layout that the profile requests, if any. `calibration`: stage -> seconds measured on these GPUs, which replace
    those of the profile. `price`: price of a GPU-hour.

    Raises SetupError if the stages do not fit on the machines, ProfileError if the requested layout does not fit, and
    ValueError if there are no shots.
    """
    if demand.shots < 1:
        raise ValueError(f"demand.shots: got {demand.shots}, must be at least 1")
    price = profile.price_per_gpu_hour if price is None else price
    measured = {name: known.nearest(demand.pixels, demand.frames) for name, known in (calibration or {}).items()}
    timing = _timing(profile, demand, measured)
    shots = demand.sizes or reference_shots(profile)
    # Without a GPU, the error is that of the layouts.
    gpu_gb = max(cluster.gpus, default=math.inf)
    actors, memories = actors_of(profile, demand.stages, shots, gpu_gb, timing.seconds)
    encode_seconds = demand.encoded_mpx * ENCODE_SECONDS[profile.encode.preset] / demand.shots
    if not actors:
        # No stage to run: every shot has a start image and no clip, so that only files are written.
        rate = ENCODER_BUSY / max(encode_seconds, 1.0)
        return estimate("fused", Packing(rate, (), 1), demand, cluster, timing, (), price)
    on_gpu = any(actor.on_gpu for actor in actors)
    slots_of = _gpu_slots if on_gpu else _cpu_slots(actors)
    problem = PackingProblem(actors, encode_seconds, demand.shots, slots_of, profile.swap_gb_per_s)
    if on_gpu:
        kind, packing, considered = _pack_gpus(profile, problem, cluster)
    else:
        kind, packing, considered = _pack_cpus(profile, problem, cluster)
    return estimate(kind, packing, demand, cluster, timing, considered, price, tuple(_memory_notes(memories)))


def _timing(profile: Profile, demand: Demand, calibration: Mapping[str, Calibration]) -> Timing:
    seconds: dict[str, float] = {}
    spread_seconds, assumed = 0.0, []
    for stage in demand.stages:
        expected = seconds_of(profile, stage, calibration)
        total = total_seconds(expected, stage.name, demand, calibration.get(stage.name))
        seconds[stage.name] = max(MIN_SECONDS, total / demand.shots)
        spread_seconds += expected.spread * seconds[stage.name]
        if not expected.is_known:
            assumed.append(stage.name)
    return Timing(seconds, min(0.9, spread_seconds / sum(seconds.values())) if seconds else 0.0, tuple(assumed))


def _memory_notes(memories: Iterable[ActorMemory]) -> Iterator[str]:
    for memory in memories:
        yield from (f"the largest shots run with lower-memory settings: {options}" for options in memory.lowered)
        yield from (f"shots will fail: {reason}" for reason in memory.refused)


def _gpu_slots(node: Node) -> Mapping[float, int]:
    return Counter(node.gpus)


def _cpu_slots(actors: Iterable[Actor]) -> SlotsOfNode:
    """Return node -> number of worker slots: one per core, or fewer if an actor needs more cores, and at least one."""
    cpus_per_slot = max(1.0, *(actor.cpus for actor in actors))
    return lambda node: {0.0: max(1, int(node.cpus / cpus_per_slot))}


Choice = tuple[Kind, Packing, tuple[ConsideredLayout, ...]]
"""Kind and packing of the chosen layout, and all layouts considered."""

LAYOUTS: tuple[tuple[str, Kind, Callable[[Sequence[Actor]], Candidates]], ...] = (
    ("fused", "fused", gpu_assignment.fused),
    ("hybrid", "hybrid", gpu_assignment.hybrid),
    ("staged", "staged", gpu_assignment.staged),
    ("colocated", "colocated", gpu_assignment.colocated),
    ("hybrid with swapping", "hybrid", gpu_assignment.hybrid_with_swapping),
)
"""Name, kind and candidate assignments of each layout, simplest first."""


def _pack_gpus(profile: Profile, problem: PackingProblem, cluster: Cluster) -> Choice:
    layouts = [layout for layout in LAYOUTS if profile.layout in ("auto", layout[0])]
    packings: dict[str, Packing] = {}
    considered = []
    # Layouts that distribute the stages may need more slots than shots: a single shot moves from GPU to GPU.
    distributed = replace(problem, max_slots=max(problem.max_slots, sum(1 for actor in problem.actors if actor.on_gpu)))
    max_rate = min(len(cluster.gpus), problem.max_slots) / problem.seconds
    for name, _, candidates_of in layouts:
        if packings and max(packing.rate for packing in packings.values()) >= max_rate * (1 - TIE):
            considered.append(ConsideredLayout(name, None, "cannot be faster"))
            continue
        # The packing asks for the candidates of the same GPUs several times.
        candidates = cache(candidates_of(problem.actors))
        packing = pack(problem if name in ("fused", "colocated") else distributed, candidates, cluster)
        if packing is None:
            considered.append(ConsideredLayout(name, None, explain_infeasible(distributed, candidates, cluster)))
            continue
        packings[name] = packing
        considered.append(ConsideredLayout(name, packing.rate * 3600, None))
    if not packings:
        # The last layout has the fewest requirements.
        raise _layout_error(profile, considered[-1].reason or "")
    best = max(packing.rate for packing in packings.values())
    name, kind = next((n, k) for n, k, _ in layouts if n in packings and packings[n].rate >= best * (1 - TIE))
    return kind, packings[name], tuple(considered)


def _pack_cpus(profile: Profile, problem: PackingProblem, cluster: Cluster) -> Choice:
    kind: Kind = "fused" if profile.layout == "auto" else profile.layout
    # With one process per actor, a single slot renders the whole run.
    max_slots = min(profile.cpu_workers or problem.max_slots, problem.max_slots) if kind == "fused" else 1
    problem = replace(problem, max_slots=max_slots)
    candidates = gpu_assignment.fused(problem.actors) if kind == "fused" else gpu_assignment.colocated(problem.actors)
    packing = pack(problem, candidates, cluster)
    if packing is None:
        raise _layout_error(profile, explain_infeasible(problem, candidates, cluster))
    if kind != "fused":
        cores = sum(filled.assignment.cpus for filled in packing.slots)
        # The processes of the slot run concurrently.
        rate = min(1 / max(actor.seconds for actor in problem.actors), max(1.0, cores) / problem.seconds)
        packing = replace(packing, rate=max(packing.rate, rate))
    return kind, packing, (ConsideredLayout(kind, packing.rate * 3600, None),)


def _layout_error(profile: Profile, reason: str) -> VidgenError:
    if profile.layout == "auto":
        return SetupError(f"profile {profile.name}: does not fit on these machines: {reason}")
    return ProfileError(
        f"profile {profile.name}, layout: {profile.layout} does not fit on these machines: {reason}; with `layout: auto` "
        "the planner chooses another layout"
    )
