"""Supervision of the workers and encoders of an engine: start-up, pings, restarts, quarantine of processes and nodes, and
giving up.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from vidgen_ray.engine.actor_client import SILENT_S, ActorClient, Ping
from vidgen_ray.engine.calls import LOADING
from vidgen_ray.engine.retries import AttemptFailed, Kind, Verdict
from vidgen_ray.engine.status import Attempt, EngineObserver
from vidgen_ray.outputs.records import Failure

FAILURES = 3
"""Failures in a row, on different shots, before a process is quarantined."""
BACK_OFF_S = 1.0
"""Seconds before the first restart of a quarantined process. Doubled with each further quarantine in a row."""
MAX_BACK_OFF_S = 300.0
MAX_QUARANTINES = 3
"""Quarantines in a row after which a process is given up. If it was the last one with its stages, the engine stops, unless its
circuit breaker decides: then the process stays in use."""
NODE_QUARANTINES = 2
"""Fewest processes of a node in quarantine at the same time after which the whole node may be quarantined."""
NODE_SHARE = 0.5
"""Share of them among the processes of the node. Two sick GPUs do not stop the other six of their node."""


@dataclass(slots=True)
class _History:
    node: str | None = None
    failures: dict[AttemptFailed, Hashable] = field(default_factory=dict)
    """Failed attempts since the process has finished a call, and their shots."""
    quarantines: list[tuple[AttemptFailed, ...]] = field(default_factory=list)
    """Quarantines in a row: for each, the failures before it. Empty if its node was quarantined."""
    quarantined: bool = False
    lost_at: float = -math.inf
    """`time.monotonic()` when the last process was quarantined or found to be lost."""


class ProcessHealth:
    """Failure records of the processes of one engine. A process is any hashable object."""

    def __init__(self) -> None:
        self._records: defaultdict[Hashable, _History] = defaultdict(_History)

    def started(self, process: Hashable, node: str | None) -> None:
        """The process is up. Its quarantine, if any, becomes a probation. `node`: the one that its failures may show sick."""
        record = self._records[process]
        record.node, record.quarantined = node, False

    def succeeded(self, process: Hashable, shot: Hashable) -> None:
        """Record a finished call. Earlier failures of other shots now count against those shots."""
        record = self._records[process]
        record.quarantines.clear()
        others = [attempt for attempt, failed in record.failures.items() if failed != shot]
        for attempt in others:
            attempt.verdict = Verdict.WELL
            del record.failures[attempt]

    def failed(self, process: Hashable, shot: Hashable, attempt: AttemptFailed) -> bool:
        """Record a failed call for a shot. Return whether the process must be quarantined now.

        On probation, a single failure is enough, and one of the node always is. Failures that are forgiven, also later, do
        not count.
        """
        record = self._records[process]
        if record.quarantined or attempt.verdict is Verdict.SICK or attempt.failed_at <= record.lost_at:
            # Another process has replaced it since, or will. The second call of a slow one fails before it is waited for.
            attempt.verdict = Verdict.SICK
            return False
        record.failures[attempt] = shot
        shots = {shot for attempt, shot in record.failures.items() if not attempt.forgiven}
        return len(shots) >= (1 if attempt.kind is Kind.NODE or self.is_on_probation(process) else FAILURES)

    def quarantine(self, process: Hashable) -> float:
        """Quarantine a process. Return the seconds before its restart."""
        record = self._records[process]
        record.quarantined = True
        record.quarantines.append(tuple(record.failures))
        self.lost(process)
        return float(min(MAX_BACK_OFF_S, BACK_OFF_S * 2 ** (len(record.quarantines) - 1)))

    def lost(self, process: Hashable) -> None:
        """The process is gone or quarantined: its failures do not count against their shots."""
        record = self._records[process]
        for attempt in record.failures:
            attempt.verdict = Verdict.SICK
        record.failures.clear()
        record.lost_at = time.monotonic()

    def quarantines(self, process: Hashable) -> int:
        """Return the number of quarantines since the process has finished a call, without those for wrong shots."""
        quarantines = self._records[process].quarantines
        return sum(not failures or any(not each.forgiven for each in failures) for failures in quarantines)

    def forget(self, process: Hashable) -> None:
        """The process is gone for good."""
        self._records.pop(process, None)

    def is_on_probation(self, process: Hashable) -> bool:
        return self.quarantines(process) > 0

    def node_to_quarantine(self, process: Hashable) -> str | None:
        """Return the node of the process if it must be quarantined as a whole, because half of them are."""
        node = self._records[process].node
        if node is None:
            return None
        quarantined = [record.quarantined for record in self._records.values() if record.node == node]
        return node if sum(quarantined) >= max(NODE_QUARANTINES, NODE_SHARE * len(quarantined)) else None


LOAD_ATTEMPTS = 3
"""Attempts to load the weights, each in a new process, before a process is given up."""
LOAD_BACK_OFF_S = 1.0
"""Seconds before the second attempt. Doubled for the third: the memory of the previous process may not be free yet."""
PING_S = 10.0
"""Seconds between two pings of a process."""
RELEASED = "Released"
"""Error of a process that is given up because it is not needed. It is well."""
SETUP_ERRORS = ("MissingWeights", "ProfileError", "SetupError")
"""Errors of a first load that another attempt cannot avoid."""


class Supervisor:
    """Supervises processes. Create it inside the event loop."""

    def __init__(
        self,
        observer: EngineObserver,
        *,
        may_give_up: Callable[[ActorClient], bool],
        on_up: Callable[[ActorClient], None],
        on_down: Callable[[ActorClient], None],
        on_given_up: Callable[[ActorClient, Failure], None],
    ) -> None:
        """`may_give_up` tells whether a process that was quarantined too often can be spared.

        `on_up`: a process has loaded its weights. `on_down`: it has crashed or is quarantined, and starts again.
        `on_given_up`: it is not used any more.
        """
        self._observer = observer
        self._may_give_up = may_give_up
        self._on_up = on_up
        self._on_down = on_down
        self._on_given_up = on_given_up
        self._health = ProcessHealth()
        self._clients: dict[ActorClient, bool] = {}
        """Processes, and whether their work is that of another machine."""
        self._up: dict[ActorClient, asyncio.Task[None]] = {}
        """Processes that have loaded their weights, and the tasks that ping them."""
        self._starting: dict[ActorClient, asyncio.Task[None]] = {}
        self._quarantined: dict[ActorClient, None] = {}
        self._given_up: dict[ActorClient, Failure] = {}

    def add(self, client: ActorClient, *, is_remote: bool) -> None:
        """Add a process that starts. `is_remote`: its failures are those of a server, not of its node."""
        self._clients[client] = is_remote
        self._start(client)

    def remove(self, name: str, failure: Failure) -> None:
        """Give up a process that is gone for good. No effect if there is none with this name."""
        for client in [client for client in self._clients if client.name == name and client not in self._given_up]:
            self._give_up(client, failure)

    def forget(self, client: ActorClient) -> None:
        """Drop what is known of a process that was removed and has no calls."""
        self._health.forget(client)
        del self._clients[client], self._given_up[client]

    def close(self) -> None:
        """Cancel the background tasks."""
        for task in (*self._starting.values(), *self._up.values()):
            task.cancel()

    # State

    @property
    def given_up(self) -> Mapping[ActorClient, Failure]:
        """Processes that are not used any more, in order, and their failures."""
        return self._given_up

    @property
    def quarantined(self) -> list[str]:
        """Processes in quarantine or given up, with their nodes."""
        given_up = (client for client, failure in self._given_up.items() if failure.error != RELEASED)
        return [client.location for client in (*self._quarantined, *given_up)]

    def is_starting(self, client: ActorClient) -> bool:
        """Return whether the process starts, or waits for that in quarantine."""
        return client in self._starting

    def is_on_probation(self, client: ActorClient) -> bool:
        """Return whether the process was quarantined and has not succeeded since."""
        return self._health.is_on_probation(client)

    # Events

    def succeeded(self, client: ActorClient, shot: Hashable) -> None:
        """Record a successful call."""
        self._health.succeeded(client, shot)

    def failed(self, client: ActorClient, shot: Hashable, attempt: AttemptFailed, reason: str) -> None:
        """Record a failed call for a shot. Quarantines the process if it fails for different shots in a row."""
        due = self._health.failed(client, shot, attempt)
        if due and (self._health.quarantines(client) < MAX_QUARANTINES or self._may_give_up(client)):
            self._quarantine(client, reason)

    def found_sick(self, client: ActorClient, reason: str, again: bool) -> None:
        """Quarantine a process that makes wrong results without failing. `again`: also after its last quarantine."""
        if again and self._may_give_up(client):
            self._observer.quarantined(client.location, reason)
            self._give_up_sick(client, reason)
        else:
            self._quarantine(client, reason)

    def crashed(self, client: ActorClient) -> None:
        """Wait until the next process has loaded its weights. No effect if the process is down already."""
        if client in self._up:
            self._down(client)
            self._start(client)

    def _down(self, client: ActorClient) -> None:
        if (pings := self._up.pop(client, None)) is not None and pings is not asyncio.current_task():
            pings.cancel()
        self._on_down(client)

    async def _ping(self, client: ActorClient) -> None:
        """Kill the process if it is silent. If it crashed while it was idle, wait for the next one."""
        while True:
            await asyncio.sleep(PING_S)
            response = await client.ping()
            if response is Ping.SILENT:
                self._observer.quarantined(client.location, f"killed, because it has not responded for {SILENT_S:.0f} s")
                client.restart(blame_running=True)
            if response is not Ping.UP:
                self.crashed(client)
                return

    def _quarantine(self, client: ActorClient, reason: str) -> None:
        """Restart a process after a back-off, or give it up. If several processes of its node are sick, the rest follows."""
        if client in self._quarantined or client in self._given_up:
            return
        self._quarantined[client] = None
        delay_s = self._health.quarantine(client)
        self._observer.quarantined(client.location, reason)
        if self._health.quarantines(client) >= MAX_QUARANTINES and self._may_give_up(client):
            self._give_up_sick(client, reason)
            return
        if (starting := self._starting.pop(client, None)) is not None:
            starting.cancel()
        self._down(client)
        client.restart()
        self._start(client, delay_s)
        if (node := self._health.node_to_quarantine(client)) is not None:
            on_node = [other for other, is_remote in self._clients.items() if other.node == node and not is_remote]
            for other in on_node:
                self._quarantine(other, "several processes of its node are quarantined")

    def _give_up_sick(self, client: ActorClient, reason: str) -> None:
        """Give up a process after quarantines. Its next process loads nothing, so that its GPU has free memory."""
        self._give_up(client, client.permanent_failure(reason))
        client.restart()

    def _give_up(self, client: ActorClient, failure: Failure) -> None:
        if (starting := self._starting.pop(client, None)) is not None:
            starting.cancel()
        self._down(client)
        self._health.lost(client)
        self._quarantined.pop(client, None)
        self._given_up[client] = failure
        self._on_given_up(client, failure)

    def _start(self, client: ActorClient, delay_s: float = 0.0) -> None:
        if client not in self._starting:
            self._starting[client] = self._watched(client, self._wait_until_ready(client, delay_s))

    def _watched(self, client: ActorClient, task: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task of a process. An error in it, which is a bug, gives up the process: nothing would restart it."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                message = f"{client.name}: {error}"
                failure = Failure(stage="health", error=type(error).__name__, message=message, attempts=1, worker=client.name)
                self._give_up(client, failure)

        running = asyncio.ensure_future(task)
        running.add_done_callback(ended)
        return running

    async def _wait_until_ready(self, client: ActorClient, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        is_first = client.place is None
        for number in count(1):
            failure = await client.ready()
            if failure is None:
                assert client.place is not None
                del self._starting[client]
                self._quarantined.pop(client, None)
                if client.has_moved:
                    self._health.lost(client)
                self._health.started(client, None if self._clients[client] else client.place.node)
                self._up[client] = self._watched(client, self._ping(client))
                times = time.time() - client.load_s, round(client.load_s, 3), 0.0
                self._observer.attempt_ended(Attempt("", LOADING, number, "done", *times, client.name, client.place.host))
                self._on_up(client)
                return
            if (is_first and failure.error in SETUP_ERRORS) or number == LOAD_ATTEMPTS:
                del self._starting[client]
                self._give_up(client, failure)
                return
            self._observer.quarantined(client.location, f"cannot load its weights: {failure.message}")
            client.restart()
            await asyncio.sleep(LOAD_BACK_OFF_S * 2 ** (number - 1))
