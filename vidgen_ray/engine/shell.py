"""Shell of an engine's core: carries out its commands with Ray, and reports what happens. Runs in the engine's event loop.

Decides nothing: which process gets a call, what a failure means and when a process is replaced is decided in `core.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, get_args

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine import messages as m
from vidgen_ray.engine.actor_start import SILENT_S, Ping, load_weights, ping, place_when_up, start_failure
from vidgen_ray.engine.callbacks import GuardedObserver
from vidgen_ray.engine.calls import CallResult, ShotFailed
from vidgen_ray.engine.canary import CANARY
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.core import Core
from vidgen_ray.engine.invariants import check_invariants
from vidgen_ray.engine.messages import LOADING, OUTPUT, Call, Kind, Result, StepTime
from vidgen_ray.engine.processes import is_encoder
from vidgen_ray.engine.recording import Recorder
from vidgen_ray.engine.status import Attempt, EngineObserver, Progress
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.engine.worker import ActorPlace
from vidgen_ray.errors import EngineFailed, SetupError, first_line
from vidgen_ray.graph import STAGE_BY_NAME, STAGES, max_loras
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.planner.layout import Layout, WorkerSpec

CHECK_ENGINE = "VIDGEN_CHECK_ENGINE"
"""Environment variable: check the state of the core after each event. Slow."""
PING_S = 10.0
"""Seconds between two pings of a process."""
PROGRESS_POLL_S = 0.25
"""Seconds between two progress requests for a call whose caller wants to know."""
NOT_SENT = "The actor is restarting"
"""Part of Ray's error text when a call was never sent: its process was already dead."""

OnProgress = Callable[[Progress], None]
_log = logging.getLogger("vidgen_ray")


class WorkerCall(NamedTuple):
    """Method of a worker, and its arguments after the number of the call."""

    method: str
    plan: ShotPlan
    args: tuple[Any, ...]
    n_results: int = 2
    """Results of the method: references to its outputs, and the call result."""


class Made(NamedTuple):
    """Result of a call, with references to its outputs in Ray's object store."""

    result: CallResult
    outputs: tuple[Any, ...]
    process: str
    """Name of the worker. The outputs are on its node."""
    record: ShotRecord | None = None
    """Set for a commit."""
    call: WorkerCall | None = None
    """For a check of the worker that repeats it."""
    is_first: bool = True
    """Otherwise another shot has asked for the same call, and its steps count as cached."""


class EncoderSession:
    """The calls that write one shot on one encoder, one after another."""

    def __init__(self, shell: Shell, invocation: _Invocation) -> None:
        self._shell, self._invocation = shell, invocation
        self.is_committing = False
        """Its last call runs: the result counts also if the encoder was taken for lost meanwhile."""

    async def run(self, method: str, *args: Any) -> CallResult:
        result: CallResult = await self._call(method, *args)
        return self._checked(result)

    async def commit(self, method: str, *args: Any) -> tuple[CallResult, ShotRecord | None]:
        """Return the result of the call that commits a shot, and the record. `None` if it failed."""
        self.is_committing = True
        result, record = await self._call(method, *args)
        return self._checked(result), record

    async def _call(self, method: str, *args: Any) -> Any:
        handle, number = self._invocation.handle, self._invocation.number
        returned = getattr(handle.actor, method).remote(self._shell.first_call + number, *args)
        handle.encoding[number] = False
        self._shell.start_timeouts(handle)
        try:
            return await asyncio.wrap_future(returned.future())
        except ray.exceptions.RayError as error:
            self._shell.call_raised(self._invocation, error)
            raise _SessionEnded from None
        finally:
            del handle.encoding[number]
            # After the last call, the end of the session follows at once.
            if not self.is_committing:
                self._shell.tell(m.Progressed(handle.name, self._invocation.life, number, waits=True))
            self._shell.start_timeouts(handle)

    def _checked(self, result: CallResult) -> CallResult:
        if result.session_lost:
            # The process that began the shot has crashed.
            self._shell.tell(m.Died(self._invocation.handle.name, self._invocation.life, (), "the encoder restarted"))
            raise _SessionEnded
        return result


class _SessionEnded(Exception):
    """A session cannot continue. The core knows why."""


Session = Callable[[EncoderSession], Awaitable[tuple[CallResult, ShotRecord | None]]]
"""Writes a shot with the calls of an encoder."""


