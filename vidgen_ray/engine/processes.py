"""The table of processes of an engine. A row has all that is known of a process; rows of processes that are gone leave it.

Indexes by stage, load and node make each question independent of the number of rows. Does not use Ray.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from vidgen_ray.engine.messages import OUTPUT, Call
from vidgen_ray.planner.layout import WorkerSpec

if TYPE_CHECKING:
    from vidgen_ray.engine.attempts import FailedAttempt, Running

ATTEMPTS = 3
"""Default number of attempts per call before the shot has failed. The first one counts."""


@dataclass(frozen=True)
class CoreLimits:
    """Limits of an engine's core. Times are in seconds."""

    in_doubt_factor: int = 2
    """Attempts, as a multiple, if nothing shows whether the processes are sick, and others have not tried the call yet."""
    max_failures: int = 6
    """Failures on one process after which a shot has failed, although its processes were found sick: it may be the cause."""
    failures: int = 3
    """Failures in a row, on different shots, before a process is quarantined."""
    restart_s: float = 1.0
    """Time before the restart of a quarantined process: the memory of the last one may not be free yet."""
    max_quarantines: int = 3
    """Quarantines in a row after which a process is given up. If it was the last one with its stages, the engine stops, unless
    its circuit breaker decides: then the process stays in use."""
    load_attempts: int = 3
    """Attempts to load the weights, each in a new process, before a process is given up."""
    load_silence_s: float = 300.0
    """Time without activity after which a load hangs."""
    evidence_s: float = 600.0
    """Longest time in which a shot that has failed on several processes waits for what shows whether they are well."""
    between_calls_s: float = 0.1
    """Time in which a shot asks for its next call, or another shot begins."""
    floor_s: float = 600.0
    factor: float = 10.0
    """A call times out after `factor` times its expected time, but not before `floor_s`: a model may be compiled for a new
    size."""
    min_slow_s: float = 10.0
    copy_factor: float = 2.0
    """A call that has run longer than both `min_slow_s` and this many times its expected time also runs on an idle process."""
    cancel_s: float = 60.0
    """Time without a step after which the process of a cancelled call is killed. Only a large clip on a CPU takes longer."""
    late_s: float = 5.0
    """If a timer is this late, the driver itself was suspended, maybe with all processes: their deadlines are extended."""
    first_checked_call: int = 20
    """Calls of a worker before its first canary check. So short runs have none."""
    checked_calls: int = 200
    """Calls of a worker between two canary checks."""


MAX_RUNNING_LOAD = 1.0
"""Load of a busy process. More is assigned only if no other process could start it now."""
MAX_PREFETCH_LOAD = 2.0
"""Largest load of a process, running and prefetched. The inputs of prefetched calls arrive while it computes."""


def is_encoder(spec: WorkerSpec) -> bool:
    return spec.stages == (OUTPUT,)


class State(Enum):
    STARTING = "starting"
    """Starts, or loads its weights."""
    LIVE = "live"
    QUARANTINED = "quarantined"
    """Down until its deadline."""
    LEAVING = "leaving"
    """Not needed any more. It ends its calls."""
    GONE = "gone"


