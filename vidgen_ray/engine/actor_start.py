"""Start of the process of a Ray actor: wait until it responds, let it load its weights, ping it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any

import ray

from vidgen_ray.engine.messages import LOADING
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.engine.ray_cluster import process_of
from vidgen_ray.engine.worker import ActorPlace
from vidgen_ray.errors import first_line
from vidgen_ray.outputs.records import Failure

LOAD_CHECK_S = 30.0
"""Seconds between two looks at a process that starts or loads its weights."""
START_SILENCE_S = 300.0
"""Seconds after which a process that has started but does not respond is frozen."""
MIN_ACTIVITY = 2.0
"""CPU seconds and MB read in LOAD_CHECK_S that are activity. Ray's own threads need less."""
SILENT_S = 60.0
"""Seconds without a response to a ping after which a process is killed: it is frozen, or its node does not respond."""
LATE_S = CoreLimits.late_s
"""If a timer ends this much too late, the driver itself was stopped, and responses may wait to be read."""
RETRY_S = 0.2
"""Seconds between two attempts to reach an actor that restarts."""


class Ping(Enum):
    """Result of a ping."""

    UP = "up"
    DOWN = "down"
    """The process has crashed or was replaced."""
    SILENT = "silent"
    """No response."""


async def place_when_up(actor: Any, killed: ActorPlace | None = None) -> ActorPlace:
    """Return the place of the actor's process, as soon as it responds. Raises RayError if there will be none.

    `killed`: place of a process that was killed, and may still respond for a short time.
    """
    watch = asyncio.ensure_future(_kill_if_frozen(actor))
    try:
        while True:
            try:
                place: ActorPlace = await actor.place.remote()
            except ray.exceptions.RayError as error:
                # A restart may take long: the node may be lost and its replacement not there yet.
                if not _is_restarting(error):
                    raise
            else:
                # Otherwise Ray has not killed the process yet.
                if place != killed:
                    return place
            await asyncio.sleep(RETRY_S)
    finally:
        watch.cancel()


async def _kill_if_frozen(actor: Any) -> None:
    """Kill each process that has started and does not respond. While no node has room for one, there is no deadline."""
    last, silent_s = None, 0.0
    while True:
        await asyncio.sleep(LOAD_CHECK_S)
        process = await asyncio.to_thread(process_of, actor)
        silent_s = silent_s + LOAD_CHECK_S if process is not None and process == last else 0.0
        last = process
        if silent_s > START_SILENCE_S:
            ray.kill(actor, no_restart=False)
            silent_s = 0.0


async def load_weights(actor: Any, on_activity: Callable[[], None]) -> Failure | None:
    """Let a process load its weights. Return the failure if that is impossible. Raises RayError if it crashes.

    `on_activity` is called when it has computed or read, or waits for other processes of its machine.
    """
    loading = asyncio.wrap_future(actor.load.remote().future())
    activity = 0.0
    try:
        while not (await asyncio.wait([loading], timeout=LOAD_CHECK_S))[0]:
            now: float | None = activity
            with suppress(TimeoutError, ray.exceptions.RayError):
                async with asyncio.timeout(LOAD_CHECK_S):
                    now = await actor.activity.remote()
            if now is None or now - activity >= MIN_ACTIVITY:
                activity = now or 0.0
                on_activity()
        failure: Failure | None = loading.result()
        return failure
    finally:
        loading.cancel()


async def start(actor: Any, name: str) -> Failure | None:
    """Wait until the actor's first process has loaded its weights. Return the failure if it cannot."""
    try:
        await place_when_up(actor)
        return await load_weights(actor, lambda: None)
    except ray.exceptions.RayError as error:
        return start_failure(name, error)


def start_failure(name: str, error: Exception) -> Failure:
    """Return the failure of a process that did not start, or crashed while it loaded its weights."""
    message = f"{name} did not start: {first_line(error)}"
    return Failure(stage=LOADING, error="WorkerDied", message=message, attempts=1, worker=name)


async def ping(actor: Any, place: ActorPlace) -> Ping:
    """Return whether the process at this place responds, beside its calls."""
    loop = asyncio.get_running_loop()
    pinged = asyncio.wrap_future(actor.place.remote().future())
    try:
        while True:
            before = loop.time()
            if (await asyncio.wait([pinged], timeout=SILENT_S))[0]:
                return Ping.UP if pinged.exception() is None and pinged.result() == place else Ping.DOWN
            if loop.time() < before + SILENT_S + LATE_S:
                return Ping.SILENT
    finally:
        pinged.cancel()


def _is_restarting(error: ray.exceptions.RayError) -> bool:
    """Return whether Ray restarts the actor. On a node that was drained for preemption, Ray reports it as dead meanwhile."""
    preempted = isinstance(error, ray.exceptions.ActorDiedError) and error.preempted
    return preempted or isinstance(error, ray.exceptions.ActorUnavailableError)
