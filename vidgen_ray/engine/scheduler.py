"""Scheduler of a run: assign waiting work to workers. Independent of Ray and of time."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count, islice
from typing import NamedTuple

from vidgen_ray.planner.layout import SHOTS_PER_SWAP, WorkerSpec

CHUNK_LOAD = 0.25
"""Load of one chunk of frames to upscale."""
COMMIT_LOAD = 0.0625
"""Load of a clip that is written on its encoder, which can write several at a time: they wait for their chunks."""


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
    """Worker that has the inputs. It is preferred among equally loaded workers, then workers on its node."""
    avoid: frozenset[WorkerState] = frozenset()
    """Workers on which this work failed. It runs there again only if no other live worker holds the stage."""
    near_load: float = 0.0
    """Load that a worker near the inputs may have more than another one and still be preferred."""

    def loras_active(self, worker: WorkerState) -> bool:
        """Return whether the LoRAs of the work are active on the worker. True for work without LoRAs."""
        return not self.adapters or self.adapters.issubset(worker.adapters)


@dataclass(eq=False)
class WorkerState:
    """A worker as the scheduler sees it. After `Scheduler.add_worker`, only the scheduler changes it, except for `node`."""

    spec: WorkerSpec
    adapters_kept: int
    """Maximum number of active LoRAs."""
    live: bool = field(init=False, default=False)
    """The process is up and has loaded its weights."""
    node: str | None = None
    """Node of the process. May change while the worker is not live."""
    probation: bool = False
    """The worker gets one call at a time, and only if no other worker can start it now. See `Scheduler.set_probation`."""
    load: float = 0.0
    """Load of the assigned work."""
    assigned: dict[Work, None] = field(default_factory=dict)
    """Assigned work in the order of assignment: the first runs, the others are prefetched."""
    adapters: list[Hashable] = field(default_factory=list)
    """Active LoRAs. The last used is last."""
    group: Sequence[str] = ()
    """Group of stages that is on the GPU after the assigned work, if groups of stages take turns."""
    turn: int = 0
    """Calls to this group in a row."""
    alone: bool = False
    """The assigned work must run alone."""


class Entry(NamedTuple):
    """Waiting work with its sort key. `number` makes the key unique: the chunks of a shot have the same order."""

    order: int
    number: int
    work: Work


class StageQueue:
    """Waiting work of one stage."""

    def __init__(self) -> None:
        self._entries: dict[Work, Entry] = {}
        self._numbers = count()
        self.ordinary: dict[float, AgeQueue] = {}
        """Load -> work with this load that any worker may take."""
        self._retried: list[Entry] = []
        self._suspects: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, work: Work) -> bool:
        return work in self._entries

    def add(self, work: Work) -> None:
        entry = self._entries[work] = Entry(work.order, next(self._numbers), work)
        if work.alone:
            insort(self._suspects, entry)
        elif work.avoid:
            insort(self._retried, entry)
        else:
            self.ordinary.setdefault(work.load, AgeQueue()).add(entry)

    def remove(self, work: Work) -> None:
        """Remove work. Raises KeyError if it does not wait."""
        entry = self._entries.pop(work)
        if work.alone:
            self._suspects.remove(entry)
        elif work.avoid:
            self._retried.remove(entry)
        else:
            queue = self.ordinary[work.load]
            queue.remove(work)
            if not queue:
                del self.ordinary[work.load]

    def retried(self) -> Iterator[Work]:
        """Yield the work that avoids some workers, oldest first."""
        return (entry.work for entry in self._retried)

    def oldest_suspect(self) -> Work | None:
        """Return the oldest work that must run alone."""
        return self._suspects[0].work if self._suspects else None


class AgeQueue:
    """Waiting work of the same stage and load. Knows the oldest work, also among those with certain LoRAs.

    Removed work stays in a heap until it is the first entry there.
    """

    def __init__(self) -> None:
        self._waiting: set[Work] = set()
        self._heap: list[Entry] = []
        self._heaps: dict[frozenset[Hashable], list[Entry]] = {}
        """LoRAs -> work with exactly these LoRAs."""
        self._lora_counts: Counter[int] = Counter()
        """Number of LoRAs -> number of heaps in `_heaps` for that many LoRAs."""
        self.newest = 0
        """Largest order of all work that was ever added."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, entry: Entry) -> None:
        work = entry.work
        self._waiting.add(work)
        self.newest = max(self.newest, work.order)
        if work.adapters not in self._heaps:
            self._heaps[work.adapters] = []
            self._lora_counts[len(work.adapters)] += 1
        heapq.heappush(self._heaps[work.adapters], entry)
        heapq.heappush(self._heap, entry)

    def remove(self, work: Work) -> None:
        self._waiting.remove(work)
        self._drop_removed(self._heap)
        heap = self._heaps[work.adapters]
        self._drop_removed(heap)
        if not heap:
            del self._heaps[work.adapters]
            self._lora_counts[len(work.adapters)] -= 1

    def oldest(self) -> Work:
        return self._heap[0].work

    def oldest_with(self, adapters: Collection[Hashable]) -> Work | None:
        """Return the oldest work that needs no other LoRAs than these."""
        sizes = [size for size, heaps in self._lora_counts.items() if heaps and size <= len(adapters)]
        subsets = (frozenset(subset) for size in sizes for subset in combinations(adapters, size))
        found = [self._heaps[subset][0] for subset in subsets if subset in self._heaps]
        return min(found).work if found else None

    def _drop_removed(self, heap: list[Entry]) -> None:
        while heap and heap[0].work not in self._waiting:
            heapq.heappop(heap)


