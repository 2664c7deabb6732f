"""How a run is told to stop: by SIGTERM, as job schedulers and spot machines do, or by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer


@contextmanager
def stoppable(grace_s: float, what: str = "shots") -> Iterator[threading.Event]:
    """An event that the first signal sets; the second one interrupts the block at once."""
    stop = threading.Event()

    def told(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        typer.echo(f"vidgen: finishing the {what} in progress, {grace_s:g} s at most; once more to stop at once", err=True)

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
