"""The core of an engine, a function: an event in, commands out. No clock, no tasks, no Ray and no randomness in it.

The same events at the same times give the same commands. Read `messages.py` first, then `processes.py`, `queues.py` and
`attempts.py`; `supervision.py` has the events of processes, this module those of calls. `shell.py` carries out the commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from heapq import heappop
from typing import Any

from vidgen_ray.engine import messages as m
from vidgen_ray.engine.attempts import (
    Durations,
    Evidence,
    FailedAttempt,
    Request,
    Running,
    Verdict,
    counting,
    in_doubt,
    is_confirmed,
    next_place,
)
from vidgen_ray.engine.canary import Canary
from vidgen_ray.engine.messages import Call, Kind, Result
from vidgen_ray.engine.processes import ATTEMPTS, CoreLimits, Process, State, Where, is_encoder
from vidgen_ray.engine.supervision import Supervision
from vidgen_ray.outputs.records import Failure


class Core(Supervision):
    """Calls of an engine, from the question to the result."""

    def __init__(
        self,
        stages: Sequence[str],
        needed: Collection[str] = (),
        limits: CoreLimits | None = None,
        *,
        attempts: int = ATTEMPTS,
        adapters_kept: int = 1,
        circuit_breaker: bool = False,
    ) -> None:
        """`stages`: all, in the order of the chain. `needed`: those of the layout. `attempts`: per call, with the first one."""
        limits = limits or CoreLimits()
        super().__init__(stages, needed, limits, adapters_kept, circuit_breaker)
        self.settings: dict[str, Any] = {
            "stages": list(stages),
            "needed": sorted(needed),
            "limits": asdict(limits),
            "attempts": attempts,
            "adapters_kept": adapters_kept,
            "circuit_breaker": circuit_breaker,
        }
        """The arguments, as plain values."""
        self.durations = Durations()
        self.requests: dict[Request, None] = {}
        self.canary = Canary(self.table, self.limits, self._repeat, self._found_sick)
        self._attempts = attempts
        self._asked: dict[int, Request] = {}
        """Id of a call -> its request."""
        self._shared: dict[tuple[str, ...], Request] = {}
        """Keys of a call that several shots may ask for -> the request that computes it."""
        self._doubtful: dict[Request, None] = {}
        """Calls that wait for what shows which processes are sick."""
        self._evidence = Evidence()
        self._wake = math.inf
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            event: getattr(self, f"_on_{name}") for name, event in m.EVENTS.items()
        }

    def handle(self, event: m.Event, now: float) -> list[m.Command]:
        """Take an event, and return the commands that follow. `now`: seconds of any clock that is never set back."""
        seconds, self.now, self._out = now - self.now, now, []
        if now > self._wake + self.limits.late_s:
            # Nothing shows when the driver was suspended since its last event.
            self._extend(seconds)
        self._handlers[type(event)](event)
        self._expire()
        if self._evidence_changed:
            self._settle_doubts()
        self.queues.assign(self._send)
        wake = self._timers[0][0] if self._timers else math.inf
        # Also if the time is the same: the event may be a tick that came early.
        if wake != self._wake or isinstance(event, m.Tick):
            self._wake = wake
            if wake < math.inf:
                self._out.append(m.WaitUntil(wake))
        return self._out

    # Questions

    def _on_Asked(self, event: m.Asked) -> None:
        call = event.call
        if call.is_shared and (request := self._shared.get(call.keys)) is not None:
            request.askers.append(call)
            self._asked[call.id] = request
            if call.order < request.call.order:
                # The age of the oldest shot counts.
                self._set_call(request, request.call._replace(order=call.order))
            return
        self._ask([call])

    def _ask(self, askers: list[Call]) -> None:
        # The age of the oldest shot counts.
        call = askers[0]._replace(order=min(each.order for each in askers))
        request = Request(call, askers)
        self._asked.update(dict.fromkeys([each.id for each in askers], request))
        self._add(request)
        if call.is_shared:
            self._shared[call.keys] = request
        self._again(request)

    def _add(self, request: Request) -> None:
        self.requests[request] = None
        self._evidence.add(request.call)

    def _set_call(self, request: Request, call: Call) -> None:
        """Change the call of a request: another shot is the first, or the oldest, that asks for it."""
        waits = request.entry is not None
        self.queues.remove(request)
        if not request.failures:
            self._evidence.remove(request.call)
            self._evidence.add(call)
        request.call = call
        if waits:
            self.queues.add(request)

    def _on_Withdrawn(self, event: m.Withdrawn) -> None:
        if (request := self._asked.pop(event.call, None)) is None:
            return
        was_first = request.askers[0].id == event.call
        request.askers = [each for each in request.askers if each.id != event.call]
        if request.askers:
            self._set_call(request, request.askers[0]._replace(order=min(each.order for each in request.askers)))
            if was_first and request.unwritten is not None:
                # The answer would be for the call that is withdrawn.
                self._check_storage(request, request.unwritten)
        else:
            self._drop(request)

    def _drop(self, request: Request) -> None:
        """Forget a call. Processes that still run it are stopped."""
        self.queues.remove(request)
        for running in list(request.running.values()):
            self._abandon(running)
        for asker in request.askers:
            del self._asked[asker.id]
        for number in request.lost:
            self._lost.pop(number, None)
        del self.requests[request]
        if not request.failures:
            self._evidence.remove(request.call)
        if self._shared.get(request.call.keys) is request:
            del self._shared[request.call.keys]
        self._doubtful.pop(request, None)
        self._evidence_changed = True

    def _abandon(self, running: Running) -> None:
        """Stop a call whose result is not needed. Its process is busy until the call ends; an encoder is not."""
        process = running.process
        if running.request is not None:
            del running.request.running[running.number]
        running.request, running.check = None, math.inf
        self._out.append(m.Cancel(process.name, running.number))
        if is_encoder(process.spec):
            self._end(running)
            return
        if running.began < math.inf:
            running.deadline = min(running.deadline, self.now + self.limits.cancel_s)
        self._watch(process)

    # Attempts

    def _send(self, process: Process, request: Request) -> None:
        running = Running(self._next_number(), request, process, request.call.load, request.call.stage)
        process.calls[running.number] = request.running[running.number] = running
        self._out.append(m.Send(process.name, process.life, running.number, request.call, request.repetition))
        self._watch(process)

    def _running(self, event: m.Returned | m.Failed) -> Running | None:
        """Return the call that has ended. `None` if it is of an earlier process."""
        process = self._row(event.process, event.life)
        return process.calls.get(event.number) if process is not None else None

    def _end(self, running: Running) -> None:
        process = running.process
        del process.calls[running.number]
        if running.request is not None:
            running.request.running.pop(running.number, None)
        self.queues.ended(process, running.load)
        if process.state is State.LEAVING and not process.calls:
            self._on_Removed(m.Removed(process.name, released=True))
        else:
            self._watch(process)

    def _on_Progressed(self, event: m.Progressed) -> None:
        if (process := self._row(event.process, event.life)) is None:
            return
        if event.number is None:
            if process.state is State.STARTING:
                self._enter(process, State.STARTING, self.limits.load_silence_s)
        elif (running := process.calls.get(event.number)) is not None and running.request is not None:
            running.deadline = math.inf if event.waits else self.now + running.request.call.timeout_s
            self._watch(process)

    def _on_Returned(self, event: m.Returned) -> None:
        running, result = self._running(event), event.result
        if running is None:
            if (request := self._lost.get(event.number)) is not None and self._has_keys(result, request):
                # Its process was taken for lost.
                self._finish(event.number, event.process, request, result)
            return
        process, request = running.process, running.request
        self._end(running)
        if request is None:
            return
        if not self._has_keys(result, request):
            message = "the worker returned the result of another shot"
            failure = self._failure(process, request.call.stage, "WrongResult", message)
            self._attempt_failed(running, request, Kind.ERROR, failure)
            return
        self.durations.add(request.call, result)
        process.device = result.device
        self._succeeded(process, request.call.order)
        if request.repetition is not None:
            outcome = self.canary.repeated(request, process, result)
            self._out.append(m.Ended(running.number, None, None, outcome))
            self._drop(request)
            return
        self._finish(running.number, process.name, request, result)
        self.canary.finished(process, request.call, result)
        # Last: if the engine is lost with one of these processes, the calls that wait fail.
        for failed in request.failures:
            if failed.is_forgiven and failed.verdict is Verdict.OPEN:
                # The shot is fine: another process has finished its call.
                failed.is_forgiven = False
                self._blame(failed)

    @staticmethod
    def _has_keys(result: Result, request: Request) -> bool:
        return not request.call.keys or tuple(step.key for step in result.steps) == request.call.keys

    def _finish(self, number: int, process: str, request: Request, result: Result) -> None:
        self._out.append(m.Ended(number, None, None))
        for position, asker in enumerate(request.askers):
            self._out.append(m.Finish(asker.id, result, process, position == 0))
        self._drop(request)

    def _on_Failed(self, event: m.Failed) -> None:
        if (running := self._running(event)) is None:
            return
        process, request = running.process, running.request
        self._end(running)
        if process.is_live and (event.is_broken or event.is_unloaded):
            self._replace(process, {}, kill=event.is_broken)
        if request is not None:
            self._attempt_failed(running, request, Kind.NOT_RUN if event.is_unloaded else event.kind, event.failure)

    def _attempt_failed(self, running: Running, request: Request, kind: Kind, failure: Failure) -> None:
        self._out.append(m.Ended(running.number, kind, failure))
        if request not in self.requests:
            return
        process = running.process
        failed = FailedAttempt(request, process.name, process.node, process.spec.gpu_gb, kind, failure, self.now)
        if request.repetition is not None:
            self.canary.failed(request)
            self._drop(request)
            if kind in (Kind.ERROR, Kind.INPUT, Kind.NODE):
                # Another worker has finished the same call.
                self._blame(failed)
        elif kind is Kind.FOREIGN:
            self._fail(request, kind, failure)
        elif kind in (Kind.NOT_RUN, Kind.SHARED_CRASH):
            request.runs_alone |= kind is Kind.SHARED_CRASH
            self._again(request)
        elif kind in (Kind.WRITE, Kind.DISK_FULL):
            request.unwritten = failed
            self._check_storage(request, failed)
        else:
            self._count(request, failed)

    def _check_storage(self, request: Request, failed: FailedAttempt) -> None:
        self._out.append(m.CheckStorage(request.call.id, failed.kind, failed.failure.message))

    def _on_StorageChecked(self, event: m.StorageChecked) -> None:
        request = self._asked.get(event.call)
        if request is None or (failed := request.unwritten) is None:
            return
        request.unwritten = None
        if event.was_down:
            self._again(request)
        else:
            failed.kind = Kind.ERROR
            self._count(request, failed)
        self._evidence_changed = True

    def _again(self, request: Request) -> None:
        """Let a call wait for a process, unless it runs on another one, or for the storage."""
        if request.running or request.entry is not None or request.unwritten is not None:
            return
        if self.fatal_failure is not None:
            self._fail(request, Kind.ERROR, self.fatal_failure)
        else:
            self.queues.add(request)

    def _count(self, request: Request, failed: FailedAttempt) -> None:
        """Count a failure, and try the call again where it has not failed, or give up."""
        if not request.failures:
            self._evidence.remove(request.call)
            self._evidence_changed = True
        request.failures.append(failed)
        failed.is_forgiven = failed.kind is Kind.INPUT
        failures = counting(request.failures)
        if failed.kind is Kind.ERROR and is_confirmed(failures):
            for each in failures:
                each.is_forgiven = True
        if failed.kind is not Kind.MEMORY:
            self._blame(failed)
        # Otherwise its copy still runs, or could not write.
        if not request.running and request.unwritten is None and request in self.requests:
            self._next_attempt(request, failed, is_settled=False)

    def _next_attempt(self, request: Request, last: FailedAttempt, *, is_settled: bool) -> None:
        stage, limits = request.call.stage, self.limits
        failures = counting(request.failures)
        on_process = [each for each in request.failures if each.process == last.process and each.verdict is not Verdict.LOST]
        most = limits.in_doubt_factor * self._attempts

        def following(limit: int) -> Where | None:
            """Return where the next attempt runs. `limit`: attempts."""
            if not failures:
                return Where()
            return None if len(failures) >= most else next_place(failures, stage, self.table, limit)

        where = following(self._attempts)
        if where is None and in_doubt(failures):
            if not is_settled:
                request.doubt_until = self.now + limits.evidence_s
                self._doubtful[request] = None
                self._evidence_changed = True
                self._wake_at(request, request.doubt_until)
                return
            tried = frozenset(each.process for each in failures)
            if self._attempts > 1 and self.table.count(stage, Where(tried)):
                where = following(most)
        if where is None or len(on_process) >= limits.max_failures:
            attempts = max(1, len(failures))
            self._fail(request, last.kind, last.failure.model_copy(update={"attempts": attempts}))
            return
        request.where = where if where != Where() else None
        request.is_copied = False
        self._out.append(m.Retried(stage))
        self._again(request)

    def _settle_doubts(self) -> None:
        """Decide about calls for which all is known, or will not be known."""
        # With enough evidence, only what is known of their own attempts decides.
        looked_at = list(self._doubtful if self._evidence.is_scarce else self._decided)
        self._decided.clear()
        self._evidence_changed = False
        for request in looked_at:
            if request in self._doubtful and not self._waits_for_evidence(request):
                del self._doubtful[request]
                request.doubt_until = request.quiet_since = None
                self._next_attempt(request, request.failures[-1], is_settled=True)

    def _waits_for_evidence(self, request: Request) -> bool:
        assert request.doubt_until is not None
        if not in_doubt(counting(request.failures)) or self.now >= request.doubt_until:
            return False
        if self._may_be_shown(request):
            request.quiet_since = None
            return True
        # The next calls of other shots may be asked for soon.
        if request.quiet_since is None:
            request.quiet_since = self.now
            self._wake_at(request, self.now + self.limits.between_calls_s)
        return self.now < request.quiet_since + self.limits.between_calls_s

    def _may_be_shown(self, request: Request) -> bool:
        """Return whether calls of other shots, or a process that starts, may show which processes are sick."""
        if self._evidence.is_there_for(request.call):
            return True
        rows = (self.table.rows.get(each.process) for each in request.failures if each.verdict is Verdict.OPEN)
        return any(row is not None and row.state in (State.STARTING, State.QUARANTINED) for row in rows)

    def _fail(self, request: Request, kind: Kind, failure: Failure) -> None:
        """Fail the shot that has asked first. Others have their own inputs and attempts."""
        others = request.askers[1:]
        for asker in request.askers[:1]:
            self._out.append(m.Fail(asker.id, kind, failure))
        self._drop(request)
        if others:
            if self.fatal_failure is not None:
                self._out += [m.Fail(asker.id, kind, self.fatal_failure) for asker in others]
            else:
                self._ask(others)

    def _fail_waiting(self, failure: Failure) -> None:
        for request in [each for each in self.requests if each.askers and not each.running]:
            if request in self.requests:
                self._fail(request, Kind.ERROR, failure)

    # Time

    def _on_Tick(self, event: m.Tick) -> None:
        """Do nothing: each event looks at what is due."""

    def _watch(self, process: Process) -> None:
        """Set the time of the next look at the calls of a process."""
        if not process.calls:
            if process.is_live:
                process.deadline = math.inf
            return
        limits, spec = self.limits, process.spec
        for running in process.running:
            if running.began == math.inf:
                running.began = self.now
                if running.request is None:
                    running.deadline = self.now + limits.cancel_s
                elif not is_encoder(spec):
                    running.deadline = self.now + self.durations.timeout_s(running.request.call, limits)
                    running.check = self.now + limits.min_slow_s
        process.deadline = min(min(each.deadline, each.check) for each in process.calls.values())
        self._wake_at(process, process.deadline)

    def _expire(self) -> None:
        timers = self._timers
        while timers and timers[0][0] <= self.now:
            when, _, owner = heappop(timers)
            if isinstance(owner, Request):
                self._decided[owner] = None
                self._evidence_changed = True
            elif owner.timer == when:
                owner.timer = math.inf
                if owner.deadline <= self.now and owner.state is not State.GONE:
                    self._due(owner)
                if owner.deadline > self.now and owner.state is not State.GONE:
                    self._wake_at(owner, owner.deadline)

    def _extend(self, seconds: float) -> None:
        """Extend all that waits for processes, which may have been suspended for this long."""
        self._extend_deadlines(seconds)
        for request in self._doubtful:
            assert request.doubt_until is not None
            request.doubt_until += seconds
            self._wake_at(request, request.doubt_until)

    def _check_calls(self, process: Process) -> None:
        late = [each for each in process.running if each.deadline <= self.now]
        if late:
            self._time_out(process, late)
            return
        for running in process.running:
            if running.check <= self.now:
                self._check_slow(running)
        if process.state is not State.GONE:
            self._watch(process)

    def _time_out(self, process: Process, late: Sequence[Running]) -> None:
        ended = {}
        for running in late:
            waited_s = self.now - running.began
            # The storage may hang.
            kind = Kind.WRITE if is_encoder(process.spec) else Kind.ERROR
            ended[running] = (kind, "TimedOut", f"it took longer than {waited_s:.0f} s")
        self._replace(process, ended, kill=True)

    def _check_slow(self, running: Running) -> None:
        """Run a slow call on an idle process, too, and the calls behind it instead."""
        limits, request, process = self.limits, running.request, running.process
        running.check = self.now + limits.min_slow_s
        if request is None:
            return
        for behind in list(process.calls.values())[process.spec.parallel :]:
            if behind.request is not None and self.queues.idle_for(behind.request) is not None:
                waiting = behind.request
                # It stays in the row until the process has said that it does not run it: the process may hang.
                self._abandon(behind)
                self._again(waiting)
                self.queues.assign(self._send)
        if self.now - running.began > limits.copy_factor * self.durations.expected_s(request.call):
            self._copy(request)

    def _copy(self, request: Request) -> None:
        """Run a slow call on an idle process, too. The first result counts."""
        if len(request.running) == 1 and not request.runs_alone and not request.is_copied:
            # Calls that wait go first.
            self.queues.assign(self._send)
            process = self.queues.idle_for(request)
            if process is not None and (request.where is None or request.where.fits(process)):
                request.is_copied = True
                self.queues.take(process, request)
                self._send(process, request)

    # Checks of workers

    def _repeat(self, process: Process, call: Call, repetition: m.Repetition) -> Request:
        """Let a worker repeat a call of another one."""
        again = call._replace(near=None, near_load=0.0, is_shared=False, is_checked=False)
        # Alone: if the process crashes, the check is the cause.
        request = Request(again, [], where=Where(only=process.name), runs_alone=True, repetition=repetition)
        self._add(request)
        self.queues.add(request)
        return request

    def _found_sick(self, process: Process, call: Call, was_found_before: bool) -> None:
        reason = (
            f"makes other images than two workers with the same GPUs from shot {call.shot}; "
            "its images since its last check may be wrong"
        )
        if was_found_before and self._may_give_up(process):
            self._out.append(m.Report(process.location, reason))
            self._give_up_sick(process, reason)
        else:
            self._quarantine(process, reason)

    def _forget_checks(self, process: Process) -> None:
        for request in self.canary.forget(process):
            self._drop(request)
