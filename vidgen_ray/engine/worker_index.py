"""Index of workers that are alike for the scheduler, by active LoRA and by node."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from itertools import islice

from vidgen_ray.engine.work import Work, WorkerState

MAX_WORKERS_COMPARED = 16
"""Workers with an active LoRA that are compared for one call. More would make a decision slower, not better."""


class WorkerSet:
    """Set of workers. Unlike a dict, it finds a member in constant time even after many removals."""

    def __init__(self) -> None:
        self._members: list[WorkerState] = []
        self._positions: dict[WorkerState, int] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, worker: object) -> bool:
        return worker in self._positions

    def __iter__(self) -> Iterator[WorkerState]:
        return iter(self._members)

    def add(self, worker: WorkerState) -> None:
        self._positions[worker] = len(self._members)
        self._members.append(worker)

    def remove(self, worker: WorkerState) -> None:
        """Remove a worker: the last one takes its position. Raises KeyError if it is no member."""
        position, last = self._positions.pop(worker), self._members.pop()
        if last is not worker:
            self._members[position] = last
            self._positions[last] = position


class WorkerIndex:
    """Workers among which only LoRAs, nodes and inputs decide."""

    def __init__(self) -> None:
        self._workers = WorkerSet()
        self._keys: dict[WorkerState, list[tuple[str, Hashable]]] = {}
        self._sets: dict[tuple[str, Hashable], WorkerSet] = {}
        """("lora", LoRA) or ("node", node) -> its workers."""

    def __len__(self) -> int:
        return len(self._workers)

    def add(self, worker: WorkerState) -> None:
        self._workers.add(worker)
        keys: list[tuple[str, Hashable]] = [("lora", adapter) for adapter in worker.adapters]
        if worker.node is not None:
            keys.append(("node", worker.node))
        for key in keys:
            self._sets.setdefault(key, WorkerSet()).add(worker)
        self._keys[worker] = keys

    def remove(self, worker: WorkerState) -> None:
        self._workers.remove(worker)
        for key in self._keys.pop(worker):
            self._sets[key].remove(worker)
            if not self._sets[key]:
                del self._sets[key]

    def best_for(self, work: Work, avoid: Collection[WorkerState] = ()) -> WorkerState | None:
        """Return the best worker for the work: one with its LoRAs, then the one with its inputs, then one on their node.

        `None` if there are only workers to avoid.
        """
        near = work.near if work.near in self._workers and work.near not in avoid else None
        if work.adapters:
            if near is not None and work.loras_active(near):
                return near
            active = [worker for worker in self._with_loras(work) if worker not in avoid]
            if active:
                return min(active, key=lambda worker: distance(worker, work))
        if near is not None:
            return near
        if work.near is not None:
            on_node = next((worker for worker in self._set("node", work.near.node) if worker not in avoid), None)
            if on_node is not None:
                return on_node
        return next((worker for worker in self._workers if worker not in avoid), None)

    def _with_loras(self, work: Work) -> list[WorkerState]:
        """Return some of the workers on which the LoRAs of the work are active."""
        rarest = min((self._set("lora", adapter) for adapter in work.adapters), key=len)
        return [worker for worker in islice(rarest, MAX_WORKERS_COMPARED) if work.loras_active(worker)]

    def _set(self, kind: str, value: Hashable) -> WorkerSet:
        return self._sets.get((kind, value), _NO_WORKERS)


_NO_WORKERS = WorkerSet()


def distance(worker: WorkerState, work: Work) -> int:
    """Return how far the inputs are from the worker: 0 on the worker, 1 on its node, 2 elsewhere or unknown."""
    if work.near is worker:
        return 0
    return 1 if work.near is not None and work.near.node is not None and work.near.node == worker.node else 2
