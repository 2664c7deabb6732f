"""Client of one Ray actor: ordered calls, a timeout per call, and attribution of crashes to calls."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Any

import ray

from vidgen_ray.engine.calls import LOADING
from vidgen_ray.engine.ray_cluster import process_of
from vidgen_ray.engine.retries import InputsLost, Kind, first_line
from vidgen_ray.engine.worker import ActorPlace
from vidgen_ray.outputs.records import Failure

MAX_CRASHES_WHILE_LOADING = 3
"""Crashes in a row while loading before the load has failed."""
LOAD_CHECK_S = 30.0
"""Seconds between two looks at a process that starts or loads its weights."""
LOAD_SILENCE_S = 300.0
"""Seconds after which a load without activity hangs, and a process that has started but does not respond is frozen."""
MIN_ACTIVITY = 2.0
"""CPU seconds and MB read in LOAD_CHECK_S that are activity. Ray's own threads need less."""
SILENT_S = 60.0
"""Seconds without a response to a ping after which a process is killed: it is frozen, or its node does not respond."""
CANCEL_S = 60.0
"""Seconds without a step after which the process of a cancelled call is killed. Only a large clip on a CPU takes longer."""
LATE_S = 5.0
"""If a timeout ends this much too late, the driver itself was stopped, and responses may wait to be read."""
RETRY_S = 0.2
"""Seconds between two attempts to reach an actor that restarts."""
NOT_SENT = "The actor is restarting"
"""Part of Ray's error text when a call was never sent: its process was already dead."""


class ActorCallFailed(Exception):
    """The actor crashed, was lost or timed out during the call.

    A crash with several pending calls is of the kind SHARED_CRASH: the result of one call can be lost when the next one crashes
    the process.
    """

    def __init__(self, error: str, message: str, kind: Kind, worker: str) -> None:
        self.error = error
        self.kind = kind
        self.worker = worker
        super().__init__(message)

    def failure(self, stage: str) -> Failure:
        return Failure(stage=stage, error=self.error, message=str(self), attempts=1, worker=self.worker)


class Ping(Enum):
    """Result of a ping."""

    UP = "up"
    DOWN = "down"
    """The process has crashed or was replaced."""
    SILENT = "silent"
    """No response."""


@dataclass(eq=False, slots=True)
class _Call:
    stage: str
    timeout_s: float
    number: object
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))

    def start(self) -> None:
        """Start the timeout: no longer are all places taken by earlier calls."""
        if self.limit.when() is None:
            self.limit.reschedule(asyncio.get_running_loop().time() + self.timeout_s)

    def shorten(self, timeout_s: float) -> None:
        """Let the call time out after these seconds from now, or from its start, unless it does so earlier."""
        self.timeout_s = min(self.timeout_s, timeout_s)
        ends, soon = self.limit.when(), asyncio.get_running_loop().time() + timeout_s
        if ends is not None and ends > soon:
            self.limit.reschedule(soon)