@dataclass(eq=False, slots=True, repr=False)
class Process:
    """A row."""

    name: str
    spec: WorkerSpec
    pool: Pool
    state: State = State.STARTING
    life: int = 1
    """Number of the process that fills the row now. Events of other ones are ignored."""
    node: str | None = None
    """Ray node id. `None` before the first process has responded."""
    pid: int = 0
    deadline: float = math.inf
    """Time of the next look at it."""
    timer: float = math.inf
    """Time at which the core wakes for it, not later than the deadline."""
    load: float = 0.0
    calls: dict[int, Running] = field(default_factory=dict)
    """Calls that it has, in the order in which they were sent: the first `parallel` ones run, the others are prefetched."""
    adapters: list[str] = field(default_factory=list)
    """Active LoRAs. The last used is last."""
    group: tuple[str, ...] = ()
    """Group of stages that is on the GPU after its calls, if groups of stages take turns."""
    turn: int = 0
    """Calls to this group in a row."""
    runs_alone: bool = False
    """It has a call that must run alone."""
    failures: dict[FailedAttempt, Call] = field(default_factory=dict)
    """Failures since it has finished a call of another shot, and their calls."""
    quarantines: int = 0
    """Quarantines in a row."""
    failed_loads: int = 0
    was_ready: bool = False
    lost_at: float = -math.inf
    """Time when its last process was lost or quarantined."""
    device: str = ""
    """Kind of its GPU, with the driver, as its last call has said."""
    calls_to_check: int = 0
    """Calls until its next canary check is due."""
    is_found_sick: bool = False
    """The last check that it took part in has found it sick."""
    shelf: float | None = None
    """Its load, as it is in the index of live rows. `None` if it is not live."""

    @property
    def is_live(self) -> bool:
        return self.state is State.LIVE

    @property
    def running(self) -> list[Running]:
        """Calls that it works on now."""
        # The sessions of an encoder wait for chunks of their clips.
        most = len(self.calls) if is_encoder(self.spec) else self.spec.parallel
        return list(self.calls.values())[:most]

    @property
    def location(self) -> str:
        """Name, node and pid, for failure records."""
        return f"{self.name} ({self.node[:8]}:{self.pid})" if self.node else self.name

    def has_active(self, adapters: Sequence[str]) -> bool:
        return not adapters or all(each in self.adapters for each in adapters)


@dataclass(eq=False, slots=True, repr=False)
class Pool:
    """Rows with the same stages and the same resources."""

    spec: WorkerSpec
    stages: tuple[str, ...]
    """Its stages, the latest first."""
    rows: dict[Process, None] = field(default_factory=dict)
    live: int = 0
    rows_on: Counter[str | None] = field(default_factory=Counter)
    """Node -> number of rows."""
    shelves: dict[float, dict[Process, None]] = field(default_factory=dict)
    """Load -> live rows."""
    with_adapter: dict[str, dict[Process, None]] = field(default_factory=dict)


class Where(NamedTuple):
    """Places at which the next attempt of a call may run."""

    not_processes: frozenset[str] = frozenset()
    not_nodes: frozenset[str | None] = frozenset()
    more_gb: float = -1.0
    """The GPU memory must be larger than this."""
    only: str | None = None
    """The only process that may run it: the call checks this one."""

    def fits(self, process: Process) -> bool:
        if self.only is not None:
            return process.name == self.only
        return (
            process.name not in self.not_processes and process.node not in self.not_nodes and process.spec.gpu_gb > self.more_gb
        )


