"""Plan a run: choose the fastest layout for a profile, a demand and a cluster, and estimate its duration, cost and disk
space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

from pydantic import JsonValue

from vidgen_ray.errors import ProfileError, SetupError, TooExpensive, UsageError, VidgenError
from vidgen_ray.graph import stages_of
from vidgen_ray.planner import layout
from vidgen_ray.planner.cluster import GB, Cluster, GpuCard, Node, typical_card
from vidgen_ray.planner.demand import (
    ENCODING,
    Calibration,
    Demand,
    demand_seconds,
    encode_seconds_per_mpx,
    planned_share,
    seconds_of,
)
from vidgen_ray.planner.gpu_memory import actors_of, memory_limits, reference_shots
from vidgen_ray.planner.layout import SHOTS_PER_SWAP, Actor, Assignment, Candidates, Layout, LayoutKind, Slot, WorkerSpec
from vidgen_ray.planner.solver import (
    DIRECTOR_CPUS,
    ENCODER_CPUS,
    SPARE_CPUS,
    FilledSlot,
    Packing,
    PackingProblem,
    explain_infeasible,
    host_gb_of_nodes,
    pack,
    parallel_loads,
)
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.speed import has_unguided_steps
from vidgen_ray.system.quantities import amount_text, money

CURRENCY = "USD"
"""Currency of the default prices of cards."""
SHOTS_PER_SLOT = 3
"""Shots in progress per slot: one running, one queued and one in transfer."""
START_SECONDS = 15.0
"""Seconds to start the processes."""
DISK_GB_PER_S = 1.5
"""Assumed rate at which a node reads weight files from its disk, in GB per second. Its workers share one read."""
_DIRECTOR = "director"
DIRECTOR_S = 0.006
"""CPU seconds of the director per shot, which it spends one after another; see benchmarks/overhead.py."""
SPLIT_NOTE = (
    f"a run starts at most {1 / DIRECTOR_S:.0f} shots per second, fewer than these GPUs render: split the script, and render "
    "each part into a folder of its own on some of the GPUs"
)
FIRST_CALL_S = 2.0
"""Assumed seconds by which the first call of a stage on a GPU is slower, if `vidgen bench` has not measured it."""
COMPILE_S = 30.0
"""Assumed seconds of compiling a network once."""


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
    """Stage -> share of the slot's time, per slot of the layout; of a worker without a GPU, share of its own time. If slots
    hold different stages, the rate is only reached if each slot keeps to its shares. A stage with share 0 runs only if the
    worker has nothing else to do."""
    shots: int
    shots_per_hour: float
    efficiency: float
    """Share of the time of all GPUs (or of all slots, on CPUs) in which they compute, without the start and end of the run."""
    seconds: float
    """Expected duration of the run, including loading the weights."""
    load_s: float
    """Seconds until the workers have loaded their weights."""
    first_clip_s: float
    """Seconds until the first shot has left the GPU, including `load_s`."""
    seconds_low: float
    seconds_high: float
    """Range of the expected duration."""
    gpu_hours: float
    output_bytes: float
    """Size of the outputs, without the stage cache."""
    cache_bytes: Mapping[str, float]
    """Value of `--cache` -> size of the stage cache."""
    cost: float | None
    """Cost in the currency of the price. `None` without GPUs and priced servers."""
    currency: str | None
    """Currency of a default price. `None` if the price is the user's, which has no currency."""
    bottleneck: str | None
    """Stage that limits the rate, or ENCODING or DIRECTOR."""
    stage_seconds: Mapping[str, float]
    """Stage -> mean seconds per shot."""
    encode_s: float
    """Mean CPU seconds of encoding per shot."""
    considered: tuple[ConsideredLayout, ...]
    notes: tuple[str, ...]
    """Assumptions and hints, to be shown with the plan."""
    server_cost: float = 0.0
    """Part of the cost that servers charge for stages that they compute."""
    reference_s: Mapping[str, float] = field(default_factory=dict)
    """Stage -> planned seconds of the reference shot, on the slowest GPUs."""
    peak_share: Mapping[str, float] = field(default_factory=dict)
    """Stage -> fraction of the GPU's peak in 16 bits that it reaches at the planned seconds. Only stages of known work."""
    options: Mapping[str, Mapping[str, JsonValue]] = field(default_factory=dict)
    """Actor -> options with which its weights are loaded, where they differ from the profile's."""

    @property
    def clip_peak_share(self) -> float:
        """Fraction of the GPU's peak that a shot reaches on average."""
        return sum(share * self.stage_seconds[stage] for stage, share in self.peak_share.items()) / sum(
            self.stage_seconds.values()
        )

    @property
    def price_per_gpu_hour(self) -> float | None:
        """Mean price of a GPU-hour. `None` without GPUs."""
        return (self.cost - self.server_cost) / self.gpu_hours if self.cost is not None and self.gpu_hours else None

    def check_cost(self, max_cost: float | None) -> None:
        """Raise TooExpensive if the cost exceeds `max_cost`, UsageError if the cost of the GPUs is unknown.

        `None` disables the check. A run without GPUs and priced servers has no price, and is never too expensive.
        """
        if max_cost is None or not (self.gpu_hours or self.server_cost):
            return
        if self.cost is None:
            raise UsageError("--max-cost: the cost of this plan is unknown: pass --price PER_GPU_HOUR")
        if self.cost > max_cost:
            gpus = f"{amount_text(self.gpu_hours)} GPU-hours" if self.gpu_hours else ""
            what = " and ".join(filter(None, (gpus, "servers" if self.server_cost else "")))
            raise TooExpensive(
                f"the plan costs {money(self.cost, self.currency)} for {what}, "
                f"--max-cost allows {amount_text(max_cost)}; render fewer shots, use fewer steps, or raise --max-cost"
            )


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per shot and their uncertainty."""

    seconds: Mapping[str, float]
    """Stage -> mean seconds per shot."""
    spread: float
    """Relative standard deviation of the sum."""
    reference_s: Mapping[str, float]
    """Stage -> seconds of the reference shot."""
    peak_share: Mapping[str, float]
    """Stage -> fraction of the GPU's peak that it reaches on one GPU. Only stages of known work."""
    assumed: tuple[str, ...]
    """Stages without calibration or seconds in the profile."""
    encode_s: float
    """Mean CPU seconds of encoding per shot."""
    warm_up_s: float
    """Seconds by which the first shot of a worker is slower."""
    compilations: int
    """Times that a worker of all stages compiles a network."""

    @property
    def shot_seconds(self) -> float:
        return sum(self.seconds.values())


