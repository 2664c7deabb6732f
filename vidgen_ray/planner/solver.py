"""Solve the packing problem: how many GPU slots hold which actors, for the highest rate that GPUs, CPUs and host memory
allow.

Explain a problem without a solution, and find slots for GPUs that become free later.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vidgen_ray.planner.cluster import GB, H100, Cluster, GpuCard, Node
from vidgen_ray.planner.layout import (
    CONTEXT_GB,
    EPSILON,
    SHOTS_PER_SWAP,
    Actor,
    Assignment,
    Candidates,
    Slot,
    drop_dominated,
    needed_gb,
)

ENCODER_CPUS = 0.5
"""CPUs of an encoder, and CPU seconds per second that it is planned to use: about half of the time it waits for frames."""
DIRECTOR_CPUS = 0.5
SPARE_CPUS = 0.5
"""CPUs for Ray's own tasks, such as reading the script."""
SLOT_WEIGHT = 1e-5
"""Minimum efficiency that an additional slot must add."""
SOLVER_NODES = 500
"""Nodes of the branch-and-bound tree, after which the best packing so far is used. Reached only for many nodes that are short
of CPUs. Not a time limit: the plan of a busy machine must be that of an idle one."""
GAP = 1e-3
"""Relative distance to the best possible rate at which the search stops."""

SlotsOfNode = Callable[[Node], Mapping[float, int]]
"""Node -> number of slots by GB of GPU memory. Slots without a GPU have 0 GB."""


@dataclass(frozen=True)
class PackingProblem:
    """The actors to be placed and the limits of the run."""

    actors: tuple[Actor, ...]
    encode_seconds: float
    """Mean CPU seconds of encoding per shot."""
    max_slots: int
    slots_of: SlotsOfNode
    speed: Callable[[Actor, GpuCard | None], float] = lambda *_: 1.0
    """Speed of an actor on a kind of GPU: its seconds divided by those on that kind."""

    @property
    def seconds(self) -> float:
        """Mean seconds per shot of the actors on GPUs, or of all actors if none is on a GPU."""
        return sum(actor.seconds for actor in self.actors if actor.on_gpu) or sum(actor.seconds for actor in self.actors)


@dataclass(frozen=True)
class FilledSlot:
    """A slot in use."""

    assignment: Assignment
    node: int
    """Index of the node in the cluster."""
    shares: Mapping[str, float]
    """Actor -> share of the slot's time on which the rate is based."""


@dataclass(frozen=True)
class Packing:
    """A solution of the packing problem."""

    rate: float
    """Shots per second."""
    slots: tuple[FilledSlot, ...]
    encoders: int


@dataclass(frozen=True)
class _SlotGroup:
    """Interchangeable slots: same memory and kind of GPU, and same node if `node` matters."""

    node: int
    memory_gb: float
    card: GpuCard | None
    count: int


@dataclass(frozen=True)
class _Option:
    """An assignment that slots of a group may have."""

    group: _SlotGroup
    assignment: Assignment


@dataclass(frozen=True)
class _Solution:
    rate: float
    chosen: tuple[tuple[_Option, int, Mapping[str, float]], ...]
    """Option, number of slots that use it, and actor -> share of the time of each of these slots."""
    encoders: tuple[int, ...]
    """Encoders per node. Empty if CPUs and host memory were ignored."""


def pack(problem: PackingProblem, candidates: Candidates, cluster: Cluster) -> Packing | None:
    """Return the packing with the highest rate, or `None` if there is none.

    First solves the problem without CPU and host memory limits, which rarely matter, then with those of all nodes together,
    and places the slots on nodes afterwards. Only if both placements fail, solves it with the limits of each node.
    """
    kinds: Counter[tuple[float, GpuCard | None]] = Counter()
    for node in cluster.nodes:
        kinds.update({(memory, node.assumed_card): count for memory, count in problem.slots_of(node).items()})
    ordered = sorted(kinds.items(), key=lambda kind: kind[0][0], reverse=True)
    groups = [_SlotGroup(0, memory, card, count) for (memory, card), count in ordered]
    unlimited = _solve(problem, groups, candidates, None)
    if unlimited is None:
        return None
    placed = _place_on_nodes(unlimited, problem, cluster)
    if placed is not None:
        return placed
    bounded = replace(problem, max_slots=min(problem.max_slots, _most_slots(problem, cluster)))
    pooled = _solve(bounded, groups, candidates, [_all_nodes(cluster)])
    if pooled is None:
        return None
    # No packing with the limits of each node is faster than this one.
    placed = _place_on_nodes(pooled, problem, cluster)
    if placed is not None:
        return placed
    groups = [
        _SlotGroup(index, memory, node.assumed_card, count)
        for index, node in enumerate(cluster.nodes)
        for memory, count in sorted(problem.slots_of(node).items(), reverse=True)
    ]
    limited = _solve(problem, groups, candidates, cluster.nodes)
    if limited is None:
        return None
    slots = [
        FilledSlot(option.assignment, option.group.node, shares)
        for option, count, shares in limited.chosen
        for _ in range(count)
    ]
    return Packing(limited.rate, tuple(slots), sum(limited.encoders))


