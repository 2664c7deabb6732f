"""Simulated processes that carry out the commands of an engine's core, in simulated time. Each event is checked."""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count

from vidgen_ray.engine import messages as m
from vidgen_ray.engine.core import Core
from vidgen_ray.engine.invariants import check_invariants
from vidgen_ray.engine.messages import LOADING, OUTPUT, Call, Kind, Result, StepTime
from vidgen_ray.engine.processes import is_encoder
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.layout import WorkerSpec

STAGES = ("instantid", "flux", "svd", OUTPUT)
CALL_S, START_S, LOAD_S, STEP_S, SILENT_S = 8.0, 1.0, 1.0, 1.0, 60.0
SLOW_FACTOR = 50
FAILURES = {
    "error": Kind.ERROR,
    "broken": Kind.ERROR,
    "unloaded": Kind.ERROR,
    "refused": Kind.INPUT,
    "too large": Kind.MEMORY,
    "unwritten": Kind.WRITE,
    "disk full": Kind.DISK_FULL,
    "node": Kind.NODE,
    "foreign": Kind.FOREIGN,
}
"""Fault of a call -> kind of its failure. `broken` and `unloaded` also say so of the process."""
FAULTS = (*FAILURES, "crash", "hang", "slow", "wrong", "unusual")
"""All faults. `wrong`: the result of another shot. `unusual`: a result that no other worker must make."""
FLUX = WorkerSpec(("flux",), 1, 1)


def instructions(function: Callable[[], object]) -> int:
    """Return how many instructions of Python a function runs: its cost, without noise."""
    number = 0

    def trace(frame, kind, _):
        nonlocal number
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        number += kind == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return number


@dataclass(eq=False)
class Proc:
    """The processes that fill a row, one after another."""

    name: str
    node: str = "n1"
    spec: WorkerSpec = FLUX
    fault: str | Callable[[Call], str] = ""
    seconds: float = CALL_S
    loads: Iterator[str] = field(default_factory=lambda: iter(()))
    """Faults of the first loads: `hang`, or an error class. Those that follow succeed."""
    load_s: float = LOAD_S
    images: Iterator[str] = field(default_factory=lambda: iter(()))
    """What the images of each process look like. The last one stays."""
    image: str = ""
    device: str = "gpu"
    life: int | None = None
    """`None` if no process runs."""
    pid: int = 0
    queue: dict[int, m.Send] = field(default_factory=dict)
    """Calls that have not ended, in the order in which they came."""
    running: dict[int, str] = field(default_factory=dict)
    """Running call -> its fault."""
    cancelled: set[int] = field(default_factory=set)
    is_frozen: bool = False
    kills: int = 0


