"""What one GPU, or one share of a machine without any, can hold: processes, and in them actors of the profile.

An actor's weights are held once a process, whatever number of stages they serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from typing import TypeVar

from vidgen_ray.planner.layout import Slot, WorkerSpec

T = TypeVar("T")

CONTEXT_GB = 0.6
"""Of the GPU's memory that a process takes before it holds anything."""
PROCESS_HOST_GB = 0.4
"""Of the host's memory that a process without a GPU takes: torch and what it brings."""
TURN_SHOTS = 8
"""Shots of one group's stages that are worked off before another group has its turn."""
EPSILON = 1e-6
"""What sums of decimals may exceed."""


@dataclass(frozen=True)
class Actor:
    """An actor of the profile with those of its stages that the script uses."""

    name: str
    stages: tuple[str, ...]
    position: int
    """In the chain."""
    seconds: float
    """Of a shot, in the mean over all shots of the script."""
    gpu_gb: float
    """0 for an actor that computes on the CPU."""
    host_gb: float
    cpus: float
    can_wait: bool
    """Whether its weights can wait in the host's memory while others have the GPU's."""


@dataclass(frozen=True)
class Process:
    """`turns` are groups of `actors` of which one at a time has the GPU's memory; all others stay."""

    actors: tuple[Actor, ...]
    turns: tuple[tuple[Actor, ...], ...] = ()

    @cached_property
    def waiting_gb(self) -> float:
        return sum(actor.gpu_gb for group in self.turns for actor in group)

    @cached_property
    def gpu_gb(self) -> float:
        held = sum(actor.gpu_gb for actor in self.actors)
        if not held:
            return 0.0
        largest = max((sum(actor.gpu_gb for actor in group) for group in self.turns), default=0.0)
        return CONTEXT_GB + held - self.waiting_gb + largest

    @cached_property
    def host_gb(self) -> float:
        """Every group waits while a turn is changed."""
        own = 0.0 if self.gpu_gb else PROCESS_HOST_GB
        return own + sum(actor.host_gb for actor in self.actors) + self.waiting_gb

    @property
    def cpus(self) -> float:
        """Stages of one process run one after another."""
        return max(actor.cpus for actor in self.actors)


@dataclass(frozen=True)
class Assignment:
    """The processes of one slot."""

    processes: tuple[Process, ...]

    @cached_property
    def actors(self) -> frozenset[Actor]:
        return frozenset(actor for process in self.processes for actor in process.actors)

    @cached_property
    def gpu_gb(self) -> float:
        return sum(process.gpu_gb for process in self.processes)

    @cached_property
    def host_gb(self) -> float:
        return sum(process.host_gb for process in self.processes)

    @cached_property
    def cpus(self) -> float:
        return sum(process.cpus for process in self.processes)

    @cached_property
    def turning(self) -> frozenset[Actor]:
        return frozenset(actor for process in self.processes for group in process.turns for actor in group)

    @property
    def swapped_gb(self) -> float:
        """What moves in a round in which each group has its turn once: in, and out again."""
        return sum(2 * process.waiting_gb for process in self.processes)

    def slot(self) -> Slot:
        shares = self._shares()
        workers = tuple(
            WorkerSpec(_stages(process.actors), process.cpus, share, tuple(_stages(group) for group in process.turns))
            for process, share in zip(self.processes, shares, strict=True)
        )
        return Slot(workers, round(self.gpu_gb, 3))

    def _shares(self) -> list[float]:
        """Of the GPU, by memory; in ten-thousandths, which is as fine as Ray counts."""
        if not self.gpu_gb:
            return [0.0] * len(self.processes)
        if len(self.processes) == 1:
            return [1.0]
        return [int(10_000 * process.gpu_gb / self.gpu_gb) / 10_000 for process in self.processes]


Assignments = Callable[[float], list[Assignment]]
"""GB of a GPU's memory -> what fits on it. Of a slot without a GPU, the memory is 0."""


def fused(actors: Sequence[Actor]) -> Assignments:
    """One process with everything."""
    return lambda memory_gb: _fitting([Assignment((Process(tuple(actors)),))], memory_gb)


def colocated(actors: Sequence[Actor]) -> Assignments:
    """A process for each actor, all of them together."""
    apart = _apart(actors)
    return lambda memory_gb: _fitting([Assignment(apart)], memory_gb)


def staged(actors: Sequence[Actor]) -> Assignments:
    """Processes of one actor each, as many different ones as fit on a GPU or fewer."""
    every = [Assignment(processes) for processes in _subsets(_apart(actors))]
    return lambda memory_gb: _fitting(every, memory_gb)


