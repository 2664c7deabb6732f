"""Client of one Ray actor: ordered calls, a timeout per call, and attribution of crashes to calls."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray

from vidgen_ray.engine.worker import ActorPlace
from vidgen_ray.engine.retries import InputsLost, first_line
from vidgen_ray.outputs.records import Failure

MAX_CRASHES_WHILE_LOADING = 3
"""Crashes in a row while loading before the actor is given up."""
RETRY_S = 0.2
"""Seconds between two attempts to reach an actor that restarts."""
NODE_DIED = "node has died"
"""Part of Ray's error text when an actor was lost with its node. No call caused that."""
NOT_SENT = "The actor is restarting"
"""Part of Ray's error text when a call was never sent: its process was already dead."""


class ActorCallFailed(Exception):
    """The actor crashed, was lost or timed out during the call.

    `caused_crash` is set if no other call can be the cause. `may_have_caused_crash` is set if the process crashed with
    several pending calls: the result of one call can be lost when the next one crashes the process.
    """

    def __init__(
        self, reason: str, message: str, *, worker: str, caused_crash: bool = False, may_have_caused_crash: bool = False
    ) -> None:
        self.reason = reason
        self.caused_crash = caused_crash
        self.may_have_caused_crash = may_have_caused_crash
        self.worker = worker
        super().__init__(message)


@dataclass(eq=False, slots=True)
class _Call:
    stage: str
    turn: asyncio.Event
    """Set when all earlier calls have returned."""


class ActorClient:
    """Client of one actor. Calls run one after another, in order."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self.name = name
        self.place: ActorPlace | None = None
        self._killed_place: ActorPlace | None = None
        """Place of the process that was killed last. It may still respond for a short time."""
        self._calls: deque[_Call] = deque()
        self._generation = 0
        self._suspects: list[_Call] = []
        """Calls that were pending when the last process crashed. One of them may be the cause."""

    async def ready(self) -> Failure | None:
        """Wait until a new process has loaded its weights. Return the failure if it never will."""
        crashes = 0
        while True:
            try:
                place = await self._actor.place.remote()
                if place == self._killed_place:
                    # Ray has not killed the process yet.
                    await asyncio.sleep(RETRY_S)
                    continue
            # A restart may take long: the node may be lost and its replacement not there yet.
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(RETRY_S)
                continue
            # The actor is dead for good, or never started: its runtime environment cannot be set up.
            except ray.exceptions.RayError as error:
                return self._loading_failed(1, error)
            try:
                failure: Failure | None = await self._actor.load.remote()
            except ray.exceptions.RayActorError as error:
                crashes += 1
                if crashes > MAX_CRASHES_WHILE_LOADING:
                    return self._loading_failed(crashes, error)
            else:
                self.place = place
                return failure

    def _loading_failed(self, crashes: int, error: Exception) -> Failure:
        message = f"{self.name} did not start (attempts: {crashes}): {first_line(error)}"
        return Failure(stage="loading", error="WorkerDied", message=message, attempts=crashes, worker=self.name)

    async def call(self, method: str, *args: Any, stage: str, timeout_s: float, num_returns: int = 1) -> Any:
        """Return the method's result. With several results, return the first one and references to the others.

        `stage` is what `running` reports during the call. The timeout starts when all earlier calls have returned. On
        timeout the process is killed and restarted.
        Raises ActorCallFailed and InputsLost.
        """
        generation = self._generation
        call = _Call(stage, asyncio.Event())
        self._calls.append(call)
        self._calls[0].turn.set()
        returned = getattr(self._actor, method).options(num_returns=num_returns).remote(*args)
        first, *rest = returned if num_returns > 1 else [returned]
        pending = asyncio.ensure_future(first)
        own_turn = asyncio.ensure_future(call.turn.wait())
        try:
            await asyncio.wait([pending, own_turn], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([pending], timeout=timeout_s)
            if not pending.done():
                self.restart()
                raise ActorCallFailed(
                    "TimedOut", f"{method} took longer than {timeout_s:g} s", caused_crash=True, worker=self.location
                )
            result = pending.result()
        except ray.exceptions.RayActorError as error:
            self._record_crash(generation, [] if NODE_DIED in str(error) else list(self._calls))
            may_have_caused_crash, alone = call in self._suspects and NOT_SENT not in str(error), len(self._suspects) == 1
            raise ActorCallFailed(
                "WorkerDied",
                f"the process crashed: {first_line(error)}",
                worker=self.location,
                caused_crash=may_have_caused_crash and alone,
                may_have_caused_crash=may_have_caused_crash and not alone,
            ) from None
        except ray.exceptions.ObjectLostError as error:
            raise InputsLost(first_line(error)) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                raise InputsLost(first_line(error.cause)) from None
            # Raise the original error instead of Ray's wrapper.
            raise error.cause or error from None
        except ray.exceptions.RayError as error:
            raise ActorCallFailed("WorkerDied", first_line(error), worker=self.location, caused_crash=True) from None
        finally:
            pending.cancel()
            own_turn.cancel()
            self._calls.remove(call)
            if self._calls:
                self._calls[0].turn.set()
        return (result, *rest) if rest else result

    def send(self, method: str, *args: Any) -> None:
        """Call a method and ignore its result."""
        getattr(self._actor, method).remote(*args)

    def restart(self) -> None:
        """Kill the process. Ray restarts it."""
        self._record_crash(self._generation, [])
        self._killed_place = self.place
        ray.kill(self._actor, no_restart=False)

    @property
    def running(self) -> str | None:
        """Stage of the running call. `None` if the actor is idle."""
        return self._calls[0].stage if self._calls else None

    @property
    def location(self) -> str:
        """Name, node and pid, for failure records."""
        return f"{self.name} ({self.place.node[:8]}:{self.place.pid})" if self.place else self.name

    def _record_crash(self, generation: int, suspects: list[_Call]) -> None:
        """Record the possible causes of a crash, once per process. All pending calls fail, in any order."""
        if generation == self._generation:
            self._generation += 1
            self._suspects = suspects
