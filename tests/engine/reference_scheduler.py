"""Simple scheduler that scans all workers and all waiting work: the reference for the tests of the policy.

Work nearest to a finished clip goes first: shots finish before new ones start, and no stage runs ahead of a slower later one.
Within a stage, a worker prefers shots that use its active LoRAs, then the oldest shot. Among equally loaded workers, work goes
to the one that has its inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from vidgen_ray.planner.layout import SHOTS_PER_SWAP, WorkerSpec

MAX_RUNNING_LOAD = 1.0
"""Load of a busy worker, in units of `Work.load`. More is assigned only if no other worker could start it now."""
MAX_PREFETCH_LOAD = 2.0
"""Maximum load of a worker, running and prefetched. The inputs of prefetched work arrive while the worker computes."""
CHUNK_LOAD = 0.25
"""Load of one chunk of frames to upscale."""
MAX_LORA_SKIPS = 64
"""A shot is no longer skipped in favour of the active LoRAs when a shot that is this much younger is waiting."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One call to a worker."""

    stage: str
    """First stage of the call."""
    order: int
    """Sequence number of the shot. Smaller is older."""
    adapters: frozenset[Hashable] = frozenset()
    """LoRAs of the shot."""
    load: float = 1.0
    """Load that the call adds to a worker. 1 for a whole shot."""
    alone: bool = False
    """Run this work alone on its worker, because a process crashed while it ran this work and other work."""
    near: WorkerState | None = None
    """Worker that has the inputs. Preferred among equally loaded workers."""


@dataclass(eq=False)
class WorkerState:
    """A worker as the scheduler sees it."""

    spec: WorkerSpec
    adapters_kept: int
    """Maximum number of active LoRAs."""
    live: bool = False
    """The process is up and has loaded its weights."""
    load: float = 0.0
    """Load of the assigned work."""
    adapters: list[Hashable] = field(default_factory=list)
    """Active LoRAs. The last used is last."""
    group: Sequence[str] = ()
    """Group of stages that is on the GPU after the assigned work, if groups of stages take turns."""
    turn: int = 0
    """Calls to this group in a row."""
    alone: bool = False
    """The assigned work must run alone."""


