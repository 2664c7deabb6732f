"""Process of the API: its app, connected to the director, and on one machine its HTTP server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from vidgen_ray.online import HeapTrim, OneRequestId, unreachable
from vidgen_ray.online.asgi_app import make_app
from vidgen_ray.online.auth import ApiKeys
from vidgen_ray.online.event_streams import MAX_STREAMS
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.store.store import open_store
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.system.http_limits import LimitedHttp

DIRECTOR_TIMEOUT_S = 2.0
"""Seconds that the director may take to say what is missing."""
_POLL_S = 1.0
"""Seconds between two polls of the store without a call of the director, while it restarts or if other servers change jobs."""
_PAUSE_S = 0.05
"""Seconds from a change of jobs until the next call that only waits for changes."""
CONNECTIONS = MAX_STREAMS + 2_000
"""Open connections and requests, event streams included. Others get 503."""
_CLOSE_S = 2
"""Seconds that requests may take to end when the server stops."""


class DirectorClient:
    """Client of the director. Use it inside an event loop."""

    def __init__(self, director: Any) -> None:
        self._director = director
        self._news = set[bool]()
        """Arguments of calls of `wake` that the director has not got."""
        self._waking: asyncio.Task[None] | None = None
        self._seen = self._returned = 0
        """Number of the last change that the director has told, and of the last one for which `changed` has returned."""
        self._waiting: asyncio.Task[None] | None = None
        """Call of the director that waits for the next change."""
        self._called = asyncio.Event()

    def wake(self, *, has_cancels: bool = False) -> None:
        """Wake the director, as `NotifyDirector`. One call at a time: none pile up while the director is down."""
        if self._is_waiting:
            self._news.add(has_cancels)
            if self._waking is None or self._waking.done():
                self._waking = asyncio.ensure_future(self._wake())
        else:
            # One call does both: each takes a millisecond of both processes.
            self._wait_for_change(partial(self._director.wake_until_changed.remote, has_cancels))

    async def _wake(self) -> None:
        while news := self._news:
            self._news = set()
            # A restarted director polls the store anyway.
            with suppress(*unreachable()):
                await self._director.wake.remote(True in news)

    async def changed(self) -> None:
        """Wait until the director has stored changes of jobs after the last call, at most `_POLL_S`."""
        if not self._is_waiting:
            # The next job often follows at once, and its call waits for changes, too.
            self._called.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._called.wait(), _PAUSE_S)
        if self._seen == self._returned:
            if not self._is_waiting:
                self._wait_for_change(self._director.changed.remote)
            assert self._waiting is not None
            await asyncio.wait([self._waiting], timeout=_POLL_S)
        self._returned = self._seen

    @property
    def _is_waiting(self) -> bool:
        return self._waiting is not None and not self._waiting.done()

    def _wait_for_change(self, call: Callable[[int], Awaitable[int]]) -> None:
        async def wait() -> None:
            try:
                self._seen = await call(self._seen)
            except unreachable():
                await asyncio.sleep(_POLL_S)

        self._waiting = asyncio.ensure_future(wait())
        self._called.set()

    async def missing(self) -> str | None:
        """Return what the server lacks to run jobs. `None` if nothing is missing."""
        silent: tuple[type[Exception], ...] = (TimeoutError, *unreachable())
        try:
            missing: str | None = await asyncio.wait_for(self._director.missing.remote(), DIRECTOR_TIMEOUT_S)
        except silent:
            return "the director does not respond; it starts again by itself"
        return missing


def make_api(
    settings: OnlineSettings, serving_profile: ServingProfile, outputs: OutputFolder, keys: ApiKeys, director: Any
) -> FastAPI:
    """Return the app of an API process. It stores new jobs and then wakes the director. Raises what `make_app` does."""
    client = DirectorClient(director)
    app = make_app(
        settings,
        open_store(settings),
        outputs,
        serving_profile,
        keys,
        jobs_changed=client.wake,
        changed=client.changed,
        missing=client.missing,
    )
    app.add_middleware(HeapTrim)
    return app


def http_config(app: ASGIApp) -> uvicorn.Config:
    """Return the settings of the HTTP server of an API."""
    return uvicorn.Config(
        app,
        http=LimitedHttp,
        ws="none",
        access_log=False,
        log_config=None,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=_CLOSE_S,
    )


class HttpApi:
    """The API with an HTTP server of its own. Create it inside an event loop."""

    def __init__(self, port: str, *parts: Any) -> None:
        """`port`: see `listening_socket`. `parts`: arguments of `make_api`."""
        app = make_api(*parts)
        app.add_middleware(OneRequestId)
        self._server = uvicorn.Server(http_config(app))
        self._serving = asyncio.ensure_future(self._server.serve([listening_socket(port)]))

    async def check_health(self) -> None:
        """Raise RuntimeError if the HTTP server has stopped."""
        if self._serving.done():
            raise RuntimeError("the HTTP server has stopped") from self._serving.exception()

    async def stop(self) -> None:
        """Accept no more requests, and wait for those in progress."""
        self._server.should_exit = True
        await self._serving


def listening_socket(path: str) -> socket.socket:
    """Return the socket that the process behind the Unix socket at `path` listens on."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        _, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
    return socket.socket(fileno=descriptor)
