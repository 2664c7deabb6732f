"""Layout of a run: its processes, their stages and their GPUs. Chosen by the planner and started by the executor."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Kind = Literal["fused", "colocated", "staged", "hybrid"]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process and its stages."""

    stages: tuple[str, ...]
    """Names of the stages, in the order of the chain."""
    cpus: float
    gpus: float
    """Share of the slot's GPU. 0 for a slot without a GPU."""
    swap_groups: tuple[tuple[str, ...], ...] = ()
    """Groups of these stages that take turns in GPU memory, while the others are in host memory (weight swapping). Stages in
    no group stay in GPU memory."""
    gpu_gb: float = 0.0
    """GPU memory that the process may use, in GB. 0 if unknown, or without a GPU."""

    def can_run(self, *stages: str) -> bool:
        """Return whether the worker can run these stages in sequence without swapping weights in between.

        Weights are swapped when the first stage starts, so the first stage must be in the only group that is needed.
        """
        swap_groups = [group for group in self.swap_groups if set(group) & set(stages)]
        return set(stages) <= set(self.stages) and (not swap_groups or (len(swap_groups) == 1 and stages[0] in swap_groups[0]))


@dataclass(frozen=True, slots=True)
class Slot:
    """One whole GPU, or a share of a machine without GPUs, and its worker processes."""

    workers: tuple[WorkerSpec, ...]
    memory_gb: float
    """GPU memory that the slot needs, in GB. 0 without a GPU."""

    @property
    def has_gpu(self) -> bool:
        return any(worker.gpus for worker in self.workers)

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

    kind: Kind
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

    def can_fuse(self, first: str, *others: str) -> bool:
        """Return whether every worker with the first stage can run all these stages in sequence; see `WorkerSpec.can_run`."""
        return all(worker.can_run(first, *others) for worker in self.workers if first in worker.stages)

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