class Farm:
    def __init__(self, *processes: Proc, flaws: dict[int, str] | None = None, **options):
        """`flaws`: order of a shot -> fault of its calls, but of those that others share. `options`: of the core."""
        self.core = Core(STAGES, **options)
        self.flaws = flaws or {}
        self.procs: dict[str, Proc] = {}
        self.now = self.storage_down_until = 0.0
        self.calls: dict[int, Call] = {}
        self.open: set[int] = set()
        self.ended: dict[int, m.Finish | m.Fail] = {}
        self.ended_at: dict[int, float] = {}
        self.sent: defaultdict[int, list[str]] = defaultdict(list)
        """Order of a shot -> processes that got its calls, without checks of workers."""
        self.quarantined: list[str] = []
        """Names of the processes of all reports."""
        self.checks: Counter[str] = Counter()
        """Outcome of checks of workers -> number."""
        self.log: list[tuple[float, m.Event, list[m.Command]]] = []
        self.then: dict[int, Callable[[], object]] = {}
        """Call -> what follows its end."""
        self._todo: list[tuple[float, int, Callable[[], object]]] = []
        self._wake, self._stopped_until = math.inf, 0.0
        self._ids, self._pids, self._numbers = count(1), count(1), count()
        for process in processes:
            self.add(process)

    # What a test does

    def add(self, process: Proc) -> None:
        self.procs[process.name] = process
        self.tell(m.Added(process.name, process.spec))

    def ask(self, order: int, *stages: str, **fields) -> int:
        """Ask for a call of a shot. Return its id."""
        stages = stages or ("flux",)
        keys = () if stages == (OUTPUT,) else tuple(f"{order} {stage}" for stage in stages)
        defaults = {"keys": keys, "costs": (1.0,) * len(keys), "load": 1.0 if keys else 1 / 16}
        call = Call(next(self._ids), order, f"shot-{order}", stages, **{**defaults, **fields})
        self.calls[call.id] = call
        self.open.add(call.id)
        self.tell(m.Asked(call))
        return call.id

    def render(self, order: int, position: int = 0, near: str | None = None) -> None:
        """Ask for a call of each stage, one after another. If inputs are lost, the shot starts again."""
        is_shared = position == 0
        fields = {"keys": (f"photo {order % 2}",), "is_shared": True} if is_shared else {"adapters": (f"lora {order % 3}",)}
        call = self.ask(order, STAGES[position], near=near, is_checked=not is_shared, **fields)

        def follow() -> None:
            ended = self.ended[call]
            if isinstance(ended, m.Finish) and position + 1 < len(STAGES):
                self.render(order, position + 1, ended.process)
            elif isinstance(ended, m.Fail) and ended.kind is Kind.FOREIGN:
                self.render(order)

        if call in self.ended:
            follow()
        self.then[call] = follow

    def withdraw(self, call: int) -> None:
        self.open.discard(call)
        self.tell(m.Withdrawn(call))

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        heappush(self._todo, (self.now + seconds, next(self._numbers), what))

    def crash(self, name: str, node: str | None = None, *, same_process: bool = False) -> None:
        """The process ends. The next one starts on another node, if one is given. `same_process`: only its connection ends."""
        process = self.procs[name]
        process.node = node or process.node
        if process.life is not None:
            died = m.Died(name, process.life, tuple(process.queue), "it was killed")
            for calls in (process.queue, process.running, process.cancelled):
                calls.clear()
            process.life, process.is_frozen = None, False
            process.pid = process.pid if same_process else next(self._pids)
            self.after(0, partial(self.tell, died))

    def freeze(self, name: str) -> None:
        process, life = self.procs[name], self.procs[name].life
        if life is not None and name in self.core.table.rows and self.core.table.rows[name].is_live:
            process.is_frozen = True
            self.after(SILENT_S, lambda: process.life == life and self.tell(m.Silent(name, life, SILENT_S)))

    def stop_driver(self, seconds: float) -> None:
        """Read no event for some time. Then timers come first."""
        self._stopped_until = self.now + seconds

    def suspend(self, seconds: float) -> None:
        """Stop the driver and all processes for some time."""
        self.stop_driver(seconds)
        self._todo = [(when + seconds, number, what) for when, number, what in self._todo]

    def run(self, until: float = math.inf) -> None:
        """Run until all calls have ended, or until a time."""
        while self.open or until < math.inf:
            when = min(self._todo[0][0] if self._todo else math.inf, self._wake)
            if when > until:
                self.now = max(self.now, until)
                return
            assert when < math.inf, ("nothing will happen any more", self.open)
            self.now = max(self.now, when, self._stopped_until)
            assert len(self.log) < 100_000, "it does not end"
            if self._wake <= self.now:
                self._wake = math.inf
                self.tell(m.Tick())
            else:
                heappop(self._todo)[2]()

    def tell(self, event: m.Event) -> None:
        commands = self.core.handle(event, self.now)
        self.log.append((self.now, event, commands))
        check_invariants(self.core)
        for command in commands:
            self._do(command)

    # What a test looks at

    def by(self, call: int) -> str | None:
        """Return the process whose result a call has got. `None` if it has failed."""
        return getattr(self.ended[call], "process", None)

    def failure(self, call: int) -> Failure:
        return self.ended[call].failure

    def commands(self, kind: type) -> list[tuple[float, m.Command]]:
        return [(when, each) for when, _, commands in self.log for each in commands if isinstance(each, kind)]

    # Commands

    def _do(self, command: m.Command) -> None:
        match command:
            case m.Start():
                self._start(self.procs[command.process], command.life)
            case m.Kill():
                self.procs[command.process].kills += 1
                self.crash(command.process)
            case m.Release():
                self.procs[command.process].life = None
            case m.Send():
                if command.repetition is None:
                    self.sent[command.call.order].append(command.process)
                process = self.procs[command.process]
                # Otherwise it has ended, and the core will hear of it.
                if process.life is not None:
                    process.queue[command.number] = command
                    self._begin(process)
            case m.Cancel():
                self._cancel(self.procs[command.process], command.number)
            case m.Finish() | m.Fail():
                self._end(command.call, command)
            case m.CheckStorage():
                down_s = self.storage_down_until - self.now
                self.after(max(STEP_S, down_s), partial(self.tell, m.StorageChecked(command.call, down_s > 0)))
            case m.WaitUntil():
                self._wake = command.time
            case m.Report():
                self.quarantined.append(command.process.partition(" ")[0])
            case m.Ended() if command.outcome:
                self.checks[command.outcome] += 1

    def _end(self, call: int, how: m.Finish | m.Fail) -> None:
        assert call in self.open, (how, "after its end")
        self.open.remove(call)
        self.ended[call], self.ended_at[call] = how, self.now
        if call in self.then:
            # The run goes on until then.
            self.open.add(-call)
            self.after(0, lambda: (self.open.discard(-call), self.then[call]()))

    # Processes

    def _start(self, process: Proc, life: int) -> None:
        # A process that has only lost its weights is the same one.
        process.life, process.pid = life, process.pid or next(self._pids)
        process.queue.clear()
        process.running.clear()
        process.image, load = next(process.images, process.image), next(process.loads, "")
        failure = Failure(stage=LOADING, error=load, message="cannot load", attempts=1, worker=process.name)
        placed = m.Placed(process.name, life, process.node, process.pid)
        ended = m.LoadFailed(process.name, life, failure) if load else m.Ready(process.name, life)
        self.after(START_S, lambda: process.life == life and self.tell(placed))
        if load != "hang":
            self.after(START_S + process.load_s, lambda: process.life == life and self.tell(ended))

    def _cancel(self, process: Proc, number: int) -> None:
        if is_encoder(process.spec):
            process.queue.pop(number, None)
        elif number in process.queue:
            process.cancelled.add(number)
            if process.running.get(number, "hang") != "hang":
                self.after(STEP_S, partial(self._end_call, process, process.queue[number], ""))

    def _begin(self, process: Proc) -> None:
        """Begin the calls for which there is a place."""
        places = len(process.queue) if is_encoder(process.spec) else process.spec.parallel
        for number, send in list(process.queue.items())[:places]:
            if number in process.running or process.is_frozen:
                continue
            fault = process.fault if isinstance(process.fault, str) else process.fault(send.call)
            if send.call.stage != STAGES[0]:
                fault = fault or self.flaws.get(send.call.order, "")
            process.running[number] = fault = "" if number in process.cancelled else fault
            if is_encoder(process.spec):
                self.after(0, partial(self.tell, m.Progressed(process.name, send.life, number)))
            if fault != "hang":
                seconds = process.seconds * (SLOW_FACTOR if fault == "slow" else number not in process.cancelled)
                self.after(seconds, partial(self._end_call, process, send, fault))

    def _end_call(self, process: Proc, send: m.Send, fault: str) -> None:
        name, life, number, call = process.name, send.life, send.number, send.call
        if process.life != life or process.is_frozen or number not in process.queue:
            return
        if fault == "crash":
            self.crash(name)
            return
        if is_encoder(process.spec) and self.now < self.storage_down_until:
            fault = fault or "unwritten"
        del process.queue[number], process.running[number]
        if number in process.cancelled:
            self.tell(m.Returned(name, life, number, Result()))
        elif fault in FAILURES:
            failure = Failure(stage=call.stage, error="RuntimeError", message=fault, attempts=1, worker=name)
            self.tell(m.Failed(name, life, number, FAILURES[fault], failure, fault == "broken", fault == "unloaded"))
        else:
            keys = tuple(f"another {key}" for key in call.keys) if fault == "wrong" else call.keys
            steps = tuple(StepTime(stage, key, process.seconds) for stage, key in zip(call.stages, keys, strict=False))
            others = () if send.repetition is None else send.repetition.others
            differences = tuple(0.0 if other.data == process.image else 255.0 for other in others)
            self.tell(
                m.Returned(name, life, number, Result(steps, process.device, fault != "unusual", differences, process.image))
            )
        self._begin(process)
