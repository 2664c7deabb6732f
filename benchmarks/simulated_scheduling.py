"""Simulated run of the engine's queues: workers, calls and shots in simulated time, without Ray, models or files.

Measures the CPU seconds of the assignment, and how well it uses the workers. Times are in simulated seconds.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from vidgen_ray.engine.attempts import Request, Running
from vidgen_ray.engine.messages import Call
from vidgen_ray.engine.processes import Process, State, Table
from vidgen_ray.engine.queues import Queues
from vidgen_ray.engine.route import CHUNK_LOAD
from vidgen_ray.engine.shots import MAX_CHUNKS_AHEAD
from vidgen_ray.graph import STAGES
from vidgen_ray.planner.layout import WorkerSpec

NAMES = tuple(stage.name for stage in STAGES)
SECONDS = {"instantid": 0.1, "flux": 4.3, "lora": 1.75, "svd": 22.6, "realesrgan": 1.5}
"""Stage -> seconds per shot on an H100, in the order of the chain."""
CHUNKS = 7
"""Chunks of a clip of 25 frames with 4 frames per call."""
LORA_LOAD_S = 1.0
SWAP_S = 3.0
JITTER = 0.1
"""Largest relative difference of a call's duration from the mean."""
SHOTS_PER_WORKER = 3
"""Shots in progress per worker on a GPU."""
FUSED = (*SECONDS,)


def fused(slots: int) -> list[WorkerSpec]:
    """Return workers that hold all stages."""
    return [WorkerSpec(FUSED, 1, 1)] * slots


def staged(slots: int) -> list[WorkerSpec]:
    """Return workers that hold the stages of one model each, in proportion to their durations."""
    images, upscalers = max(1, round(0.2 * slots)), max(1, round(0.05 * slots))
    clips = max(1, slots - images - upscalers)
    return [
        *[WorkerSpec(("instantid", "flux", "lora"), 1, 1)] * images,
        *[WorkerSpec(("svd",), 1, 1)] * clips,
        *[WorkerSpec(("realesrgan",), 1, 1)] * upscalers,
    ]


def hybrid(slots: int) -> list[WorkerSpec]:
    """Return workers for images and others for clips, all of which also upscale."""
    images = max(1, round(0.22 * slots))
    return [
        *[WorkerSpec(("instantid", "flux", "lora", "realesrgan"), 1, 1)] * images,
        *[WorkerSpec(("svd", "realesrgan"), 1, 1)] * max(1, slots - images),
    ]


def swapping(slots: int) -> list[WorkerSpec]:
    """Return workers that hold all stages and swap weights, and some for clips only."""
    groups = (("flux", "lora"), ("svd",))
    clips = slots // 4
    return [*[WorkerSpec(FUSED, 1, 1, groups)] * (slots - clips), *[WorkerSpec(("svd", "realesrgan"), 1, 1)] * clips]


LAYOUTS: dict[str, Callable[[int], list[WorkerSpec]]] = {
    "fused": fused,
    "staged": staged,
    "hybrid": hybrid,
    "swapping": swapping,
}


@dataclass(slots=True)
class Result:
    """Measurements of a simulated run."""

    slots: int
    makespan_s: float = 0.0
    scheduler_cpu_s: float = 0.0
    """CPU seconds of the assignment. Real, not simulated."""
    calls: int = 0
    lora_loads: int = 0
    swaps: int = 0
    remote_inputs: int = 0
    """Calls whose inputs came from another worker."""
    latency_s: list[float] = field(default_factory=list)
    """Seconds from a shot's start to its end, in order of completion."""


class _Shot(NamedTuple):
    order: int
    loras: tuple[str, ...]
    started_s: float


@dataclass(slots=True)
class _Call:
    """A call and what follows it."""

    request: Request
    seconds: float
    shot: _Shot
    step: int
    """Index in the calls of the shot. -1 for a chunk."""