class ActorClient:
    """Client of one actor. `parallel` calls run at once, in order. Use it inside an event loop."""

    def __init__(self, actor: Any, name: str, parallel: int = 1) -> None:
        self._actor = actor
        self._parallel = parallel
        self.name = name
        self.place: ActorPlace | None = None
        self.load_s = 0.0
        """Seconds in which the last process has loaded its weights, with waiting for other processes of the machine."""
        self._killed_place: ActorPlace | None = None
        """Place of the process that was killed last. It may still respond for a short time."""
        self._calls: deque[_Call] = deque()
        self._generation = 0
        self._up = False
        """True if a process has loaded its weights and was not lost or killed since."""
        self._suspects: list[_Call] = []
        """Calls that were pending when the last process crashed. One of them may be the cause."""
        self.has_moved = False
        """True if the process that loaded last is on another node than the one before, or is that same process: the other one
        was lost with its node, or only its connection was."""

    async def ready(self) -> Failure | None:
        """Wait until a process has loaded its weights. Return the failure if it cannot load them or does not start."""
        crashes = 0
        self.has_moved = False
        while True:
            try:
                place = await self._placed()
            except ray.exceptions.RayError as error:
                # The actor is dead for good, or never started: its runtime environment cannot be set up.
                return self._loading_failed(1, error)
            before, self.place = self.place, place
            self.has_moved |= before is not None and (before.node != place.node or before.pid == place.pid)
            begun = time.monotonic()
            try:
                failure = await self._load()
            except ray.exceptions.RayActorError as error:
                crashes += 1
                if crashes > MAX_CRASHES_WHILE_LOADING:
                    return self._loading_failed(crashes, error)
            else:
                self._up, self.load_s = failure is None, time.monotonic() - begun
                return failure

    async def _placed(self) -> ActorPlace:
        """Wait until a process responds. Raises RayError if there will be none."""
        watch = asyncio.ensure_future(self._kill_if_frozen())
        try:
            while True:
                try:
                    place: ActorPlace = await self._actor.place.remote()
                except ray.exceptions.RayError as error:
                    # A restart may take long: the node may be lost and its replacement not there yet.
                    if not _is_restarting(error):
                        raise
                else:
                    # Otherwise Ray has not killed the process yet.
                    if place != self._killed_place:
                        return place
                await asyncio.sleep(RETRY_S)
        finally:
            watch.cancel()

    async def _kill_if_frozen(self) -> None:
        """Kill each process that has started and does not respond. While no node has room for one, there is no deadline."""
        last, silent_s = None, 0.0
        while True:
            await asyncio.sleep(LOAD_CHECK_S)
            process = await asyncio.to_thread(process_of, self._actor)
            silent_s = silent_s + LOAD_CHECK_S if process is not None and process == last else 0.0
            last = process
            if silent_s > LOAD_SILENCE_S:
                ray.kill(self._actor, no_restart=False)
                silent_s = 0.0

    async def _load(self) -> Failure | None:
        """Load the weights. Return the failure if that is impossible, or if the load hangs; then the process is killed."""
        loading = asyncio.wrap_future(self._actor.load.remote().future())
        loop, activity = asyncio.get_running_loop(), 0.0
        active = loop.time()
        try:
            while True:
                if (await asyncio.wait([loading], timeout=LOAD_CHECK_S))[0]:
                    failure: Failure | None = loading.result()
                    return failure
                now: float | None = activity
                with suppress(TimeoutError, ray.exceptions.RayError):
                    async with asyncio.timeout(LOAD_CHECK_S):
                        now = await self._actor.activity.remote()
                if now is None or now - activity >= MIN_ACTIVITY:
                    activity, active = now or 0.0, loop.time()
                elif (silent_s := loop.time() - active) > LOAD_SILENCE_S:
                    self.restart()
                    message = (
                        f"{self.name} hangs while it loads its weights: it has neither read nor computed for {silent_s:.0f} s"
                    )
                    return Failure(stage=LOADING, error="TimedOut", message=message, attempts=1, worker=self.location)
        finally:
            loading.cancel()

    def _loading_failed(self, crashes: int, error: Exception) -> Failure:
        message = f"{self.name} did not start (attempts: {crashes}): {first_line(error)}"
        return Failure(stage=LOADING, error="WorkerDied", message=message, attempts=crashes, worker=self.name)

    async def call(self, method: str, *args: Any, stage: str, timeout_s: float, num_returns: int = 1) -> Any:
        """Return the method's result. With several results, return the last one, and then references to the others.

        `stage` is what `running` reports during the call. The timeout starts when all earlier calls have returned. On
        timeout the process is killed and restarted.
        Raises ActorCallFailed and InputsLost.
        """
        generation, was_up = self._generation, self._up
        call = _Call(stage, timeout_s, args[0] if args else None)
        returned = getattr(self._actor, method).options(num_returns=num_returns).remote(*args)
        *rest, last = [returned] if num_returns == 1 else returned
        self._calls.append(call)
        try:
            result = await self._response(call, asyncio.wrap_future(last.future()))
        except ray.exceptions.RayActorError as error:
            if was_up:
                self._record_crash(generation, list(self._calls))
            # The scheduler may have chosen the process before it was killed, and the killed one may still take calls.
            if not was_up or call not in self._suspects or NOT_SENT in str(error):
                kind = Kind.NOT_RUN
            else:
                kind = Kind.ERROR if len(self._suspects) == 1 else Kind.SHARED_CRASH
            message = f"the process crashed: {first_line(error)}"
            raise ActorCallFailed("WorkerDied", message, kind, self.location) from None
        except ray.exceptions.ObjectLostError as error:
            raise InputsLost(first_line(error)) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                raise InputsLost(first_line(error.cause)) from None
            if isinstance(error.cause, ray.exceptions.RayError):
                raise self._node_failed(error.cause) from None
            # Raise the original error instead of Ray's wrapper.
            raise error.cause or error from None
        except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
            raise self._node_failed(error) from None
        except ray.exceptions.RayError as error:
            raise ActorCallFailed("WorkerDied", first_line(error), Kind.ERROR, self.location) from None
        except TimeoutError:
            self.restart()
            message = f"{method} took longer than {timeout_s:g} s"
            raise ActorCallFailed("TimedOut", message, Kind.ERROR, self.location) from None
        finally:
            self._calls.remove(call)
            self._start_timeouts()
        return (result, *rest) if rest else result

    def _node_failed(self, error: ray.exceptions.RayError) -> ActorCallFailed:
        name = type(error).__name__
        message = f"Ray could not store its result: {name}: {first_line(error)}. Free disk space and memory of its node"
        return ActorCallFailed(name, message, Kind.NODE, self.location)

    def _start_timeouts(self) -> None:
        for call in islice(self._calls, self._parallel):
            call.start()

    async def _response(self, call: _Call, response: asyncio.Future[Any]) -> Any:
        """Return the result of a call. Raises TimeoutError."""
        try:
            async with call.limit:
                self._start_timeouts()
                return await asyncio.shield(response)
        except TimeoutError:
            ended = call.limit.when()
            if ended is None or asyncio.get_running_loop().time() < ended + LATE_S:
                raise
            async with asyncio.timeout(LATE_S):
                return await response
        finally:
            response.cancel()

    async def ping(self) -> Ping:
        """Return whether the process responds, beside its calls."""
        loop = asyncio.get_running_loop()
        pinged = asyncio.wrap_future(self._actor.place.remote().future())
        try:
            while True:
                before = loop.time()
                if (await asyncio.wait([pinged], timeout=SILENT_S))[0]:
                    return Ping.UP if pinged.exception() is None and pinged.result() == self.place else Ping.DOWN
                if loop.time() < before + SILENT_S + LATE_S:
                    return Ping.SILENT
        finally:
            pinged.cancel()

    def cancel(self, number: int) -> None:
        """Stop the call with this number at its next step. The process is killed if that takes longer than CANCEL_S."""
        self.send("cancel", number)
        for call in self._calls:
            if call.number == number:
                call.shorten(CANCEL_S)

    def send(self, method: str, *args: Any) -> Any:
        """Call a method without waiting. Return the reference of its result."""
        return getattr(self._actor, method).remote(*args)

    def restart(self, *, blame_running: bool = False) -> None:
        """Kill the process. Ray restarts it. `blame_running`: its running call is the possible cause."""
        self._record_crash(self._generation, list(self._calls)[:blame_running])
        self._killed_place = self.place
        ray.kill(self._actor, no_restart=False)

    @property
    def running(self) -> str | None:
        """Stage of the running call. `None` if the actor is idle."""
        return self._calls[0].stage if self._calls else None

    @property
    def node(self) -> str | None:
        """Ray node id. `None` before the process has started."""
        return self.place.node if self.place else None

    @property
    def location(self) -> str:
        """Name, node and pid, for failure records."""
        return f"{self.name} ({self.place.node[:8]}:{self.place.pid})" if self.place else self.name

    def permanent_failure(self, reason: str) -> Failure:
        """Return the failure of an actor that is given up after too many quarantines. `reason`: of the last one."""
        message = f"{self.name}: {reason}, also after restarts"
        return Failure(stage="health", error="Quarantined", message=message, attempts=1, worker=self.location)

    def _record_crash(self, generation: int, suspects: list[_Call]) -> None:
        """Record the possible causes of a crash, once per process. All pending calls fail, in any order."""
        if generation == self._generation:
            self._generation += 1
            self._up = False
            self._suspects = suspects


def _is_restarting(error: ray.exceptions.RayError) -> bool:
    """Return whether Ray restarts the actor. On a node that was drained for preemption, Ray reports it as dead meanwhile."""
    preempted = isinstance(error, ray.exceptions.ActorDiedError) and error.preempted
    return preempted or isinstance(error, ray.exceptions.ActorUnavailableError)