def _all_nodes(cluster: Cluster) -> Node:
    """Return one node with the CPUs and the host memory of all nodes."""
    memory_gb = [node.memory_gb for node in cluster.nodes if node.memory_gb is not None]
    return Node(
        cluster.gpus,
        sum(node.cpus for node in cluster.nodes),
        sum(memory_gb) if len(memory_gb) == len(cluster.nodes) else None,
    )


def _most_slots(problem: PackingProblem, cluster: Cluster) -> int:
    """Return an upper bound of the slots with workers that fit on the nodes, each on one node, beside the director."""
    smallest = min(actor.cpus for actor in problem.actors)

    def fitting(cpus: float) -> int:
        return max(0, math.floor(cpus / smallest + EPSILON))

    by_node = [fitting(node.cpus) for node in cluster.nodes]
    displaced = [fitting(node.cpus) - fitting(node.cpus - DIRECTOR_CPUS - SPARE_CPUS) for node in cluster.nodes]
    return sum(by_node) - min(displaced)


def encoders_needed(rate: float, encode_seconds: float) -> int:
    """Return the encoders for `rate` shots per second that take so many CPU seconds to encode on average."""
    return max(1, math.ceil(rate * encode_seconds / ENCODER_CPUS - EPSILON))


def host_gb_of_nodes(packing: Packing) -> dict[int, float]:
    """Return node -> GB of host memory that its processes need at most, which is while the largest of them loads."""
    assignments: defaultdict[int, list[Assignment]] = defaultdict(list)
    for filled in packing.slots:
        assignments[filled.node].append(filled.assignment)
    return {node: sum(a.host_gb for a in held) + max(a.load_gb for a in held) for node, held in assignments.items()}


def parallel_loads(packing: Packing, cluster: Cluster) -> int:
    """Return how many processes may load weights at once on each node. 1 if the host memory of a node is unknown."""
    loads = [sum(len(filled.assignment.processes) for filled in packing.slots)]
    for number, node in enumerate(cluster.nodes):
        held = [filled.assignment for filled in packing.slots if filled.node == number]
        load_gb = max((assignment.load_gb for assignment in held), default=0.0)
        if load_gb:
            free_gb = 0.0 if node.memory_gb is None else node.memory_gb - sum(assignment.host_gb for assignment in held)
            loads.append(int(free_gb / load_gb))
    return max(1, min(loads))


def _place_on_nodes(solution: _Solution, problem: PackingProblem, cluster: Cluster) -> Packing | None:
    """Place each slot on the node with the most free CPUs. Returns `None` if this greedy placement fails."""
    cpus = [node.cpus for node in cluster.nodes]
    host = [math.inf if node.memory_gb is None else node.memory_gb for node in cluster.nodes]
    load = [0.0 for _ in cluster.nodes]
    free = [Counter(problem.slots_of(node)) for node in cluster.nodes]
    cards = [node.assumed_card for node in cluster.nodes]
    slots: list[FilledSlot] = []

    def take(cpus_needed: float, host_gb: float = 0.0, load_gb: float = 0.0, group: _SlotGroup | None = None) -> int | None:
        suitable = [
            node
            for node in range(len(cpus))
            if cpus[node] >= cpus_needed - EPSILON
            and host[node] >= host_gb + max(load_gb, load[node]) - EPSILON
            and (group is None or (free[node][group.memory_gb] > 0 and cards[node] == group.card))
        ]
        if not suitable:
            return None
        node = max(suitable, key=lambda node: cpus[node])
        cpus[node] -= cpus_needed
        host[node] -= host_gb
        load[node] = max(load_gb, load[node])
        if group is not None:
            free[node][group.memory_gb] -= 1
        return node

    for option, count, shares in sorted(solution.chosen, key=lambda chosen: -chosen[0].assignment.cpus):
        assignment = option.assignment
        for _ in range(count):
            node = take(assignment.cpus, assignment.host_gb, assignment.load_gb, option.group)
            if node is None:
                return None
            slots.append(FilledSlot(assignment, node, shares))
    encoders = encoders_needed(solution.rate, problem.encode_seconds)
    others = [DIRECTOR_CPUS + SPARE_CPUS, *[ENCODER_CPUS] * encoders]
    if any(take(needed) is None for needed in others):
        return None
    return Packing(solution.rate, tuple(slots), encoders)


