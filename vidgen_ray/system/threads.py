"""Threads for calls that may never return, such as those to a network file system whose server is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")


def to_daemon_thread(function: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
    """Call a function as `asyncio.to_thread` does, but see `in_daemon_thread`."""
    return asyncio.wrap_future(in_daemon_thread(partial(function, *args)))


def in_daemon_thread(call: Callable[[], _T]) -> Future[_T]:
    """Run a call in a thread of its own and return its future. A thread of a pool would keep the process from ending."""
    outcome: Future[_T] = Future()

    def run() -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome
