"""Workers and encoders of an engine: send each call to a suitable one, and retry it elsewhere.

An encoder is a worker whose only stage is OUTPUT. Runs in the engine's event loop. Independent of what is called.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from typing import Any, NamedTuple

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.engine.calls import OUTPUT, CallResult, Durations, call_timeout_s, is_encoder
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.retries import (
    AttemptFailed,
    Candidate,
    InputsLost,
    Kind,
    ShotFailed,
    Verdict,
    drop_frames,
    run_with_retries,
)
from vidgen_ray.engine.scheduler import Scheduler, Work, WorkerState
from vidgen_ray.engine.status import Attempt, EngineObserver, Progress
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.engine.supervisor import RELEASED, Supervisor
from vidgen_ray.engine.worker_checks import CANARY, MAX_DIFFERENCE, Canary, MadeCall, Repeated, SlowCalls
from vidgen_ray.graph import STAGE_BY_NAME, STAGES, durations, max_loras
from vidgen_ray.outputs.records import Failure
from vidgen_ray.outputs.run_log import StageStatus
from vidgen_ray.planner.layout import Layout, WorkerSpec

BUSY_WINDOW = 30
"""Snapshots (one per second) over which the utilization is averaged."""
NODE_LOST = "node"
"""Failure stage of an engine that has lost the last worker with a stage. Another layout may fit on the nodes that are left."""
EVIDENCE_S = 600.0
"""Seconds after which a shot that has failed on several workers does not wait any longer for what shows that they are well."""
BETWEEN_CALLS_S = 0.1
"""Seconds in which a shot queues its next call, or another shot begins."""
WHOLE_SHOT = ("run", "run_clip")
"""Methods of a worker that take the names of steps first, and their input last, and return their output second."""
PROGRESS_POLL_S = 0.25
"""Seconds between two progress requests for a call whose caller wants to know."""

ProgressCallback = Callable[[Progress], None]
Session = Callable[[ActorClient, int], Awaitable[tuple[Any, ...]]]
"""One or several calls of a worker, under one number. Returns a CallResult and what belongs to it."""


Returned = tuple[tuple[Any, ...], WorkerState]
"""Result of a session, and its worker."""


@dataclass(eq=False, slots=True)
class _Running:
    """A session on its worker."""

    worker: WorkerState
    session: Session
    expected_s: Callable[[], float]
    """Returns its expected seconds, as far as they are known."""
    ended: asyncio.Future[None]
    """Set when the session or its copy has ended, or when it must go to another worker."""
    copies: list[asyncio.Task[Returned]] | None
    """The next attempt, if it was started early because this one is slow. `None` if it must not be."""


class RemoteArtefacts(NamedTuple):
    """Artefacts in Ray's object store."""

    reference: Any
    by: WorkerState | None
    """Worker that produced them. They are on its node."""
    clip: Any = None
    """Reference to what chunked stages have made of the whole clip, if they ran in the same call. Otherwise `None`."""


