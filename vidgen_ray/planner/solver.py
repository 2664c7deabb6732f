"""How many slots of which holding: the highest rate of shots that GPUs, CPUs and host memory allow.

A mixed-integer linear programme. Whole: the number n of slots that hold the same. Continuous: the seconds of each second
that they give to each actor, and the rounds of turns. Every shot needs each actor for its mean seconds, so the actor with
the least GPU time behind it sets the rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vidgen_ray.planner.cluster import Cluster, Node
from vidgen_ray.planner.gpu_assignment import EPSILON, TURN_SHOTS, Actor, Assignment, Assignments, drop_dominated

ENCODER_CPUS = 0.5
"""Of an Encoder: it waits for frames about as long as it works on them."""
ENCODER_BUSY = 0.8
"""Share of the time that an encoder may work, so that none is waited for."""
DIRECTOR_CPUS = 0.5
SPARE_CPUS = 0.5
"""For Ray's own tasks, such as reading the script."""
SLOT_WEIGHT = 1e-5
"""Efficiency that a slot must add to be worth its processes."""
SOLVER_SECONDS = 5.0
"""Only many nodes with too few CPUs for their GPUs take so long; then the best of what was found is taken."""
GAP = 1e-3
"""Relative, to the best rate there may be, at which it is not searched for."""

Sizes = Callable[[Node], Mapping[float, int]]
"""The slots that a node offers: GB of GPU memory, 0 without a GPU, and how many of that size."""


@dataclass(frozen=True)
class PackingProblem:
    """What is to be packed."""

    actors: tuple[Actor, ...]
    encode_seconds: float
    """CPU seconds of encoding, of a mean shot."""
    most_slots: int
    slots_of: Sizes
    swap_gb_per_s: float
    """Between the host's memory and the GPU's."""

    @property
    def seconds(self) -> float:
        """Of all actors, of a mean shot."""
        return sum(actor.seconds for actor in self.actors)


@dataclass(frozen=True)
class FilledSlot:
    """A slot in use."""

    holding: Assignment
    node: int
    """Index in the cluster."""
    shares: Mapping[str, float]
    """Actor -> share of the slot's time that the rate counts on."""


@dataclass(frozen=True)
class Packing:
    rate: float
    """Shots a second."""
    slots: tuple[FilledSlot, ...]
    encoders: int


@dataclass(frozen=True)
class _SlotGroup:
    """Slots of one size that need not be told apart."""

    room: int
    memory_gb: float
    count: int


@dataclass(frozen=True)
class _ChosenAssignment:
    place: _SlotGroup
    holding: Assignment
    count: int
    shares: Mapping[str, float]
    """Of each of them."""


@dataclass(frozen=True)
class _Solution:
    rate: float
    chosen: tuple[_ChosenAssignment, ...]
    encoders: tuple[int, ...]
    """Of each room."""


def pack(wanted: PackingProblem, holdings: Assignments, cluster: Cluster) -> Packing | None:
    """The best packing, or none where there is no packing at all.

    First as if CPUs and host memory were plenty, which they mostly are. Where that does not find places on the nodes, node
    by node.
    """
    sizes: Counter[float] = Counter()
    for node in cluster.nodes:
        sizes.update(wanted.slots_of(node))
    places = [_SlotGroup(0, memory, count) for memory, count in sorted(sizes.items(), reverse=True)]
    easy = _solve(wanted, places, lambda memory: drop_dominated(holdings(memory), ignore_host_limits=True), None)
    if easy is None:
        return None
    on_nodes = _spread(easy, wanted, cluster)
    if on_nodes is not None:
        return on_nodes
    rooms = cluster.nodes
    places = [
        _SlotGroup(room, memory, count)
        for room, node in enumerate(rooms)
        for memory, count in sorted(wanted.slots_of(node).items(), reverse=True)
    ]
    tight = _solve(wanted, places, lambda memory: drop_dominated(holdings(memory)), rooms)
    if tight is None:
        return None
    slots = [FilledSlot(c.holding, c.place.room, c.shares) for c in tight.chosen for _ in range(c.count)]
    return Packing(tight.rate, tuple(slots), sum(tight.encoders))


def encoders_for(rate: float, encode_seconds: float) -> int:
    """Enough to keep up with so many shots a second."""
    return max(1, math.ceil(rate * encode_seconds / ENCODER_BUSY - EPSILON))


def _spread(solution: _Solution, wanted: PackingProblem, cluster: Cluster) -> Packing | None:
    """The slots on nodes, each on the one with the most free CPUs; none where that leads nowhere."""
    cpus = [node.cpus for node in cluster.nodes]
    host = [math.inf if node.memory_gb is None else node.memory_gb for node in cluster.nodes]
    free = [Counter(wanted.slots_of(node)) for node in cluster.nodes]
    slots: list[FilledSlot] = []

    def take(cpus_needed: float, host_gb: float, memory_gb: float | None) -> int | None:
        able = [
            room
            for room in range(len(cpus))
            if cpus[room] >= cpus_needed - EPSILON
            and host[room] >= host_gb - EPSILON
            and (memory_gb is None or free[room][memory_gb] > 0)
        ]
        if not able:
            return None
        room = max(able, key=lambda room: cpus[room])
        cpus[room] -= cpus_needed
        host[room] -= host_gb
        if memory_gb is not None:
            free[room][memory_gb] -= 1
        return room

    for chosen in sorted(solution.chosen, key=lambda chosen: -chosen.holding.cpus):
        for _ in range(chosen.count):
            room = take(chosen.holding.cpus, chosen.holding.host_gb, chosen.place.memory_gb)
            if room is None:
                return None
            slots.append(FilledSlot(chosen.holding, room, chosen.shares))
    encoders = encoders_for(solution.rate, wanted.encode_seconds)
    others = [DIRECTOR_CPUS + SPARE_CPUS, *[ENCODER_CPUS] * encoders]
    if any(take(needed, 0.0, None) is None for needed in others):
        return None
    return Packing(solution.rate, tuple(slots), encoders)