class Simulation:
    """A run of `shots` shots. Each has one or no LoRA out of `loras`."""

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        shots: int,
        *,
        loras: int = 4,
        seed: int = 0,
        chunks: int = CHUNKS,
    ) -> None:
        self._random = random.Random(seed)
        table = Table(NAMES, adapters_kept=4)
        self._queues = Queues(table)
        self.workers = [table.add(str(place), spec) for place, spec in enumerate(specs)]
        for worker in self.workers:
            table.enter(worker, State.LIVE)
        self._steps = calls_of(specs)
        self._shots, self._loras, self._chunk_count = shots, loras, chunks
        swaps = any(spec.swap_groups for spec in specs)
        self._window = (16 if swaps else SHOTS_PER_WORKER) * sum(bool(spec.gpus) for spec in specs)
        self._orders = count()
        self._now, self._in_progress = 0.0, 0
        self._events: list[tuple[float, int, int]] = []
        self._numbers = count()
        self._calls: list[deque[_Call]] = [deque() for _ in specs]
        """Calls of each worker. The first one runs."""
        self._waiting: dict[Request, _Call] = {}
        self._gpu_loras: list[list[str]] = [[] for _ in specs]
        self._gpu_groups: list[Sequence[str]] = [() for _ in specs]
        self._chunks_left: Counter[int] = Counter()
        self._chunks_running: dict[int, deque[Request]] = {}
        self._chunks_done: set[Request] = set()
        self.result = Result(len(specs))

    def run(self) -> Result:
        self._start_shots()
        while self._events:
            self._now, _, place = heapq.heappop(self._events)
            self._finish(place)
        self.result.makespan_s = self._now
        return self.result

    def _start_shots(self) -> None:
        while self._in_progress < self._window and (order := next(self._orders)) < self._shots:
            self._in_progress += 1
            lora = self._random.randrange(self._loras + 1)
            self._next_step(_Shot(order, (str(lora),) if lora else (), self._now), -1, None)

    def _next_step(self, shot: _Shot, done: int, by: str | None) -> None:
        step = done + 1
        if step < len(self._steps):
            stages = self._steps[step]
            adapters = shot.loras if {"flux", "lora"} & set(stages) else ()
            request = _request(shot, stages, by, adapters=adapters)
            self._add(_Call(request, sum(SECONDS[stage] for stage in stages), shot, step))
            return
        self._chunks_left[shot.order] = self._chunk_count
        self._chunks_running[shot.order] = deque()
        for _ in range(MAX_CHUNKS_AHEAD):
            self._start_chunk(shot, by)

    def _start_chunk(self, shot: _Shot, by: str | None) -> None:
        if self._chunks_left[shot.order]:
            self._chunks_left[shot.order] -= 1
            request = _request(shot, ("realesrgan",), by, load=CHUNK_LOAD)
            self._chunks_running[shot.order].append(request)
            self._add(_Call(request, SECONDS["realesrgan"] / self._chunk_count, shot, -1))

    def _add(self, call: _Call) -> None:
        self._waiting[call.request] = call
        self._queues.add(call.request)
        self._assign()

    def _assign(self) -> None:
        before = time.thread_time()
        self._queues.assign(self._send)
        self.result.scheduler_cpu_s += time.thread_time() - before

    def _send(self, worker: Process, request: Request) -> None:
        place, call = int(worker.name), request.call
        number = self.result.calls = self.result.calls + 1
        worker.calls[number] = Running(number, request, worker, call.load, call.stage)
        self._calls[place].append(self._waiting.pop(request))
        self.result.remote_inputs += call.near is not None and call.near != worker.name
        if len(self._calls[place]) == 1:
            self._start_next(place)

    def _start_next(self, place: int) -> None:
        call = self._calls[place][0]
        seconds = call.seconds * (1 + self._random.uniform(-JITTER, JITTER))
        loras = self._gpu_loras[place]
        adapters = call.request.call.adapters
        missing = set(adapters) - set(loras)
        self.result.lora_loads += len(missing)
        self._gpu_loras[place] = [*(lora for lora in loras if lora not in adapters), *adapters][-4:]
        group = next((group for group in self.workers[place].spec.swap_groups if call.request.call.stage in group), None)
        swaps = group is not None and group != self._gpu_groups[place]
        if group is not None and swaps:
            self.result.swaps += 1
            self._gpu_groups[place] = group
        seconds += LORA_LOAD_S * len(missing) + SWAP_S * swaps
        heapq.heappush(self._events, (self._now + seconds, next(self._numbers), place))

    def _finish(self, place: int) -> None:
        call, worker = self._calls[place].popleft(), self.workers[place]
        if self._calls[place]:
            self._start_next(place)
        worker.calls.pop(next(iter(worker.calls)))
        self._queues.ended(worker, call.request.call.load)
        self._assign()
        if call.step >= 0:
            self._next_step(call.shot, call.step, worker.name)
            return
        self._chunks_done.add(call.request)
        running = self._chunks_running[call.shot.order]
        while running and running[0] in self._chunks_done:
            self._chunks_done.remove(running.popleft())
            self._start_chunk(call.shot, call.request.call.near)
        if not running and not self._chunks_left[call.shot.order]:
            del self._chunks_running[call.shot.order], self._chunks_left[call.shot.order]
            self.result.latency_s.append(self._now - call.shot.started_s)
            self._in_progress -= 1
            self._start_shots()


def _request(
    shot: _Shot, stages: tuple[str, ...], near: str | None, *, load: float = 1.0, adapters: tuple[str, ...] = ()
) -> Request:
    call = Call(0, shot.order, "", stages, load=load, adapters=adapters, near=near)
    return Request(call, [call])


def calls_of(specs: Sequence[WorkerSpec]) -> list[tuple[str, ...]]:
    """Return the stages of each call before the chunks: as many per call as every worker with its first stage can run."""
    calls: list[tuple[str, ...]] = []
    for stage in list(SECONDS)[:-1]:
        fused_call = (*calls[-1], stage) if calls else ()
        if fused_call and all(spec.can_run(*fused_call) for spec in specs if fused_call[0] in spec.stages):
            calls[-1] = fused_call
        else:
            calls.append((stage,))
    return calls
