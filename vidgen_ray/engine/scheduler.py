"""Scheduler of a run: assign waiting work to workers. Independent of Ray and of time.

Work nearest to a finished clip goes first: shots finish before new ones start, and no stage runs ahead of a slower later one.
Within a stage, a worker prefers shots that use its active LoRAs, then the oldest shot. Among equally loaded workers, work goes
to one with its LoRAs, then to the one that has its inputs, then to one on the same node.

Workers that are alike (same stages, load and group of swapped stages) share an index. So a decision visits one index per kind
of worker and load, however many workers and calls there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vidgen_ray.engine.work import CHUNK_LOAD, Work, WorkerState
from vidgen_ray.engine.work_queue import StageQueue
from vidgen_ray.engine.worker_index import WorkerIndex, distance
from vidgen_ray.planner.gpu_assignment import SHOTS_PER_SWAP

__all__ = ["CHUNK_LOAD", "Scheduler", "Work", "WorkerState"]

MAX_RUNNING_LOAD = 1.0
"""Load of a busy worker, in units of `Work.load`. More is assigned only if no other worker could start it now."""
MAX_PREFETCH_LOAD = 2.0
"""Maximum load of a worker, running and prefetched. The inputs of prefetched work arrive while the worker computes."""
MAX_LORA_SKIPS = 64
"""A shot is no longer skipped in favour of the active LoRAs when a shot that is this much younger has come."""
MAX_RESERVED_LOAD = 4.0
"""Load that the other workers of a stage finish on average until a reserved worker that is still busy is given up. Its call may
hang."""

Pair = tuple[WorkerState, Work]


class _Kind(NamedTuple):
    """Kind of worker. All workers of a kind hold the same stages."""

    stages: tuple[str, ...]
    """Stages, the latest first."""
    swap_groups: tuple[tuple[str, ...], ...]


class _Alike(NamedTuple):
    """Properties that equal workers share. Sorted by the order in which they choose."""

    probation: bool
    load: float
    kind: int
    """Index of the kind."""
    group: tuple[str, ...]
    """Group of stages that is on the GPU."""
    turn_is_over: bool


@dataclass(slots=True)
class _Reservation:
    """A worker that gets no new work until it is idle and can run a suspect alone."""

    work: Work
    worker: WorkerState
    others_load: float = 0.0
    """Load that other workers of the stage have finished since then."""


class Scheduler:
    """Queue of waiting work, and its assignment to workers. Events of workers that were removed are ignored."""

    def __init__(self, positions: Mapping[str, int]) -> None:
        """`positions`: stage name -> position in the graph."""
        self._positions = positions
        self._queues: dict[str, StageQueue] = {}
        self._workers: dict[WorkerState, int] = {}
        """Worker -> index of its kind."""
        self._kinds: list[_Kind] = []
        self._holders: dict[str, dict[WorkerState, None]] = {}
        self._live: Counter[str] = Counter()
        """Stage -> live workers that hold it."""
        self._live_unswapped: Counter[str] = Counter()
        """Stage -> live workers that hold it and never swap weights."""
        self._indexes: dict[_Alike, WorkerIndex] = {}
        """Live workers, except those that are reserved or run a suspect."""
        self._indexed: dict[WorkerState, _Alike] = {}
        self._reservations: dict[str, _Reservation] = {}
        """Stage -> reservation for its oldest suspect."""

    # Workers

    def add_worker(self, worker: WorkerState) -> None:
        """Add a worker. It gets work after `started`."""
        stages = sorted(worker.spec.stages, key=self._positions.__getitem__, reverse=True)
        kind = _Kind(tuple(stages), worker.spec.swap_groups)
        if kind not in self._kinds:
            self._kinds.append(kind)
        self._workers[worker] = self._kinds.index(kind)
        for stage in worker.spec.stages:
            self._holders.setdefault(stage, {})[worker] = None

    def remove_worker(self, worker: WorkerState) -> None:
        """Remove a worker that does not come back. Its assigned work is forgotten, as after a crash."""
        self.crashed(worker)
        if self._workers.pop(worker, None) is not None:
            for stage in worker.spec.stages:
                del self._holders[stage][worker]

    def started(self, worker: WorkerState) -> None:
        """Record that the process is up and has loaded its weights."""
        if not worker.live and worker in self._workers:
            worker.live = True
            self._count_live(worker, 1)
            self._index(worker)

    def crashed(self, worker: WorkerState) -> None:
        """Reset a worker whose process crashed or is down. `finished` may or may not follow for its assigned work."""
        if worker not in self._workers:
            return
        if worker.live:
            worker.live = False
            self._count_live(worker, -1)
        worker.alone, worker.load = False, 0.0
        worker.assigned.clear()
        worker.adapters, worker.group, worker.turn = [], (), 0
        self._index(worker)
        for stage, reservation in list(self._reservations.items()):
            if reservation.worker is worker:
                del self._reservations[stage]

    def set_probation(self, worker: WorkerState, probation: bool) -> None:
        """Start or end the probation of a worker. See `WorkerState.probation`."""
        if worker.probation != probation:
            worker.probation = probation
            self._index(worker)

    def holders(self, stage: str) -> Collection[WorkerState]:
        """Return the workers that hold a stage, live or not."""
        return self._holders.get(stage, {}).keys()

    # Work

    def add(self, work: Work) -> None:
        self._queues.setdefault(work.stage, StageQueue()).add(work)

    def remove(self, work: Work) -> None:
        """Remove waiting work, if it was cancelled."""
        if work in self._queues.get(work.stage, ()):
            self._queues[work.stage].remove(work)
            self._release(work)

    def queued(self, stage: str) -> int:
        return len(self._queues.get(stage, ()))

    def finished(self, worker: WorkerState, work: Work) -> None:
        """Record the end of a call, successful or not. Ignored for work of a process that has crashed."""
        if work not in worker.assigned:
            return
        del worker.assigned[work]
        worker.load = worker.load - work.load if worker.assigned else 0.0
        worker.alone = False  # it was its only work
        self._index(worker)
        for stage, reservation in self._reservations.items():
            if reservation.worker is not worker and stage in worker.spec.stages:
                reservation.others_load += work.load

    def recall(self, worker: WorkerState) -> list[Work]:
        """Make the prefetched work of a worker wait again, and return it. For a worker whose running call takes too long.

        The caller cancels the calls, and starts the worker's probation, so that no other work is prefetched.
        """
        prefetched = list(worker.assigned)[1:]
        for work in prefetched:
            self.finished(worker, work)
            self.add(work)
        return prefetched

    def assign(self) -> list[Pair]:
        """Assign all work that can be assigned now, and return it. The least loaded worker chooses first."""
        if not any(self._queues.values()):
            return []
        assigned = self._assign_suspects()
        for max_load, probation in ((MAX_RUNNING_LOAD, False), (MAX_RUNNING_LOAD, True), (MAX_PREFETCH_LOAD, False)):
            while (pair := self._next_pair(max_load, probation)) is not None:
                self._assign(*pair)
                assigned.append(pair)
        return assigned

    def _next_pair(self, max_load: float, probation: bool) -> Pair | None:
        """Return the next assignment that loads a worker with at most `max_load`.

        Only if there is none with MAX_RUNNING_LOAD, work may be prefetched: then no worker could start it now.
        """
        best: Pair | None = None
        for alike in sorted(alike for alike in self._indexes if alike.probation == probation and alike.load < max_load):
            if best is not None and alike.load > best[0].load:
                break
            if probation and alike.load:
                continue
            pair = self._choice(alike, max_load)
            if pair is not None and (best is None or _mismatch(pair) < _mismatch(best)):
                best = pair
        return best

    def _choice(self, alike: _Alike, max_load: float) -> Pair | None:
        """Return the best assignment to one of the workers that are alike."""
        kind = self._kinds[alike.kind]
        stages = [stage for stage in kind.stages if self._queues.get(stage)]
        if not kind.swap_groups:
            return next((pair for stage in stages if (pair := self._stage_choice(alike, stage, max_load))), None)
        pairs = {stage: pair for stage in stages if (pair := self._stage_choice(alike, stage, max_load))}
        in_turn = self._in_turn(kind, alike, pairs) if pairs else ()
        return next((pairs[stage] for stage in stages if stage in in_turn), None)

    def _stage_choice(self, alike: _Alike, stage: str, max_load: float) -> Pair | None:
        """Return the best assignment of a stage's work to one of the workers that are alike."""
        waiting, index = self._queues[stage], self._indexes[alike]
        # Prefetch whole shots only if enough is left for the workers that finish sooner.
        spare = max_load <= MAX_RUNNING_LOAD or self._upcoming(stage) >= self._live[stage]

        def fits(load: float) -> bool:
            return alike.load + load <= max_load and (spare or load < MAX_RUNNING_LOAD)

        fitting = [queue for load, queue in waiting.ordinary.items() if fits(load)]
        queue = min(fitting, key=lambda queue: queue.oldest().order, default=None)
        for work in waiting.retried():
            if queue is not None and work.order > queue.oldest().order:
                break
            worker = index.best_for(work, self._avoided(work)) if fits(work.load) else None
            if worker is not None:
                return worker, work
        if queue is None:
            return None
        oldest = queue.oldest()
        worker = index.best_for(oldest)
        assert worker is not None  # there is no empty index
        if worker.adapters and not oldest.loras_active(worker) and queue.newest - oldest.order <= MAX_LORA_SKIPS:
            return worker, queue.oldest_with(worker.adapters) or oldest
        return worker, oldest

    def _upcoming(self, stage: str) -> int:
        """Return how much work waits for this stage, or for earlier ones, from which it comes to this stage later."""
        last = self._positions[stage]
        return sum(len(queue) for other, queue in self._queues.items() if self._positions[other] <= last)

    def _avoided(self, work: Work) -> Collection[WorkerState]:
        """Return the workers that the work must not go to. None if no other live worker holds the stage."""
        live = sum(worker.live and work.stage in worker.spec.stages for worker in work.avoid)
        return work.avoid if live < self._live[work.stage] else ()

    def _in_turn(self, kind: _Kind, alike: _Alike, stages: Collection[str]) -> list[str]:
        """Return the stages of the group whose turn it is, and those that are always on the GPU."""
        groups = [group for group in kind.swap_groups if set(group) & set(stages)]
        always = [stage for stage in stages if not any(stage in group for group in kind.swap_groups)]
        if not groups:
            return always
        if alike.group in groups and not (len(groups) > 1 and self._turn_is_over(alike)):
            return [*always, *(stage for stage in stages if stage in alike.group)]
        # Work that needs no swap may soon produce work for the group on the GPU.
        if always and alike.group:
            return always
        others = [group for group in groups if group != alike.group]
        chosen = max(others, key=lambda group: sum(self.queued(stage) for stage in group))
        return [*always, *(stage for stage in stages if stage in chosen)]

    def _turn_is_over(self, alike: _Alike) -> bool:
        if alike.turn_is_over:
            return True
        # Other workers that hold only this group are about to run out of work. Make some for them.
        others = sum(self._live_unswapped[stage] for stage in alike.group)
        return others > 0 and sum(self.queued(stage) for stage in alike.group) <= 2 * others

    def _assign(self, worker: WorkerState, work: Work) -> None:
        self._queues[work.stage].remove(work)
        worker.assigned[work] = None
        worker.load += work.load
        worker.alone = work.alone
        if work.adapters:
            kept = [adapter for adapter in worker.adapters if adapter not in work.adapters]
            worker.adapters = [*kept, *work.adapters][-worker.adapters_kept :]
        group = next((group for group in worker.spec.swap_groups if work.stage in group), None)
        if group is not None:
            worker.turn = worker.turn + 1 if group == worker.group else 1
            worker.group = group
        self._index(worker)

    # Suspects: work that must run alone

    def _assign_suspects(self) -> list[Pair]:
        """Assign suspects to idle workers. Reserve a busy worker for the oldest suspect of each stage that has no idle one."""
        assigned: list[Pair] = []
        suspects = [suspect for queue in self._queues.values() if (suspect := queue.oldest_suspect())]
        for suspect in sorted(suspects, key=lambda work: work.order):
            next_suspect: Work | None = suspect
            while next_suspect is not None and (worker := self._reserve(next_suspect)) is not None and not worker.load:
                self._release(next_suspect)
                self._assign(worker, next_suspect)
                assigned.append((worker, next_suspect))
                next_suspect = self._queues[suspect.stage].oldest_suspect()
        return assigned

    def _reserve(self, suspect: Work) -> WorkerState | None:
        """Reserve a worker for the oldest suspect of a stage, the least loaded one, and return it. `None` if there is none."""
        reserved = self._reservations.get(suspect.stage)
        if reserved is not None and reserved.work is not suspect:
            self._release(reserved.work)
            reserved = None
        if reserved is not None and not reserved.worker.load:
            return reserved.worker
        worker = self._least_loaded(suspect)
        if reserved is not None:
            hangs = reserved.others_load > MAX_RESERVED_LOAD * self._live[suspect.stage]
            if worker is None or not (hangs or (worker.load == 0 and worker.probation <= reserved.worker.probation)):
                return reserved.worker
            self._release(suspect)
        if worker is not None:
            self._reservations[suspect.stage] = _Reservation(suspect, worker)
            self._index(worker)
        return worker

    def _release(self, work: Work) -> None:
        """End the reservation for this work, if there is one."""
        reservation = self._reservations.get(work.stage)
        if reservation is not None and reservation.work is work:
            del self._reservations[work.stage]
            self._index(reservation.worker)

    def _least_loaded(self, work: Work) -> WorkerState | None:
        """Return the least loaded worker that may run the work and is not reserved, a worker on probation last."""
        avoided = self._avoided(work)
        holding = (alike for alike in self._indexes if work.stage in self._kinds[alike.kind].stages)
        found = (self._indexes[alike].best_for(work, avoided) for alike in sorted(holding))
        return next((worker for worker in found if worker is not None), None)

    # Indexes

    def _index(self, worker: WorkerState) -> None:
        """Move the worker to the index of those that it is like now, or to none."""
        before = self._indexed.pop(worker, None)
        if before is not None:
            self._indexes[before].remove(worker)
            if not self._indexes[before]:
                del self._indexes[before]
        reserved = any(reservation.worker is worker for reservation in self._reservations.values())
        if not worker.live or worker.alone or reserved:
            return
        alike = _Alike(worker.probation, worker.load, self._workers[worker], tuple(worker.group), worker.turn >= SHOTS_PER_SWAP)
        self._indexes.setdefault(alike, WorkerIndex()).add(worker)
        self._indexed[worker] = alike

    def _count_live(self, worker: WorkerState, change: int) -> None:
        for stage in worker.spec.stages:
            self._live[stage] += change
            if not worker.spec.swap_groups:
                self._live_unswapped[stage] += change


def _mismatch(pair: Pair) -> tuple[bool, int]:
    """Return how badly the worker suits the work. The best suited of equally loaded workers gets its work first."""
    worker, work = pair
    return not work.loras_active(worker), distance(worker, work)
