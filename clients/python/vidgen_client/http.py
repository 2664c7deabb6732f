"""HTTP requests with retries, over blocking or asynchronous I/O."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from vidgen_client.errors import ApiError, ClientError, ConnectionFailed
from vidgen_ray.version import __version__

RETRIED_STATUS = (429, 502, 503)
"""Too many requests or jobs; the server restarts behind its proxy; it cannot store jobs."""
MAX_DELAY_S = 60.0
"""Longest delay between two attempts. A server that asks for a longer one is not tried again."""
CONNECT_TIMEOUT_S = 10.0
BACKOFF = wait_random_exponential(multiplier=0.5, max=16)
R = TypeVar("R")
Files = Sequence[tuple[str, tuple[str, bytes]]]
"""Form fields with their file names and contents."""


class Network(Protocol):
    """I/O of a client. The blocking implementation never suspends the coroutine that awaits it."""

    @property
    def client(self) -> httpx2.Client | httpx2.AsyncClient: ...

    async def send(self, request: httpx2.Request, *, stream: bool) -> httpx2.Response: ...

    async def read(self, response: httpx2.Response) -> bytes: ...

    def chunks(self, response: httpx2.Response) -> AsyncGenerator[bytes]: ...

    def events(self, response: httpx2.Response) -> AsyncGenerator[httpx2.ServerSentEvent]: ...

    async def close_response(self, response: httpx2.Response) -> None: ...

    async def sleep(self, seconds: float) -> None: ...

    async def close(self) -> None: ...


class AsyncNetwork:
    """I/O in an event loop."""

    def __init__(self, **options: Any) -> None:
        self.client = httpx2.AsyncClient(**options)

    async def send(self, request: httpx2.Request, *, stream: bool) -> httpx2.Response:
        return await self.client.send(request, stream=stream)

    async def read(self, response: httpx2.Response) -> bytes:
        return await response.aread()

    async def chunks(self, response: httpx2.Response) -> AsyncGenerator[bytes]:
        async for chunk in response.aiter_bytes():
            yield chunk

    async def events(self, response: httpx2.Response) -> AsyncGenerator[httpx2.ServerSentEvent]:
        async for event in httpx2.EventSource(response):
            yield event

    async def close_response(self, response: httpx2.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self.client.aclose()


class BlockingNetwork:
    """I/O that blocks the thread. A coroutine over it runs to its end in one step, see `run_blocking`."""

    def __init__(self, **options: Any) -> None:
        self.client = httpx2.Client(**options)

    async def send(self, request: httpx2.Request, *, stream: bool) -> httpx2.Response:
        return self.client.send(request, stream=stream)

    async def read(self, response: httpx2.Response) -> bytes:
        return response.read()

    async def chunks(self, response: httpx2.Response) -> AsyncGenerator[bytes]:
        for chunk in response.iter_bytes():
            yield chunk

    async def events(self, response: httpx2.Response) -> AsyncGenerator[httpx2.ServerSentEvent]:
        for event in httpx2.EventSource(response):
            yield event

    async def close_response(self, response: httpx2.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self.client.close()


class Http:
    """Requests to one server."""

    def __init__(self, network: Network, *, retries: int) -> None:
        self.network = network
        self._retries = retries

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Mapping[str, Any] | None = None,
        data: Mapping[str, str] | None = None,
        files: Files | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> httpx2.Response:
        """Send a request and return the response with its body.

        The request is repeated after connection errors and `RETRIED_STATUS`. A request that creates something needs the header
        `Idempotency-Key`. `timeout_s`: seconds without any data; `None` is the client's default. Raises ApiError and
        ConnectionFailed.
        """
        timeout = httpx2.USE_CLIENT_DEFAULT if timeout_s is None else _timeout(timeout_s)
        request = self.network.client.build_request(
            method, path, params=params, json=json, data=data, files=files, headers=headers, timeout=timeout
        )
        return await self.retry(lambda: self._send(request, stream=False))

    @asynccontextmanager
    async def stream(
        self, path: str, *, params: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None, timeout_s: float
    ) -> AsyncIterator[httpx2.Response]:
        """Open a response to read its body piece by piece. Not repeated. Raises ApiError and ConnectionFailed."""
        request = self.network.client.build_request("GET", path, params=params, headers=headers, timeout=_timeout(timeout_s))
        response = await self._send(request, stream=True)
        try:
            with _connection_errors(request):
                yield response
        finally:
            await self.network.close_response(response)

    async def retry(self, call: Callable[[], Awaitable[R]]) -> R:
        """Call until it succeeds, the error is final or all attempts are used up. Then raise the last error."""
        retrying = AsyncRetrying(
            sleep=self.network.sleep,
            stop=stop_after_attempt(1 + self._retries),
            wait=_delay_s,
            retry=retry_if_exception(_may_succeed_later),
            reraise=True,
        )

        async def attempt() -> R:
            # tenacity awaits only coroutine functions.
            return await call()

        return await retrying(attempt)

    async def _send(self, request: httpx2.Request, *, stream: bool) -> httpx2.Response:
        with _connection_errors(request):
            response = await self.network.send(request, stream=stream)
            if response.is_success:
                return response
            try:
                await self.network.read(response)
            finally:
                await self.network.close_response(response)
        raise _api_error(response)


def connection_options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Return the options of an httpx2 client. The URL may end in /v1. Raises ClientError if it is not an http(s) URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ClientError(f"url: got {url!r}, must be the URL of a server, for example http://127.0.0.1:8000")
    headers = {"User-Agent": f"vidgen-ray/{__version__}"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return {"base_url": url.rstrip("/").removesuffix("/v1"), "headers": headers, "timeout": _timeout(timeout_s)}


def _timeout(timeout_s: float) -> httpx2.Timeout:
    return httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)


@contextmanager
def _connection_errors(request: httpx2.Request) -> Iterator[None]:
    """Raise ConnectionFailed instead of httpx2's errors."""
    try:
        yield
    except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
        raise ClientError(f"{request.url}: {error}") from error
    except httpx2.TransportError as error:
        raise ConnectionFailed(f"{request.url}: {str(error) or type(error).__name__}") from error


def _api_error(response: httpx2.Response) -> ApiError:
    try:
        error = response.json()["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, LookupError, TypeError, AttributeError):
        # Not an error of vidgen-ray: a proxy answered.
        message, code, param = response.text[:500].strip() or response.reason_phrase, None, None
    retryable = response.status_code in RETRIED_STATUS and response.headers.get("x-should-retry") != "false"
    return ApiError(
        message,
        status=response.status_code,
        code=code,
        param=param,
        retry_after_s=_retry_after_s(response.headers),
        retryable=retryable,
    )


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
    return None


def _may_succeed_later(error: BaseException) -> bool:
    if isinstance(error, ApiError):
        return error.retryable and (error.retry_after_s or 0) <= MAX_DELAY_S
    return isinstance(error, ConnectionFailed)


def _delay_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, ApiError) and error.retry_after_s is not None:
        return error.retry_after_s
    return BACKOFF(state)