@dataclass(eq=False, slots=True)
class _Handle:
    """A worker or an encoder as Ray knows it."""

    name: str
    actor: Any
    spec: WorkerSpec
    life: int = 0
    place: ActorPlace | None = None
    killed: ActorPlace | None = None
    """Place of the process that was killed last."""
    sent: dict[int, _Invocation] = field(default_factory=dict)
    """Calls that have not returned."""
    encoding: dict[int, bool] = field(default_factory=dict)
    """Sessions of an encoder whose calls have not returned, in order, and whether their timeouts have started."""
    task: asyncio.Task[None] | None = None
    """Starts and pings its process."""


@dataclass(eq=False, slots=True)
class _Asked:
    """A call that a shot waits for."""

    what: WorkerCall | Session
    future: asyncio.Future[Made]
    on_progress: OnProgress | None
    begun: float
    """Time since when the present attempt waits for its process, by `time.monotonic()`."""
    is_followed: bool
    """`on_progress` gets each step, not only the GPU-seconds of attempts that were stopped."""
    attempts: int = 0
    is_withdrawn: bool = False


@dataclass(eq=False, slots=True)
class _Invocation:
    """An attempt of a call on its process."""

    number: int
    handle: _Handle
    life: int
    call: Call
    what: WorkerCall | Session
    asked: _Asked | None
    """`None` for a check of a worker."""
    attempt: int
    sent: float
    host: str | None
    begun: float | None = None
    """Time at which it became the first call in its process, by `time.monotonic()`."""
    started_at: float | None = None
    seconds: float = 0.0
    made: CallResult | None = None
    task: asyncio.Future[Any] | None = None
    session: EncoderSession | None = None
    following: asyncio.Task[None] | None = None