class _Rows:
    """Constraints `low <= sum of coefficients times variables <= high`, gathered one by one."""

    def __init__(self) -> None:
        self.rows: list[dict[int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, terms: dict[int, float], *, low: float = -math.inf, high: float = math.inf) -> None:
        self.rows.append(terms)
        self.low.append(low)
        self.high.append(high)

    def matrix(self, columns: int) -> Any:
        from scipy.sparse import csr_array

        where = [(row, column) for row, terms in enumerate(self.rows) for column in terms]
        values = [value for terms in self.rows for value in terms.values()]
        rows, cols = np.array(where, dtype=int).reshape(-1, 2).T
        return csr_array((values, (rows, cols)), shape=(len(self.rows), columns))


def _solve(
    wanted: PackingProblem, places: Sequence[_SlotGroup], holdings: Assignments, rooms: Sequence[Node] | None
) -> _Solution | None:
    """`rooms`: the nodes whose CPUs and host memory bound what is placed there; none: without bounds."""
    options = [(place, holding) for place in places for holding in holdings(place.memory_gb)]
    if not options:
        return None
    # Time is counted in shares of all slots' time, so that numbers are of one size whatever the seconds are.
    total = sum(place.count for place in places)
    needs = {actor: total * actor.seconds / wanted.seconds for actor in wanted.actors}
    rows = _Rows()
    integer: list[int] = []
    highest: list[float] = []

    def variable(high: float, *, whole: bool = False) -> int:
        integer.append(int(whole))
        highest.append(high)
        return len(highest) - 1

    efficiency = variable(1.0)
    numbers = [variable(place.count, whole=True) for place, _ in options]
    seconds_of: dict[int, dict[str, int]] = {number: {} for number in numbers}
    given: dict[Actor, dict[int, float]] = {actor: {efficiency: -needs[actor]} for actor in wanted.actors}
    for (_, holding), number in zip(options, numbers, strict=True):
        time = {number: -1.0}
        rounds = variable(math.inf) if holding.turning else None
        if rounds is not None:
            time[rounds] = holding.swapped_gb / wanted.swap_gb_per_s * total / wanted.seconds
        for actor in (actor for actor in wanted.actors if actor in holding.actors):
            seconds = variable(math.inf)
            time[seconds] = 1.0
            given[actor][seconds] = 1.0
            seconds_of[number][actor.name] = seconds
            if actor in holding.turning and rounds is not None:
                rows.add({seconds: 1.0, rounds: -TURN_SHOTS * needs[actor]}, high=0.0)
        rows.add(time, high=0.0)
    for actor in wanted.actors:
        rows.add(given[actor], low=0.0)
        rows.add({n: 1.0 for n, (_, holding) in zip(numbers, options, strict=True) if actor in holding.actors}, low=1.0)
    for place in places:
        rows.add({n: 1.0 for n, (own, _) in zip(numbers, options, strict=True) if own is place}, high=place.count)
    rows.add(dict.fromkeys(numbers, 1.0), high=wanted.most_slots)
    encoders = []
    if rooms is not None:
        encoders = [variable(math.floor(node.cpus / ENCODER_CPUS), whole=True) for node in rooms]
        directors = [variable(1, whole=True) for _ in rooms]
        keeping_up = total / wanted.seconds * wanted.encode_seconds / ENCODER_BUSY
        rows.add({**dict.fromkeys(encoders, 1.0), efficiency: -keeping_up}, low=0.0)
        rows.add(dict.fromkeys(encoders, 1.0), low=1.0)
        rows.add(dict.fromkeys(directors, 1.0), low=1.0)
        for room, node in enumerate(rooms):
            here = {n: holding for n, (place, holding) in zip(numbers, options, strict=True) if place.room == room}
            cpus = {n: holding.cpus for n, holding in here.items()}
            rows.add({**cpus, encoders[room]: ENCODER_CPUS, directors[room]: DIRECTOR_CPUS + SPARE_CPUS}, high=node.cpus)
            if node.memory_gb is not None:
                rows.add({n: holding.host_gb for n, holding in here.items()}, high=node.memory_gb)
    cost = np.zeros(len(highest))
    cost[efficiency] = -1.0
    cost[[*numbers, *encoders]] = SLOT_WEIGHT / total
    values = _optimum(cost, integer, highest, rows)
    if values is None:
        return None
    counts = [round(values[number]) for number in numbers]
    return _Solution(
        rate=float(values[efficiency]) * total / wanted.seconds,
        chosen=tuple(
            _ChosenAssignment(
                place, holding, n, {name: float(values[column]) / n for name, column in seconds_of[number].items()}
            )
            for (place, holding), number, n in zip(options, numbers, counts, strict=True)
            if n
        ),
        encoders=tuple(round(values[number]) for number in encoders),
    )


def _optimum(cost: Any, integer: Sequence[int], highest: Sequence[float], rows: _Rows) -> Any:
    from scipy.optimize import Bounds, LinearConstraint, milp

    found = milp(
        cost,
        integrality=np.array(integer),
        bounds=Bounds(np.zeros(len(highest)), np.array(highest)),
        constraints=LinearConstraint(rows.matrix(len(highest)), np.array(rows.low), np.array(rows.high)),
        options={"time_limit": SOLVER_SECONDS, "mip_rel_gap": GAP},
    )
    # Out of time it may still have found a packing, if not the best one.
    return found.x
