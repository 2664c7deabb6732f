"""CPU of the engine's core per event and per shot, and how long the last lines of a script take, with simulated processes.

Each worker holds all stages, as in the layout `fused`. A shot is an image, a clip, four chunks and a commit. Bad lines fail on
every worker when their clip is made. Nothing else is simulated: no Ray, no loads, no driver.

    python benchmarks/core_events.py
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from vidgen_ray.engine import messages as m
from vidgen_ray.engine.core import Core
from vidgen_ray.engine.messages import OUTPUT, Call, Kind, Result, StepTime
from vidgen_ray.engine.route import CHUNK_LOAD
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.layout import WorkerSpec

STAGES = ("flux", "svd", "realesrgan", OUTPUT)
SECONDS = {"flux": 5.0, "svd": 20.0, "realesrgan": 1.0, OUTPUT: 2.0}
"""Stage -> seconds of a call."""
CHUNKS = 4
WORKER, ENCODER = WorkerSpec(STAGES[:-1], 1, 1), WorkerSpec((OUTPUT,), 1, 0)
WORKERS_PER_ENCODER = 8
SHOTS_PER_WORKER = 3
"""Shots in progress."""
SESSION_LOAD = 1 / 16
"""Load that a commit adds to an encoder."""
PROCESSES = (10, 100, 1000)
TAILS = (1, 2, 4, 8, 16)
TAIL_PROCESSES = 32


class Measured(NamedTuple):
    """Measurements of a run."""

    events: int
    cpu_us: float
    """Mean CPU of an event, in microseconds."""
    largest_ms: float
    shot_ms: float
    seconds: float
    """Simulated length of the run."""
    tail_s: float
    """Simulated seconds from the last shot that is done to the end."""
    attempts: int
    """Most attempts of a bad line's clip."""


