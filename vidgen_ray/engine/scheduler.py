"""Scheduler of a run: assign waiting work to workers. Independent of Ray and of time."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from vidgen_ray.planner.layout import SHOTS_PER_SWAP, WorkerSpec

CHUNK_LOAD = 0.25
"""Load of one chunk of frames to upscale."""
COMMIT_LOAD = 0.0625
"""Load of a clip that is written on its encoder, which can write several at a time: they wait for their chunks."""
MAX_RUNNING_LOAD = 1.0
"""Load of a busy worker, in units of `Work.load`. More is assigned only if no other worker could start it now."""
MAX_PREFETCH_LOAD = 2.0
"""Maximum load of a worker, running and prefetched. The inputs of prefetched work arrive while the worker computes."""
MAX_LORA_SKIPS = 64
"""A shot is no longer skipped in favour of the active LoRAs when a shot that is this much younger has come."""


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
    shot: str = ""
    """Id of the shot, for logs."""

    def loras_active(self, worker: WorkerState) -> bool:
        """Return whether the LoRAs of the work are active on the worker. True for work without LoRAs."""
        return not self.adapters or self.adapters.issubset(worker.adapters)

    def mismatch(self, worker: WorkerState) -> tuple[bool, int]:
        """Return how badly the worker suits the work: by its LoRAs, then by the distance of the inputs.

        The distance is 0 on the worker, 1 on its node, 2 elsewhere or unknown.
        """
        on_node = self.near is not None and self.near.node is not None and self.near.node == worker.node
        return not self.loras_active(worker), 0 if self.near is worker else 2 - on_node

    @property
    def best_mismatch(self) -> tuple[bool, int]:
        """The smallest possible mismatch."""
        return False, 2 if self.near is None else 0


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

    @property
    def alone(self) -> bool:
        """True if the assigned work must run alone."""
        return any(work.alone for work in self.assigned)


Entry = tuple[int, int, Work]
"""Order, a number that makes the key unique since the chunks of a shot have the same order, and the work."""
Alike = tuple[float, tuple[str, ...], bool]
"""Load, stages and probation of workers."""
Pair = tuple[WorkerState, Work]


class Scheduler:
    """Queue of waiting work, and its assignment to workers. Events of workers that were removed are ignored."""

    def __init__(self, positions: Mapping[str, int]) -> None:
        """`positions`: stage name -> position in the graph."""
        self._positions = positions
        self._queues: dict[str, list[Entry]] = {stage: [] for stage in positions}
        """Stage -> waiting work, oldest first."""
        self._upcoming = {
            stage: [queue for other, queue in self._queues.items() if positions[other] <= last]
            for stage, last in positions.items()
        }
        """Stage -> queues of work that waits for this stage, or for earlier ones, from which it comes to this stage later."""
        self._loads: dict[str, Counter[float]] = {stage: Counter() for stage in positions}
        """Stage -> load -> waiting work with this load."""
        self._entries: dict[Work, Entry] = {}
        self._suspects: list[Entry] = []
        """Waiting work that must run alone, oldest first."""
        self._numbers = count()
        self._holders: dict[str, dict[WorkerState, None]] = {stage: {} for stage in positions}
        self._stages: dict[WorkerState, list[str]] = {}
        """Worker -> its stages, the latest first."""
        self._open: dict[Alike, dict[WorkerState, None]] = {}
        """Live workers that can take more work."""
        self._opened: dict[WorkerState, Alike] = {}
        self._live: Counter[str] = Counter()
        """Stage -> live workers that hold it."""

    # Workers

    def add_worker(self, worker: WorkerState) -> None:
        """Add a worker. It gets work after `started`."""
        self._stages[worker] = sorted(worker.spec.stages, key=self._positions.__getitem__, reverse=True)
        for stage in worker.spec.stages:
            self._holders[stage][worker] = None

    def remove_worker(self, worker: WorkerState) -> None:
        """Remove a worker that does not come back. Its assigned work is forgotten, as after a crash."""
        self.crashed(worker)
        if self._stages.pop(worker, None) is not None:
            for stage in worker.spec.stages:
                del self._holders[stage][worker]

    def started(self, worker: WorkerState) -> None:
        """Record that the process is up and has loaded its weights."""
        if not worker.live and worker in self._stages:
            worker.live = True
            self._live.update(worker.spec.stages)
            self._update(worker)

    def crashed(self, worker: WorkerState) -> None:
        """Reset a worker whose process crashed or is down. `finished` may or may not follow for its assigned work."""
        if worker not in self._stages:
            return
        if worker.live:
            worker.live = False
            self._live.subtract(worker.spec.stages)
        worker.load = 0.0
        worker.assigned.clear()
        worker.adapters, worker.group, worker.turn = [], (), 0
        self._update(worker)

    def set_probation(self, worker: WorkerState, probation: bool) -> None:
        """Start or end the probation of a worker. See `WorkerState.probation`."""
        worker.probation = probation
        self._update(worker)

    def holders(self, stage: str) -> Collection[WorkerState]:
        """Return the workers that hold a stage, live or not."""
        return self._holders[stage].keys()

    def _update(self, worker: WorkerState) -> None:
        """Record whether the worker can take more work."""
        if (before := self._opened.pop(worker, None)) is not None:
            del self._open[before][worker]
            if not self._open[before]:
                del self._open[before]
        # Work that waits at a server could go to another one.
        full = len(worker.assigned) >= worker.spec.parallel if worker.spec.server else worker.load >= MAX_PREFETCH_LOAD
        if worker.live and not full and not worker.alone:
            alike = self._opened[worker] = worker.load, worker.spec.stages, worker.probation
            self._open.setdefault(alike, {})[worker] = None

    # Work

    def add(self, work: Work) -> None:
        entry = self._entries[work] = work.order, next(self._numbers), work
        insort(self._queues[work.stage], entry)
        self._loads[work.stage][work.load] += 1
        if work.alone:
            insort(self._suspects, entry)

    def remove(self, work: Work) -> None:
        """Remove waiting work, if it was cancelled."""
        if (entry := self._entries.pop(work, None)) is not None:
            self._queues[work.stage].remove(entry)
            loads = self._loads[work.stage]
            loads[work.load] -= 1
            if not loads[work.load]:
                del loads[work.load]
            if work.alone:
                self._suspects.remove(entry)

    def queued(self, stage: str) -> int:
        return len(self._queues[stage])

    def finished(self, worker: WorkerState, work: Work) -> None:
        """Record the end of a call, successful or not. Ignored for work of a process that has crashed."""
        if work in worker.assigned:
            del worker.assigned[work]
            worker.load = worker.load - work.load if worker.assigned else 0.0
            self._update(worker)

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
        assigned: list[Pair] = []
        if not self._entries:
            return assigned
        reserved = self._assign_suspects(assigned)
        for max_load, probation in ((MAX_RUNNING_LOAD, False), (MAX_RUNNING_LOAD, True), (MAX_PREFETCH_LOAD, False)):
            while (pair := self._next_pair(max_load, probation, reserved)) is not None:
                self._assign(*pair)
                assigned.append(pair)
        return assigned

    def _assign_suspects(self, assigned: list[Pair]) -> set[WorkerState]:
        """Assign work that must run alone to idle workers. Return the workers that get no other work until they are idle.

        That is one for the oldest such work of each stage, the least loaded one: a worker whose call may hang is on probation.
        """
        reserved: dict[str, WorkerState] = {}
        for _, _, work in list(self._suspects):
            if work.stage in reserved:
                continue
            holders = (worker for worker in self._holders[work.stage] if worker.live and worker not in reserved.values())
            usable = [worker for worker in holders if not worker.alone and self._may_run(worker, work)]
            if not usable:
                continue
            best = min(usable, key=lambda worker: (worker.probation, worker.load, work.mismatch(worker)))
            if best.load:
                reserved[work.stage] = best
            else:
                self._assign(best, work)
                assigned.append((best, work))
        return set(reserved.values())

    def _next_pair(self, max_load: float, probation: bool, reserved: Collection[WorkerState]) -> Pair | None:
        """Return the next assignment that loads a worker with at most `max_load`.

        Only if there is none with MAX_RUNNING_LOAD, work may be prefetched: then no worker could start it now.
        """
        below = 0.0 if probation else max_load
        groups = [each for each in self._open if each[2] == probation and (not each[0] or each[0] < below)]
        for alike in sorted(groups):
            fitting = self._fitting(alike, max_load)
            for worker in self._open[alike] if fitting else ():
                if worker not in reserved and (work := self._choice(worker, fitting)) is not None:
                    return self._best_worker(worker, work, reserved), work
        return None

    def _best_worker(self, first: WorkerState, work: Work, reserved: Collection[WorkerState]) -> WorkerState:
        """Return the worker that suits the work best, among those that could take it instead of the first one."""
        best, mismatch = first, work.mismatch(first)
        loads = first.load, first.load + work.near_load
        for alike in sorted(each for each in self._open if loads[0] <= each[0] <= loads[1] and work.stage in each[1]):
            if mismatch <= work.best_mismatch:
                break
            for worker in self._open[alike] if alike[2] == first.probation else ():
                in_turn = not worker.spec.swap_groups or (worker.group == first.group and worker.turn < SHOTS_PER_SWAP)
                if in_turn:
                    other = work.mismatch(worker)
                    if other < mismatch and worker not in reserved and self._may_run(worker, work):
                        best, mismatch = worker, other
        return best

    def _fitting(self, alike: Alike, max_load: float) -> dict[str, float]:
        """Return stage -> largest load of its waiting work that these workers may take now."""
        fitting = {}
        for stage in alike[1]:
            fits = [each for each in self._loads[stage] if alike[0] + each <= max_load]
            # Prefetch whole shots only if enough is left for the workers that finish sooner.
            if fits and max_load > MAX_RUNNING_LOAD and sum(map(len, self._upcoming[stage])) < self._live[stage]:
                fits = [each for each in fits if each < MAX_RUNNING_LOAD]
            if fits:
                fitting[stage] = max(fits)
        return fitting

    def _choice(self, worker: WorkerState, fitting: Mapping[str, float]) -> Work | None:
        """Return the best work for a worker. `fitting`: see `_fitting`."""
        stages = [stage for stage in self._stages[worker] if stage in fitting]
        if not worker.spec.swap_groups:
            return next((work for stage in stages if (work := self._stage_choice(worker, stage, fitting[stage]))), None)
        choices = {stage: work for stage in stages if (work := self._stage_choice(worker, stage, fitting[stage]))}
        in_turn = self._in_turn(worker, choices) if choices else ()
        return next((choices[stage] for stage in stages if stage in in_turn), None)

    def _stage_choice(self, worker: WorkerState, stage: str, max_load: float) -> Work | None:
        """Return the oldest work of a stage that the worker may take now, or a younger one whose LoRAs are active."""
        queue = self._queues[stage]
        oldest: Work | None = None
        for order, _, work in queue:
            if oldest is not None and order - oldest.order > MAX_LORA_SKIPS:
                break
            if work.alone or work.load > max_load or not self._may_run(worker, work):
                continue
            if work.loras_active(worker):
                return work
            oldest = oldest or work
            if not worker.adapters or queue[-1][0] - oldest.order > MAX_LORA_SKIPS:
                break
        return oldest

    def _may_run(self, worker: WorkerState, work: Work) -> bool:
        """Return whether the work has not failed on the worker, or on all live workers."""
        if worker not in work.avoid:
            return True
        return sum(other.live and work.stage in other.spec.stages for other in work.avoid) >= self._live[work.stage]

    def _in_turn(self, worker: WorkerState, stages: Collection[str]) -> list[str]:
        """Return the stages of the group whose turn it is, and those that are always on the GPU."""
        swap_groups = worker.spec.swap_groups
        groups = [group for group in swap_groups if set(group) & set(stages)]
        always = [stage for stage in stages if not any(stage in group for group in swap_groups)]
        if not groups:
            return always
        if worker.group in groups and not (len(groups) > 1 and self._turn_is_over(worker)):
            return [*always, *(stage for stage in stages if stage in worker.group)]
        # Work that needs no swap may soon produce work for the group on the GPU.
        if always and worker.group:
            return always
        others = [group for group in groups if group != worker.group]
        chosen = max(others, key=lambda group: sum(map(self.queued, group)))
        return [*always, *(stage for stage in stages if stage in chosen)]

    def _turn_is_over(self, worker: WorkerState) -> bool:
        if worker.turn >= SHOTS_PER_SWAP:
            return True
        # Other workers that hold only this group are about to run out of work. Make some for them.
        others = sum(other.live and not other.spec.swap_groups for stage in worker.group for other in self._holders[stage])
        return others > 0 and sum(map(self.queued, worker.group)) <= 2 * others

    def _assign(self, worker: WorkerState, work: Work) -> None:
        self.remove(work)
        worker.assigned[work] = None
        worker.load += work.load
        if work.adapters:
            kept = [adapter for adapter in worker.adapters if adapter not in work.adapters]
            worker.adapters = [*kept, *work.adapters][-worker.adapters_kept :]
        group = next((group for group in worker.spec.swap_groups if work.stage in group), None)
        if group is not None:
            worker.turn = worker.turn + 1 if group == worker.group else 1
            worker.group = group
        self._update(worker)
