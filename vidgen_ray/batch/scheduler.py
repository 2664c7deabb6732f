"""Which worker does what next. Knows nothing of Ray or of time: a worker is what it holds and has in hand.

Work nearest to a finished clip goes first, so that shots leave before new ones enter and no stage runs ahead of the slower one
behind it. Among equals a worker takes what its LoRAs are laid on for, and the older shot;
a work goes where its inputs are.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vidgen_ray.planner.gpu_assignment import TURN_SHOTS
from vidgen_ray.planner.layout import WorkerSpec

MAX_RUNNING_LOAD = 1.0
"""Load of one worker: what runs, in units of `Work.load`. The next is handed over early only where plenty waits."""
MAX_PREFETCH_LOAD = 2.0
"""The most that a worker has at hand, what runs and what waits there: its next inputs arrive while it computes."""
CHUNK_LOAD = 0.25
MAX_LORA_SKIPS = 64
"""A shot is not passed over for a LoRA's sake when shots so much younger wait."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One call to a worker. `stage` is the first it passes; `order` is the age of its shot, smaller is older."""

    stage: str
    order: int
    adapters: frozenset[Hashable] = frozenset()
    load: float = 1.0
    alone: bool = False
    """Whether the worker may have nothing else in hand: a process died with this work and others in it."""
    near: WorkerState | None = None
    """Where its inputs are: of workers with as little in hand it goes to this one."""


@dataclass(eq=False)
class WorkerState:
    """A worker as the scheduler sees it."""

    spec: WorkerSpec
    adapters_kept: int
    live: bool = False
    load: float = 0.0
    adapters: list[Hashable] = field(default_factory=list)
    """Last used last."""
    group: Sequence[str] = ()
    """Of the stages that take turns: those on the GPU after what is in hand."""
    turn: int = 0
    """Works of this group in a row."""
    alone: bool = False
    """Whether what it has in hand is to be there alone."""


class Scheduler:
    """Holds what waits, and gives it to workers.

    `positions` orders the stages: stage name -> place in the chain.
    """

    def __init__(self, workers: Iterable[WorkerState], positions: Mapping[str, int]) -> None:
        self.workers = list(workers)
        self._positions = positions
        self.waiting: dict[str, list[Work]] = {}
        self._holders = {
            stage: [worker for worker in self.workers if stage in worker.spec.stages]
            for stage in {stage for worker in self.workers for stage in worker.spec.stages}
        }

    def add(self, work: Work) -> None:
        self.waiting.setdefault(work.stage, []).append(work)

    def remove(self, work: Work) -> None:
        """Forget work that waits, where nobody wants it any more."""
        if work in self.waiting.get(work.stage, ()):
            self.waiting[work.stage].remove(work)

    def queued(self, stage: str) -> int:
        return len(self.waiting.get(stage, ()))

    def assign(self) -> list[tuple[WorkerState, Work]]:
        """Give out all that can be; the least loaded worker chooses first. What is given is in the worker's hand."""
        given: list[tuple[WorkerState, Work]] = []
        while True:
            free = (worker for worker in self.workers if worker.live and worker.load < MAX_PREFETCH_LOAD and not worker.alone)
            pairs = ((worker, work) for worker in free if (work := self._choice(worker)) is not None)
            pair = min(pairs, key=_reluctance, default=None)
            if pair is None:
                return given
            self._give(*pair)
            given.append(pair)

    def done(self, worker: WorkerState, work: Work) -> None:
        worker.load = max(0.0, worker.load - work.load)
        worker.alone = worker.alone and worker.load > 0

    def died(self, worker: WorkerState) -> None:
        """The process and all it knew is gone."""
        worker.live, worker.alone, worker.load = False, False, 0.0
        worker.adapters, worker.group, worker.turn = [], (), 0

    def _choice(self, worker: WorkerState) -> Work | None:
        open_to_it = {stage: works for stage in worker.spec.stages if (works := self._open_to(worker, stage))}
        stages = self._in_turn(worker, open_to_it) if worker.spec.turns else list(open_to_it)
        if not stages:
            return None
        return _match(worker, open_to_it[max(stages, key=self._positions.__getitem__)])

    def _open_to(self, worker: WorkerState, stage: str) -> list[Work]:
        """What of the waiting work the worker may take now."""
        waiting = self.waiting.get(stage, [])
        at_once = [work for work in waiting if worker.load + work.load <= MAX_RUNNING_LOAD and not (work.alone and worker.load)]
        if at_once or not waiting:
            return at_once
        # Early only what nobody could begin at once, with something left for those who end sooner.
        holders = [other for other in self._holders[stage] if other.live]
        if any(other.load + waiting[0].load <= MAX_RUNNING_LOAD for other in holders):
            return []
        # What is before this stage is to come here, too.
        to_come = sum(self.queued(other) for other in self._positions if self._positions[other] <= self._positions[stage])
        if to_come < len(holders) and waiting[0].load == 1:
            return []
        return [work for work in waiting if worker.load + work.load <= MAX_PREFETCH_LOAD and not work.alone]

    def _in_turn(self, worker: WorkerState, stages: Collection[str]) -> list[str]:
        """The stages of the group whose turn it is, and those that are always on the GPU."""
        groups = [group for group in worker.spec.turns if set(group) & set(stages)]
        always = [stage for stage in stages if not any(stage in group for group in worker.spec.turns)]
        if not groups:
            return always
        if worker.group in groups and not (len(groups) > 1 and self._turn_is_over(worker)):
            return [*always, *(stage for stage in stages if stage in worker.group)]
        # While something is left that needs no swap, it may be about to make work for the group that is there.
        if always and worker.group:
            return always
        others = [group for group in groups if group != worker.group]
        chosen = max(others, key=lambda group: sum(self.queued(stage) for stage in group))
        return [*always, *(stage for stage in stages if stage in chosen)]

    def _turn_is_over(self, worker: WorkerState) -> bool:
        if worker.turn >= TURN_SHOTS:
            return True
        # Before those who can do nothing else run out of this group's work, some must be made for them.
        others = sum(
            other.live and not other.spec.turns
            for stage in worker.group
            for other in self._holders[stage]
            if other is not worker
        )
        return others > 0 and sum(self.queued(stage) for stage in worker.group) <= 2 * others

    def _give(self, worker: WorkerState, work: Work) -> None:
        self.waiting[work.stage].remove(work)
        worker.load += work.load
        worker.alone = work.alone
        if work.adapters:
            kept = [adapter for adapter in worker.adapters if adapter not in work.adapters]
            worker.adapters = [*kept, *work.adapters][-worker.adapters_kept :]
        group = next((group for group in worker.spec.turns if work.stage in group), None)
        if group is not None:
            worker.turn = worker.turn + 1 if group == worker.group else 1
            worker.group = group


def _reluctance(pair: tuple[WorkerState, Work]) -> tuple[float, bool, bool]:
    worker, work = pair
    return worker.load, not _wears(worker, work), work.near is not worker


def _match(worker: WorkerState, waiting: Sequence[Work]) -> Work:
    oldest = min(waiting, key=lambda work: work.order)
    newest = max(waiting, key=lambda work: work.order)
    if not worker.adapters or newest.order - oldest.order > MAX_LORA_SKIPS:
        return oldest
    worn = [work for work in waiting if _wears(worker, work)]
    return min(worn, key=lambda work: work.order, default=oldest)


def _wears(worker: WorkerState, work: Work) -> bool:
    """Whether the LoRAs of the work are laid on, or it has none and wants none taken off."""
    return work.adapters <= set(worker.adapters)
