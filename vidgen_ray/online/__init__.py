"""The server: HTTP API, stored jobs, and the director that leads them through the stages. On a cluster on Ray Serve.

Ray Serve's HTTP proxy imports this file at its start, so it imports little.
"""

import asyncio
import ctypes
import sys
import uuid
from contextlib import suppress
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "vidgen_ray.online:middlewares"}
"""Environment variable of Ray's processes with which the HTTP proxy uses this middleware."""


def middlewares() -> list[Middleware]:
    """Return the middlewares of the HTTP proxy, and limit its connections. Ray Serve calls this in the proxy's process.

    The proxy has no setting for its HTTP protocol, so the one that uvicorn chooses by itself is replaced.
    """
    from uvicorn.config import HTTP_PROTOCOLS

    HTTP_PROTOCOLS["auto"] = "vidgen_ray.system.http_limits:LimitedHttp"
    return [Middleware(LostReplica), Middleware(OneRequestId), Middleware(HeapTrim)]


REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that this task answers, for logs."""
LOST_REPLICA = {
    "message": "The server does not respond. Try again later.",
    "type": "server_error",
    "param": None,
    "code": "unavailable",
}
LARGE_BODY_BYTES = 1_000_000
TRIM_DELAY_S = 2.0


class HeapTrim:
    """Returns the memory of large request bodies to the system after the requests. The C library would keep it.

    For the API, and the proxy of Ray Serve, which holds each body in memory.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if self._timer is None and scope["type"] == "http" and announced_bytes(scope) >= LARGE_BODY_BYTES:
                self._timer = asyncio.get_running_loop().call_later(TRIM_DELAY_S, self._trim)

    def _trim(self) -> None:
        self._timer = None
        # Only glibc has it.
        with suppress(AttributeError):
            asyncio.get_running_loop().run_in_executor(None, ctypes.CDLL(None).malloc_trim, 0)


def announced_bytes(scope: Scope) -> float:
    """Return the length of the body that a request announces, infinite for a chunked one."""
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    return float("inf") if "transfer-encoding" in headers else int(length) if length.isdigit() else 0


class OneRequestId:
    """Gives each response one `X-Request-Id`: its own, the id of a video, or that of the request, or a new one.

    Ray Serve appends another one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("X-Request-Id") or str(uuid.uuid4())

        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = (headers.getlist("X-Request-Id") or [request_id])[0]
            await send(message)

        REQUEST_ID.set(request_id)
        await self._app(scope, receive, send_one_id)


class LostReplica:
    """Answers 503 with `Retry-After`, as the API does, if Ray Serve has lost the replica with a request, or has none.

    Its proxy sends nothing then, which uvicorn makes a 500, or 503 in plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = is_lost = False

        async def send_of_api(message: Message) -> None:
            nonlocal has_started, is_lost
            if message["type"] == "http.response.start":
                is_lost = _is_of_proxy(message)
            if not is_lost:
                has_started = True
                await send(message)

        await self._app(scope, receive, send_of_api)
        if not has_started:
            await JSONResponse({"error": LOST_REPLICA}, 503, {"Retry-After": "2"})(scope, receive, send)


def _is_of_proxy(start: Message) -> bool:
    """Return whether a response is an error of Ray Serve's proxy. Those of the API are JSON."""
    return start["status"] == 503 and Headers(scope=start).get("content-type", "").startswith("text/plain")


def unreachable() -> tuple[type[Exception], ...]:
    """Return the errors of a call of a process that has crashed or starts again."""
    from ray.exceptions import RayError

    # Importing Ray Serve takes 120 MB. Without it there are no such errors.
    serve = sys.modules.get("ray.serve.exceptions")
    return (RayError,) if serve is None else (RayError, serve.RayServeException)