class WorkerPool:
    """Workers of one engine. Create it inside the event loop."""

    def __init__(self, config: EngineConfig, layout: Layout, observer: EngineObserver, storage: StoragePause) -> None:
        self._attempts = config.attempts
        self._timeout_s = config.timeout_s
        self._circuit_breaker = config.circuit_breaker
        self._layout = layout
        self._observer = observer
        self._storage = storage
        self._adapters_kept = max_loras(config.profile)
        self._places = layout.server_places
        """Stage that servers compute -> calls that a worker runs at once."""
        self._scheduler = Scheduler({name: n for n, name in enumerate((*(stage.name for stage in STAGES), OUTPUT))})
        self._supervisor = Supervisor(
            observer,
            may_give_up=self._may_give_up,
            on_up=self._worker_up,
            on_down=self._worker_down,
            on_given_up=self._worker_given_up,
        )
        # Every shot asks, and the layout looks at all its workers.
        self.can_fuse = cache(layout.can_fuse)
        self.only_together = cache(layout.only_together)
        self._clients: dict[WorkerState, ActorClient] = {}
        self._workers: dict[ActorClient, WorkerState] = {}
        self._gone: list[WorkerState] = []
        """Removed workers with calls."""
        self._assigned: dict[Work, asyncio.Future[WorkerState]] = {}
        self._paused: set[Work] = set()
        """Commits that wait until the output folder can be written again."""
        self._fatal_failure: Failure | None = None
        self._durations = Durations()
        self._slow_calls = SlowCalls(self._expected_s, self._copy, self._recall)
        self._canary = Canary(self._scheduler.holders, self._repeat, self._found_sick)
        self._sessions: dict[Work, _Running] = {}
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
        self._clients[worker], self._workers[client] = client, worker
        self._scheduler.add_worker(worker)
        self._supervisor.add(client, is_remote=bool(spec.server))
        lost = self._fatal_failure is not None and self._fatal_failure.stage == NODE_LOST
        if lost and all(map(self._scheduler.holders, (*self._layout.stages, OUTPUT))):
            # Another node has come.
            self._fatal_failure = None

    def remove(self, name: str, error: str = "NodeLost") -> None:
        """Remove a worker that is gone for good, or, with the error RELEASED, will be stopped after its calls."""
        message = f"{name}: {'not needed any more' if error == RELEASED else 'its node is lost, and no other node has room'}"
        failure = Failure(stage=NODE_LOST, error=error, message=message, attempts=1, worker=name)
        self._supervisor.remove(name, failure)
        self._gone += [worker for worker, client in self._clients.items() if client.name == name and worker not in self._gone]
        self._forget_gone_soon()

    def _forget_gone_soon(self) -> None:
        if self._gone:
            # Calls that have just been assigned start first, and those that have just ended are reported.
            asyncio.get_running_loop().call_soon(self._forget_gone)

    def _forget_gone(self) -> None:
        """Drop what is known of removed workers whose calls have ended."""
        busy = {running.worker for running in self._sessions.values()}
        for worker in [worker for worker in self._gone if worker not in busy]:
            self._gone.remove(worker)
            client = self._clients.pop(worker)
            del self._workers[client]
            self._supervisor.forget(client)
            self._canary.forget(worker)

    async def until_unused(self, names: Collection[str]) -> None:
        """Wait until these workers, which were removed, have no calls."""
        # Calls that have just been assigned start first.
        await asyncio.sleep(0)
        while any(self._clients[running.worker].name in names for running in self._sessions.values()):
            await self._changed.wait()

    def lose_layout(self, reason: str) -> None:
        """Fail all shots, so that another layout is planned: the workers of this one do not start."""
        self._fail_all(Failure(stage=NODE_LOST, error="NodeLost", message=reason, attempts=1, worker="cluster"))
        self._notify()

    def close(self) -> None:
        """Cancel the background tasks."""
        self._supervisor.close()
        self._slow_calls.close()
        self._canary.close()

    @property
    def fatal_failure(self) -> Failure | None:
        """Failure after which no shot can be rendered. `None` if there is none."""
        return self._fatal_failure

    @property
    def count(self) -> int:
        """Number of workers that are not given up, without encoders."""
        given_up = self._supervisor.given_up
        return sum(not is_encoder(worker.spec) and client not in given_up for client, worker in self._workers.items())

    @property
    def missing_stages(self) -> list[str]:
        """Stages of the layout without a worker that has loaded its weights."""
        return [stage for stage in self._layout.stages if not any(worker.live for worker in self._scheduler.holders(stage))]

    @property
    def quarantined(self) -> list[str]:
        """Workers in quarantine or given up, with their nodes."""
        return self._supervisor.quarantined

    # Calls

    def load_of(self, stage: str) -> float:
        """Return the load that a call of this stage adds to a worker; see `Work.load`."""
        return 1 / self._places.get(stage, 1)

    async def call(
        self,
        requested: Work,
        timeout_s: float,
        method: str,
        plan: ShotPlan,
        stages: Collection[str],
        *args: Any,
        share: float = 1.0,
        num_returns: int = 2,
        on_progress: ProgressCallback | None = None,
    ) -> tuple[CallResult, RemoteArtefacts]:
        """Run a call of these stages on a worker. Return its result and references to its output.

        `share`: of the clip that it works on. `num_returns`: result and output together.

        Otherwise as `run`.
        """
        costs = durations(plan.shot, stages)
        expected_s = partial(self._durations.expected_s, costs, share)

        async def call(client: ActorClient, number: int) -> tuple[Any, ...]:
            result, *output = await client.call(
                method,
                number,
                plan,
                *args,
                stage=requested.stage,
                # How long a job waits at its server is not known.
                timeout_s=timeout_s if requested.stage in self._places else call_timeout_s(timeout_s, expected_s()),
                num_returns=num_returns,
            )
            keys = [step.key for step in plan.steps if step.stage in stages]
            # Also the result of a cancelled call: this one was not cancelled, or its result is not read.
            if result.failure is None and [record.key for record in result.records] != keys:
                message = "the worker returned the result of another shot"
                failure = Failure(
                    stage=requested.stage, error="WrongResult", message=message, attempts=1, worker=client.location
                )
                result = CallResult(failure=failure)
            self._durations.add(costs, result.records, share)
            return result, *output

        (result, artefacts, *clip), worker = await self.run(requested, call, on_progress, expected_s)
        if method in WHOLE_SHOT and _can_repeat(worker, result):
            self._canary.finished(MadeCall(requested, plan, args[0], args[-1], artefacts, worker, result.device))
        return result, RemoteArtefacts(artefacts, worker, *clip)

    async def run(
        self,
        requested: Work,
        session: Session,
        on_progress: ProgressCallback | None = None,
        expected_s: Callable[[], float] = lambda: math.inf,
    ) -> Returned:
        """Run a session on a worker. Return what it returned, and the worker.

        Failures are retried on other workers and nodes; see `run_with_retries`. If the caller is cancelled, the worker stops at
        its next step, or is restarted; see `ActorClient.cancel`. Raises ShotFailed and InputsLost.
        """

        copies: list[asyncio.Task[Returned]] = []
        attempts, begun, sent = 0, 0.0, 0.0

        async def attempt(avoid: frozenset[WorkerState], alone: bool) -> Returned:
            nonlocal attempts, begun, sent
            attempts += 1
            begun = sent = time.monotonic()
            try:
                returned, worker = await run(avoid, alone)
            except AttemptFailed as failed:
                self._report(requested, attempts, begun, sent, failed.process.key, failed)
                raise
            self._report(requested, attempts, begun, sent, worker, returned[0])
            return returned, worker

        async def run(avoid: frozenset[WorkerState], alone: bool) -> Returned:
            if copies:
                return await copies.pop()
            # Each attempt needs its own Work object.
            work = replace(requested, alone=alone, avoid=avoid)
            while self._must_wait(work):
                await self._changed.wait()
            if work.stage == OUTPUT:
                self._paused.add(work)
                try:
                    await self._storage.over()
                finally:
                    self._paused.discard(work)
            worker = await self._worker_for(work)
            nonlocal sent
            sent = time.monotonic()
            return await self._attempt(worker, work, session, expected_s, on_progress, None if alone else copies)

        def blame(failed: AttemptFailed) -> None:
            if (client := self._clients.get(failed.process.key)) is None:
                return
            in_a_row = f"failed for {requested.stage} on different shots in a row, the last time with: {failed}"
            reason = str(failed) if failed.kind is Kind.NODE else in_a_row
            self._supervisor.failed(client, requested.order, failed, reason)

        def candidates() -> Sequence[Candidate[WorkerState]]:
            holders = self._scheduler.holders(requested.stage)
            return [_process(worker) for worker in holders if worker.live or self._is_starting(worker)]

        try:
            return await run_with_retries(
                attempt,
                candidates,
                blame,
                partial(self._evidence, requested.order, requested.stage),
                self._storage.is_cause,
                limit=self._attempts,
                observer=self._observer,
            )
        finally:
            for copy in copies:
                copy.cancel()

    def _report(
        self, work: Work, number: int, begun: float, sent: float, worker: WorkerState, outcome: CallResult | AttemptFailed
    ) -> None:
        """Report an attempt, with each of its steps if it has succeeded. It waited from `begun` to `sent` for its worker."""
        if (client := self._clients.get(worker)) is None:
            return
        seconds, waited = time.monotonic() - sent, sent - begun
        started_at = time.time() - seconds
        if outcome.started_at is not None:
            # It may have been prefetched.
            waited += max(0.0, outcome.started_at - started_at)
            started_at, seconds = outcome.started_at, outcome.seconds
        ended: list[tuple[str, str, float, str | None, str | None]]
        if isinstance(outcome, AttemptFailed):
            ended = [(outcome.failure.stage, outcome.kind.value, seconds, outcome.failure.error, str(outcome))]
        elif work.stage == OUTPUT:
            ended = [(OUTPUT, "done", seconds, None, None)]
        else:
            ended = [(step.stage, "cached" if step.cached else "done", step.seconds, None, None) for step in outcome.records]
        host = client.place.host if client.place else None
        for stage, how, step_s, error, message in ended:
            times = started_at, round(step_s, 3), round(waited, 3)
            self._observer.attempt_ended(Attempt(work.shot, stage, number, how, *times, client.name, host, error, message))
            started_at, waited = started_at + step_s, 0.0

    async def _evidence(self, order: int, stage: str, failed: Sequence[AttemptFailed]) -> None:
        """Wait until it is known which processes of failed attempts of a shot are sick.

        Calls of other shots show it, and the restart of a process, which may have been lost with its node.
        """

        def is_open() -> bool:
            # The session of an encoder may wait for a chunk that waits for evidence, too.
            others = (work for work in (*self._paused, *self._assigned, *self._sessions) if work.order != order)
            is_shown = any(work.stage == stage or work.stage != OUTPUT for work in others)
            unknown = [each.process.key for each in failed if each.kind is Kind.ERROR and each.verdict is Verdict.OPEN]
            return bool(unknown) and (is_shown or any(map(self._is_starting, unknown)))

        await self._storage.over()
        with suppress(TimeoutError):
            async with asyncio.timeout(EVIDENCE_S):
                while True:
                    while is_open():
                        await self._changed.wait()
                    await asyncio.sleep(BETWEEN_CALLS_S)
                    if not is_open():
                        return

    async def _attempt(
        self,
        worker: WorkerState,
        work: Work,
        session: Session,
        expected_s: Callable[[], float],
        on_progress: ProgressCallback | None,
        copies: list[asyncio.Task[Returned]] | None,
    ) -> Returned:
        client, number = self._clients[worker], next(self._calls)
        running = asyncio.ensure_future(session(client, number))
        this = self._sessions[work] = _Running(worker, session, expected_s, asyncio.get_running_loop().create_future(), copies)
        running.add_done_callback(lambda _: _set(this.ended))
        busy = True
        try:
            if on_progress is not None:
                await self._follow(this.ended, client, number, on_progress)
            await this.ended
            if not running.done():
                client.send("cancel", number)
                if copies and copies[0].done():
                    running.add_done_callback(partial(self._abandoned, worker, work))
                    busy = False
                    return copies[0].result()
                running.add_done_callback(_ignore_error)
                failure = Failure(stage=work.stage, error="Recalled", message="not run", attempts=1, worker=client.location)
                raise AttemptFailed(Kind.NOT_RUN, failure, _process(worker))
            returned = running.result()
            result: CallResult = returned[0]
            if result.failure is not None:
                if result.kind is Kind.FOREIGN:
                    raise InputsLost(result.failure.message)
                process = _process(worker)
                if result.context_broken:
                    client.restart()
                if result.context_broken or result.load_failed:
                    self._supervisor.crashed(client)
                # A load that failed before this call is not a failure of the shot.
                kind = Kind.NOT_RUN if result.load_failed else result.kind
                raise AttemptFailed(kind, result.failure, process, result.started_at, result.seconds)
            self._supervisor.succeeded(client, work.order)
            self._scheduler.set_probation(worker, False)
            if work.stage == OUTPUT:
                self._storage.written()
            return returned, worker
        except asyncio.CancelledError:
            client.cancel(number)
            if is_encoder(worker.spec):
                # Between the calls of its session, an encoder is free.
                running.cancel()
            running.add_done_callback(partial(self._abandoned, worker, work))
            busy = False
            raise
        except ActorCallFailed as lost:
            if lost.kind is not Kind.NODE:
                self._supervisor.crashed(client)
            # Its traceback has this frame, and this frame has the task that keeps it.
            drop_frames(lost)
            raise AttemptFailed(lost.kind, lost.failure(work.stage), _process(worker)) from None
        finally:
            del self._sessions[work]
            if busy:
                self._finished(worker, work)

    def _abandoned(self, worker: WorkerState, work: Work, running: asyncio.Future[Any]) -> None:
        """A session has stopped whose result is not needed. Until then, its worker was busy."""
        if worker in self._clients and not running.cancelled() and isinstance(running.exception(), ActorCallFailed):
            self._supervisor.crashed(self._clients[worker])
        self._finished(worker, work)

    async def _follow(
        self, ended: asyncio.Future[None], client: ActorClient, number: int, on_progress: ProgressCallback
    ) -> None:
        """Report the progress of a call until it ends or is recalled."""
        last: Progress | None = None
        while True:
            done, _ = await asyncio.wait([ended], timeout=PROGRESS_POLL_S)
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
        self._slow_calls.watch(worker)
        self._assign_waiting()
        self._notify()
        self._forget_gone_soon()

    # Slow calls

    def _expected_s(self, work: Work) -> float:
        """Return the expected seconds of a running call, as far as they are known."""
        session = self._sessions.get(work)
        return session.expected_s() if session is not None else math.inf

    def _recall(self, worker: WorkerState) -> None:
        """Give the work behind a slow call to other workers. No more is prefetched until a call succeeds."""
        self._scheduler.set_probation(worker, True)
        for work in self._scheduler.recall(worker):
            # It is added again as another attempt.
            self._scheduler.remove(work)
            if work in self._sessions:
                _set(self._sessions[work].ended)
        self._assign_waiting()

    def _copy(self, work: Work) -> None:
        """Repeat a running call on an idle worker. The first result counts."""
        running = self._sessions.get(work)
        holders = frozenset(self._scheduler.holders(work.stage))
        idle = {each for each in holders - work.avoid if each.live and not each.load and not each.probation}
        if running is None or running.copies is None or running.copies or not idle:
            return

        async def copy() -> Returned:
            again = replace(work, avoid=holders - idle)
            return await self._attempt(await self._worker_for(again), again, running.session, running.expected_s, None, None)

        def ended(copy: asyncio.Task[Returned]) -> None:
            _ignore_error(copy)
            if not copy.cancelled() and copy.exception() is None:
                _set(running.ended)

        running.copies.append(asyncio.ensure_future(copy()))
        running.copies[0].add_done_callback(ended)

    # Canary checks

    async def _repeat(self, worker: WorkerState, call: MadeCall, others: Sequence[Any]) -> Repeated | None:
        """Repeat a call on this worker, and compare the output with others. `None` if that fails."""
        stages = call.steps
        expected_s = partial(self._durations.expected_s, durations(call.plan.shot, stages))

        async def session(client: ActorClient, number: int) -> tuple[Any, ...]:
            args = call.plan, stages, call.inputs, *others
            timeout_s = call_timeout_s(self._timeout_s(call.plan.shot, *stages), expected_s())
            returned: tuple[Any, ...] = await client.call(
                "compare", number, *args, stage=stages[0], timeout_s=timeout_s, num_returns=2
            )
            return returned

        work = replace(call.work, near=None, avoid=frozenset(self._scheduler.holders(call.work.stage)) - {worker})
        begun = time.monotonic()
        try:
            chosen = await self._worker_for(work)
            if chosen is not worker:
                self._finished(chosen, work)
                return None
            sent = time.monotonic()
            (result, output), _ = await self._attempt(worker, work, session, expected_s, None, None)
        except (AttemptFailed, InputsLost, ShotFailed):
            return None
        if not _can_repeat(worker, result):
            return None
        same = max(result.differences) <= MAX_DIFFERENCE
        times = result.started_at or time.time(), round(time.monotonic() - sent, 3), round(sent - begun, 3)
        client = self._clients[worker]
        host = client.place.host if client.place else None
        self._observer.attempt_ended(
            Attempt(work.shot, CANARY, len(others), "done" if same else "differs", *times, client.name, host)
        )
        return Repeated(result.differences, output)

    def _found_sick(self, worker: WorkerState, call: MadeCall, again: bool) -> None:
        reason = (
            f"makes other images than two workers with the same GPUs from shot {call.work.shot}; "
            "its images since its last check may be wrong"
        )
        self._supervisor.found_sick(self._clients[worker], reason, again)

    def _is_starting(self, worker: WorkerState) -> bool:
        return worker in self._clients and self._supervisor.is_starting(self._clients[worker])

    def _may_give_up(self, client: ActorClient) -> bool:
        """Return whether others can do the work of this worker, or no circuit breaker stops the run if it is sick."""
        worker = self._workers[client]
        others = all(any(each.live and each is not worker for each in self._scheduler.holders(s)) for s in worker.spec.stages)
        return others or not self._circuit_breaker

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
            self._notify()
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
                self._slow_calls.watch(worker)

    # Events of the supervisor

    def _worker_up(self, client: ActorClient) -> None:
        worker = self._workers[client]
        worker.node = client.node
        self._scheduler.set_probation(worker, self._supervisor.is_on_probation(client))
        self._scheduler.started(worker)
        self._canary.started(worker)
        self._assign_waiting()
        self._notify()

    def _worker_down(self, client: ActorClient) -> None:
        """Give waiting work to other workers until a process has loaded its weights."""
        if self._workers[client].live:
            self._scheduler.crashed(self._workers[client])
        self._notify()

    def _worker_given_up(self, client: ActorClient, failure: Failure) -> None:
        """Stop to use a worker. Fails all shots if it was the last one with a stage."""
        worker = self._workers[client]
        self._scheduler.remove_worker(worker)
        if any(not self._scheduler.holders(stage) for stage in worker.spec.stages):
            self._fail_all(failure)
        self._notify()

    def _fail_all(self, failure: Failure) -> None:
        self._fatal_failure = failure
        for future in self._assigned.values():
            if not future.done():
                future.set_exception(ShotFailed(failure))

    # Status

    def sample_status(self) -> tuple[dict[str, StageStatus], float | None]:
        """Return the status of each stage and the GPU utilization. Both are averages over calls at regular intervals."""
        given_up = self._supervisor.given_up
        running = {worker: client.running for worker, client in self._clients.items() if client not in given_up}
        self._running.append(Counter(stage for stage in running.values() if stage))
        with_gpu = [worker for worker in running if worker.spec.gpus]
        if with_gpu:
            busy = sum(worker.spec.gpus for worker in with_gpu if running[worker])
            self._gpu_utilization.append(busy / sum(worker.spec.gpus for worker in with_gpu))
        stages = dict.fromkeys(stage for worker in self._clients for stage in worker.spec.stages)
        gpus_busy = sum(self._gpu_utilization) / len(self._gpu_utilization) if self._gpu_utilization else None
        return {stage: self._status(stage) for stage in stages}, gpus_busy

    def _status(self, stage: str) -> StageStatus:
        workers = sum(worker.live for worker in self._scheduler.holders(stage))
        running = [sample[stage] for sample in self._running]
        busy = sum(running) / len(running) / workers if workers else 0.0
        return StageStatus(self._scheduler.queued(stage), running[-1], workers, min(1.0, busy))


def _can_repeat(worker: WorkerState, result: CallResult) -> bool:
    """Return whether another worker must make the same images: computed, with the settings of the profile."""
    makes_pixels = any({"image", "frames"} & set(STAGE_BY_NAME[record.stage].writes) for record in result.records)
    computed = not any(record.cached or record.recovered for record in result.records)
    return makes_pixels and computed and not worker.spec.server


def _set(event: asyncio.Future[None]) -> None:
    if not event.done():
        event.set_result(None)


def _ignore_error(call: asyncio.Future[Any]) -> None:
    """Retrieve the error of a cancelled call, so that asyncio does not log it."""
    with suppress(asyncio.CancelledError):
        call.exception()


def _process(worker: WorkerState) -> Candidate[WorkerState]:
    return Candidate(worker, worker.node, worker.spec.gpu_gb)
