"""Middlewares of Ray Serve's HTTP proxy: start a few requests at a time, health checks at once, and send one request id.

The proxy and the API are one process each, and every request costs both some milliseconds. Without a queue, a health check
waits for all requests that arrived before it.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "vidgen_ray.online.request_queue:middlewares"}
"""Environment variable of Ray's processes with which the HTTP proxy uses these middlewares."""
HEALTH_PATHS = ("/healthz", "/health", "/-/healthz")
STARTING = 8
"""Requests that are between their start and the start of their response."""
MAX_START_S = 0.25
"""Seconds after which a request no longer counts: its body arrives slowly, or its response takes long."""


def middlewares() -> list[Middleware]:
    """Return the middlewares of the HTTP proxy. Ray Serve calls this in the proxy's process."""
    return [Middleware(OneRequestId), Middleware(RequestQueue)]


class OneRequestId:
    """Removes the `X-Request-Id` that Ray Serve appends to a response that has one of its own: the id of a video."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if len(ids := headers.getlist("X-Request-Id")) > 1:
                    headers["X-Request-Id"] = ids[0]
            await send(message)

        await self._app(scope, receive, send_one_id)


class RequestQueue:
    """Lets at most `starting` requests start at a time, first come, first served."""

    def __init__(self, app: ASGIApp, starting: int = STARTING, max_start_s: float = MAX_START_S) -> None:
        self._app = app
        self._slots = asyncio.Semaphore(starting)
        self._max_start_s = max_start_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self._app(scope, receive, send)
            return
        await self._slots.acquire()
        is_starting = True

        def started() -> None:
            nonlocal is_starting
            if is_starting:
                is_starting = False
                self._slots.release()

        async def send_started(message: Message) -> None:
            started()
            await send(message)

        timer = asyncio.get_running_loop().call_later(self._max_start_s, started)
        try:
            await self._app(scope, receive, send_started)
        finally:
            timer.cancel()
            started()
