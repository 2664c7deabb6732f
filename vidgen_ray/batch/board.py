"""Where the driver and the director leave word for each other, outside the stream of results."""

from __future__ import annotations

from typing import Any

from vidgen_ray.batch.watcher import Snapshot


class Board:
    """An actor of a few bytes: how the run stands, and whether it should take no more lines."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._stopping = False

    def post(self, snapshot: Snapshot) -> bool:
        """The director's word. Answers whether the run is to stop."""
        self._snapshot = snapshot
        return self._stopping

    def look(self) -> Snapshot | None:
        return self._snapshot

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping


def board_name(run: str) -> str:
    return f"{run}/board"


BoardHandle = Any
"""Ray's handle of a Board."""
