"""Which processes a run has, what each holds, and on which GPU: what the planner decides and the executor builds."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["fused", "colocated", "staged", "hybrid"]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One process that holds stages."""

    stages: tuple[str, ...]
    """Names, in the order of the chain."""
    cpus: float
    gpus: float
    """Share of its slot's GPU; 0 on a slot without one."""
    turns: tuple[tuple[str, ...], ...] = ()
    """Groups of these stages that take turns in the GPU's memory, the others waiting in the host's. Empty: all stay."""

    def can_run(self, *stages: str) -> bool:
        """Whether it holds them all, and the first needs the turn that any of them needs: by the first, turns change."""
        turns = [group for group in self.turns if set(group) & set(stages)]
        return set(stages) <= set(self.stages) and (not turns or (len(turns) == 1 and stages[0] in turns[0]))


@dataclass(frozen=True, slots=True)
class Slot:
    """One whole GPU, or a share of a machine without one, and the processes that live there."""

    workers: tuple[WorkerSpec, ...]
    memory_gb: float
    """GPU memory that the slot needs, in GB; 0 without a GPU."""

    @property
    def has_gpu(self) -> bool:
        return any(worker.gpus for worker in self.workers)

    @property
    def cpus(self) -> float:
        return sum(worker.cpus for worker in self.workers)


@dataclass(frozen=True, slots=True)
class Layout:
    """Every process of a run. `window` is the number of shots in progress at once, at most."""

    kind: Kind
    slots: tuple[Slot, ...]
    encoders: int
    window: int

    @property
    def workers(self) -> tuple[WorkerSpec, ...]:
        return tuple(worker for slot in self.slots for worker in slot.workers)

    def can_fuse(self, first: str, *others: str) -> bool:
        """Whether every worker that holds the first of these stages takes the others, too, in the same turn."""
        return all(worker.can_run(first, *others) for worker in self.workers if first in worker.stages)
