"""Health of workers, encoders and their nodes: which ones are quarantined, and for how long. Does not use Ray or clocks.

A process whose last `FAILURES` calls failed for different shots is quarantined: it is restarted after a back-off, then gets one
call at a time until one succeeds. If half of the processes of a node, and at least two, are quarantined, the rest follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

FAILURES = 3
"""Failures in a row, on different shots, before a process is quarantined."""
BACK_OFF_S = 1.0
"""Seconds before the first restart of a quarantined process. Doubled with each further quarantine in a row."""
MAX_BACK_OFF_S = 300.0
MAX_QUARANTINES = 3
"""Quarantines in a row after which a process is given up. If it was the last one with its stages, the run stops."""
NODE_QUARANTINES = 2
"""Fewest processes of a node in quarantine at the same time after which the whole node may be quarantined."""
NODE_SHARE = 0.5
"""Share of them among the processes of the node. Two sick GPUs do not stop the other six of their node."""


@dataclass(slots=True)
class _Record:
    node: str | None = None
    failed_shots: list[Hashable] = field(default_factory=list)
    """Shots that failed in a row, in order, without repetition."""
    quarantines: list[tuple[Hashable, ...]] = field(default_factory=list)
    """Quarantines in a row: for each, the shots that failed before it. Empty if its node was quarantined."""
    quarantined: bool = False


class Health:
    """Failure records of the processes of one engine. A process is any hashable object."""

    def __init__(self) -> None:
        self._records: defaultdict[Hashable, _Record] = defaultdict(_Record)
        self._in_doubt: set[Hashable] = set()
        """Shots that have failed and are tried again elsewhere, so that it is not known yet whether they are wrong."""

    def started(self, process: Hashable, node: str) -> None:
        """The process is up on this node. Its quarantine, if any, becomes a probation."""
        record = self._records[process]
        record.node, record.quarantined = node, False
        record.failed_shots.clear()

    def succeeded(self, process: Hashable) -> None:
        record = self._records[process]
        record.failed_shots.clear()
        record.quarantines.clear()

    def failed(self, process: Hashable, shot: Hashable, *, in_doubt: bool = True) -> bool:
        """Record a failed call for a shot. Return whether the process must be quarantined now.

        On probation, a single failure is enough. After MAX_QUARANTINES, none is until the process is hopeless.
        `in_doubt`: the shot may be wrong; call `ended` once it is known.
        """
        record = self._records[process]
        if record.quarantined:
            return False
        if shot not in record.failed_shots:
            record.failed_shots.append(shot)
        if in_doubt:
            self._in_doubt.add(shot)
        if len(record.quarantines) >= MAX_QUARANTINES:
            return self.is_hopeless(process)
        return len(record.failed_shots) >= (1 if record.quarantines else FAILURES)

    def forgive(self, process: Hashable, shot: Hashable) -> None:
        """Remove a failure that was the fault of the shot: it failed in the same way elsewhere.

        A quarantine to which it has led does not count any more.
        """
        record = self._records[process]
        if shot in record.failed_shots:
            record.failed_shots.remove(shot)
        record.quarantines = [shots for shots in record.quarantines if shot not in shots]

    def ended(self, shot: Hashable) -> None:
        """The shot was rendered or has failed. Its failures that are not forgiven were those of their processes."""
        self._in_doubt.discard(shot)

    def quarantine(self, process: Hashable) -> float:
        """Quarantine a process. Return the seconds before its restart."""
        record = self._records[process]
        record.quarantined = True
        record.quarantines.append(tuple(record.failed_shots))
        return float(min(MAX_BACK_OFF_S, BACK_OFF_S * 2 ** (len(record.quarantines) - 1)))

    def is_on_probation(self, process: Hashable) -> bool:
        return bool(self._records[process].quarantines)

    def is_hopeless(self, process: Hashable) -> bool:
        """Return whether the process was quarantined too often in a row to try it again.

        A quarantine does not count while all shots that led to it are in doubt: they may be wrong.
        """
        quarantines = self._records[process].quarantines
        return sum(not shots or not self._in_doubt.issuperset(shots) for shots in quarantines) >= MAX_QUARANTINES

    def sick_node(self, process: Hashable) -> str | None:
        """Return the node of the process if it must be quarantined as a whole, because half of them are."""
        node = self._records[process].node
        if node is None:
            return None
        quarantined = [record.quarantined for record in self._records.values() if record.node == node]
        return node if sum(quarantined) >= max(NODE_QUARANTINES, NODE_SHARE * len(quarantined)) else None