def cpus_needed(layout: Layout) -> float:
    """Return the CPUs of all processes of a run with this layout."""
    return sum(slot.cpus for slot in layout.slots) + layout.encoders * ENCODER_CPUS + DIRECTOR_CPUS + SPARE_CPUS


def estimate(
    kind: LayoutKind,
    packing: Packing,
    demand: Demand,
    cluster: Cluster,
    timing: Timing,
    considered: tuple[ConsideredLayout, ...],
    price: float | None,
    notes: tuple[str, ...] = (),
    servers: Sequence[ServerSlot] = (),
) -> Plan:
    """Return the plan of a packing for the shots of the demand. `notes`: further notes. `servers`: see `_server_slots`."""
    assignments = [filled.assignment for filled in packing.slots]
    places = Counter[str]()
    for server in servers:
        places[server.stage] += server.slot.workers[0].parallel
    rates = {_DIRECTOR: 1 / DIRECTOR_S, **{stage: count / timing.seconds[stage] for stage, count in places.items()}}
    limit = min((stage for stage, rate in rates.items() if rate < packing.rate), key=rates.__getitem__, default=None)
    if limit is not None:
        packing = replace(packing, rate=rates[limit])
    slots = tuple(filled.assignment.slot(max(cluster.nodes[filled.node].gpus, default=0.0)) for filled in packing.slots)
    used_gpus = sum(slot.gpus for slot in slots)
    on_gpu = used_gpus > 0
    # A single shot runs its stages one after another, regardless of the number of slots.
    one_shot = timing.shot_seconds
    render_seconds = max(demand.shots / packing.rate, one_shot)
    # At the end of a run, slots become idle one after another: on average they lose half a shot.
    drain_seconds = one_shot / 2 * (1 - 1 / demand.shots)
    # Sums of floats depend on their order, and that of a set on the process.
    actors = sorted({actor for assignment in assignments for actor in assignment.actors}, key=lambda actor: actor.position)
    load_seconds = _load_seconds(actors, cluster)
    compile_seconds = timing.compilations * COMPILE_S
    expected = load_seconds + compile_seconds + render_seconds + drain_seconds
    gpu_hours = len(cluster.gpus) * expected / 3600 if on_gpu else 0.0
    per_hour, is_default = _price(cluster, price) if on_gpu else (None, False)
    units = len(cluster.gpus) if on_gpu else max(1, len(slots))
    gpu_cost = (per_hour or 0.0) * expected / 3600
    server_cost = sum(server.price for server in servers)
    unit_seconds = sum(a.gpus * a.seconds for a in actors if a.on_gpu) if on_gpu else timing.shot_seconds
    return Plan(
        layout=Layout(
            kind,
            (*slots, *(server.slot for server in servers)),
            packing.encoders,
            _window(slots, demand.shots, max(places.values(), default=0)),
            parallel_loads(packing, cluster),
        ),
        nodes=(*(filled.node for filled in packing.slots), *(server.node for server in servers)),
        shares=(*(_stage_shares(filled, timing) for filled in packing.slots), *({server.stage: 1.0} for server in servers)),
        shots=demand.shots,
        shots_per_hour=packing.rate * 3600,
        efficiency=min(1.0, packing.rate * unit_seconds / units),
        seconds=expected,
        load_s=load_seconds,
        first_clip_s=load_seconds + timing.warm_up_s + one_shot + _wait_for_turns(assignments, demand.shots),
        seconds_low=render_seconds * (1 - timing.spread),
        seconds_high=load_seconds + compile_seconds + (render_seconds + one_shot) * (1 + timing.spread),
        gpu_hours=gpu_hours,
        output_bytes=demand.output_bytes,
        cache_bytes={
            "none": 0.0,
            "images": demand.image_cache_bytes,
            "all": demand.image_cache_bytes + demand.clip_cache_bytes,
        },
        cost=gpu_cost + server_cost if per_hour is not None or server_cost else None,
        server_cost=server_cost,
        currency=CURRENCY if is_default else None,
        bottleneck=limit or _bottleneck(packing, timing, cluster),
        stage_seconds=timing.seconds,
        encode_s=timing.encode_s,
        considered=considered,
        notes=(*_notes(packing, cluster, timing, used_gpus, is_default), *notes, *([SPLIT_NOTE] if limit == _DIRECTOR else ())),
    )


