"""Where the driver and the director leave word for each other, outside the stream of results."""

from __future__ import annotations

from typing import Any

from vidgen_ray.batch.run_progress import Snapshot


class RunState:
    """An actor of a few bytes: how the run stands, whether it should take no more lines, and which results were given."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._stopping = False
        self._given: dict[str, list[int]] = {}

    def publish(self, snapshot: Snapshot) -> bool:
        """The director's word. Answers whether the run is to stop."""
        self._snapshot = snapshot
        return self._stopping

    def snapshot(self) -> Snapshot | None:
        return self._snapshot

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping

    def mark_emitted(self, part: str, number: int) -> None:
        """The director is about to give the result of this line of a part."""
        self._given.setdefault(part, []).append(number)

    def emitted(self, part: str) -> list[int]:
        """The lines whose results were given, in that order."""
        return self._given.get(part, [])

    def received(self, part: str) -> None:
        """The driver has all results of the part."""
        self._given.pop(part, None)


def board_name(run: str) -> str:
    return f"{run}/board"


RunStateHandle = Any
"""Ray's handle of a Board."""