class Table:
    def __init__(self, stages: Sequence[str], adapters_kept: int) -> None:
        """`stages`: in the order of the chain. `adapters_kept`: maximum number of active LoRAs of a process."""
        self.stages = tuple(stages)
        self.positions = {stage: number for number, stage in enumerate(stages)}
        self.adapters_kept = adapters_kept
        self.rows: dict[str, Process] = {}
        self.pools: dict[WorkerSpec, Pool] = {}
        self.holders: dict[str, list[Pool]] = {stage: [] for stage in stages}
        """Stage -> pools that hold it."""
        self.on_node: dict[str | None, dict[Process, None]] = {}
        self.touched: dict[Process, None] = {}
        """Rows that may be able to take more calls since the last assignment."""

    def add(self, name: str, spec: WorkerSpec) -> Process:
        if (pool := self.pools.get(spec)) is None:
            latest = tuple(sorted(spec.stages, key=self.positions.__getitem__, reverse=True))
            pool = self.pools[spec] = Pool(spec, latest)
            for stage in spec.stages:
                self.holders[stage].append(pool)
        process = self.rows[name] = Process(name, spec, pool)
        pool.rows[process] = None
        pool.rows_on[None] += 1
        self.on_node.setdefault(None, {})[process] = None
        return process

    def remove(self, process: Process) -> None:
        self.release(process, State.GONE)
        del self.rows[process.name], self.on_node[process.node][process]
        self.set_adapters(process, [])
        self.touched.pop(process, None)

    def release(self, process: Process, state: State) -> None:
        """No further call can run there: the row counts no more where one looks for processes."""
        self.enter(process, state, process.deadline)
        if process in process.pool.rows:
            del process.pool.rows[process]
            process.pool.rows_on[process.node] -= 1

    def enter(self, process: Process, state: State, deadline: float = math.inf) -> None:
        """Change the state of a row, and its deadline."""
        process.state, process.deadline = state, deadline
        self.file(process)

    def place(self, process: Process, node: str, pid: int) -> None:
        """Set where the process of a row is."""
        process.pid = pid
        if node != process.node:
            process.pool.rows_on[process.node] -= 1
            del self.on_node[process.node][process]
            process.node = node
            process.pool.rows_on[node] += 1
            self.on_node.setdefault(node, {})[process] = None

    def file(self, process: Process) -> None:
        """Update the indexes after a change of the state or the load."""
        shelf = process.load if process.is_live else None
        before, pool = process.shelf, process.pool
        if shelf is not None:
            self.touched[process] = None
        if shelf == before:
            return
        process.shelf = shelf
        if before is not None:
            rows = pool.shelves[before]
            del rows[process]
            if not rows:
                del pool.shelves[before]
        if shelf is not None:
            pool.shelves.setdefault(shelf, {})[process] = None
        if (shelf is None) != (before is None):
            pool.live += 1 if before is None else -1

    def set_adapters(self, process: Process, adapters: list[str]) -> None:
        for adapter in process.adapters:
            rows = process.pool.with_adapter[adapter]
            del rows[process]
            if not rows:
                del process.pool.with_adapter[adapter]
        process.adapters = adapters
        for adapter in adapters:
            process.pool.with_adapter.setdefault(adapter, {})[process] = None

    def use_adapters(self, process: Process, adapters: Sequence[str]) -> None:
        """A call with these LoRAs comes to a row: those that were not used for longest leave it."""
        used = [*(each for each in process.adapters if each not in adapters), *adapters]
        self.set_adapters(process, used[max(0, len(used) - self.adapters_kept) :])

    # Questions

    def live(self, stage: str) -> int:
        """Return the number of live rows with a stage."""
        return sum(pool.live for pool in self.holders[stage])

    def is_held(self, stage: str) -> bool:
        """Return whether any row has this stage, live or not."""
        return any(pool.rows for pool in self.holders[stage])

    def holders_of(self, stage: str) -> Iterator[Process]:
        return chain.from_iterable(pool.rows for pool in self.holders[stage])

    def count(self, stage: str, where: Where) -> int:
        """Return the number of rows where a call may run, at once or after a start."""
        if where.only is not None:
            return int(where.only in self.rows)
        number = 0
        for pool in self.holders[stage]:
            if pool.spec.gpu_gb > where.more_gb:
                number += len(pool.rows) - sum(pool.rows_on[node] for node in where.not_nodes)
        for name in where.not_processes:
            row = self.rows.get(name)
            if row is not None and stage in row.spec.stages and row.spec.gpu_gb > where.more_gb:
                number -= row.node not in where.not_nodes
        return number

    def largest_gb(self, stage: str) -> float:
        return max((pool.spec.gpu_gb for pool in self.holders[stage] if pool.rows), default=0.0)

    def shelves(self, stage: str, most: float) -> Iterator[tuple[float, Pool, dict[Process, None]]]:
        """Yield live rows of one load, at most this one, the least loaded first."""
        found = [
            (load, number, pool, rows)
            for number, pool in enumerate(self.holders[stage])
            for load, rows in pool.shelves.items()
            if load <= most
        ]
        for load, _, pool, rows in sorted(found, key=lambda each: each[:2]):
            yield load, pool, rows
