"""Workers of an engine: send each call to a suitable worker, retry it elsewhere, and quarantine workers that keep failing.

Runs in the engine's event loop. Independent of what is called.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.engine.engine_config import EngineConfig
from vidgen_ray.engine.health import Health
from vidgen_ray.engine.retries import AttemptFailed, Kind, Process, ShotFailed, run_with_retries
from vidgen_ray.engine.scheduler import Scheduler, Work, WorkerState
from vidgen_ray.engine.status import EngineObserver, Progress, StageStatus
from vidgen_ray.engine.step_groups import CallResult
from vidgen_ray.graph import STAGES, max_loras
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.layout import Layout, WorkerSpec

BUSY_WINDOW = 30
"""Snapshots (one per second) over which the utilization is averaged."""
NODE_LOST = "node"
"""Failure stage of an engine that has lost the last worker with a stage. Another layout may fit on the nodes that are left."""
LOAD_ATTEMPTS = 3
"""Attempts to load the weights, each in a new process, before a worker is given up."""
LOAD_BACK_OFF_S = 1.0
"""Seconds before the second attempt. Doubled for the third: the memory of the previous process may not be free yet."""
SETUP_ERRORS = ("MissingWeights", "ProfileError", "SetupError")
"""Errors of a first load that another attempt cannot avoid."""
MIN_SLOW_S = 10.0
SLOW_FACTOR = 5.0
"""A call that has run longer than both MIN_SLOW_S and SLOW_FACTOR times the longest recent call of its stage may hang. The work
behind it goes to other workers."""
RECENT_CALLS = 32
"""Calls per stage whose durations are kept."""
PROGRESS_POLL_S = 0.25
"""Seconds between two progress requests for a call whose caller wants to know."""

ProgressCallback = Callable[[Progress], None]


class RemoteArtefacts(NamedTuple):
    """Artefacts in Ray's object store."""

    reference: Any
    by: WorkerState | None
    """Worker that produced them. They are on its node."""