def hybrid(actors: Sequence[Actor]) -> Assignments:
    """One process with a part of the actors that fits."""
    every = [Assignment((Process(held),)) for held in _subsets(actors)]
    return lambda memory_gb: _fitting(every, memory_gb)


def hybrid_with_turns(actors: Sequence[Actor]) -> Assignments:
    """As `hybrid`, and where a part does not fit, its actors take turns, with as little to move as possible."""

    def holdings(memory_gb: float) -> list[Assignment]:
        processes = (_with_turns(held, memory_gb) for held in _subsets(actors))
        return [Assignment((process,)) for process in processes if process]

    return holdings


def drop_dominated(holdings: Sequence[Assignment], *, ignore_host_limits: bool = False) -> list[Assignment]:
    """Without those that hold less than another one and are in nothing better.

    `ignore_host_limits`: CPUs and host memory do not matter.
    """

    def better_in_something(holding: Assignment, other: Assignment) -> bool:
        swaps_less = holding.swapped_gb < other.swapped_gb - EPSILON or not other.turning <= holding.turning
        takes_less = holding.cpus < other.cpus - EPSILON or holding.host_gb < other.host_gb - EPSILON
        return swaps_less or (takes_less and not ignore_host_limits)

    def beaten(holding: Assignment) -> bool:
        return any(holding.actors < other.actors and not better_in_something(holding, other) for other in holdings)

    return [holding for holding in holdings if not beaten(holding)]


def _fitting(holdings: Sequence[Assignment], memory_gb: float) -> list[Assignment]:
    return [holding for holding in holdings if holding.gpu_gb <= memory_gb + EPSILON]


def _subsets(things: Sequence[T]) -> Iterator[tuple[T, ...]]:
    return chain.from_iterable(combinations(things, size) for size in range(1, len(things) + 1))


def _apart(actors: Sequence[Actor]) -> tuple[Process, ...]:
    """A process for each actor on the GPU; one on the CPU lives with the next after it in the chain, or the last."""
    on_gpu = [actor for actor in actors if actor.gpu_gb]
    if not on_gpu:
        return tuple(Process((actor,)) for actor in actors)
    homes: dict[str, list[Actor]] = {actor.name: [] for actor in on_gpu}
    for actor in actors:
        home = next((other for other in on_gpu if other.position >= actor.position), on_gpu[-1])
        homes[home.name].append(actor)
    return tuple(Process(tuple(held)) for held in homes.values())


def _with_turns(actors: Sequence[Actor], memory_gb: float) -> Process | None:
    """These actors in one process: all to stay if they fit, else as much as possible."""
    free = memory_gb - CONTEXT_GB + EPSILON
    on_gpu = [actor for actor in actors if actor.gpu_gb]
    if sum(actor.gpu_gb for actor in on_gpu) <= free or not on_gpu:
        return Process(tuple(actors))
    can_wait = [actor for actor in on_gpu if actor.can_wait]
    best: Process | None = None
    for waiting in _subsets(can_wait):
        if len(waiting) < 2 or (best and sum(actor.gpu_gb for actor in waiting) >= best.waiting_gb):
            continue
        staying = sum(actor.gpu_gb for actor in on_gpu if actor not in waiting)
        groups = _grouped(waiting, free - staying)
        if groups:
            best = Process(tuple(actors), groups)
    return best


def _grouped(actors: Sequence[Actor], room_gb: float) -> tuple[tuple[Actor, ...], ...] | None:
    """The fewest groups of at most that size; none where an actor alone is larger. All actors are a handful."""
    best: list[list[Actor]] | None = None

    def put(n: int, groups: list[list[Actor]]) -> None:
        nonlocal best
        if best is not None and len(groups) >= len(best):
            return
        if n == len(actors):
            best = [list(group) for group in groups]
            return
        for group in groups:
            if sum(actor.gpu_gb for actor in group) + actors[n].gpu_gb <= room_gb:
                group.append(actors[n])
                put(n + 1, groups)
                group.pop()
        if actors[n].gpu_gb <= room_gb:
            put(n + 1, [*groups, [actors[n]]])

    put(0, [])
    return None if best is None else tuple(tuple(group) for group in best)


def _stages(actors: Sequence[Actor]) -> tuple[str, ...]:
    ordered = sorted(actors, key=lambda actor: actor.position)
    return tuple(stage for actor in ordered for stage in actor.stages)
