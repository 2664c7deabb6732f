"""Graceful stop on SIGTERM, which job schedulers and spot instances send, and on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer


@contextmanager
def stoppable(grace_s: float, unit: str = "shots") -> Iterator[threading.Event]:
    """Yield an event that the first signal sets. A second signal raises KeyboardInterrupt in the block."""
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        typer.echo(
            f"vidgen: stopping. Finishing the {unit} in progress for up to {grace_s:g} s. Press Ctrl-C again to stop now.",
            err=True,
        )

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def remembered_interrupt() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed in the block.

    Ctrl-C itself raises it, too. But Python drops an exception that is raised in a destructor or a callback of the interpreter,
    and libraries that are imported catch some. Call the function about once a second in long work.
    """
    pressed = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    def check() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
