"""The part of an engine's core that supervises processes: starts, loads, crashes, quarantine and giving up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from heapq import heappush

from vidgen_ray.engine import messages as m
from vidgen_ray.engine.attempts import FailedAttempt, Request, Running, Verdict
from vidgen_ray.engine.messages import LOADING, Kind
from vidgen_ray.engine.processes import CoreLimits, Process, State, Table
from vidgen_ray.engine.queues import Queues
from vidgen_ray.outputs.records import Failure

NODE_LOST = "node"
"""Failure stage of an engine that has lost the last process with a stage. Another layout may fit on the nodes that are left."""
SETUP_ERRORS = ("MissingWeights", "ProfileError", "SetupError")
"""Errors of a first load that another attempt cannot avoid."""
_RESTARTED = Failure(stage="", error="NotRun", message="its process was restarted", attempts=1, worker="")


class Supervision(ABC):
    """State of an engine's core, and its events of processes. `Core` adds the calls."""

    def __init__(
        self, stages: Sequence[str], needed: Collection[str], limits: CoreLimits, adapters_kept: int, breaker: bool
    ) -> None:
        """`needed`: stages without which no shot can be rendered. `breaker`: see `EngineConfig.circuit_breaker`."""
        self.limits = limits
        self.table = Table(stages, adapters_kept)
        self.queues = Queues(self.table)
        self.now = 0.0
        self.fatal_failure: Failure | None = None
        """Failure after which no shot can be rendered. `None` if there is none."""
        self.given_up: dict[str, str] = {}
        """Name -> location of processes that are not used any more, because they are sick or cannot load."""
        self._needed = frozenset(needed)
        self._breaker = breaker
        self._lost: dict[int, Request] = {}
        """Number of an attempt whose process was lost -> its call, as long as that has no result."""
        self._timers: list[tuple[float, int, Process | Request]] = []
        self._numbers = self._timer_numbers = 0
        self._evidence_changed = False
        """Something has changed that may decide about calls which wait for evidence."""
        self._decided: dict[Request, None] = {}
        """Calls of which an attempt has got a verdict, or whose time to wait for evidence is over."""
        self._out: list[m.Command] = []

    # What `Core` adds

    @abstractmethod
    def _attempt_failed(self, running: Running, request: Request, kind: Kind, failure: Failure) -> None:
        """Decide what follows for a call whose attempt has ended."""

    @abstractmethod
    def _fail_waiting(self, failure: Failure) -> None:
        """Fail all calls that wait for a process."""

    @abstractmethod
    def _forget_checks(self, process: Process) -> None:
        """Drop the checks that wait for this process."""

    @abstractmethod
    def _check_calls(self, process: Process) -> None:
        """The deadline of a process with calls has passed."""

    @property
    def quarantined(self) -> tuple[str, ...]:
        """Processes in quarantine or given up, with their nodes."""
        rows = (row.location for row in self.table.rows.values() if row.state is State.QUARANTINED)
        return (*rows, *self.given_up.values())

    # Events

    def _on_Added(self, event: m.Added) -> None:
        if event.process in self.table.rows:
            return
        process = self.table.add(event.process, event.spec)
        process.lost_at = self.now
        self._start(process, is_first=True)
        is_lost = self.fatal_failure is not None and self.fatal_failure.stage == NODE_LOST
        if is_lost and all(map(self.table.is_held, self._needed)):
            # Another node has come.
            self.fatal_failure = None

    def _on_Removed(self, event: m.Removed) -> None:
        if (process := self.table.rows.get(event.process)) is None:
            return
        reason = "not needed any more" if event.released else "its node is lost, and no other node has room"
        failure = _node_lost(f"{process.name}: {reason}", process.name)
        if event.released and process.calls:
            self.table.release(process, State.LEAVING)
            self._forget_checks(process)
            self._look_for_others(process, failure)
        else:
            self._leave(process, failure)

    def _on_Unplaceable(self, event: m.Unplaceable) -> None:
        self._set_fatal(_node_lost(event.reason, "cluster"))

    def _on_Placed(self, event: m.Placed) -> None:
        if (process := self._row(event.process, event.life)) is not None and process.state is State.STARTING:
            if process.node is not None and (event.node != process.node or event.pid == process.pid):
                # The process before was lost with its node, or only the connection to it was.
                self._forgive(process, Verdict.LOST)
            self.table.place(process, event.node, event.pid)
            self.queues.look_again(process.spec.stages)
            self._enter(process, State.STARTING, self.limits.load_silence_s)

    def _on_Ready(self, event: m.Ready) -> None:
        if (process := self._row(event.process, event.life)) is not None and process.state is State.STARTING:
            process.failed_loads, process.was_ready = 0, True
            process.calls_to_check = 1 if process.is_found_sick else self.limits.first_checked_call
            self._enter(process, State.LIVE)
            self._evidence_changed = True

    def _on_LoadFailed(self, event: m.LoadFailed) -> None:
        if (process := self._row(event.process, event.life)) is not None and process.state is State.STARTING:
            self._load_failed(process, event.failure)

    def _on_Died(self, event: m.Died) -> None:
        if (process := self._row(event.process, event.life)) is None or process.state is State.QUARANTINED:
            return
        if process.state is State.STARTING:
            self._load_failed(process, self._failure(process, LOADING, "WorkerDied", f"it crashed: {event.reason}"))
            return
        suspects = [process.calls[number] for number in event.suspects if number in process.calls]
        self._replace(process, _suspected(suspects, "WorkerDied", f"the process crashed: {event.reason}"), kill=False)

    def _on_Silent(self, event: m.Silent) -> None:
        process = self._row(event.process, event.life)
        if process is None or process.state in (State.QUARANTINED, State.STARTING):
            return
        self._out.append(m.Report(process.location, f"killed, because it has not responded for {event.seconds:.0f} s"))
        message = f"the process has not responded for {event.seconds:.0f} s"
        self._replace(process, _suspected(process.running, "TimedOut", message), kill=True)

    def _row(self, name: str, life: int) -> Process | None:
        """Return the row with this process. `None` if another process fills it, or if it has left the table."""
        process = self.table.rows.get(name)
        return process if process is not None and process.life == life else None

    # Starts

    def _start(self, process: Process, *, is_first: bool = False) -> None:
        """Let the next process of a row start."""
        process.life = self._next_number()
        self._enter(process, State.STARTING)
        self._out.append(m.Start(process.name, process.life, is_first))

    def _load_failed(self, process: Process, failure: Failure) -> None:
        process.failed_loads += 1
        is_setup = not process.was_ready and failure.error in SETUP_ERRORS
        if is_setup or process.failed_loads >= self.limits.load_attempts:
            self._give_up(process, failure)
            return
        self._out += (m.Report(process.location, f"cannot load its weights: {failure.message}"), m.Kill(process.name))
        self._enter(process, State.QUARANTINED, self.limits.restart_s)

    def _replace(self, process: Process, ended: Mapping[Running, tuple[Kind, str, str]], *, kill: bool) -> None:
        """Start a new process in a row. `ended`: how its calls have failed; the others are not the cause.

        `kill`: the process still runs.
        """
        calls, location = self._take_calls(process), process.location
        if process.state is State.LEAVING:
            self._leave(process, _node_lost(f"{process.name}: not needed any more", process.name))
        else:
            self._enter(process, State.STARTING)
        life = process.life
        for running, request in calls:
            kind, error, message = ended.get(running, (Kind.NOT_RUN, _RESTARTED.error, _RESTARTED.message))
            failure = Failure(stage=request.call.stage, error=error, message=message, attempts=1, worker=location)
            self._attempt_failed(running, request, kind, failure)
        # One of the failures may have quarantined it.
        if process.state is State.STARTING and process.life == life:
            if kill:
                self._out.append(m.Kill(process.name))
            self._start(process)

    def _take_calls(self, process: Process) -> list[tuple[Running, Request]]:
        """Take all calls from a row whose process is gone."""
        calls = [(each, each.request) for each in process.calls.values() if each.request is not None]
        for running, request in calls:
            del request.running[running.number]
            request.lost.append(running.number)
            self._lost[running.number] = request
        self.queues.reset(process)
        self._forget_checks(process)
        return calls

    # Quarantine

    def _blame(self, failed: FailedAttempt) -> None:
        """Count a failure against its process, and quarantine it if it fails for different shots in a row.

        After a quarantine, until it has finished a call, a single failure is enough, and one of the node always is.
        """
        process, request = self.table.rows.get(failed.process), failed.request
        if process is None or process.state is State.QUARANTINED or failed.at <= process.lost_at:
            # Another process has replaced it since, or will.
            self._judge(failed, Verdict.SICK)
            return
        process.failures[failed] = request.call
        calls = [call for each, call in process.failures.items() if not each.is_forgiven]
        # Neither several calls of a shot nor a call that several shots ask for are different shots.
        shots = min(len({call.order for call in calls}), len({call.keys if call.is_shared else call.order for call in calls}))
        is_due = shots >= (1 if failed.kind is Kind.NODE or process.quarantines else self.limits.failures)
        if is_due and (process.quarantines < self.limits.max_quarantines or self._may_give_up(process)):
            in_a_row = f"failed for {request.call.stage} on different shots in a row, the last time with: "
            self._quarantine(process, f"{'' if failed.kind is Kind.NODE else in_a_row}{failed.failure.message}")

    def _succeeded(self, process: Process, order: float) -> None:
        """A process has finished a call. Its earlier failures of other shots now count against those shots."""
        process.quarantines = 0
        if process.failures:
            for each in [each for each, call in process.failures.items() if call.order != order]:
                self._judge(each, Verdict.WELL)
                del process.failures[each]

    def _judge(self, failed: FailedAttempt, verdict: Verdict) -> None:
        failed.verdict = verdict
        self._decided[failed.request] = None
        self._evidence_changed = True

    def _forgive(self, process: Process, verdict: Verdict = Verdict.SICK) -> None:
        """The process is gone: its failures do not count against their shots."""
        for failed in process.failures:
            self._judge(failed, verdict)
        process.failures.clear()
        process.lost_at = self.now

    def _quarantine(self, process: Process, reason: str) -> None:
        """Restart a process, or give it up."""
        if process.state in (State.QUARANTINED, State.GONE):
            return
        process.quarantines += 1
        self._forgive(process)
        self._out.append(m.Report(process.location, reason))
        if process.quarantines >= self.limits.max_quarantines and self._may_give_up(process):
            self._give_up_sick(process, reason)
            return
        if process.state is State.LEAVING:
            self._leave(process, _node_lost(f"{process.name}: not needed any more", process.name))
            return
        calls = self._take_calls(process)
        self._out.append(m.Kill(process.name))
        self._enter(process, State.QUARANTINED, self.limits.restart_s)
        for running, request in calls:
            self._attempt_failed(running, request, Kind.NOT_RUN, _RESTARTED)

    def _may_give_up(self, process: Process) -> bool:
        """Return whether others can do the work of this process, or no circuit breaker stops the run if it is sick."""
        others = all(self.table.live(stage) - process.is_live > 0 for stage in process.spec.stages)
        return others or not self._breaker

    def _give_up_sick(self, process: Process, reason: str) -> None:
        message = f"{process.name}: {reason}, also after restarts"
        self._give_up(process, self._failure(process, "health", "Quarantined", message))

    def _give_up(self, process: Process, failure: Failure) -> None:
        """Stop to use a process. Its next process loads nothing, so that its GPU has free memory."""
        self.given_up[process.name] = process.location
        self._out.append(m.Kill(process.name))
        self._leave(process, failure)

    def _leave(self, process: Process, failure: Failure) -> None:
        """Remove a row. `failure`: that of the engine, if it was the last one with a stage."""
        calls, was_leaving = self._take_calls(process), process.state is State.LEAVING
        self._forgive(process)
        self.table.remove(process)
        self._out.append(m.Release(process.name))
        if not was_leaving:
            self._look_for_others(process, failure)
        for running, request in calls:
            self._attempt_failed(running, request, Kind.NOT_RUN, _RESTARTED)

    def _look_for_others(self, process: Process, failure: Failure) -> None:
        """The calls that wait need other rows than this one."""
        if not all(map(self.table.is_held, process.spec.stages)):
            self._set_fatal(failure)
        self.queues.look_again(process.spec.stages)

    def _set_fatal(self, failure: Failure) -> None:
        self.fatal_failure = self.fatal_failure or failure
        self._fail_waiting(self.fatal_failure)

    @staticmethod
    def _failure(process: Process, stage: str, error: str, message: str) -> Failure:
        return Failure(stage=stage, error=error, message=message, attempts=1, worker=process.location)

    # Time

    def _next_number(self) -> int:
        """Return the number of a call, or of the life of a process: a later row of the same name has other ones."""
        self._numbers += 1
        return self._numbers

    def _enter(self, process: Process, state: State, seconds: float = math.inf) -> None:
        self.table.enter(process, state, self.now + seconds)
        self._wake_at(process, process.deadline)

    def _wake_at(self, owner: Process | Request, when: float) -> None:
        if isinstance(owner, Process):
            if when >= owner.timer:
                return
            owner.timer = when
        if when < math.inf:
            self._timer_numbers += 1
            heappush(self._timers, (when, self._timer_numbers, owner))

    def _extend_deadlines(self, seconds: float) -> None:
        """The driver, and maybe all processes, were suspended for this long: no deadline passes because of that.

        Results may wait to be read.
        """
        soonest = self.now + self.limits.late_s
        for process in self.table.rows.values():
            for running in process.calls.values():
                running.extend(seconds, soonest)
            if process.state is not State.QUARANTINED:
                process.deadline = max(process.deadline + seconds, soonest)

    def _due(self, process: Process) -> None:
        """The deadline of a row has passed."""
        if process.state is State.QUARANTINED:
            self._start(process)
        elif process.state is State.STARTING:
            seconds = self.limits.load_silence_s
            message = f"{process.name} hangs while it loads its weights: it has neither read nor computed for {seconds:.0f} s"
            self._load_failed(process, self._failure(process, LOADING, "TimedOut", message))
        else:
            self._check_calls(process)


def _suspected(calls: Sequence[Running], error: str, message: str) -> dict[Running, tuple[Kind, str, str]]:
    """Return how calls have failed that may have stopped their process. Of several, each runs again alone."""
    return dict.fromkeys(calls, (Kind.ERROR if len(calls) == 1 else Kind.SHARED_CRASH, error, message))


def _node_lost(message: str, worker: str) -> Failure:
    return Failure(stage=NODE_LOST, error="NodeLost", message=message, attempts=1, worker=worker)