class Shell:
    """Create it inside the event loop."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        observer: EngineObserver,
        storage: StoragePause,
        recorder: Recorder | None = None,
    ) -> None:
        self._observer = GuardedObserver(observer)
        self._storage = storage
        self._recorder = recorder
        stages = (*(stage.name for stage in STAGES), OUTPUT)
        self.core = Core(
            stages,
            (*layout.stages, OUTPUT),
            config.limits,
            attempts=config.attempts,
            adapters_kept=max_loras(config.profile),
            circuit_breaker=config.circuit_breaker,
        )
        if recorder is not None:
            recorder.begin(self.core)
        self.first_call = time.time_ns()
        """Higher than the calls of earlier engines with the same workers."""
        self._handles: dict[str, _Handle] = {}
        self._asked: dict[int, _Asked] = {}
        self._invocations: dict[int, _Invocation] = {}
        self._calls = count(1)
        self._tasks: set[asyncio.Future[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        """Set, and replaced, when a row has left the table."""
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self.error: EngineFailed | None = None
        """Bug that has ended the engine."""
        self._is_checked = bool(os.environ.get(CHECK_ENGINE))
        self._do: dict[type[Any], Callable[[Any], None]] = {
            command: getattr(self, f"_do_{command.__name__}") for command in get_args(m.Command)
        }

    def tell(self, event: m.Event) -> None:
        """Give the core an event, and carry out its commands at once: calls to a process arrive in order."""
        self._try(self._handle, event)

    def _handle(self, event: m.Event) -> None:
        if self._is_closed:
            return
        now = asyncio.get_running_loop().time()
        commands = self.core.handle(event, now)
        if self._recorder is not None:
            self._recorder.add(now, event, commands)
        if self._is_checked:
            check_invariants(self.core)
        for command in commands:
            self._do[type(command)](command)

    def _try(self, action: Callable[..., None], *args: Any) -> None:
        """Do what must not fail. The event loop would log an exception, and go on without the commands that were to follow."""
        try:
            action(*args)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End the engine because of a bug: its calls raise EngineFailed, also those that follow."""
        if self._is_closed:
            return
        reason = f"the engine has failed, which is a bug of vidgen-ray: {type(error).__name__}: {first_line(error)}"
        _log.error(reason, exc_info=error)
        self.error = EngineFailed(f"stopped, because {reason}. Finished shots are kept; run the same command again to resume")
        self.close()
        for call in self._asked:
            self._raise(call, self.error)

    def close(self) -> None:
        """Cancel the background tasks. What happens from now on is ignored."""
        self._is_closed = True
        self._notify()
        if self._timer is not None:
            self._timer.cancel()
        invocations = self._invocations.values()
        starts = (each.task for each in self._handles.values())
        for task in (*starts, *(each.task for each in invocations), *(each.following for each in invocations), *self._tasks):
            if task is not None:
                task.cancel()

    # Processes

    def add(self, name: str, spec: WorkerSpec, actor: Any) -> None:
        """Use a worker or an encoder."""
        self._handles[name] = _Handle(name, actor, spec)
        self.tell(m.Added(name, spec))

    def remove(self, name: str, *, released: bool = False) -> None:
        """A worker is gone for good, or, if `released`, will be stopped after its calls."""
        self.tell(m.Removed(name, released))

    async def until_unused(self, names: Collection[str]) -> None:
        """Wait until these workers, which were removed, have no calls."""
        while not self._is_closed and any(name in self.core.table.rows for name in names):
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task whose exceptions end the engine."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(error)

        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    def _do_Start(self, command: m.Start) -> None:
        handle = self._handles[command.process]
        if handle.task is not None:
            handle.task.cancel()
        handle.task = asyncio.ensure_future(self._live(handle, command.life))

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                # A bug: nothing would look at the process any more.
                self.tell(m.Died(command.process, command.life, (), repr(error)))

        handle.task.add_done_callback(ended)

    async def _live(self, handle: _Handle, life: int) -> None:
        """Wait until a process has loaded its weights, then ping it until it is gone."""
        name = handle.name
        try:
            handle.place = await place_when_up(handle.actor, handle.killed)
            # Calls of an earlier engine, and those that Ray has brought from the process before, are not needed any more.
            handle.actor.attach.remote(self.first_call + life)
            self.tell(m.Placed(name, life, handle.place.node, handle.place.pid))
            begun = time.monotonic()
            failure = await load_weights(handle.actor, lambda: self.tell(m.Progressed(name, life)))
        except ray.exceptions.RayError as error:
            # Also if the actor is dead for good, or never started: its runtime environment cannot be set up.
            failure = start_failure(name, error)
        if failure is not None:
            self.tell(m.LoadFailed(name, life, failure))
            return
        assert handle.place is not None
        seconds = round(time.monotonic() - begun, 3)
        self._observer.attempt_ended(
            Attempt("", LOADING, 1, "done", time.time() - seconds, seconds, 0.0, name, handle.place.host)
        )
        self.tell(m.Ready(name, life))
        while True:
            await asyncio.sleep(PING_S)
            response = await ping(handle.actor, handle.place)
            if response is Ping.SILENT:
                self.tell(m.Silent(name, life, SILENT_S))
            elif response is Ping.DOWN:
                self.tell(m.Died(name, life, self._suspects(handle, life), "another process has replaced it"))
            if response is not Ping.UP:
                return

    def _do_Kill(self, command: m.Kill) -> None:
        handle = self._handles[command.process]
        handle.killed = handle.place
        ray.kill(handle.actor, no_restart=False)

    def _do_Release(self, command: m.Release) -> None:
        if (task := self._handles.pop(command.process).task) is not None and task is not asyncio.current_task():
            task.cancel()
        self._notify()

    def _do_Report(self, command: m.Report) -> None:
        self._observer.quarantined(command.process, command.reason)

    # Calls

    async def call(
        self, call: Call, what: WorkerCall | Session, on_progress: OnProgress | None = None, *, is_followed: bool = True
    ) -> Made:
        """Return the result of a call. Raises ShotFailed.

        If the caller is cancelled, the process stops at its next step, or is restarted. `on_progress` then gets the
        GPU-seconds until now, as it does after a timeout. `is_followed`: it also gets each step.
        Raises EngineFailed if the engine fails.
        """
        if self.error is not None:
            raise self.error
        call = call._replace(id=next(self._calls))
        asked = _Asked(what, asyncio.get_running_loop().create_future(), on_progress, time.monotonic(), is_followed)
        self._asked[call.id] = asked
        self.tell(m.Asked(call))
        try:
            return await asked.future
        finally:
            del self._asked[call.id]
            asked.is_withdrawn = not asked.future.done() or asked.future.cancelled()
            if asked.is_withdrawn or asked.future.exception() is not None:
                self.tell(m.Withdrawn(call.id))

    def _do_Send(self, command: m.Send) -> None:
        handle, call, repetition = self._handles[command.process], command.call, command.repetition
        asked = None if repetition is not None else self._asked[call.id]
        if asked is not None:
            asked.attempts += 1
        what = asked.what if asked is not None else _repeated(repetition)
        host = handle.place.host if handle.place is not None else None
        number = asked.attempts if asked is not None else len(repetition.others) if repetition is not None else 0
        invocation = _Invocation(command.number, handle, command.life, call, what, asked, number, time.monotonic(), host)
        self._invocations[command.number] = handle.sent[command.number] = invocation
        if isinstance(what, WorkerCall):
            method = getattr(handle.actor, what.method).options(num_returns=what.n_results)
            *outputs, result = method.remote(self.first_call + command.number, what.plan, *what.args)
            result.future().add_done_callback(partial(self._on_result, invocation, tuple(outputs)))
            _begin_first(handle, command.life)
            if asked is not None and asked.on_progress is not None and asked.is_followed:
                invocation.following = self._in_background(self._follow(invocation, asked.on_progress))
        else:
            session = invocation.session = EncoderSession(self, invocation)
            writing = invocation.task = asyncio.ensure_future(what(session))
            writing.add_done_callback(partial(self._try, self._written, invocation))

    async def _follow(self, invocation: _Invocation, on_progress: OnProgress) -> None:
        """Report the progress of a call until it ends."""
        last: Progress | None = None
        while True:
            await asyncio.sleep(PROGRESS_POLL_S)
            # The call itself fails if the worker is lost.
            with suppress(ray.exceptions.RayError):
                progress: Progress | None = await invocation.handle.actor.progress.remote(self.first_call + invocation.number)
                if progress is not None and progress != last:
                    last = progress
                    on_progress(progress)

    def _on_result(self, *ended: Any) -> None:
        """A call to a worker has ended. Runs in a thread of Ray."""
        if not self._is_closed:
            self._loop.call_soon_threadsafe(self._try, self._returned, *ended)

    def _returned(self, invocation: _Invocation, outputs: tuple[Any, ...], returned: Future[CallResult]) -> None:
        invocation.handle.sent.pop(invocation.number, None)
        _begin_first(invocation.handle, invocation.life)
        if (error := returned.exception()) is not None:
            self.call_raised(invocation, error)
            return
        self._ended(invocation, returned.result(), outputs, None)

    def _written(self, invocation: _Invocation, writing: asyncio.Future[tuple[CallResult, ShotRecord | None]]) -> None:
        """The session of an encoder has ended."""
        invocation.handle.sent.pop(invocation.number, None)
        error = None if writing.cancelled() else writing.exception()
        result, record = (None, None) if writing.cancelled() or error is not None else writing.result()
        if record is None:
            invocation.handle.actor.cancel.remote(self.first_call + invocation.number)
        if result is not None:
            self._ended(invocation, result, (), record)
        elif error is not None and not isinstance(error, _SessionEnded):
            # A chunk of its clip has failed, and with it the shot.
            self._raise(invocation.call.id, _without_frames(error))

    def _ended(self, invocation: _Invocation, result: CallResult, outputs: tuple[Any, ...], record: ShotRecord | None) -> None:
        handle, call = invocation.handle, invocation.call
        invocation.started_at, invocation.seconds, invocation.made = result.started_at, result.seconds, result
        if result.failure is not None:
            kind, broken, unloaded = result.kind, result.context_broken, result.load_failed
            self.tell(m.Failed(handle.name, invocation.life, invocation.number, kind, result.failure, broken, unloaded))
            return
        what = invocation.what if isinstance(invocation.what, WorkerCall) else None
        steps = tuple(StepTime(step.stage, step.key, None if step.cached else step.seconds) for step in result.records)
        made = Made(result, outputs, handle.name, record, what)
        told = Result(steps if call.keys else (), result.device, _is_usual(result), tuple(result.differences), made)
        # An attempt that was taken for lost has ended before, and ends again if its result counts.
        self._invocations[invocation.number] = invocation
        self.tell(m.Returned(handle.name, invocation.life, invocation.number, told))
        self._invocations.pop(invocation.number, None)

    def call_raised(self, invocation: _Invocation, error: BaseException) -> None:
        """Tell the core that Ray has raised an error instead of a result."""
        handle, life, number = invocation.handle, invocation.life, invocation.number
        row = self.core.table.rows.get(handle.name)
        stage, worker = invocation.call.stage, handle.name if row is None else row.location
        cause = getattr(error, "cause", None)
        kind, name, message = Kind.ERROR, "WorkerDied", first_line(error)
        if isinstance(error, ray.exceptions.RayActorError):
            # The process may have been chosen before it was killed: then this call is not the cause.
            unsent = (number,) if NOT_SENT in str(error) else ()
            suspects = tuple(each for each in self._suspects(handle, life, number) if each not in unsent)
            self.tell(m.Died(handle.name, life, suspects, message))
            return
        if any(isinstance(each, ray.exceptions.ObjectLostError) for each in (error, cause)):
            kind, name = Kind.FOREIGN, "InputsLost"
        elif isinstance(cause or error, ray.exceptions.OutOfDiskError | ray.exceptions.ObjectStoreFullError) or isinstance(
            cause, ray.exceptions.RayError
        ):
            kind, name = Kind.NODE, type(cause or error).__name__
            message = (
                f"Ray could not store its result: {name}: {first_line(cause or error)}. Free disk space and memory of its node"
            )
        elif cause is not None:
            name, message = type(cause).__name__, str(cause)
        failure = Failure(stage=stage, error=name, message=message, attempts=1, worker=worker)
        self.tell(m.Failed(handle.name, life, number, kind, failure))

    @staticmethod
    def _suspects(handle: _Handle, life: int, *others: int) -> tuple[int, ...]:
        """Return the calls of a process that may be the cause of its crash."""
        if is_encoder(handle.spec):
            sent = list(handle.encoding)
        else:
            sent = [number for number, invocation in handle.sent.items() if invocation.life == life]
        return tuple(dict.fromkeys((*sent, *others)))

    def start_timeouts(self, handle: _Handle) -> None:
        """Start the timeouts of the calls that an encoder works on. No longer are all places taken by earlier calls."""
        for number in list(islice(handle.encoding, handle.spec.parallel)):
            if not handle.encoding[number]:
                handle.encoding[number] = True
                self.tell(m.Progressed(handle.name, handle.sent[number].life, number))

    def _taken(self, number: int) -> _Invocation | None:
        """Return an attempt whose end is known, and forget it. `None` if it is forgotten already."""
        invocation = self._invocations.pop(number, None)
        if invocation is not None and invocation.following is not None:
            invocation.following.cancel()
        return invocation

    def _do_Cancel(self, command: m.Cancel) -> None:
        if (invocation := self._taken(command.number)) is None:
            return
        if invocation.asked is not None and invocation.asked.is_withdrawn:
            _charge(invocation)
        if invocation.session is not None:
            self._end_session(invocation)
        else:
            invocation.handle.actor.cancel.remote(self.first_call + command.number)

    @staticmethod
    def _end_session(invocation: _Invocation) -> None:
        task = invocation.task
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _do_Ended(self, command: m.Ended) -> None:
        if (invocation := self._taken(command.number)) is None:
            return
        self._report(invocation, command)
        if command.failure is not None and command.failure.error == "TimedOut":
            _charge(invocation)
        if command.kind is not None:
            session = invocation.session
            if session is not None and not session.is_committing:
                self._end_session(invocation)
            if invocation.asked is not None:
                invocation.asked.begun = time.monotonic()

    def _do_Finish(self, command: m.Finish) -> None:
        made: Made = command.result.data
        if made.record is not None:
            self._storage.written()
        if (future := self._open_future(command.call)) is not None:
            # Its inputs are not needed any more.
            future.set_result(made._replace(call=None, is_first=command.is_first))

    def _do_Fail(self, command: m.Fail) -> None:
        self._raise(command.call, ShotFailed(command.failure, command.kind))

    def _open_future(self, call: int) -> asyncio.Future[Made] | None:
        """Return the future of a call that a shot still waits for."""
        asked = self._asked.get(call)
        return None if asked is None or asked.future.done() else asked.future

    def _raise(self, call: int, error: BaseException) -> None:
        """Raise an error in the shot that waits for a call, if one does."""
        if (future := self._open_future(call)) is not None:
            future.set_exception(error)

    def _do_Retried(self, command: m.Retried) -> None:
        self._observer.retried(command.stage)

    def _do_CheckStorage(self, command: m.CheckStorage) -> None:
        self._in_background(self._check_storage(command))

    async def _check_storage(self, command: m.CheckStorage) -> None:
        """Answer in every case: the call waits for it."""
        was_down = True
        try:
            was_down = await self._storage.is_cause(command.kind, command.reason)
        except SetupError as error:
            # The folder could not be written for too long. The shot withdraws its call before the answer.
            self._raise(command.call, error)
            await asyncio.sleep(0)
        self.tell(m.StorageChecked(command.call, was_down))

    def _do_WaitUntil(self, command: m.WaitUntil) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(command.time, self.tell, m.Tick())

    def _report(self, invocation: _Invocation, ended: m.Ended) -> None:
        """Report an attempt, with each of its steps if it has succeeded."""
        kind, failure, call, asked = ended.kind, ended.failure, invocation.call, invocation.asked
        if failure is not None and kind not in (Kind.NOT_RUN, Kind.SHARED_CRASH, Kind.FOREIGN, None) and asked is not None:
            self._observer.step_failed(failure.stage, failure.error)
        seconds, begun = time.monotonic() - invocation.sent, invocation.sent if asked is None else asked.begun
        waited, started_at = max(0.0, invocation.sent - begun), time.time() - seconds
        if invocation.started_at is not None and invocation.session is None:
            # It may have been prefetched.
            waited += max(0.0, invocation.started_at - started_at)
            started_at, seconds = invocation.started_at, invocation.seconds if kind is not None else seconds
        steps: list[tuple[str, str, float, str | None, str | None]]
        if asked is None:
            outcome = ended.outcome if kind is None else kind.value
            steps = [(CANARY, outcome, seconds, None, None)]
        elif kind is not None:
            error, message = (failure.error, failure.message) if failure is not None else ("NotRun", "not run")
            steps = [((failure.stage if failure is not None else "") or call.stage, kind.value, seconds, error, message)]
        elif call.stage == OUTPUT or invocation.made is None:
            steps = [(OUTPUT, "done", seconds, None, None)]
        else:
            records = invocation.made.records
            steps = [(step.stage, "cached" if step.cached else "done", step.seconds, None, None) for step in records]
        for stage, how, step_s, error_name, text in steps:
            times = started_at, round(step_s, 3), round(waited, 3)
            self._observer.attempt_ended(
                Attempt(
                    call.shot, stage, invocation.attempt, how, *times, invocation.handle.name, invocation.host, error_name, text
                )
            )
            started_at, waited = started_at + step_s, 0.0


