"""The server, on Ray Serve: HTTP API, stored jobs, and the director that leads them through the stages.

Ray Serve's HTTP proxy imports this file at its start, so it imports little.
"""

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "vidgen_ray.online:middlewares"}
"""Environment variable of Ray's processes with which the HTTP proxy uses this middleware."""


def middlewares() -> list[Middleware]:
    """Return the middlewares of the HTTP proxy. Ray Serve calls this in the proxy's process."""
    return [Middleware(OneRequestId)]


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
