"""Layout of a run: its processes, their stages and their GPUs; and the candidate assignments of actors to one slot, from
which it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from math import ceil
from typing import Literal, TypeVar

from vidgen_ray.system.free_memory import pins_exact_sizes

LayoutKind = Literal["fused", "staged", "hybrid"]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process and its stages."""

    stages: tuple[str, ...]
    """Names of the stages, in the order of the chain."""
    cpus: float
    gpus: float
    """Share of the slot's GPU, or the number of its GPUs if they divide the work of each shot. 0 for a slot without a GPU."""
    swap_groups: tuple[tuple[str, ...], ...] = ()
    """Groups of these stages that take turns in GPU memory, while the others are in host memory (weight swapping). Stages in
    no group stay in GPU memory."""
    gpu_gb: float = 0.0
    """GPU memory that the process may use, in GB. 0 if unknown, or without a GPU."""
    server: str = ""
    """Server that computes the stages. Empty: the process does."""
    parallel: int = 1
    """Calls that it runs at once."""

    def can_run(self, *stages: str) -> bool:
        """Return whether the worker can run these stages in sequence without swapping weights in between.

        Weights are swapped when the first stage starts, so the first stage must be in the only group that is needed.
        """
        swap_groups = [group for group in self.swap_groups if set(group) & set(stages)]
        return set(stages) <= set(self.stages) and (not swap_groups or (len(swap_groups) == 1 and stages[0] in swap_groups[0]))


@dataclass(frozen=True, slots=True)
class Slot:
    """One whole GPU, several GPUs of one machine that work on the same shot, or a share of a machine without GPUs, and its
    worker processes."""

    workers: tuple[WorkerSpec, ...]
    memory_gb: float
    """Memory that the slot needs on each of its GPUs, in GB. 0 without a GPU."""

    @property
    def has_gpu(self) -> bool:
        return self.gpus > 0

    @property
    def gpus(self) -> int:
        return ceil(sum(worker.gpus for worker in self.workers) - EPSILON)

    @property
    def cpus(self) -> float:
        return sum(worker.cpus for worker in self.workers)

    @property
    def stages(self) -> frozenset[str]:
        """Stages of all its workers."""
        return frozenset(stage for worker in self.workers for stage in worker.stages)