def _solve(
    problem: PackingProblem, groups: Sequence[_SlotGroup], candidates: Candidates, nodes: Sequence[Node] | None
) -> _Solution | None:
    """Return the best solution, or `None` if there is none.

    `nodes`: nodes whose CPUs and host memory limit the slots placed there. `None` ignores these limits.
    """

    def usable(group: _SlotGroup) -> Sequence[Assignment]:
        found = candidates(group.memory_gb)
        if group.card and group.card.unified:
            # Swapped weights would be in the same memory twice.
            found = [replace(assignment, unified=True) for assignment in found if not assignment.swapped_actors]
        return drop_dominated(found, ignore_host_limits=nodes is None)

    options = [_Option(group, assignment) for group in groups for assignment in usable(group)]
    if not options:
        return None
    return _PackingModel(problem, groups, options, nodes).solve()


class _PackingModel:
    """The packing problem as a linear programme.

    Times are shares of the time of all slots, so that all coefficients have a similar magnitude.
    """

    def __init__(
        self,
        problem: PackingProblem,
        groups: Sequence[_SlotGroup],
        options: Sequence[_Option],
        nodes: Sequence[Node] | None,
    ) -> None:
        self._problem = problem
        self._options = options
        self._programme = LinearProgramme()
        self._total_slots = sum(group.count for group in groups)
        self._needs = {actor: self._total_slots * actor.seconds / problem.seconds for actor in problem.actors}
        self._efficiency = self._programme.add_variable(
            max(problem.speed(actor, group.card) for group in groups for actor in problem.actors)
        )
        self._counts = [self._programme.add_variable(option.group.count, integer=True) for option in options]
        self._time_variables: list[dict[Actor, int]] = [self._add_slot_time(n) for n in range(len(options))]
        self._supply_all_actors()
        self._limit_slots(groups)
        self._encoders = [] if nodes is None else self._limit_nodes(nodes)

    def solve(self) -> _Solution | None:
        """Maximise the efficiency, with a small penalty per slot and encoder."""
        values = self._values_of_one_option() or self._best_values()
        if values is None:
            return None
        chosen = []
        for option, count_variable, times in zip(self._options, self._counts, self._time_variables, strict=True):
            if count := round(values[count_variable]):
                used = {actor: self._used_share(actor, values) for actor in times}
                shares = {actor.name: max(0.0, float(values[time])) * used[actor] / count for actor, time in times.items()}
                chosen.append((option, count, shares))
        return _Solution(
            rate=float(values[self._efficiency]) * self._total_slots / self._problem.seconds,
            chosen=tuple(chosen),
            encoders=tuple(round(values[variable]) for variable in self._encoders),
        )

    def _best_values(self) -> Any:
        cost = self._programme.zero_cost()
        cost[self._efficiency] = -1.0
        cost[[*self._counts, *self._encoders]] = SLOT_WEIGHT / self._total_slots
        return self._programme.minimize(cost)

    def _values_of_one_option(self) -> dict[int, float] | None:
        """Return what `_best_values` does, without scipy, if all slots share their time in one way. Otherwise `None`."""
        option, times = self._options[0], self._time_variables[0]
        slots = min(option.group.count, self._problem.max_slots)
        is_shared = not (option.assignment.swapped_actors or option.assignment.beside_gpu)
        if len(self._options) > 1 or self._encoders or not is_shared or slots < 1 or len(times) < len(self._problem.actors):
            return None
        needed = {actor: self._needs[actor] / self._problem.speed(actor, option.group.card) for actor in times}
        efficiency = slots / sum(needed.values())
        shares = {times[actor]: efficiency * time for actor, time in needed.items()}
        return {self._efficiency: efficiency, self._counts[0]: slots, **shares}

    def _used_share(self, actor: Actor, values: Any) -> float:
        """Return the share of its time that an actor needs. One beside a GPU may have more time than that."""
        time = sum(values[times[actor]] for times in self._time_variables if actor in times)
        return 1.0 if actor.on_gpu else min(1.0, float(values[self._efficiency] * self._needs[actor] / time))

    def _add_slot_time(self, n: int) -> dict[Actor, int]:
        """Limit the time that the slots of option `n` spend on actors and on swapping. Return actor -> time variable.

        Processes beside the GPU have time of their own.
        """
        assignment = self._options[n].assignment
        slot_time = {self._counts[n]: -1.0}
        rounds = self._programme.add_variable(math.inf) if assignment.swapped_actors else None
        if rounds is not None:
            seconds_per_round = (self._options[n].group.card or H100).copy_seconds(assignment.swapped_gb * GB)
            slot_time[rounds] = seconds_per_round * self._total_slots / self._problem.seconds
        times = {}
        beside = {actor: process for process in assignment.beside_gpu for actor in process.actors}
        beside_time = {process: {self._counts[n]: -1.0} for process in assignment.beside_gpu}
        for actor in (actor for actor in self._problem.actors if actor in assignment.actors):
            time = times[actor] = self._programme.add_variable(math.inf)
            (beside_time[beside[actor]] if actor in beside else slot_time)[time] = 1.0
            if actor in assignment.swapped_actors and rounds is not None:
                # At most `TURN_SHOTS` shots per round of swapping.
                speed = self._problem.speed(actor, self._options[n].group.card)
                self._programme.add_constraint({time: speed, rounds: -SHOTS_PER_SWAP * self._needs[actor]}, high=0.0)
        for process_time in (slot_time, *beside_time.values()):
            self._programme.add_constraint(process_time, high=0.0)
        return times

    def _supply_all_actors(self) -> None:
        """Require enough time of every actor for the efficiency, and at least one slot with it."""
        for actor in self._problem.actors:
            supply = {
                times[actor]: self._problem.speed(actor, option.group.card)
                for times, option in zip(self._time_variables, self._options, strict=True)
                if actor in times
            }
            self._programme.add_constraint({self._efficiency: -self._needs[actor], **supply}, low=0.0)
            slots = [n for n, option in zip(self._counts, self._options, strict=True) if actor in option.assignment.actors]
            self._programme.add_constraint(dict.fromkeys(slots, 1.0), low=1.0)

    def _limit_slots(self, groups: Sequence[_SlotGroup]) -> None:
        """Use at most the slots of each group, and at most `max_slots` in total."""
        for group in groups:
            slots = [n for n, option in zip(self._counts, self._options, strict=True) if option.group is group]
            self._programme.add_constraint(dict.fromkeys(slots, 1.0), high=group.count)
        self._programme.add_constraint(dict.fromkeys(self._counts, 1.0), high=self._problem.max_slots)

    def _limit_nodes(self, nodes: Sequence[Node]) -> list[int]:
        """Place encoders and the director, and limit the CPUs and host memory used on each node.

        Returns the variables of the number of encoders per node.
        """
        programme, problem = self._programme, self._problem
        encoders = [programme.add_variable(math.floor(node.cpus / ENCODER_CPUS), integer=True) for node in nodes]
        directors = [programme.add_variable(1, integer=True) for _ in nodes]
        encoders_per_efficiency = self._total_slots / problem.seconds * problem.encode_seconds / ENCODER_CPUS
        programme.add_constraint({**dict.fromkeys(encoders, 1.0), self._efficiency: -encoders_per_efficiency}, low=0.0)
        programme.add_constraint(dict.fromkeys(encoders, 1.0), low=1.0)
        programme.add_constraint(dict.fromkeys(directors, 1.0), low=1.0)
        for index, node in enumerate(nodes):
            options = {n: option for n, option in zip(self._counts, self._options, strict=True) if option.group.node == index}
            cpus = {n: option.assignment.cpus for n, option in options.items()}
            others = {encoders[index]: ENCODER_CPUS, directors[index]: DIRECTOR_CPUS + SPARE_CPUS}
            programme.add_constraint({**cpus, **others}, high=node.cpus)
            if node.memory_gb is not None:
                host_gb = {n: option.assignment.host_gb for n, option in options.items()}
                programme.add_constraint({**host_gb, self._add_load_memory(options): 1.0}, high=node.memory_gb)
        return encoders

    def _add_load_memory(self, options: Mapping[int, _Option]) -> int:
        """Return the variable of the host memory that loading needs at times on a node: that of the largest load.

        `options`: variable of the number of slots -> option, of this node.
        """
        programme = self._programme
        load_gb = programme.add_variable(math.inf)
        for slots, option in options.items():
            if option.assignment.load_gb:
                is_used = programme.add_variable(1, integer=True)
                programme.add_constraint({slots: 1.0, is_used: -float(option.group.count)}, high=0.0)
                programme.add_constraint({load_gb: 1.0, is_used: -option.assignment.load_gb}, low=0.0)
        return load_gb