def _load_seconds(actors: Sequence[Actor], cluster: Cluster) -> float:
    """Return the seconds until processes have started and read their weights from disk, through the slowest link to a GPU.

    Weights are converted to the precision of the computation before they are copied.
    """
    held_gb = sum(actor.gpu_gb + actor.host_gb - actor.copied_gb for actor in actors)
    copy_s = max((card.copy_seconds(held_gb * GB) for card in cluster.assumed_cards), default=0.0)
    files_gb = sum(actor.files_gb for actor in actors)
    return START_SECONDS + files_gb / DISK_GB_PER_S + copy_s


def _wait_for_turns(assignments: Sequence[Assignment], shots: int) -> float:
    """Return the seconds for which the first shot waits for others, because the groups of its slot take turns."""

    def waits(assignment: Assignment) -> float:
        groups = [group for process in assignment.processes for group in process.swap_groups]
        first = sorted(groups, key=lambda group: min(actor.position for actor in group))[:-1]
        return (min(SHOTS_PER_SWAP, shots) - 1) * sum(actor.seconds for group in first for actor in group)

    return min(map(waits, assignments), default=0.0)


def _stage_shares(filled: FilledSlot, timing: Timing) -> dict[str, float]:
    """Divide the share of each actor among its stages, in proportion to their seconds."""
    shares = {}
    for actor in sorted(filled.assignment.actors, key=lambda actor: actor.position):
        for stage in actor.stages:
            shares[stage] = round(filled.shares[actor.name] * timing.seconds[stage] / actor.seconds, 6)
    return shares


def _window(slots: Sequence[Slot], shots: int, server_places: int) -> int:
    """Return how many shots must be in progress so that no slot or server waits, and each turn of swapped stages is full."""
    shots_needed = sum(
        2 * SHOTS_PER_SWAP if any(worker.swap_groups for worker in slot.workers) else SHOTS_PER_SLOT for slot in slots
    )
    return max(1, min(shots_needed + server_places, shots))


def _price(cluster: Cluster, price: float | None) -> tuple[float, bool]:
    """Return the price of an hour of all GPUs, and whether it is from the table of default prices."""
    if price is not None:
        return price * len(cluster.gpus), False
    return sum(len(node.gpus) * card.usd_per_hour for node in cluster.nodes if (card := node.assumed_card)), True


