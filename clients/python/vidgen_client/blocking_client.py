"""Blocking client of a vidgen-ray server: the methods of `AsyncClient`, without an event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from vidgen_client.async_client import TIMEOUT_S, AsyncClient
from vidgen_client.http import BlockingNetwork

P = ParamSpec("P")
R = TypeVar("R")


def run_blocking(coroutine: Coroutine[Any, Any, R]) -> R:
    """Return the result of a coroutine that awaits only `BlockingNetwork`, so that it never waits for an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        result: R = finished.value
        return result
    coroutine.close()
    raise RuntimeError(f"{coroutine} waits for an event loop")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    """Return the blocking variant of a method."""

    @wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return run_blocking(method(self._client, *args, **kwargs))

    return call


def _blocking_generator(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[R]],
) -> Callable[Concatenate[Client, P], Iterator[R]]:
    """Return the blocking variant of a generator method."""

    @wraps(method)
    def iterate(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        values = method(self._client, *args, **kwargs)
        try:
            while True:
                try:
                    value = run_blocking(_next(values))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            run_blocking(_close(values))

    return iterate


async def _next(values: AsyncGenerator[R]) -> R:
    return await anext(values)


async def _close(values: AsyncGenerator[Any]) -> None:
    await values.aclose()


class Client:
    """Client of a server. Every method blocks until the server has answered.

    Requests are repeated after lost connections, with an idempotency key, so that nothing is created twice. Methods raise
    ApiError if the server refuses a request, and ConnectionFailed if it cannot be reached.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = 5,
        **options: Any,
    ) -> None:
        """Open no connection yet. The arguments are those of `AsyncClient`."""
        self._client = AsyncClient(url, api_key, timeout_s=timeout_s, retries=retries, network=BlockingNetwork, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    close = _blocking(AsyncClient.close)
    create_video = _blocking(AsyncClient.create_video)
    estimate_video = _blocking(AsyncClient.estimate_video)
    estimate_shot = _blocking(AsyncClient.estimate_shot)
    remix_video = _blocking(AsyncClient.remix_video)
    get_video = _blocking(AsyncClient.get_video)
    list_videos = _blocking(AsyncClient.list_videos)
    cancel_video = _blocking(AsyncClient.cancel_video)
    delete_video = _blocking(AsyncClient.delete_video)
    follow_video = _blocking_generator(AsyncClient.follow_video)
    wait_for_video = _blocking(AsyncClient.wait_for_video)
    read_video = _blocking(AsyncClient.read_video)
    download_video = _blocking(AsyncClient.download_video)
    create_images = _blocking(AsyncClient.create_images)
    edit_images = _blocking(AsyncClient.edit_images)
    upload_image = _blocking(AsyncClient.upload_image)
    create_character = _blocking(AsyncClient.create_character)
    list_characters = _blocking(AsyncClient.list_characters)
    delete_character = _blocking(AsyncClient.delete_character)
    erase_character = _blocking(AsyncClient.erase_character)
    list_models = _blocking(AsyncClient.list_models)
