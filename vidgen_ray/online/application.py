"""Ray Serve application of a server, for `serve deploy` and `serve run`: replicas of its API, director and owner of workers.

Serve configs use `vidgen_ray.online.application:build` as their import path.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen_ray.engine.ray_cluster import LOOPBACK, live_cluster
from vidgen_ray.engine.ray_internals import serve_http_config
from vidgen_ray.errors import SetupError, VidgenError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.api_process import make_api
from vidgen_ray.online.event_streams import MAX_STREAMS
from vidgen_ray.online.job_director import CHANGED_S, JobDirector
from vidgen_ray.online.server_plan import API, DIRECTOR, WORKERS, Parts, check_exposure, parts_of, server_plan
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.workers import Workers
from vidgen_ray.planner.solver import DIRECTOR_CPUS
from vidgen_ray.stages.base import Stage

API_CPUS, WORKERS_CPUS = 0.2, 0.1
"""CPUs of a process. A layout leaves enough for two replicas of the API: a new one starts before an old one stops."""
API_SURGE_PERCENT = 25
"""Replicas of the API, rounded up, that an update starts before it stops old ones."""
_END_S = 10.0
"""Seconds from the end of the last wait for a job until its response is sent."""
HANDOVER_S = CHANGED_S + 2.0
"""Seconds that workers stay when Ray Serve stops their owner and the director: without them, jobs would fail that the director
has not given back yet."""
UNCHECKED_S = 10.0
"""Seconds without a health check after which a replica of the API is being stopped, or Ray Serve's controller starts again."""
HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
API_REQUESTS = 1_000
"""Concurrent requests per replica, without event streams, and those that wait for it in each proxy. Others get 503."""
MAX_DIRECTOR_CALLS = 1_000
"""Concurrent calls of the director: one that waits of each API replica, and short ones."""
HEALTH: dict[str, Any] = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0, "graceful_shutdown_wait_loop_s": 0.5}


def build(args: dict[str, Any]) -> Application:
    """Build the application for `serve deploy` and `serve run`, planned for the cluster that this runs on. `args`: settings.

    Raises SetupError and ProfileError, also for a server that listens beyond this machine without protection.
    """
    with without_frames():
        return build_with(args)


@contextmanager
def without_frames() -> Iterator[None]:
    """Let Ray Serve show errors for the user as a sentence: it puts the frames of this process in front."""
    try:
        yield
    except VidgenError:
        sys.tracebacklimit = 0
        raise


def build_with(args: Any, stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME) -> Application:
    """Return the application of `build` with these classes for the stages."""
    try:
        settings = OnlineSettings.model_validate(args)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        setting = ".".join(map(str, detail["loc"])) or "settings"
        raise SetupError(f"args, {setting}: {detail['msg']}") from None
    if os.environ.get(HA_PROXY) == "1":
        raise SetupError(
            f"{HA_PROXY}=1: HAProxy's metrics and statistics listen on all interfaces, without a key. "
            f"Run `unset {HA_PROXY}`, and start Ray again."
        )
    server = server_plan(settings, lambda: live_cluster().total)
    # A config sets the host of the running Ray Serve apart from the settings.
    running = serve_http_config()
    check_exposure(settings, [] if running is None else [running.host or LOOPBACK])
    return application(parts_of(server, stages))


def application(parts: Parts) -> Application:
    """Return the application of a server."""
    settings: OnlineSettings = parts.api[0]
    workers = serve.deployment(
        ReadyWorkers, name=WORKERS, num_replicas=1, ray_actor_options={"num_cpus": WORKERS_CPUS}, **HEALTH
    ).bind(*parts.workers)
    director = serve.deployment(
        ReplacedDirector,
        name=DIRECTOR,
        num_replicas=1,
        ray_actor_options={"num_cpus": DIRECTOR_CPUS},
        max_ongoing_requests=MAX_DIRECTOR_CALLS,
        **HEALTH,
    ).bind(*parts.director, workers)
    return serve.deployment(
        serve.ingress()(Api),
        name=API,
        num_replicas=1,
        ray_actor_options={"num_cpus": API_CPUS},
        max_ongoing_requests=API_REQUESTS + MAX_STREAMS,
        max_queued_requests=API_REQUESTS,
        max_surge_percent=API_SURGE_PERCENT,
        # Requests that wait for a job end before.
        graceful_shutdown_timeout_s=settings.wait_s + _END_S,
        **HEALTH,
    ).bind(*parts.api, director)


class Api:
    """HTTP API replica."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts
        self._closing: asyncio.TimerHandle | None = None

    def __serve_build_asgi_app__(self) -> Any:
        with without_frames():
            self._app = make_api(*self._parts)
        self._app.add_middleware(DisconnectedClients)
        return self._app

    async def check_health(self) -> None:
        """End the event streams soon, unless Serve calls this again: it lets a replica that it stops wait for them."""
        if self._closing is not None:
            self._closing.cancel()
        close_streams = self._app.state.server.job_feed.close_streams
        self._closing = asyncio.get_running_loop().call_later(UNCHECKED_S, close_streams)


class ReadyWorkers(Workers):
    """Its replica is up as soon as every stage has a worker with loaded weights, and ends after a director that ends, too."""

    # Serve awaits it.
    async def __init__(self, *parts: Any) -> None:  # type: ignore[misc]
        super().__init__(*parts)
        with without_frames():
            await self.ready()

    # Serve awaits it.
    async def __del__(self) -> None:
        await asyncio.sleep(HANDOVER_S)


class ReplacedDirector(JobDirector):
    """Its jobs continue in the replica that replaces it, which starts before this one ends."""

    # Serve awaits it.
    async def __del__(self) -> None:
        await self.drain(0)


class DisconnectedClients:
    """Middleware that receives `http.disconnect` also if Ray Serve's proxy has cancelled the call that waits for it.

    Without it, a third of the event streams that clients close are logged as errors with a traceback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_disconnect() -> Message:
            try:
                return await receive()
            except ray.exceptions.TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_disconnect, send)