class WorkerPool:
    """Workers of one engine. Create it inside the event loop."""

    def __init__(self, config: EngineConfig, layout: Layout, observer: EngineObserver) -> None:
        self._attempts = config.attempts
        self._layout = layout
        self._observer = observer
        self._adapters_kept = max_loras(config.profile)
        self._scheduler = Scheduler((), {stage.name: n for n, stage in enumerate(STAGES)})
        self._clients: dict[WorkerState, ActorClient] = {}
        self._assigned: dict[Work, asyncio.Future[WorkerState]] = {}
        self._starting: dict[WorkerState, asyncio.Task[None]] = {}
        self._health = Health()
        self._quarantined: set[WorkerState] = set()
        self._given_up: dict[WorkerState, None] = {}
        """Workers that are not used any more, in order."""
        self._fatal_failure: Failure | None = None
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT_CALLS))
        """First stage of a call -> durations of the last calls."""
        self._watched: dict[WorkerState, tuple[Work, asyncio.TimerHandle]] = {}
        """Running call of each worker, and the timer that checks whether it takes too long."""
        self._recalled: dict[Work, asyncio.Future[None]] = {}
        """Assigned work -> set when it must go to another worker."""
        self._changed = asyncio.Event()
        """Set, and replaced, when a worker has started, is quarantined or is given up."""
        self.first_call = time.time_ns()
        """Higher than the calls of earlier engines with the same workers."""
        self._calls = count(self.first_call)
        self._running: deque[Counter[str]] = deque(maxlen=BUSY_WINDOW)
        self._gpu_utilization: deque[float] = deque(maxlen=BUSY_WINDOW)

    # Workers

    def add(self, spec: WorkerSpec, client: ActorClient) -> None:
        """Add a worker. It gets calls once it has loaded its weights."""
        worker = WorkerState(spec, self._adapters_kept)
        self._clients[worker] = client
        self._scheduler.add_worker(worker)
        self._start(worker)
        lost = self._fatal_failure is not None and self._fatal_failure.stage == NODE_LOST
        if lost and all(map(self._holders, self._layout.stages)):
            # Another node has come.
            self._fatal_failure = None

    def remove(self, name: str) -> None:
        """Remove a worker that is gone for good."""
        for worker in [worker for worker, client in self._clients.items() if client.name == name]:
            message = f"{name}: its node is lost, and no other node has room"
            self._give_up(worker, Failure(stage=NODE_LOST, error="NodeLost", message=message, attempts=1, worker=name))

    def close(self) -> None:
        """Cancel the background tasks."""
        for task in self._starting.values():
            task.cancel()
        for _, timer in self._watched.values():
            timer.cancel()

    @property
    def fatal_failure(self) -> Failure | None:
        """Failure after which no shot can be rendered. `None` if there is none."""
        return self._fatal_failure

    @property
    def count(self) -> int:
        """Number of workers that are not given up."""
        return len(self._clients) - len(self._given_up)

    @property
    def missing_stages(self) -> list[str]:
        """Stages of the layout without a worker that has loaded its weights."""
        return [stage for stage in self._layout.stages if not any(worker.live for worker in self._scheduler.holders(stage))]

    @property
    def quarantined(self) -> list[str]:
        """Workers in quarantine or given up, with their nodes."""
        return [self._clients[worker].location for worker in (*self._quarantined, *self._given_up)]

    def can_fuse(self, first: str, *others: str) -> bool:
        """Return whether every worker with the first stage, started or not, can run all these stages in one call."""
        return self._layout.can_fuse(first, *others)

    # Calls

    async def call(
        self,
        requested: Work,
        timeout_s: float,
        method: str,
        plan: ShotPlan,
        *args: Any,
        on_progress: ProgressCallback | None = None,
    ) -> tuple[CallResult, RemoteArtefacts]:
        """Run a call on a worker. Return its result and a reference to its output.

        Failures are retried on other workers and nodes; see `run_with_retries`. If the caller is cancelled, the worker stops at
        its next step. Raises ShotFailed and InputsLost.
        """

        async def attempt(avoid: frozenset[WorkerState], alone: bool) -> tuple[CallResult, RemoteArtefacts]:
            # Each attempt needs its own Work object.
            work = replace(requested, alone=alone, avoid=avoid)
            while self._must_wait(work):
                await self._changed.wait()
            worker = await self._worker_for(work)
            return await self._attempt(worker, work, timeout_s, method, plan, *args, on_progress=on_progress)

        def report(failed: AttemptFailed, own_failure: bool) -> None:
            worker = failed.process.key
            if not own_failure:
                self._health.forgive(worker, requested.order)
            elif self._health.failed(worker, requested.order):
                stage = requested.stage
                self._quarantine(worker, f"failed for {stage} on different shots in a row, the last time with: {failed}")

        def candidates() -> Sequence[Process[WorkerState]]:
            holders = self._scheduler.holders(requested.stage)
            return [Process(worker, worker.node) for worker in holders if worker.live or self._is_starting(worker)]

        return await run_with_retries(attempt, candidates, report, limit=self._attempts, observer=self._observer)

    async def _attempt(
        self,
        worker: WorkerState,
        work: Work,
        timeout_s: float,
        method: str,
        plan: ShotPlan,
        *args: Any,
        on_progress: ProgressCallback | None,
    ) -> tuple[CallResult, RemoteArtefacts]:
        client, number = self._clients[worker], next(self._calls)
        running = asyncio.ensure_future(
            client.call(method, number, plan, *args, stage=work.stage, timeout_s=timeout_s, num_returns=2)
        )
        recalled = self._recalled[work] = asyncio.get_running_loop().create_future()
        busy = True
        try:
            if on_progress is not None:
                await self._follow(running, recalled, client, number, on_progress)
            await asyncio.wait([running, recalled], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                client.send("cancel", number)
                running.add_done_callback(_ignore_error)
                failure = Failure(stage=work.stage, error="Recalled", message="not run", attempts=1, worker=client.location)
                raise AttemptFailed(Kind.NOT_RUN, failure, Process(worker, worker.node))
            result, output = running.result()
            if result.failure is not None:
                process = Process(worker, worker.node)
                if result.context_broken:
                    client.restart()
                if result.context_broken or result.load_failed:
                    self._mark_down(worker)
                # A load that failed before this call is not a failure of the shot.
                kind = Kind.NOT_RUN if result.load_failed else result.kind
                raise AttemptFailed(kind, result.failure, process)
        except asyncio.CancelledError:
            client.send("cancel", number)
            # The worker is busy until the call has stopped.
            running.add_done_callback(lambda _: self._finished(worker, work))
            running.add_done_callback(_ignore_error)
            busy = False
            raise
        except ActorCallFailed as lost:
            self._mark_down(worker)
            raise AttemptFailed(lost.kind, lost.failure(work.stage), Process(worker, worker.node), lost.loss) from None
        finally:
            del self._recalled[work]
            if busy:
                self._finished(worker, work)
        self._seconds[work.stage].append(sum(record.seconds for record in result.records))
        self._health.succeeded(worker)
        self._scheduler.set_probation(worker, False)
        return result, RemoteArtefacts(output, worker)

    async def _follow(
        self,
        running: asyncio.Future[Any],
        recalled: asyncio.Future[None],
        client: ActorClient,
        number: int,
        on_progress: ProgressCallback,
    ) -> None:
        """Report the progress of a call until it ends or is recalled."""
        last: Progress | None = None
        while True:
            done, _ = await asyncio.wait([running, recalled], timeout=PROGRESS_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            # The call itself fails if the worker is lost.
            with suppress(ray.exceptions.RayError):
                progress: Progress | None = await client.send("progress", number)
                if progress is not None and progress != last:
                    last = progress
                    on_progress(progress)

    def _finished(self, worker: WorkerState, work: Work) -> None:
        self._scheduler.finished(worker, work)
        self._watch(worker)
        self._assign_waiting()

    def _watch(self, worker: WorkerState) -> None:
        """Check later whether the running call of the worker takes too long."""
        running = next(iter(worker.assigned), None)
        if worker in self._watched:
            watched, timer = self._watched[worker]
            if watched is running:
                return
            timer.cancel()
            del self._watched[worker]
        if running is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(MIN_SLOW_S, self._recall_if_slow, worker, running, loop.time())
            self._watched[worker] = running, timer

    def _recall_if_slow(self, worker: WorkerState, running: Work, started: float) -> None:
        """Send the work behind a call that may hang to other workers."""
        if next(iter(worker.assigned), None) is not running:
            return
        loop = asyncio.get_running_loop()
        usual_s = max(self._seconds[running.stage], default=math.inf)
        left_s = max(MIN_SLOW_S, SLOW_FACTOR * usual_s) - (loop.time() - started)
        if left_s > 0:
            timer = loop.call_later(min(left_s, MIN_SLOW_S), self._recall_if_slow, worker, running, started)
            self._watched[worker] = running, timer
            return
        # No more work is prefetched until a call succeeds.
        self._scheduler.set_probation(worker, True)
        for work in self._scheduler.recall(worker):
            # It is added again as another attempt.
            self._scheduler.remove(work)
            recalled = self._recalled.get(work)
            if recalled is not None and not recalled.done():
                recalled.set_result(None)
        self._assign_waiting()

    def _is_starting(self, worker: WorkerState) -> bool:
        """Return whether the worker starts, and not because it was quarantined."""
        return worker in self._starting and worker not in self._quarantined

    def _must_wait(self, work: Work) -> bool:
        """Return whether all live workers have failed for the work, but another one starts."""
        if not work.avoid or self._fatal_failure is not None:
            return False
        others = [worker for worker in self._scheduler.holders(work.stage) if worker not in work.avoid]
        return not any(worker.live for worker in others) and any(map(self._is_starting, others))

    def _notify(self) -> None:
        """Wake the calls that wait for a change of a worker's state."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _worker_for(self, work: Work) -> WorkerState:
        if self._fatal_failure is not None:
            raise ShotFailed(self._fatal_failure)
        future: asyncio.Future[WorkerState] = asyncio.get_running_loop().create_future()
        self._assigned[work] = future
        self._scheduler.add(work)
        self._assign_waiting()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._finished(future.result(), work)
            self._scheduler.remove(work)
            raise
        finally:
            self._assigned.pop(work, None)

    def _assign_waiting(self) -> None:
        for worker, work in self._scheduler.assign():
            future = self._assigned.get(work)
            if future is None or future.done():
                self._scheduler.finished(worker, work)
            else:
                future.set_result(worker)
                self._watch(worker)

    # Crashes, restarts and quarantine

    def _mark_down(self, worker: WorkerState) -> None:
        """Mark a worker as down until a process has loaded its weights. Waiting work goes to other workers."""
        if worker.live and worker not in self._given_up:
            self._scheduler.crashed(worker)
            self._start(worker)

    def _quarantine(self, worker: WorkerState, reason: str) -> None:
        """Restart a worker after a back-off, or give it up. If several workers of its node are sick, the rest follows."""
        if worker in self._quarantined or worker in self._given_up:
            return
        client = self._clients[worker]
        self._quarantined.add(worker)
        delay_s = self._health.quarantine(worker)
        self._observer.quarantined(client.location, reason)
        self._notify()
        if self._health.is_hopeless(worker):
            self._give_up(worker, client.hopeless(reason))
            return
        starting = self._starting.pop(worker, None)
        if starting is not None:
            starting.cancel()
        if worker.live:
            self._scheduler.crashed(worker)
        client.restart()
        self._start(worker, delay_s)
        if (node := self._health.sick_node(worker)) is not None:
            for other in [other for other in self._clients if other.node == node and other is not worker]:
                self._quarantine(other, "several workers of its node are quarantined")

    def _start(self, worker: WorkerState, delay_s: float = 0.0) -> None:
        if worker not in self._starting:
            self._starting[worker] = asyncio.ensure_future(self._wait_until_ready(worker, delay_s))

    async def _wait_until_ready(self, worker: WorkerState, delay_s: float) -> None:
        client = self._clients[worker]
        await asyncio.sleep(delay_s)
        is_first = client.place is None
        for number in count(1):
            failure = await client.ready()
            if failure is None:
                self._starting.pop(worker, None)
                self._quarantined.discard(worker)
                assert client.place is not None
                self._health.started(worker, client.place.node)
                worker.node = client.place.node
                self._scheduler.set_probation(worker, self._health.is_on_probation(worker))
                self._scheduler.started(worker)
                self._assign_waiting()
                self._notify()
                return
            if (is_first and failure.error in SETUP_ERRORS) or number == LOAD_ATTEMPTS:
                self._starting.pop(worker, None)
                self._give_up(worker, failure)
                return
            self._observer.quarantined(client.location, f"cannot load its weights: {failure.message}")
            client.restart()
            await asyncio.sleep(LOAD_BACK_OFF_S * 2 ** (number - 1))

    def _give_up(self, worker: WorkerState, failure: Failure) -> None:
        """Stop to use a worker. Fails all shots if it was the last one with a stage."""
        if worker.live:
            self._scheduler.crashed(worker)
        self._scheduler.remove_worker(worker)
        self._quarantined.discard(worker)
        self._given_up[worker] = None
        if any(not self._holders(stage) for stage in worker.spec.stages):
            self._fatal_failure = failure
            for future in self._assigned.values():
                if not future.done():
                    future.set_exception(ShotFailed(failure))
        self._notify()

    def _holders(self, stage: str) -> list[WorkerState]:
        return [worker for worker in self._clients if stage in worker.spec.stages and worker not in self._given_up]

    # Status

    def sample_status(self) -> tuple[dict[str, StageStatus], float | None]:
        """Return the status of each stage and the GPU utilization. Both are averages over calls at regular intervals."""
        running = {worker: client.running for worker, client in self._clients.items()}
        self._running.append(Counter(stage for stage in running.values() if stage))
        with_gpu = [worker for worker in self._clients if worker.spec.gpus]
        if with_gpu:
            busy = sum(worker.spec.gpus for worker in with_gpu if running[worker])
            self._gpu_utilization.append(busy / sum(worker.spec.gpus for worker in with_gpu))
        stages = dict.fromkeys(stage for worker in self._clients for stage in worker.spec.stages)
        gpus_busy = sum(self._gpu_utilization) / len(self._gpu_utilization) if self._gpu_utilization else None
        return {stage: self._status(stage) for stage in stages}, gpus_busy

    def _status(self, stage: str) -> StageStatus:
        workers = sum(worker.live and stage in worker.spec.stages for worker in self._clients)
        running = [sample[stage] for sample in self._running]
        busy = sum(running) / len(running) / workers if workers else 0.0
        return StageStatus(self._scheduler.queued(stage), running[-1], workers, min(1.0, busy))


def _ignore_error(call: asyncio.Future[Any]) -> None:
    """Retrieve the error of a cancelled call, so that asyncio does not log it."""
    with suppress(asyncio.CancelledError):
        call.exception()
