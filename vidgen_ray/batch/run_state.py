"""State shared by the driver and the director: run status, stop flag, emitted results."""

from __future__ import annotations

from typing import Any

from vidgen_ray.batch.run_progress import Snapshot


class RunState:
    """Actor with the latest snapshot, the stop flag and the numbers of the emitted results."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._stopping = False
        self._emitted: dict[str, list[int]] = {}

    def publish(self, snapshot: Snapshot) -> bool:
        """Store the director's snapshot. Return whether the run should stop."""
        self._snapshot = snapshot
        return self._stopping

    def snapshot(self) -> Snapshot | None:
        """Return the latest snapshot. `None` before the first one."""
        return self._snapshot

    def stop(self) -> None:
        """Request that no more shots start."""
        self._stopping = True

    def stopping(self) -> bool:
        """Return whether a stop was requested."""
        return self._stopping

    def mark_emitted(self, part: str, number: int) -> None:
        """Record that the director is about to emit the result of this line of a part."""
        self._emitted.setdefault(part, []).append(number)

    def emitted(self, part: str) -> list[int]:
        """Return the lines of the part whose results were emitted, in that order."""
        return self._emitted.get(part, [])

    def received(self, part: str) -> None:
        """Forget a part. The driver has all its results."""
        self._emitted.pop(part, None)


def run_state_name(run: str) -> str:
    return f"{run}/run-state"


RunStateHandle = Any
"""Ray actor handle of a RunState."""