class LinearProgramme:
    """A mixed-integer linear programme. Variables are identified by their index and are at least 0."""

    def __init__(self) -> None:
        self._upper_bounds: list[float] = []
        self._integer: list[int] = []
        self._rows: list[dict[int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add_variable(self, high: float, *, integer: bool = False) -> int:
        """Add a variable between 0 and `high`."""
        self._integer.append(int(integer))
        self._upper_bounds.append(high)
        return len(self._upper_bounds) - 1

    def add_constraint(self, terms: dict[int, float], *, low: float = -math.inf, high: float = math.inf) -> None:
        """Add `low <= sum(coefficient * variable) <= high`. `terms`: variable -> coefficient."""
        self._rows.append(terms)
        self._low.append(low)
        self._high.append(high)

    def zero_cost(self) -> Any:
        """Return a cost vector of zeros, one per variable."""
        return np.zeros(len(self._upper_bounds))

    def minimize(self, cost: Any) -> Any:
        """Return the values of all variables at the minimum of `cost`, or `None` if there is no solution."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        result = milp(
            cost,
            integrality=np.array(self._integer),
            bounds=Bounds(np.zeros(len(self._upper_bounds)), np.array(self._upper_bounds)),
            constraints=LinearConstraint(self._matrix(), np.array(self._low), np.array(self._high)),
            options={"node_limit": SOLVER_NODES, "mip_rel_gap": GAP},
        )
        # At the limit, `x` is the best solution so far, or None.
        return result.x

    def _matrix(self) -> Any:
        from scipy.sparse import csr_array

        indices = [(row, column) for row, terms in enumerate(self._rows) for column in terms]
        values = [value for terms in self._rows for value in terms.values()]
        rows, columns = np.array(indices, dtype=int).reshape(-1, 2).T
        return csr_array((values, (rows, columns)), shape=(len(self._rows), len(self._upper_bounds)))


UNLIMITED_CPUS = 1e6


def explain_infeasible(problem: PackingProblem, candidates: Candidates, cluster: Cluster) -> str:
    """Return why `pack` found no packing for the same arguments."""
    on_gpu = [actor for actor in problem.actors if actor.on_gpu]
    largest = max(cluster.gpus, default=0.0)
    for actor in on_gpu:
        if needed_gb([actor]) + CONTEXT_GB > largest + EPSILON:
            available = f"the largest GPU has {largest:.4g} GB" if cluster.gpus else "there is no GPU"
            stages = " and ".join(actor.stages)
            need = f"stage {stages} needs" if len(actor.stages) == 1 else f"stages {stages} need"
            return f"{need} {needed_gb([actor]) + CONTEXT_GB:.4g} GB of GPU memory, {available}"
    if pack(problem, candidates, _without_limits(cluster, cpus=UNLIMITED_CPUS)) is None:
        total_gb = needed_gb(on_gpu) + CONTEXT_GB
        return f"the stages need {total_gb:.4g} GB together, the largest of {len(cluster.gpus)} GPUs has {largest:.4g} GB"
    if pack(problem, candidates, _without_limits(cluster)) is not None:
        return _explain_host_memory(problem, candidates, cluster)
    worker_cpus = max(actor.cpus for actor in problem.actors)
    node_cpus = ", ".join(f"{node.cpus:g}" for node in cluster.nodes)
    return (
        f"a worker needs up to {worker_cpus:g} CPUs, in addition to {ENCODER_CPUS:g} for an encoder and "
        f"{DIRECTOR_CPUS + SPARE_CPUS:g} for the director and Ray; the nodes have {node_cpus}"
    )


def _explain_host_memory(problem: PackingProblem, candidates: Candidates, cluster: Cluster) -> str:
    """Return how much host memory the processes of the node that needs most would take, and what the nodes have."""
    packing = pack(problem, candidates, _without_limits(cluster))
    assert packing is not None
    needs = host_gb_of_nodes(packing)
    node = max(needs, key=lambda node: needs[node])
    slots = [filled.assignment for filled in packing.slots if filled.node == node]
    load_gb = max(assignment.load_gb for assignment in slots)
    while_loading = f" ({load_gb:.4g} GB of it for the largest weights, which pass through host memory)" if load_gb else ""
    available = ", ".join(f"{node.memory_gb:.4g}" for node in cluster.nodes if node.memory_gb is not None)
    needed = f"{needs[node]:.4g} GB are needed on one node{while_loading}; the nodes have {available} GB"
    if cluster.nodes[node].is_unified:
        return f"memory, which GPU and host share: {needed}; with a smaller object store of Ray it is more, see docs/gpu.md"
    return f"host memory: {needed}"


def _without_limits(cluster: Cluster, cpus: float | None = None) -> Cluster:
    """Return the cluster with unlimited host memory and, if `cpus` is not `None`, with that many CPUs per node."""
    nodes = (replace(node, cpus=node.cpus if cpus is None else cpus, memory_gb=None) for node in cluster.nodes)
    return replace(cluster, nodes=tuple(nodes))


MIN_GAIN = 1e-6
"""Minimum relative gain in the rate for which a slot is added."""


def more_slots(slots: Sequence[Slot], seconds: Mapping[str, float], free: Cluster) -> tuple[tuple[Slot, int], ...]:
    """Return the slots to add, and the index of the free node of each.

    The kinds of slots are those of `slots`, the present ones. `seconds`: stage -> mean seconds per shot. Each free GPU gets the
    kind of one GPU that it has the memory and CPUs for and that raises the rate most; the time for swapping weights is
    neglected.
    """
    slots = [slot for slot in slots if not any(worker.server for worker in slot.workers)]
    held = frozenset().union(*(slot.stages for slot in slots))
    seconds = {stage: each for stage, each in seconds.items() if stage in held}
    counts = Counter(slots)
    cpus = [node.cpus for node in free.nodes]
    added = []
    rate = _rate(counts, seconds)
    for memory_gb, node in sorted(((gb, n) for n, each in enumerate(free.nodes) for gb in each.gpus), reverse=True):
        kinds = [
            kind
            for kind in dict.fromkeys(slots)
            if kind.gpus == 1 and kind.memory_gb <= memory_gb + EPSILON and kind.cpus + ENCODER_CPUS <= cpus[node] + EPSILON
        ]
        rates = {kind: _rate(counts + Counter([kind]), seconds) for kind in kinds}
        best = max(kinds, key=lambda kind: rates[kind], default=None)
        if best is not None and rates[best] >= rate * (1 + MIN_GAIN):
            counts[best] += 1
            cpus[node] -= best.cpus + ENCODER_CPUS
            rate = rates[best]
            added.append((best, node))
    return tuple(added)


def _rate(counts: Mapping[Slot, int], seconds: Mapping[str, float]) -> float:
    """Return the shots per second of these slots, each of which divides its time among its stages in the best way."""
    programme = LinearProgramme()
    # Relative to one slot, so that all coefficients have a similar magnitude.
    total = sum(seconds.values())
    rate = programme.add_variable(float(sum(counts.values())))
    supply: dict[str, dict[int, float]] = {stage: {rate: -seconds[stage] / total} for stage in seconds}
    for slot, count in counts.items():
        # Workers without a GPU work beside those on it.
        beside = [worker.stages for worker in slot.workers if slot.has_gpu and not worker.gpus]
        on_slot = slot.stages.difference(*beside)
        for held in (on_slot, *beside):
            times = {stage: programme.add_variable(float(count)) for stage in held if stage in seconds}
            programme.add_constraint(dict.fromkeys(times.values(), 1.0), high=float(count))
            for stage, time in times.items():
                supply[stage][time] = 1.0
    for terms in supply.values():
        programme.add_constraint(terms, low=0.0)
    cost = programme.zero_cost()
    cost[rate] = -1.0
    values = programme.minimize(cost)
    return 0.0 if values is None else float(values[rate]) / total