@dataclass(frozen=True, slots=True)
class Layout:
    """All processes of a run."""

    kind: LayoutKind
    slots: tuple[Slot, ...]
    encoders: int
    window: int
    """Maximum number of shots in progress."""
    parallel_loads: int = 1
    """Maximum number of processes per node that load weights at once. The weights pass through host memory."""

    @property
    def workers(self) -> tuple[WorkerSpec, ...]:
        return tuple(worker for slot in self.slots for worker in slot.workers)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all stages that a worker holds."""
        return tuple(dict.fromkeys(stage for worker in self.workers for stage in worker.stages))

    @property
    def group_size(self) -> int:
        """Number of GPUs of a machine that divide the work of each shot."""
        return max((1, *(int(worker.gpus) for worker in self.workers)))

    def can_fuse(self, first: str, *others: str) -> bool:
        """Return whether every worker with the first stage can run all these stages in sequence; see `WorkerSpec.can_run`."""
        return all(worker.can_run(first, *others) for worker in self.workers if first in worker.stages)

    @property
    def server_places(self) -> dict[str, int]:
        """Stage that servers compute -> calls that a worker runs at once."""
        return {stage: worker.parallel for worker in self.workers if worker.server for stage in worker.stages}

    def only_together(self, *stages: str) -> bool:
        """Return whether every worker with one of these stages can run all of them in sequence; see `WorkerSpec.can_run`."""
        return all(worker.can_run(*stages) for worker in self.workers if not frozenset(worker.stages).isdisjoint(stages))


def complete_set(slots: Sequence[Slot]) -> tuple[int, ...]:
    """Return the indexes of the fewest slots that hold every stage of all slots together. Empty for no slots."""
    first_of_kind = {slot.stages: index for index, slot in reversed(list(enumerate(slots)))}
    all_stages = frozenset().union(*first_of_kind)
    # A layout has only a few kinds of slots.
    return next(
        tuple(sorted(first_of_kind[kind] for kind in kinds))
        for size in range(len(first_of_kind) + 1)
        for kinds in combinations(first_of_kind, size)
        if frozenset().union(*kinds) == all_stages
    )


_T = TypeVar("_T")

CONTEXT_GB = 0.6
"""GPU memory of a process before it loads any weights."""
GROUP_GB = 1.5
"""GPU memory of the NCCL communicators of a process that divides shots with others. Assumed: 0.3 for each of five."""
PROCESS_HOST_GB = 0.4
"""Host memory of a process without a GPU: torch and other libraries."""
GPU_PROCESS_HOST_GB = 2.0
"""Host memory of a process with a GPU: also the CUDA libraries, and images and frames on their way."""
ROUNDED_PINNED = 1.56
"""Host memory of FLUX's pinned weights divided by their size, where torch rounds blocks up to powers of two. The largest factor
of all models."""
SHOTS_PER_SWAP = 8
"""Shots that one group of stages processes before its weights are swapped for those of another group."""
EPSILON = 1e-6
"""Tolerance of comparisons between sums of decimals."""


@dataclass(frozen=True)
class Actor:
    """An actor of the profile, with the stages that the script uses."""

    name: str
    stages: tuple[str, ...]
    position: int
    """Position in the chain of actors."""
    seconds: float
    """Mean seconds per shot, over all shots of the script."""
    gpu_gb: float
    """GPU memory of its weights between calls. 0 for an actor on the CPU, or whose weights wait in host memory."""
    host_gb: float
    cpus: float
    swappable: bool
    """Its weights can be moved to host memory while other actors use the GPU."""
    peak_gb: float = 0.0
    """Further GPU memory during its largest call."""
    copied_gb: float = 0.0
    """Part of `gpu_gb` of which `host_gb` includes a copy."""
    files_gb: float = 0.0
    """Files from which its weights are read."""
    gpus: int = 1
    """GPUs that divide the work of each shot. Each holds all weights."""

    @property
    def on_gpu(self) -> bool:
        return self.gpu_gb + self.peak_gb > 0


def needed_gb(actors: Sequence[Actor]) -> float:
    """Return the GPU memory in GB of actors that run one after another: all weights, and the activations of one call."""
    return sum(actor.gpu_gb for actor in actors) + max((actor.peak_gb for actor in actors), default=0.0)


@dataclass(frozen=True)
class WorkerProcess:
    """A worker process and its actors."""

    actors: tuple[Actor, ...]
    swap_groups: tuple[tuple[Actor, ...], ...] = ()
    """Groups of these actors that take turns in GPU memory (weight swapping). Actors in no group always stay there."""

    @cached_property
    def gpus(self) -> int:
        """GPUs that it works on, with a process for each if they are several."""
        return max(actor.gpus for actor in self.actors)

    @cached_property
    def swapped_gb(self) -> float:
        """Weights of all groups that take turns, in GB, on each of its GPUs."""
        return sum(actor.gpu_gb for group in self.swap_groups for actor in group)

    @cached_property
    def gpu_gb(self) -> float:
        """GPU memory needed in GB: weights of the permanent actors and of a group, and the activations of one call of these."""
        if not any(actor.on_gpu for actor in self.actors):
            return 0.0
        swapped = {actor for group in self.swap_groups for actor in group}
        permanent = [actor for actor in self.actors if actor not in swapped]
        # The first of several GPUs is that of two processes.
        context_gb = CONTEXT_GB if self.gpus == 1 else 2 * CONTEXT_GB + GROUP_GB
        return context_gb + max(needed_gb([*permanent, *group]) for group in self.swap_groups or ((),))

    @cached_property
    def host_gb(self) -> float:
        """Host memory needed in GB after loading. The weights of all groups have a copy in host memory."""
        own = GPU_PROCESS_HOST_GB if self.gpu_gb else PROCESS_HOST_GB
        swapped = sum(actor.gpu_gb - actor.copied_gb for group in self.swap_groups for actor in group)
        held = sum(actor.host_gb for actor in self.actors) + swapped
        return self.gpus * (own + (held if not self.gpu_gb or pins_exact_sizes() else held * ROUNDED_PINNED))

    @cached_property
    def load_gb(self) -> float:
        """More host memory in GB that loading needs at times: the largest weights that pass through it to the GPU.

        For weights that take turns, `host_gb` includes it.
        """
        swapped = {actor for group in self.swap_groups for actor in group}
        return max((actor.gpus * actor.gpu_gb for actor in self.actors if actor not in swapped), default=0.0)

    @property
    def cpus(self) -> float:
        """CPUs needed by the largest actor: stages of one process run one after another."""
        return max(actor.gpus * actor.cpus for actor in self.actors)


@dataclass(frozen=True)
class Assignment:
    """The processes of one slot and the actors that they hold."""

    processes: tuple[WorkerProcess, ...]
    unified: bool = False
    """GPU and host have the same memory."""

    @cached_property
    def actors(self) -> frozenset[Actor]:
        return frozenset(actor for process in self.processes for actor in process.actors)

    @cached_property
    def gpu_gb(self) -> float:
        return sum(process.gpu_gb for process in self.processes)

    @cached_property
    def host_gb(self) -> float:
        """Host memory needed in GB after loading, with that of the GPU if it is the same."""
        return sum(process.host_gb for process in self.processes) + self.gpu_gb * self.unified

    @cached_property
    def load_gb(self) -> float:
        """More host memory in GB during loading. The processes of a node load one after another.

        None if it is that of the GPU: what has moved there has left the host.
        """
        return 0.0 if self.unified else max(process.load_gb for process in self.processes)

    @cached_property
    def cpus(self) -> float:
        return sum(process.cpus for process in self.processes)

    @cached_property
    def swapped_actors(self) -> frozenset[Actor]:
        """Actors that take turns in GPU memory."""
        return frozenset(actor for process in self.processes for group in process.swap_groups for actor in group)

    @cached_property
    def beside_gpu(self) -> tuple[WorkerProcess, ...]:
        """Processes that work on CPUs while others of the slot use its GPU."""
        return tuple(process for process in self.processes if self.gpu_gb and not process.gpu_gb)

    @property
    def swapped_gb(self) -> float:
        """Weights copied per round, in GB. In a round, each group is copied to the GPU once; its copy there is then dropped."""
        return sum(process.swapped_gb for process in self.processes)

    def slot(self, gpu_gb: float = 0.0) -> Slot:
        """Return the slot for the layout of a run. `gpu_gb`: memory of its GPU, 0 if unknown."""
        shares = self._shares()
        workers = tuple(
            WorkerSpec(
                _stages(process.actors),
                process.cpus,
                share,
                tuple(_stages(group) for group in process.swap_groups),
                round(min(1.0, share) * gpu_gb, 3),
            )
            for process, share in zip(self.processes, shares, strict=True)
        )
        return Slot(workers, round(self.gpu_gb, 3))

    def _shares(self) -> list[float]:
        """Return the share of the GPU per process, proportional to memory, rounded down to Ray's resolution of 0.0001.

        Several GPUs are those of one process.
        """
        if not self.gpu_gb:
            return [0.0] * len(self.processes)
        return [process.gpus * int(10_000 * process.gpu_gb / self.gpu_gb) / 10_000 for process in self.processes]


Candidates = Callable[[float], list[Assignment]]
"""GB of GPU memory of a slot -> assignments that fit. The memory is 0 for a slot without a GPU."""


def fused(actors: Sequence[Actor]) -> Candidates:
    """Return candidates with one process that holds all actors."""
    return lambda memory_gb: _fitting([Assignment((WorkerProcess(tuple(actors)),))], memory_gb)


def staged(actors: Sequence[Actor]) -> Candidates:
    """Return candidates with one process per actor, for any subset of the actors that fits."""
    assignments = [Assignment(processes) for processes in _subsets(_one_process_per_actor(actors))]
    return lambda memory_gb: _fitting(assignments, memory_gb)


def hybrid(actors: Sequence[Actor]) -> Candidates:
    """Return candidates with one process that holds any subset of the actors that fits."""
    assignments = [Assignment((WorkerProcess(subset),)) for subset in _subsets(actors)]
    return lambda memory_gb: _fitting(assignments, memory_gb)


def hybrid_with_swapping(actors: Sequence[Actor]) -> Candidates:
    """Return the candidates of `hybrid`, and subsets that fit with weight swapping, with as little to move as possible."""

    def candidates(memory_gb: float) -> list[Assignment]:
        processes = (with_swapping(subset, memory_gb) for subset in _subsets(actors))
        return [Assignment((process,)) for process in processes if process]

    return candidates


def cpu_actors_beside(candidates: Candidates) -> Candidates:
    """Return the candidates with the CPU actors of each process on a GPU in a process of their own.

    In the same process, they keep the GPU idle, but need fewer CPUs and less host memory.
    """

    def divided(process: WorkerProcess) -> Iterator[WorkerProcess]:
        on_gpu = tuple(actor for actor in process.actors if actor.on_gpu)
        on_cpu = tuple(actor for actor in process.actors if not actor.on_gpu)
        if on_gpu:
            yield WorkerProcess(on_gpu, process.swap_groups)
        if on_cpu:
            yield WorkerProcess(on_cpu)

    return lambda memory_gb: [
        Assignment(tuple(part for process in assignment.processes for part in divided(process)))
        for assignment in candidates(memory_gb)
    ]


def drop_dominated(assignments: Sequence[Assignment], *, ignore_host_limits: bool = False) -> list[Assignment]:
    """Return the assignments without those that hold fewer actors than another one and have no advantage over it.

    Advantages are less swapping and, unless `ignore_host_limits`, fewer CPUs or less host memory.
    """

    def has_advantage(assignment: Assignment, other: Assignment) -> bool:
        swaps_less = assignment.swapped_gb < other.swapped_gb - EPSILON or not other.swapped_actors <= assignment.swapped_actors
        needs_less = any(
            needed < by_other - EPSILON
            for needed, by_other in (
                (assignment.cpus, other.cpus),
                (assignment.host_gb, other.host_gb),
                (assignment.load_gb, other.load_gb),
            )
        )
        return swaps_less or (needs_less and not ignore_host_limits)

    return [
        assignment
        for assignment in assignments
        if not any(assignment.actors < other.actors and not has_advantage(assignment, other) for other in assignments)
    ]


def _fitting(assignments: Sequence[Assignment], memory_gb: float) -> list[Assignment]:
    return [assignment for assignment in assignments if assignment.gpu_gb <= memory_gb + EPSILON]


def _subsets(items: Sequence[_T]) -> Iterator[tuple[_T, ...]]:
    """Yield all non-empty subsets, smallest first."""
    return chain.from_iterable(combinations(items, size) for size in range(1, len(items) + 1))


def _one_process_per_actor(actors: Sequence[Actor]) -> tuple[WorkerProcess, ...]:
    """Return one process per GPU actor. A CPU actor joins the next GPU actor in the chain, or the last one."""
    on_gpu = [actor for actor in actors if actor.on_gpu]
    if not on_gpu:
        return tuple(WorkerProcess((actor,)) for actor in actors)
    members: dict[str, list[Actor]] = {actor.name: [] for actor in on_gpu}
    for actor in actors:
        host = next((other for other in on_gpu if other.position >= actor.position), on_gpu[-1])
        members[host.name].append(actor)
    return tuple(WorkerProcess(tuple(group)) for group in members.values())


def with_swapping(actors: Sequence[Actor], memory_gb: float) -> WorkerProcess | None:
    """Return one process with these actors, or `None` if they do not fit even with swapping.

    As few GB of weights as possible take turns: none if all actors fit together.
    """
    free = memory_gb - CONTEXT_GB + EPSILON
    on_gpu = [actor for actor in actors if actor.on_gpu]
    if needed_gb(on_gpu) <= free or not on_gpu:
        return WorkerProcess(tuple(actors))
    swappable_actors = [actor for actor in on_gpu if actor.swappable]
    best: WorkerProcess | None = None
    for swapped in _subsets(swappable_actors):
        if len(swapped) < 2 or (best and sum(actor.gpu_gb for actor in swapped) >= best.swapped_gb):
            continue
        groups = _fewest_groups(swapped, [actor for actor in on_gpu if actor not in swapped], free)
        if groups:
            best = WorkerProcess(tuple(actors), groups)
    return best


def _fewest_groups(actors: Sequence[Actor], permanent: Sequence[Actor], max_gb: float) -> tuple[tuple[Actor, ...], ...] | None:
    """Divide the actors into the fewest groups that need at most `max_gb` together with the permanent actors.

    Returns `None` if an actor alone needs more. Tries all divisions: a profile has only a handful of actors.
    """
    best: list[list[Actor]] | None = None

    def assign(n: int, groups: list[list[Actor]]) -> None:
        nonlocal best
        if best is not None and len(groups) >= len(best):
            return
        if n == len(actors):
            best = [list(group) for group in groups]
            return
        for group in groups:
            if needed_gb([*permanent, *group, actors[n]]) <= max_gb:
                group.append(actors[n])
                assign(n + 1, groups)
                group.pop()
        if needed_gb([*permanent, actors[n]]) <= max_gb:
            assign(n + 1, [*groups, [actors[n]]])

    assign(0, [])
    return None if best is None else tuple(tuple(group) for group in best)


def _stages(actors: Sequence[Actor]) -> tuple[str, ...]:
    ordered = sorted(actors, key=lambda actor: actor.position)
    return tuple(stage for actor in ordered for stage in actor.stages)
