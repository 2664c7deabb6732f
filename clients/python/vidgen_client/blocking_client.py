"""Blocking client of a vidgen-ray server: the methods of `AsyncClient`, run in the event loop of a background thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import cache, wraps
from threading import Lock, Thread
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from vidgen_client.async_client import TIMEOUT_S, AsyncClient, check_completed
from vidgen_client.models import Video

P = ParamSpec("P")
R = TypeVar("R")
_STARTING = Lock()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Start the event loop that all blocking clients of this process share. It ends with the process."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="vidgen-client", daemon=True).start()
    return loop


if hasattr(os, "register_at_fork"):
    # The child process has no thread that runs the loop.
    os.register_at_fork(after_in_child=_event_loop.cache_clear)


def _run(coroutine: Coroutine[Any, Any, R]) -> R:
    """Return the result of a coroutine. It is cancelled if this thread is interrupted, such as by Ctrl-C."""
    with _STARTING:
        loop = _event_loop()
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    finally:
        future.cancel()


async def _next(states: AsyncGenerator[Video]) -> Video | None:
    return await anext(states, None)


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    """Return the blocking variant of a method."""

    @wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return _run(method(self._client, *args, **kwargs))

    return call


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
        self._client = AsyncClient(url, api_key, timeout_s=timeout_s, retries=retries, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def follow_video(self, video: Video | str, *, timeout_s: float | None = None) -> Iterator[Video]:
        """Yield a video now and after each change, until its job has ended. Raises WaitTimeout after `timeout_s`."""
        states = self._client.follow_video(video, timeout_s=timeout_s)
        while (state := _run(_next(states))) is not None:
            try:
                yield state
            except GeneratorExit:
                # Not awaited: at the end of the process, the loop has ended before.
                asyncio.run_coroutine_threadsafe(states.aclose(), _event_loop())
                raise

    def wait_for_video(
        self, video: Video | str, *, on_progress: Callable[[Video], object] | None = None, timeout_s: float | None = None
    ) -> Video:
        """Wait until the job has ended and return the completed video.

        `on_progress` is called in this thread, with the video now and after each change. Raises JobFailed, JobCancelled, and
        WaitTimeout after `timeout_s`.
        """
        for current in self.follow_video(video, timeout_s=timeout_s):
            if on_progress is not None:
                on_progress(current)
        return check_completed(current)

    close = _blocking(AsyncClient.close)
    create_video = _blocking(AsyncClient.create_video)
    estimate_video = _blocking(AsyncClient.estimate_video)
    estimate_shot = _blocking(AsyncClient.estimate_shot)
    remix_video = _blocking(AsyncClient.remix_video)
    get_video = _blocking(AsyncClient.get_video)
    get_shot = _blocking(AsyncClient.get_shot)
    list_videos = _blocking(AsyncClient.list_videos)
    cancel_video = _blocking(AsyncClient.cancel_video)
    delete_video = _blocking(AsyncClient.delete_video)
    read_video = _blocking(AsyncClient.read_video)
    download_video = _blocking(AsyncClient.download_video)
    create_images = _blocking(AsyncClient.create_images)
    edit_images = _blocking(AsyncClient.edit_images)
    upload_image = _blocking(AsyncClient.upload_image)
    create_character = _blocking(AsyncClient.create_character)
    list_characters = _blocking(AsyncClient.list_characters)
    delete_character = _blocking(AsyncClient.delete_character)
    erase_character = _blocking(AsyncClient.erase_character)
    upload_batch = _blocking(AsyncClient.upload_batch)
    create_batch = _blocking(AsyncClient.create_batch)
    get_batch = _blocking(AsyncClient.get_batch)
    list_batches = _blocking(AsyncClient.list_batches)
    cancel_batch = _blocking(AsyncClient.cancel_batch)
    wait_for_batch = _blocking(AsyncClient.wait_for_batch)
    batch_lines = _blocking(AsyncClient.batch_lines)
    batch_results = _blocking(AsyncClient.batch_results)
    list_models = _blocking(AsyncClient.list_models)