def _begin_first(handle: _Handle, life: int) -> None:
    """Note when the first call of a process begins. It runs its calls one after another."""
    first = next((each for each in handle.sent.values() if each.life == life), None)
    if first is not None and first.begun is None:
        first.begun = time.monotonic()


def _charge(invocation: _Invocation) -> None:
    """Report the GPU-seconds of a call that is stopped. Those until the next step of the process do not count."""
    asked, gpus = invocation.asked, invocation.handle.spec.gpus
    if asked is None or asked.on_progress is None or invocation.begun is None or not gpus:
        return
    asked.on_progress(Progress(invocation.call.stage, 0, 0, gpus * (time.monotonic() - invocation.begun)))


def _repeated(repetition: m.Repetition | None) -> WorkerCall:
    """Return the call of a check."""
    assert repetition is not None
    made: Made = repetition.of.data
    assert made.call is not None
    others = tuple(other.data.outputs[0] for other in repetition.others)
    # `run` and `run_clip` take the names of steps first, and their input last.
    return WorkerCall("compare", made.call.plan, (made.call.args[0], made.call.args[-1], *others))


def _is_usual(result: CallResult) -> bool:
    """Return whether another worker must make the same images: computed, with the settings of the profile."""
    makes_pixels = any({"image", "frames"} & set(STAGE_BY_NAME[record.stage].writes) for record in result.records)
    return makes_pixels and not any(record.cached or record.recovered for record in result.records)


def _without_frames(error: BaseException) -> BaseException:
    """Drop the traceback of an error that is kept: its stack frames would keep results of calls in the object store."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
