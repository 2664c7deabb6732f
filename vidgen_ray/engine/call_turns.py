"""Turns of the calls of one process: one after another, except that the end of a call may run beside the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from types import TracebackType
from typing import Self


class CallTurns:
    """Locks of one process. At most one call has its turn, and at most one other call is at its end."""

    def __init__(self) -> None:
        self._turn = Lock()
        self._end = Lock()

    def next(self) -> Turn:
        """Return the turn of a call. Use it as a context manager."""
        return Turn(self._turn, self._end)


class Turn:
    """Waits for its turn, and keeps it until its block ends or its `end` begins."""

    def __init__(self, turn: Lock, end: Lock) -> None:
        self._turn = turn
        self._end = end
        self._held = turn

    def __enter__(self) -> Self:
        self._turn.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.release()

    @contextmanager
    def end(self) -> Iterator[None]:
        """Run a block, and what follows it in the turn's block, beside the turn of the next call.

        Waits for the end of the call before. If the block fails, it has its turn again when the error is raised.
        """
        self._end.acquire()
        self._held = self._end
        self._turn.release()
        try:
            yield
        except BaseException:
            # In this order: the call that has its turn may be waiting for its own end.
            self._end.release()
            self._turn.acquire()
            self._held = self._turn
            raise