class Scheduler:
    """Queue of waiting work, and its assignment to workers."""

    def __init__(self, positions: Mapping[str, int]) -> None:
        """`positions`: stage name -> position in the graph."""
        self.workers: list[WorkerState] = []
        self._positions = positions
        self.waiting: dict[str, list[Work]] = {}
        self._holders: dict[str, list[WorkerState]] = {}

    def add_worker(self, worker: WorkerState) -> None:
        self.workers.append(worker)
        for stage in worker.spec.stages:
            self._holders.setdefault(stage, []).append(worker)

    def started(self, worker: WorkerState) -> None:
        worker.live = True

    def add(self, work: Work) -> None:
        self.waiting.setdefault(work.stage, []).append(work)

    def remove(self, work: Work) -> None:
        """Remove waiting work, if it was cancelled."""
        if work in self.waiting.get(work.stage, ()):
            self.waiting[work.stage].remove(work)

    def queued(self, stage: str) -> int:
        return len(self.waiting.get(stage, ()))

    def assign(self) -> list[tuple[WorkerState, Work]]:
        """Assign all work that can be assigned now, and return it. The least loaded worker chooses first."""
        assigned: list[tuple[WorkerState, Work]] = []
        while True:
            free = (worker for worker in self.workers if worker.live and worker.load < MAX_PREFETCH_LOAD and not worker.alone)
            pairs = ((worker, work) for worker in free if (work := self._choice(worker)) is not None)
            pair = min(pairs, key=_assignment_cost, default=None)
            if pair is None:
                return assigned
            self._assign(*pair)
            assigned.append(pair)

    def finished(self, worker: WorkerState, work: Work) -> None:
        worker.load = max(0.0, worker.load - work.load)
        worker.alone = worker.alone and worker.load > 0

    def crashed(self, worker: WorkerState) -> None:
        """Reset a worker whose process crashed."""
        worker.live, worker.alone, worker.load = False, False, 0.0
        worker.adapters, worker.group, worker.turn = [], (), 0

    def _choice(self, worker: WorkerState) -> Work | None:
        available = {stage: works for stage in worker.spec.stages if (works := self._available(worker, stage))}
        stages = self._in_turn(worker, available) if worker.spec.swap_groups else list(available)
        if not stages:
            return None
        return _best_match(worker, available[max(stages, key=self._positions.__getitem__)])

    def _available(self, worker: WorkerState, stage: str) -> list[Work]:
        """Return the waiting work of a stage that the worker may take now."""
        waiting = self.waiting.get(stage, [])
        startable = [
            work for work in waiting if worker.load + work.load <= MAX_RUNNING_LOAD and not (work.alone and worker.load)
        ]
        if startable or not waiting:
            return startable
        # Prefetch only if no worker could start it now, and if enough is left for the workers that finish sooner.
        holders = [other for other in self._holders[stage] if other.live]
        if any(other.load + waiting[0].load <= MAX_RUNNING_LOAD for other in holders):
            return []
        # Work of earlier stages comes to this stage later.
        upcoming = sum(self.queued(other) for other in self._positions if self._positions[other] <= self._positions[stage])
        if upcoming < len(holders) and waiting[0].load == 1:
            return []
        return [work for work in waiting if worker.load + work.load <= MAX_PREFETCH_LOAD and not work.alone]

    def _in_turn(self, worker: WorkerState, stages: Collection[str]) -> list[str]:
        """Return the stages of the group whose turn it is, and those that are always on the GPU."""
        groups = [group for group in worker.spec.swap_groups if set(group) & set(stages)]
        always = [stage for stage in stages if not any(stage in group for group in worker.spec.swap_groups)]
        if not groups:
            return always
        if worker.group in groups and not (len(groups) > 1 and self._turn_is_over(worker)):
            return [*always, *(stage for stage in stages if stage in worker.group)]
        # Work that needs no swap may soon produce work for the group on the GPU.
        if always and worker.group:
            return always
        others = [group for group in groups if group != worker.group]
        chosen = max(others, key=lambda group: sum(self.queued(stage) for stage in group))
        return [*always, *(stage for stage in stages if stage in chosen)]

    def _turn_is_over(self, worker: WorkerState) -> bool:
        if worker.turn >= SHOTS_PER_SWAP:
            return True
        # Other workers that hold only this group are about to run out of work. Make some for them.
        others = sum(
            other.live and not other.spec.swap_groups
            for stage in worker.group
            for other in self._holders[stage]
            if other is not worker
        )
        return others > 0 and sum(self.queued(stage) for stage in worker.group) <= 2 * others

    def _assign(self, worker: WorkerState, work: Work) -> None:
        self.waiting[work.stage].remove(work)
        worker.load += work.load
        worker.alone = work.alone
        if work.adapters:
            kept = [adapter for adapter in worker.adapters if adapter not in work.adapters]
            worker.adapters = [*kept, *work.adapters][-worker.adapters_kept :]
        group = next((group for group in worker.spec.swap_groups if work.stage in group), None)
        if group is not None:
            worker.turn = worker.turn + 1 if group == worker.group else 1
            worker.group = group


def _assignment_cost(pair: tuple[WorkerState, Work]) -> tuple[float, bool, bool]:
    """Return the sort key of a pair. The smallest is assigned first."""
    worker, work = pair
    return worker.load, not _loras_active(worker, work), work.near is not worker


def _best_match(worker: WorkerState, waiting: Sequence[Work]) -> Work:
    """Return the oldest work that uses the active LoRAs, or the oldest work if it was skipped too often."""
    oldest = min(waiting, key=lambda work: work.order)
    newest = max(waiting, key=lambda work: work.order)
    if not worker.adapters or newest.order - oldest.order > MAX_LORA_SKIPS:
        return oldest
    matching = [work for work in waiting if _loras_active(worker, work)]
    return min(matching, key=lambda work: work.order, default=oldest)


def _loras_active(worker: WorkerState, work: Work) -> bool:
    """Return whether the LoRAs of the work are active on the worker. True for work without LoRAs."""
    return work.adapters <= set(worker.adapters)
