"""An actor of ours as the director sees it: calls in order, a time limit for each, and who is to blame when it dies."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray

from vidgen_ray.batch.worker import ActorPlace
from vidgen_ray.engine.retries import InputsLost, first_line
from vidgen_ray.outputs.records import Failure

DEATHS_WHILE_LOADING = 3
"""After so many in a row an actor is given up."""
RETRY_S = 0.2
NODE_DIED = "node has died"
"""In Ray's account of an actor that went with its machine, for which no line is to blame."""
NOT_SENT = "The actor is restarting"
"""In Ray's account of a call that no process has seen: the one it was meant for was dead already, and nobody knew yet."""


class ActorCallFailed(Exception):
    """The call will not be answered.

    It is `blamed` where nothing else can be the reason, and one of several `suspects` where the process died with more than
    one call in hand: the answer of a call may be lost with the process that died of the next.
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
    """Set when the calls before are answered."""


class ActorClient:
    """Calls one actor. Its calls run one after another, in order."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self.name = name
        self.place: ActorPlace | None = None
        self._ended: ActorPlace | None = None
        """Where the process is, or was, that was told to end last: it answers for a while."""
        self._calls: deque[_Call] = deque()
        self._generation = 0
        self._suspects: list[_Call] = []
        """What the last process had in hand when it died, for which a call may be the reason."""

    async def ready(self) -> Failure | None:
        """Wait until a process is up, and not one that was told to end, and has its weights; or why there will be none."""
        deaths = 0
        while True:
            try:
                place = await self._actor.place.remote()
                if place == self._ended:
                    # Ray has not got round to it.
                    await asyncio.sleep(RETRY_S)
                    continue
            # A process that starts again may take its time: its machine may be lost, and another not there yet.
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(RETRY_S)
                continue
            # Dead for good, or never born: its environment cannot be set up there.
            except ray.exceptions.RayError as error:
                return self._given_up(1, error)
            try:
                failure: Failure | None = await self._actor.load.remote()
            except ray.exceptions.RayActorError as error:
                deaths += 1
                if deaths > DEATHS_WHILE_LOADING:
                    return self._given_up(deaths, error)
            else:
                self.place = place
                return failure

    def _given_up(self, deaths: int, error: Exception) -> Failure:
        message = f"{self.name} died {deaths} times before it was ready: {first_line(error)}"
        return Failure(stage="loading", error="WorkerDied", message=message, attempts=deaths, worker=self.name)

    async def call(self, method: str, *args: Any, stage: str, timeout_s: float, num_returns: int = 1) -> Any:
        """The method's answer, or, of several results, the first and the references of the others.

        `stage` is what the call counts as while it runs. The time counts from when the calls before are answered; when it is
        up the process is killed, and starts again.
        Raises ActorCallFailed and InputsLost.
        """
        generation = self._generation
        call = _Call(stage, asyncio.Event())
        self._calls.append(call)
        self._calls[0].turn.set()
        returned = getattr(self._actor, method).options(num_returns=num_returns).remote(*args)
        first, *rest = returned if num_returns > 1 else [returned]
        answered = asyncio.ensure_future(first)
        waiting = asyncio.ensure_future(call.turn.wait())
        try:
            await asyncio.wait([answered, waiting], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([answered], timeout=timeout_s)
            if not answered.done():
                self.restart()
                raise ActorCallFailed(
                    "TimedOut", f"{method} took longer than {timeout_s:g} s", caused_crash=True, worker=self.where
                )
            answer = answered.result()
        except ray.exceptions.RayActorError as error:
            self._died(generation, [] if NODE_DIED in str(error) else list(self._calls))
            may_have_caused_crash, alone = call in self._suspects and NOT_SENT not in str(error), len(self._suspects) == 1
            raise ActorCallFailed(
                "WorkerDied",
                f"the process died: {first_line(error)}",
                worker=self.where,
                caused_crash=may_have_caused_crash and alone,
                may_have_caused_crash=may_have_caused_crash and not alone,
            ) from None
        except ray.exceptions.ObjectLostError as error:
            raise InputsLost(first_line(error)) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                raise InputsLost(first_line(error.cause)) from None
            # What went wrong there, not Ray's account of it.
            raise error.cause or error from None
        except ray.exceptions.RayError as error:
            raise ActorCallFailed("WorkerDied", first_line(error), worker=self.where, caused_crash=True) from None
        finally:
            answered.cancel()
            waiting.cancel()
            self._calls.remove(call)
            if self._calls:
                self._calls[0].turn.set()
        return (answer, *rest) if rest else answer

    def tell(self, method: str, *args: Any) -> None:
        """Call without an answer."""
        getattr(self._actor, method).remote(*args)

    def restart(self) -> None:
        """End the process; Ray starts it again."""
        self._died(self._generation, [])
        self._ended = self.place
        ray.kill(self._actor, no_restart=False)

    @property
    def running(self) -> str | None:
        """The stage of the call that runs."""
        return self._calls[0].stage if self._calls else None

    @property
    def where(self) -> str:
        return f"{self.name} ({self.place.node[:8]}:{self.place.pid})" if self.place else self.name

    def _died(self, generation: int, suspects: list[_Call]) -> None:
        """Note what may be the reason, once for each process: all calls in hand hear of its death, in any order."""
        if generation == self._generation:
            self._generation += 1
            self._suspects = suspects
