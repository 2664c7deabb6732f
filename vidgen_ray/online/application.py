"""Ray Serve application of a server, for `serve deploy` and `serve run`: replicas of its API, director and owner of workers.

Serve configs use `vidgen_ray.online.application:build` as their import path.
"""

# Not `from __future__ import annotations`: Serve reads the annotation of `build` to convert the args of a config to settings.

import os
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen_ray.engine.ray_cluster import LOOPBACK, live_cluster
from vidgen_ray.engine.ray_internals import serve_http_config
from vidgen_ray.errors import SetupError
from vidgen_ray.online.api_process import make_api
from vidgen_ray.online.event_streams import MAX_STREAMS
from vidgen_ray.online.job_director import JobDirector
from vidgen_ray.online.server_plan import API, DIRECTOR, WORKERS, Parts, check_exposure, parts_of, server_plan
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.workers import Workers
from vidgen_ray.planner.solver import DIRECTOR_CPUS

API_CPUS, WORKERS_CPUS = 0.25, 0.1
HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
API_REQUESTS = 1_000
"""Concurrent requests per replica, without event streams, and those that wait for it in each proxy. Others get 503."""
MAX_DIRECTOR_CALLS = 1_000
"""Concurrent calls of the director: one that waits of each API replica, and short ones."""
HEALTH: dict[str, Any] = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0, "graceful_shutdown_wait_loop_s": 0.5}


def build(args: OnlineSettings) -> Application:
    """Build the application for `serve deploy` and `serve run`, planned for the cluster that this runs on.

    Raises SetupError and ProfileError, also for a server that listens beyond this machine without protection.
    """
    if os.environ.get(HA_PROXY) == "1":
        raise SetupError(
            f"{HA_PROXY}=1: HAProxy's metrics and statistics listen on all interfaces, without a key. "
            f"Run `unset {HA_PROXY}`, and start Ray again."
        )
    server = server_plan(args, lambda: live_cluster().total)
    # A config sets the host of the running Ray Serve apart from the settings.
    running = serve_http_config()
    check_exposure(args, [] if running is None else [running.host or LOOPBACK])
    return application(parts_of(server))


def application(parts: Parts) -> Application:
    """Return the application of a server."""
    workers = serve.deployment(
        ReadyWorkers, name=WORKERS, num_replicas=1, ray_actor_options={"num_cpus": WORKERS_CPUS}, **HEALTH
    ).bind(*parts.workers)
    director = serve.deployment(
        JobDirector,
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
        **HEALTH,
    ).bind(*parts.api, director)


class Api:
    """HTTP API replica."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __serve_build_asgi_app__(self) -> Any:
        app = make_api(*self._parts)
        app.add_middleware(DisconnectedClients)
        return app


class ReadyWorkers(Workers):
    """Its replica is up as soon as every stage has a worker with loaded weights."""

    # Serve awaits it.
    async def __init__(self, *parts: Any) -> None:  # type: ignore[misc]
        super().__init__(*parts)
        await self.ready()


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