class Run:
    """A script of `shots` lines on a number of workers. `bad`: orders of lines that fail on every worker."""

    def __init__(self, processes: int, shots: int, *, bad: Collection[int] = (), with_loras: bool = False) -> None:
        self._core = Core(STAGES)
        self._shots, self._bad, self._with_loras = shots, bad, with_loras
        self._random = random.Random(0)
        self._now, self._wake = 0.0, math.inf
        self._todo: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers, self._ids, self._orders = count(), count(1), count()
        self._queues: dict[str, deque[m.Send]] = {}
        self._lives: dict[str, int] = {}
        self._cancelled: set[int] = set()
        self._calls: dict[int, Call] = {}
        self._parts: Counter[int] = Counter()
        """Order of a shot -> chunks that are left."""
        self._attempts: Counter[int] = Counter()
        self._open, self._last_done = 0, 0.0
        self._processes = processes
        self._cpu = self._largest = 0.0
        self._events = 0

    def run(self) -> Measured:
        """Run until every line has a result."""
        for number in range(self._processes):
            self._tell(m.Added(f"worker/{number}", WORKER))
        for number in range(math.ceil(self._processes / WORKERS_PER_ENCODER)):
            self._tell(m.Added(f"encoder/{number}", ENCODER))
        for number, (name, life) in enumerate(self._lives.items()):
            self._tell(m.Placed(name, life, f"node-{number // 8}", number))
            self._tell(m.Ready(name, life))
        self._cpu, self._largest, self._events = 0.0, 0.0, 0
        for _ in range(SHOTS_PER_WORKER * self._processes):
            self._next_shot()
        while self._open:
            self._step()
        return Measured(
            self._events,
            1e6 * self._cpu / self._events,
            1e3 * self._largest,
            1e3 * self._cpu / self._shots,
            self._now,
            self._now - self._last_done,
            max(self._attempts.values(), default=0),
        )

    def _step(self) -> None:
        when = self._todo[0][0] if self._todo else math.inf
        if self._wake <= when:
            self._now, self._wake = self._wake, math.inf
            self._tell(m.Tick())
            return
        self._now, _, what = heappop(self._todo)
        what()

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        heappush(self._todo, (self._now + seconds, next(self._numbers), what))

    def _tell(self, event: m.Event) -> None:
        before = time.thread_time()
        commands = self._core.handle(event, self._now)
        seconds = time.thread_time() - before
        self._cpu += seconds
        self._largest = max(self._largest, seconds)
        self._events += 1
        for command in commands:
            self._do(command)

    def _do(self, command: m.Command) -> None:
        match command:
            case m.Start():
                self._lives[command.process] = command.life
                self._queues[command.process] = deque()
            case m.Send():
                self._queues[command.process].append(command)
                if command.call.stage == OUTPUT or len(self._queues[command.process]) == 1:
                    self._begin(command)
            case m.Finish():
                self._finished(self._calls.pop(command.call), command.process)
            case m.Fail():
                self._calls.pop(command.call)
                self._next_shot(ended=True)
            case m.WaitUntil():
                self._wake = command.time
            case m.Cancel():
                self._cancelled.add(command.number)
            case m.Kill() | m.Report() | m.CheckStorage():
                raise AssertionError(command)

    # Shots

    def _next_shot(self, *, ended: bool = False) -> None:
        self._open -= ended
        if (order := next(self._orders)) < self._shots:
            self._open += 1
            self._ask(order, "flux", adapters=(f"lora-{order}",) if self._with_loras else ())

    def _ask(self, order: int, stage: str, **fields: Any) -> None:
        keys, costs = ((), ()) if stage == OUTPUT else ((f"{order} {stage}",), (1.0,))
        call = Call(next(self._ids), order, str(order), (stage,), keys, costs, **fields)
        self._calls[call.id] = call
        # A shot continues after the event that has ended its call.
        self._after(0.0, lambda: self._tell(m.Asked(call)))

    def _finished(self, call: Call, process: str) -> None:
        order = call.order
        match call.stage:
            case "flux":
                self._ask(int(order), "svd", near=process)
            case "svd":
                self._parts[int(order)] = CHUNKS
                for _ in range(CHUNKS):
                    self._ask(int(order), "realesrgan", near=process, load=CHUNK_LOAD)
            case "realesrgan":
                self._parts[int(order)] -= 1
                if not self._parts[int(order)]:
                    del self._parts[int(order)]
                    self._ask(int(order), OUTPUT, load=SESSION_LOAD)
            case _:
                self._last_done = self._now
                self._next_shot(ended=True)

    # Processes

    def _begin(self, send: m.Send) -> None:
        seconds = SECONDS[send.call.stage] * self._random.uniform(0.9, 1.1) * (send.number not in self._cancelled)
        if send.call.stage == OUTPUT:
            self._tell(m.Progressed(send.process, send.life, send.number))
        self._after(seconds, lambda: self._end(send, seconds))

    def _end(self, send: m.Send, seconds: float) -> None:
        name, call, queue = send.process, send.call, self._queues[send.process]
        queue.remove(send)
        if queue and call.stage != OUTPUT:
            self._begin(queue[0])
        if call.stage == "svd" and call.order in self._bad and send.number not in self._cancelled:
            self._attempts[int(call.order)] += 1
            failure = Failure(stage="svd", error="RuntimeError", message="bad", attempts=1, worker=name)
            self._tell(m.Failed(name, send.life, send.number, Kind.ERROR, failure))
        else:
            steps = tuple(StepTime(stage, key, seconds) for stage, key in zip(call.stages, call.keys, strict=False))
            self._tell(m.Returned(name, send.life, send.number, Result(steps, "gpu")))


def spread(shots: int, every: int = 100) -> range:
    """Return the orders of 1% bad lines all over a script."""
    return range(every // 2, shots, every)


def measured(*args: Any, **options: Any) -> Measured:
    gc.collect()
    gc.disable()
    try:
        return Run(*args, **options).run()
    finally:
        gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=lambda text: [int(each) for each in text.split(",")], default=PROCESSES)
    parser.add_argument("--shots-per-process", type=int, default=6)
    args = parser.parse_args()
    console = Console(width=140)
    tails = Table(
        "last lines that are bad", "seconds after the last good line", "attempts", title=f"{TAIL_PROCESSES} processes"
    )
    for number in TAILS:
        shots = 6 * TAIL_PROCESSES + number
        result = measured(TAIL_PROCESSES, shots, bad=range(shots - number, shots))
        tails.add_row(str(number), f"{result.tail_s:.0f}", str(result.attempts))
    console.print(tails)
    costs = Table("processes", "lines", "us per event", "ms per shot", "largest event", "seconds", "after the last good line")
    for processes in args.processes:
        shots = args.shots_per_process * processes
        for name, options in (("good", {}), ("1% bad", {"bad": spread(shots)}), ("a LoRA each", {"with_loras": True})):
            result = measured(processes, shots, **options)
            figures = f"{result.cpu_us:.0f}", f"{result.shot_ms:.2f}", f"{result.largest_ms:.1f} ms"
            costs.add_row(str(processes), name, *figures, f"{result.seconds:.0f}", f"{result.tail_s:.0f}")
    console.print(costs)


if __name__ == "__main__":
    main()