def _bottleneck(packing: Packing, timing: Timing, cluster: Cluster) -> str | None:
    """Return ENCODING if its CPUs limit the rate, else the longest stage of the actor with the most seconds per slot."""
    encoders_cpus = packing.encoders * ENCODER_CPUS
    others_cpus = sum(filled.assignment.cpus for filled in packing.slots) + DIRECTOR_CPUS + SPARE_CPUS
    if packing.rate * timing.encode_s > encoders_cpus * (1 - TIE) and others_cpus + encoders_cpus > cluster.cpus - ENCODER_CPUS:
        return ENCODING
    holders = Counter(actor for filled in packing.slots for actor in filled.assignment.actors)
    if not holders:
        return None
    slowest = max(holders, key=lambda actor: (actor.seconds / holders[actor], -actor.position))
    return max(slowest.stages, key=lambda stage: timing.seconds[stage])


def _notes(packing: Packing, cluster: Cluster, timing: Timing, used_gpus: int, default_price: bool) -> Iterator[str]:
    yield from cluster.notes
    if timing.assumed:
        stages = ", ".join(timing.assumed)
        yield f"the profile has no seconds of {stages}: assuming those that the stages state until a run measures them"
    if unknown := [gb for node, gb in host_gb_of_nodes(packing).items() if cluster.nodes[node].memory_gb is None]:
        yield f"the workers need up to {max(unknown):.4g} GB of host memory per node, which is assumed to be available"
    if shared := [gb for node, gb in host_gb_of_nodes(packing).items() if cluster.nodes[node].is_unified]:
        yield f"GPU and host share their memory: the workers need up to {max(shared):.4g} GB on both together"
    if timing.compilations:
        seconds = timing.compilations * COMPILE_S
        yield f"each worker compiles for about {seconds:.0f} s: its networks for two sizes, with and without LoRAs"
    if used_gpus and (idle := len(cluster.gpus) - used_gpus):
        yield f"{idle} of {len(cluster.gpus)} GPUs are idle: too little memory, too few shots, or too few CPUs"
    unnamed = sorted({max(node.gpus) for node in cluster.nodes if node.gpus and node.card is None})
    if used_gpus and unnamed:
        assumed = " and ".join(f"{memory:.4g} GB as {typical_card(memory).name}" for memory in unnamed)
        yield f"GPUs of unknown kind: planned {assumed}; name them with --gpus, such as 8xL40S"
    if default_price:
        yield "the price is an estimate; set it with --price or price_per_gpu_hour in the profile"


ROOM_GB = 2.0
"""GPU memory that stays free if there is a plan with it, for what the computed memory leaves out."""
TIE = 0.01
"""Relative gain in rate below which the simpler layout is preferred."""
_MIN_SECONDS = 1e-6
"""Minimum seconds of a stage, so that a stage without work still gets a worker."""
GPUS_PER_SHOT = (2, 4, 8)
"""Numbers of GPUs of a node that may divide the work of a shot. FLUX and Wan have multiples of 8 attention heads."""
WORTHWHILE = 0.05
"""Part of a run's duration that dividing shots among twice as many GPUs must save."""


