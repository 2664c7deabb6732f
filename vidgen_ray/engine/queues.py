"""One queue per stage, and the assignment of waiting calls to processes. Independent of Ray and of time.

Between two events nothing can be assigned. So after an event only the rows and calls that it touched are looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import chain, combinations, islice

from vidgen_ray.engine.attempts import Request
from vidgen_ray.engine.processes import (
    MAX_PREFETCH_LOAD,
    MAX_RUNNING_LOAD,
    Process,
    Table,
)
from vidgen_ray.planner.layout import EPSILON, SHOTS_PER_SWAP

Entry = tuple[float, int, Request]
"""Order of the shot, a number that makes the entry unique, and the call."""
_Send = Callable[[Process, Request], None]
LOOKS = 16
"""Most processes that are looked at for inputs or LoRAs."""
MAX_LORA_SKIPS = 64
"""A shot is no longer skipped in favour of the active LoRAs when a shot that is this much younger has come."""


class Lane:
    """Waiting calls of a stage with the same load that may run on every process.

    Entries of calls that do not wait any more stay in a heap until they are its first.
    """

    __slots__ = ("by_adapters", "entries", "load")

    def __init__(self, load: float) -> None:
        self.load = load
        self.entries: list[Entry] = []
        """Heap of all calls."""
        self.by_adapters: dict[tuple[str, ...], list[Entry]] = {}
        """LoRAs -> heap of the calls that need them. The first one of each waits."""

    def push(self, entry: Entry) -> None:
        heappush(self.entries, entry)
        heappush(self.by_adapters.setdefault(entry[2].call.adapters, []), entry)

    def removed(self, adapters: tuple[str, ...]) -> None:
        """A call with these LoRAs does not wait any more."""
        if not _drop_ended(self.by_adapters[adapters]):
            del self.by_adapters[adapters]

    def choice(self, process: Process) -> Entry | None:
        """Return the oldest call, or a younger one whose LoRAs are active, unless the oldest was skipped too often."""
        if not _drop_ended(self.entries):
            return None
        oldest = self.entries[0]
        if process.has_active(oldest[2].call.adapters):
            return oldest
        active = min((heap[0] for heap in self._active(process)), default=None)
        return oldest if active is None or active[0] - oldest[0] > MAX_LORA_SKIPS else active

    def _active(self, process: Process) -> list[list[Entry]]:
        """Return the heaps of the calls that need no other LoRAs than the active ones. There may be a LoRA for each call."""
        heaps = self.by_adapters
        if len(heaps) < 2 ** len(process.adapters):
            return [heap for adapters, heap in heaps.items() if process.has_active(adapters)]
        active = sorted(process.adapters)
        subsets = chain.from_iterable(combinations(active, number) for number in range(len(active) + 1))
        return [heaps[each] for each in subsets if each in heaps]


def _drop_ended(heap: list[Entry]) -> list[Entry]:
    """Drop the first entries of a heap whose calls do not wait any more."""
    while heap and heap[0][2].entry is not heap[0]:
        heappop(heap)
    return heap


class Queues:
    def __init__(self, table: Table) -> None:
        self._table = table
        self.lanes: dict[str, dict[float, Lane]] = {stage: {} for stage in table.stages}
        self.picky: dict[str, dict[Request, None]] = {stage: {} for stage in table.stages}
        """Calls that may run on some processes only, because they failed on others."""
        self.alone: dict[str, dict[Request, None]] = {stage: {} for stage in table.stages}
        """Calls that must run alone on their process."""
        self.waiting: Counter[str] = Counter()
        self.added: dict[Request, None] = {}
        """Calls that may be assigned since the last assignment."""
        self._upcoming = {stage: table.stages[: number + 1] for number, stage in enumerate(table.stages)}
        """Stage -> stages from which calls come to this one later, and itself."""
        self._numbers = self._n_alone = 0

    def add(self, request: Request) -> None:
        self._numbers += 1
        stage = request.call.stage
        request.entry = (request.call.order, self._numbers, request)
        self.waiting[stage] += 1
        if request.runs_alone:
            self.alone[stage][request] = None
            self._n_alone += 1
        elif request.where is not None:
            self.picky[stage][request] = None
        else:
            load = request.call.load
            self.lanes[stage].setdefault(load, Lane(load)).push(request.entry)
        self.added[request] = None

    def remove(self, request: Request) -> None:
        """Remove a call, if it waits."""
        if request.entry is None:
            return
        request.entry = None
        stage = request.call.stage
        self.waiting[stage] -= 1
        self.added.pop(request, None)
        if request in self.alone[stage]:
            del self.alone[stage][request]
            self._n_alone -= 1
            # Processes of the stage may take other calls again.
            self._table.touched.update(dict.fromkeys(self._table.holders_of(stage)))
        elif request in self.picky[stage]:
            del self.picky[stage][request]
        else:
            self.lanes[stage][request.call.load].removed(request.call.adapters)
        if not self.waiting[stage]:
            # Only entries of calls that do not wait any more are left.
            self.lanes[stage].clear()

    def look_again(self, stages: Iterable[str]) -> None:
        """Look again at the calls that depend on which rows there are: one has left the table, or its node has changed."""
        for stage in stages:
            self.added.update(self.picky[stage])
            self.added.update(self.alone[stage])

    def may_run(self, process: Process, request: Request) -> bool:
        """Return whether the call has not failed there, or on all processes that there are."""
        where = request.where
        return where is None or where.fits(process) or not self._table.count(request.call.stage, where)

    # Assignment

    def assign(self, send: _Send) -> None:
        """Assign all that can be assigned. `send` adds the call to the row."""
        table = self._table
        while table.touched or self.added:
            touched, table.touched = list(table.touched), {}
            added, self.added = list(self.added), {}
            if len(touched) > 1:
                touched.sort(key=lambda process: process.load)
            if len(added) > 1:
                added.sort(key=self._urgency)
            for process in touched:
                self._fill(process, MAX_RUNNING_LOAD, send)
            for request in added:
                if request.entry is not None:
                    self._place(request, send)
            # Only now: what is prefetched could not start anywhere.
            for process in touched:
                if not process.spec.server:
                    self._fill(process, MAX_PREFETCH_LOAD, send)
            for request in added:
                if request.entry is not None and not request.runs_alone:
                    self._place_behind(request, send)

    def _urgency(self, request: Request) -> tuple[int, float]:
        return -self._table.positions[request.call.stage], request.call.order

    def _fill(self, process: Process, most: float, send: _Send) -> None:
        """Give a row the calls that suit it best, up to a load."""
        while process.is_live and not process.runs_alone:
            if (alone := self._alone_for(process)) is not None:
                # Nothing else is assigned until one process of the stage is idle.
                if not process.load:
                    self._send(process, alone, send)
                return
            if (request := self._choice(process, most)) is None:
                return
            self._send(process, request, send)

    def _alone_for(self, process: Process) -> Request | None:
        """Return the oldest call that must run alone and may run on this process."""
        if not self._n_alone:
            return None
        waiting = chain.from_iterable(self.alone[stage] for stage in process.pool.stages if self.alone[stage])
        return min(
            (each for each in waiting if self.may_run(process, each)), key=lambda each: each.entry or (0, 0, each), default=None
        )

    def _choice(self, process: Process, most: float) -> Request | None:
        """Return the best call for a row: of the latest stage, then the oldest."""
        room, prefetches = most - process.load + EPSILON, most > MAX_RUNNING_LOAD
        for stage in self._stages(process):
            if not self.waiting[stage]:
                continue
            is_enough = not prefetches or self._is_enough(stage)
            best: Entry | None = None
            for lane in self.lanes[stage].values():
                if lane.load <= room and (is_enough or lane.load < MAX_RUNNING_LOAD):
                    entry = lane.choice(process)
                    if entry is not None and (best is None or entry < best):
                        best = entry
            for request in self.picky[stage]:
                picky, load = request.entry, request.call.load
                fits = load <= room and (is_enough or load < MAX_RUNNING_LOAD)
                if picky is not None and fits and (best is None or picky < best):
                    best = picky if self.may_run(process, request) else best
            if best is not None and (best[2].call.is_prefetched or not prefetches):
                return best[2]
        return None

    def _is_enough(self, stage: str) -> bool:
        """Return whether there are calls for all processes, so that none goes without if calls are prefetched."""
        return sum(self.waiting[each] for each in self._upcoming[stage]) >= self._table.live(stage)

    def _stages(self, process: Process) -> Iterable[str]:
        """Return the stages of which a row may take a call, the latest first; those of the group in turn first."""
        stages, groups = process.pool.stages, process.spec.swap_groups
        if not groups:
            return stages
        always = [stage for stage in stages if not any(stage in group for group in groups)]
        wanted = [group for group in groups if self._waiting(group)]
        if process.group in wanted and not (len(wanted) > 1 and self._turn_is_over(process)):
            chosen = process.group
        elif process.group and any(self.waiting[stage] for stage in always):
            # Calls that need no swap may soon lead to calls for the group on the GPU.
            chosen = ()
        else:
            others = [group for group in wanted if group != process.group]
            chosen = max(others, key=self._waiting, default=process.group)
        first = [stage for stage in stages if stage in always or stage in chosen]
        # The calls of the chosen group may be some that failed here.
        return [*first, *(stage for stage in stages if stage not in first and not process.load)]

    def _waiting(self, group: Iterable[str]) -> int:
        return sum(self.waiting[stage] for stage in group)

    def _turn_is_over(self, process: Process) -> bool:
        if process.turn >= SHOTS_PER_SWAP:
            return True
        # Other processes that hold only this group are about to run out of calls. Make some for them.
        pools = {id(pool): pool for stage in process.group for pool in self._table.holders[stage]}.values()
        others = sum(pool.live for pool in pools if not pool.spec.swap_groups)
        return others > 0 and self._waiting(process.group) <= 2 * others

    def _place(self, request: Request, send: _Send) -> None:
        """Find the best row for a call that waits since now."""
        process = self.idle_for(request) if request.runs_alone else self._best(request, MAX_RUNNING_LOAD)
        if process is not None:
            self._send(process, request, send)

    def _place_behind(self, request: Request, send: _Send) -> None:
        """Let the best row prefetch: not always this call, for older ones may wait that were too few until now."""
        may_prefetch = request.call.load < MAX_RUNNING_LOAD or self._is_enough(request.call.stage)
        if may_prefetch and (process := self._best(request, MAX_PREFETCH_LOAD)) is not None:
            self._fill(process, MAX_PREFETCH_LOAD, send)

    def _best(self, request: Request, most: float) -> Process | None:
        """Return the least loaded row; of these one with the LoRAs, then near the inputs."""
        call, table = request.call, self._table
        for low, pool, rows in table.shelves(call.stage, most - call.load + EPSILON):
            if most > MAX_RUNNING_LOAD and pool.spec.server:
                continue
            high = min(low + call.near_load, most - call.load + EPSILON)
            found = [each for each in self._nearby(request, rows) if self._is_open(each, request, high)]
            if found:
                near = table.rows.get(call.near) if call.near is not None else None
                node = near.node if near is not None else None
                return min(
                    found,
                    key=lambda each: (
                        not each.has_active(call.adapters),
                        0 if each is near else 1 if node and each.node == node else 2,
                        each.load,
                    ),
                )
        return None

    def _nearby(self, request: Request, rows: dict[Process, None]) -> Iterator[Process]:
        """Yield the rows at which it is worth to look, with bounded effort."""
        call, table = request.call, self._table
        if (near := table.rows.get(call.near) if call.near is not None else None) is not None:
            yield near
            yield from islice(table.on_node[near.node], LOOKS)
        if call.adapters:
            for pool in table.holders[call.stage]:
                yield from islice(pool.with_adapter.get(call.adapters[0], ()), LOOKS)
        # Rows of one shelf differ only in their groups of stages and in what has failed there.
        is_plain = request.where is None and not next(iter(rows)).spec.swap_groups and not self.alone[call.stage]
        yield from islice(rows, 2 if is_plain else None)

    def _is_open(self, process: Process, request: Request, high: float) -> bool:
        shelf, stage = process.shelf, request.call.stage
        if shelf is None or process.runs_alone or shelf > high or stage not in process.spec.stages:
            return False
        if process.load and process.spec.swap_groups and stage not in process.group:
            return False
        return self.may_run(process, request) and self._alone_for(process) is None

    def idle_for(self, request: Request) -> Process | None:
        """Return a row that has nothing to do, and may run a call."""
        rows = chain.from_iterable(pool.shelves.get(0.0, ()) for pool in self._table.holders[request.call.stage])
        usable = (each for each in rows if self.may_run(each, request))
        return next((each for each in usable if request.runs_alone or self._alone_for(each) is None), None)

    # Rows

    def _send(self, process: Process, request: Request, send: _Send) -> None:
        self.remove(request)
        self.take(process, request)
        send(process, request)

    def take(self, process: Process, request: Request) -> None:
        """Add a call to the load of a row."""
        call = request.call
        process.runs_alone = request.runs_alone
        process.load += call.load
        if call.adapters:
            self._table.use_adapters(process, call.adapters)
        for group in process.spec.swap_groups:
            if call.stage in group:
                process.turn = process.turn + 1 if group == process.group else 1
                process.group = group
        self._table.file(process)

    def ended(self, process: Process, load: float) -> None:
        """A call of this load has left a row."""
        process.load = process.load - load if process.calls else 0.0
        if not process.calls:
            process.runs_alone = False
        self._table.file(process)

    def reset(self, process: Process) -> None:
        """A row has no process any more."""
        process.calls.clear()
        process.load, process.runs_alone, process.group, process.turn = 0.0, False, (), 0
        self._table.set_adapters(process, [])
        self._table.file(process)