MAX_WORKERS_COMPARED = 16
"""Workers with an active LoRA that are compared for one call. More would make a decision slower, not better."""


class WorkerSet:
    """Set of workers. Unlike a dict, it finds a member in constant time even after many removals."""

    def __init__(self) -> None:
        self._members: list[WorkerState] = []
        self._positions: dict[WorkerState, int] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, worker: object) -> bool:
        return worker in self._positions

    def __iter__(self) -> Iterator[WorkerState]:
        return iter(self._members)

    def add(self, worker: WorkerState) -> None:
        self._positions[worker] = len(self._members)
        self._members.append(worker)

    def remove(self, worker: WorkerState) -> None:
        """Remove a worker: the last one takes its position. Raises KeyError if it is no member."""
        position, last = self._positions.pop(worker), self._members.pop()
        if last is not worker:
            self._members[position] = last
            self._positions[last] = position


class WorkerIndex:
    """Workers among which only LoRAs, nodes and inputs decide."""

    def __init__(self) -> None:
        self._workers = WorkerSet()
        self._keys: dict[WorkerState, list[tuple[str, Hashable]]] = {}
        self._sets: dict[tuple[str, Hashable], WorkerSet] = {}
        """("lora", LoRA) or ("node", node) -> its workers."""

    def __len__(self) -> int:
        return len(self._workers)

    def add(self, worker: WorkerState) -> None:
        self._workers.add(worker)
        keys: list[tuple[str, Hashable]] = [("lora", adapter) for adapter in worker.adapters]
        if worker.node is not None:
            keys.append(("node", worker.node))
        for key in keys:
            self._sets.setdefault(key, WorkerSet()).add(worker)
        self._keys[worker] = keys

    def remove(self, worker: WorkerState) -> None:
        self._workers.remove(worker)
        for key in self._keys.pop(worker):
            self._sets[key].remove(worker)
            if not self._sets[key]:
                del self._sets[key]

    def best_for(self, work: Work, avoid: Collection[WorkerState] = ()) -> WorkerState | None:
        """Return the best worker for the work: one with its LoRAs, then the one with its inputs, then one on their node.

        `None` if there are only workers to avoid.
        """
        near = work.near if work.near in self._workers and work.near not in avoid else None
        if work.adapters:
            if near is not None and work.loras_active(near):
                return near
            active = [worker for worker in self._with_loras(work) if worker not in avoid]
            if active:
                return min(active, key=lambda worker: distance(worker, work))
        if near is not None:
            return near
        if work.near is not None:
            on_node = next((worker for worker in self._set("node", work.near.node) if worker not in avoid), None)
            if on_node is not None:
                return on_node
        return next((worker for worker in self._workers if worker not in avoid), None)

    def _with_loras(self, work: Work) -> list[WorkerState]:
        """Return some of the workers on which the LoRAs of the work are active."""
        rarest = min((self._set("lora", adapter) for adapter in work.adapters), key=len)
        return [worker for worker in islice(rarest, MAX_WORKERS_COMPARED) if work.loras_active(worker)]

    def _set(self, kind: str, value: Hashable) -> WorkerSet:
        return self._sets.get((kind, value), _NO_WORKERS)


_NO_WORKERS = WorkerSet()


def distance(worker: WorkerState, work: Work) -> int:
    """Return how far the inputs are from the worker: 0 on the worker, 1 on its node, 2 elsewhere or unknown."""
    if work.near is worker:
        return 0
    return 1 if work.near is not None and work.near.node is not None and work.near.node == worker.node else 2


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


class _WorkerClass(NamedTuple):
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
        self._indexes: dict[_WorkerClass, WorkerIndex] = {}
        """Live workers, except those that are reserved or run a suspect."""
        self._indexed: dict[WorkerState, _WorkerClass] = {}
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
            if best is not None and alike.load > best[0].load + best[1].near_load:
                break
            if probation and alike.load:
                continue
            pair = self._choice(alike, max_load)
            if pair is not None and (best is None or _mismatch(pair) < _mismatch(best)):
                best = pair
        return best

    def _choice(self, alike: _WorkerClass, max_load: float) -> Pair | None:
        """Return the best assignment to one of the workers that are alike."""
        kind = self._kinds[alike.kind]
        stages = [stage for stage in kind.stages if self._queues.get(stage)]
        if not kind.swap_groups:
            return next((pair for stage in stages if (pair := self._stage_choice(alike, stage, max_load))), None)
        pairs = {stage: pair for stage in stages if (pair := self._stage_choice(alike, stage, max_load))}
        in_turn = self._in_turn(kind, alike, pairs) if pairs else ()
        return next((pairs[stage] for stage in stages if stage in in_turn), None)

    def _stage_choice(self, alike: _WorkerClass, stage: str, max_load: float) -> Pair | None:
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

    def _in_turn(self, kind: _Kind, alike: _WorkerClass, stages: Collection[str]) -> list[str]:
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

    def _turn_is_over(self, alike: _WorkerClass) -> bool:
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
        alike = _WorkerClass(
            worker.probation, worker.load, self._workers[worker], tuple(worker.group), worker.turn >= SHOTS_PER_SWAP
        )
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