def plan_run(
    profile: Profile,
    demand: Demand,
    cluster: Cluster,
    *,
    calibration: Mapping[str, Calibration] | None = None,
    price: float | None = None,
    shots_at_once: int | None = None,
) -> Plan:
    """Return the plan with the fastest layout, or with the simplest one that is at most 1% slower.

    Uses the layout that the profile requests, if any. With `layout: auto` and fewer shots than GPUs, several GPUs of a node
    divide the work of each shot if that makes the run clearly shorter. `calibration`: stage -> seconds measured on these GPUs,
    which replace those of the profile. `price`: price of a GPU-hour. `shots_at_once`: shots that come at the same time, of a
    demand without an end, for which a shorter shot counts. `None`: those of the demand.

    Raises SetupError if the stages do not fit on the machines, ProfileError if the requested layout does not fit, and
    ValueError if there are no shots.
    """
    if demand.shots < 1:
        raise ValueError(f"demand.shots: got {demand.shots}, must be at least 1")
    shots = demand.shots if shots_at_once is None else shots_at_once

    def duration(planned: Plan) -> float:
        return planned.seconds if shots_at_once is None else sum(planned.stage_seconds.values())

    best = _plan(profile, demand, cluster, calibration, price, 1)
    if profile.layout == "auto" and any(_can_divide(profile, stage) for stage in demand.stages):
        for gpus in GPUS_PER_SHOT:
            if sum(len(node.gpus) // gpus for node in cluster.nodes) < shots:
                break
            with suppress(SetupError, ProfileError):
                divided = _plan(profile, demand, cluster, calibration, price, gpus)
                if duration(divided) < duration(best) * (1 - WORTHWHILE):
                    best = divided
    return best


def _can_divide(profile: Profile, stage: type[Stage[Any]]) -> bool:
    return profile.actor_of(stage).device == "cuda" and stage.divided(profile.options_of(stage)) is not None


def _plan(
    profile: Profile,
    demand: Demand,
    cluster: Cluster,
    calibration: Mapping[str, Calibration] | None,
    price: float | None,
    gpus: int,
) -> Plan:
    """Return the best plan with this number of GPUs per shot, where stages can use several."""
    divided = {stage.actor for stage in demand.stages if gpus > 1 and _can_divide(profile, stage)}
    price = profile.price_per_gpu_hour if price is None else price
    measured = {name: known.nearest(demand.pixels, demand.frames) for name, known in (calibration or {}).items()}
    cards = cluster.assumed_cards or (None,)
    timings = {card: _timing(profile, demand, measured, card, divided, gpus) for card in cards}
    timing = timings[cards[0]]
    reference_s = {stage.name: max(timings[card].reference_s[stage.name] for card in cards) for stage in demand.stages}
    shots = demand.sizes or reference_shots(profile)
    servers = _server_slots(profile, demand, cluster)
    stages = [stage for stage in demand.stages if stage.name not in {server.stage for server in servers}]
    remaining = _without_cpus_of(cluster, servers)

    def speed(actor: Actor, card: GpuCard | None) -> float:
        on_card = timings.get(card, timing).seconds
        return actor.seconds / sum(on_card[stage] for stage in actor.stages)

    def plan_within(limit_gb: float, usable: Cluster) -> Plan:
        """Return the plan whose calls take at most `limit_gb` of GPU memory each, on GPUs with the memory of `usable`."""
        actors, memories = actors_of(profile, stages, shots, limit_gb, timing.seconds)
        actors = tuple(replace(actor, gpus=gpus) if actor.name in divided else actor for actor in actors)
        if not actors:
            # No stage to run: every shot has a start image and no clip, so that only files are written.
            rate = ENCODER_CPUS / max(timing.encode_s, 1.0)
            return estimate("fused", Packing(rate, (), 1), demand, cluster, timing, (), price, servers=servers)
        on_gpu = any(actor.on_gpu for actor in actors)
        cpus_per_slot = max(1.0, *(actor.cpus for actor in actors))

        def slots_of(node: Node) -> Mapping[float, int]:
            # On CPUs: one per core, or fewer if an actor needs more cores, and at least one.
            return Counter(node.gpus) if on_gpu else {0.0: max(1, int(node.cpus / cpus_per_slot))}

        problem = PackingProblem(actors, timing.encode_s, demand.shots, slots_of, speed)
        nodes = tuple(replace(node, gpus=_groups(node.gpus, gpus)) for node in usable.nodes)
        kind, packing, considered = (_pack_gpus if on_gpu else _pack_cpus)(profile, problem, replace(usable, nodes=nodes))
        lowered = [options for each in memories for options in each.lowered]
        notes = [f"the largest shots run with lower-memory settings: {options}" for options in lowered]
        notes += [f"shots will fail: {reason}" for each in memories for reason in each.refused]
        if divided:
            gains = {stage.actor: stage.gain(profile.options_of(stage), gpus) for stage in stages if stage.actor in divided}
            names = " and ".join(f"{name} ({gain:.2g} times as fast)" for name, gain in sorted(gains.items()))
            because = "since there are fewer shots than GPUs; they start kernels as before"
            notes.append(f"{gpus} GPUs divide the work of each shot in {names}, {because}")
        planned = estimate(kind, packing, demand, cluster, timing, considered, price, tuple(notes), servers)
        options = {actor.name: memory.options for actor, memory in zip(actors, memories, strict=True) if memory.options}
        return replace(planned, options=options, reference_s=reference_s, peak_share=timing.peak_share)

    def best_plan(usable: Cluster) -> Plan:
        gpu_gb = max(usable.gpus, default=math.inf)
        limits = memory_limits(profile, stages, shots, gpu_gb)
        return _fastest(partial(plan_within, usable=usable), limits)

    sections = [profile.actor_of(stage) for stage in demand.stages]
    if any(section.device == "cuda" and not section.memory_gb for section in sections):
        with suppress(SetupError, ProfileError):
            return best_plan(remaining.with_room(ROOM_GB))
    return best_plan(remaining)


class ServerSlot(NamedTuple):
    """The worker of a server."""

    stage: str
    slot: Slot
    node: int
    """Index of the planned node."""
    price: float
    """Charge of the server for its share of the demand."""


def _server_slots(profile: Profile, demand: Demand, cluster: Cluster) -> list[ServerSlot]:
    """Return the workers of the servers that compute stages of the demand, on the node with the most CPUs."""
    node = max(range(len(cluster.nodes)), key=lambda number: cluster.nodes[number].cpus, default=0)
    slots = []
    for stage in demand.stages:
        params = profile.options_of(stage)
        places = stage.places(params)
        price = stage.price(params, demand.billed.get(stage.name, 0.0)) or 0.0
        if places and not cluster.nodes:
            raise SetupError(f"{cluster}: no node for the workers of {stage.name}")
        for server, parallel in places.items():
            worker = WorkerSpec((stage.name,), profile.actor_of(stage).cpus, 0.0, server=server, parallel=parallel)
            slots.append(ServerSlot(stage.name, Slot((worker,), 0.0), node, price / len(places)))
    return slots


def _without_cpus_of(cluster: Cluster, servers: Sequence[ServerSlot]) -> Cluster:
    """Return the cluster without the CPUs of these workers."""
    nodes = list(cluster.nodes)
    for server in servers:
        nodes[server.node] = replace(nodes[server.node], cpus=max(0.0, nodes[server.node].cpus - server.slot.cpus))
    return replace(cluster, nodes=tuple(nodes))


def _fastest(plan_within: Callable[[float], Plan], limits_gb: Sequence[float]) -> Plan:
    """Return the fastest plan; of several about as fast the one with the highest settings.

    More memory never leads to a slower plan: a larger GPU has the limits of a smaller one too. Raises the error of the first
    limit if no plan is possible.
    """
    plans: list[Plan] = []
    errors: list[VidgenError] = []
    for limit_gb in limits_gb:
        try:
            planned = plan_within(limit_gb)
        except (SetupError, ProfileError) as error:
            errors.append(error)
            continue
        plans.append(planned)
        # With one worker per GPU that holds everything, lower settings gain nothing.
        if planned.layout.kind == "fused":
            break
    if not plans:
        raise errors[0]
    best = max(planned.shots_per_hour for planned in plans)
    return next(planned for planned in plans if planned.shots_per_hour >= best * (1 - TIE))


def _groups(gpus: tuple[float, ...], size: int) -> tuple[float, ...]:
    """Return the memory per GPU of groups of this many GPUs."""
    return gpus if size == 1 else (min(gpus, default=0.0),) * (len(gpus) // size)


def is_compiled(profile: Profile, stage: type[Stage[Any]]) -> bool:
    return bool(getattr(profile.options_of(stage), "compile", False))


def compilations(profile: Profile, demand: Demand) -> int:
    """Return how many times workers compile their networks for these shots, at most.

    A network is compiled for the first size and once more for all others; both for each number of LoRAs, of which 0 is another
    network as soon as a LoRA was loaded. A network that gets one pass in some steps and two in others counts as two.
    """
    networks: dict[tuple[str, str], tuple[set[int], set[tuple[int, int, int]]]] = {}

    for shot in demand.sizes:
        for stage in stages_of(shot):
            if stage not in demand.stages or not is_compiled(profile, stage):
                continue
            used = {"": len(stage.active_loras(shot))}
            if stage.identity_field == "flux_identity" and shot.flux_identity:
                used[shot.flux_identity] = 0
            if has_unguided_steps(profile.options_of(stage)):
                used["one pass"] = 0
            for network, number in used.items():
                loras, sizes = networks.setdefault((stage.actor, network), (set(), set()))
                loras.add(number)
                sizes.add((shot.width, shot.height, shot.num_frames))
    return sum(len(loras) * min(2, len(sizes)) + (0 in loras and len(loras) > 1) for loras, sizes in networks.values())


def _timing(
    profile: Profile,
    demand: Demand,
    calibration: Mapping[str, Calibration],
    card: GpuCard | None,
    divided: Collection[str],
    gpus: int,
) -> Timing:
    """Return the seconds of all stages. Those of the `divided` actors have several GPUs."""
    seconds: dict[str, float] = {}
    reference_s: dict[str, float] = {}
    peak_share: dict[str, float] = {}
    spread_seconds, warm_up_s, assumed = 0.0, 0.0, []
    for stage in demand.stages:
        expected = seconds_of(profile, stage, calibration, card)
        total = demand_seconds(profile, stage, demand, calibration, card)
        # With the mean of the script's shots.
        cost = demand.relative_cost[stage.name].mixed(stage.fixed_share())
        reference_s[stage.name] = total / cost if cost else expected.reference_s
        if card and total and (share := planned_share(profile, stage, demand, total, card)):
            peak_share[stage.name] = share
        if stage.actor in divided:
            total = demand_seconds(profile, stage, demand, calibration, card, gpus)
        seconds[stage.name] = max(_MIN_SECONDS, total / demand.shots)
        spread_seconds += expected.spread * seconds[stage.name]
        if profile.actor_of(stage).device == "cuda":
            known = calibration.get(stage.name)
            first_call_s = FIRST_CALL_S + COMPILE_S * is_compiled(profile, stage)
            warm_up_s += max((each.warmup_s for each in known.measurements) if known else (), default=first_call_s)
        if not expected.is_known:
            assumed.append(stage.name)
    spread = min(0.9, spread_seconds / sum(seconds.values())) if seconds else 0.0
    encode_s = demand.encoded_mpx * encode_seconds_per_mpx(profile, calibration) / demand.shots
    compiling = compilations(profile, demand)
    return Timing(seconds, spread, reference_s, peak_share, tuple(assumed), encode_s, warm_up_s, compiling)


Choice = tuple[LayoutKind, Packing, tuple[ConsideredLayout, ...]]
"""Kind and packing of the chosen layout, and all layouts considered."""

_LAYOUTS: tuple[tuple[str, LayoutKind, Callable[[Sequence[Actor]], Candidates]], ...] = (
    ("fused", "fused", layout.fused),
    ("hybrid", "hybrid", layout.hybrid),
    ("hybrid with swapping", "hybrid", layout.hybrid_with_swapping),
)
"""Name, kind and candidate assignments of the layouts of `auto`, simplest first."""
STAGED: tuple[str, LayoutKind, Callable[[Sequence[Actor]], Candidates]] = ("staged", "staged", layout.staged)
"""Used if a profile requests it. One process with the same stages needs no more memory, and has the same rate."""


def _pack_gpus(profile: Profile, problem: PackingProblem, cluster: Cluster) -> Choice:
    layouts = _LAYOUTS if profile.layout == "auto" else [each for each in (*_LAYOUTS, STAGED) if each[0] == profile.layout]
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
        packing = _pack_beside(problem if name == "fused" else distributed, candidates, cluster)
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


def _pack_beside(problem: PackingProblem, candidates: Candidates, cluster: Cluster) -> Packing | None:
    """Return the packing with CPU actors beside the processes on GPUs, or in these if that is faster: if CPUs are few."""
    joined = partial(pack, problem, candidates, cluster)
    if all(actor.on_gpu for actor in problem.actors):
        return joined()
    beside = pack(problem, cache(layout.cpu_actors_beside(candidates)), cluster)
    max_rate = min(len(cluster.gpus), problem.max_slots) / problem.seconds
    if beside is not None and beside.rate >= max_rate * (1 - TIE):
        return beside
    return max((packing for packing in (beside, joined()) if packing), key=lambda packing: packing.rate, default=None)


def _pack_cpus(profile: Profile, problem: PackingProblem, cluster: Cluster) -> Choice:
    kind: LayoutKind = "fused" if profile.layout == "auto" else profile.layout
    # With one process per actor, a single slot renders the whole run.
    max_slots = min(profile.cpu_workers or problem.max_slots, problem.max_slots) if kind == "fused" else 1
    problem = replace(problem, max_slots=max_slots)
    candidates = (layout.fused if kind == "fused" else layout.staged)(problem.actors)
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
