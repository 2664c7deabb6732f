"""Waiting work of one stage, ordered by age and indexed by LoRAs. Adding and removing work takes logarithmic time."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Collection, Hashable, Iterator
from itertools import combinations, count
from typing import NamedTuple

from vidgen_ray.engine.work import Work


class Entry(NamedTuple):
    """Waiting work with its sort key. `number` makes the key unique: the chunks of a shot have the same order."""

    order: int
    number: int
    work: Work


class StageQueue:
    """Waiting work of one stage."""

    def __init__(self) -> None:
        self._entries: dict[Work, Entry] = {}
        self._numbers = count()
        self.ordinary: dict[float, AgeQueue] = {}
        """Load -> work with this load that any worker may take."""
        self._retried: list[Entry] = []
        self._suspects: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, work: Work) -> bool:
        return work in self._entries

    def add(self, work: Work) -> None:
        entry = self._entries[work] = Entry(work.order, next(self._numbers), work)
        if work.alone:
            insort(self._suspects, entry)
        elif work.avoid:
            insort(self._retried, entry)
        else:
            self.ordinary.setdefault(work.load, AgeQueue()).add(entry)

    def remove(self, work: Work) -> None:
        """Remove work. Raises KeyError if it does not wait."""
        entry = self._entries.pop(work)
        if work.alone:
            self._suspects.remove(entry)
        elif work.avoid:
            self._retried.remove(entry)
        else:
            queue = self.ordinary[work.load]
            queue.remove(work)
            if not queue:
                del self.ordinary[work.load]

    def retried(self) -> Iterator[Work]:
        """Yield the work that avoids some workers, oldest first."""
        return (entry.work for entry in self._retried)

    def oldest_suspect(self) -> Work | None:
        """Return the oldest work that must run alone."""
        return self._suspects[0].work if self._suspects else None


class AgeQueue:
    """Waiting work of the same stage and load. Knows the oldest work, also among those with certain LoRAs.

    Removed work stays in a heap until it is the first entry there.
    """

    def __init__(self) -> None:
        self._waiting: set[Work] = set()
        self._heap: list[Entry] = []
        self._heaps: dict[frozenset[Hashable], list[Entry]] = {}
        """LoRAs -> work with exactly these LoRAs."""
        self._lora_counts: Counter[int] = Counter()
        """Number of LoRAs -> number of heaps in `_heaps` for that many LoRAs."""
        self.newest = 0
        """Largest order of all work that was ever added."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, entry: Entry) -> None:
        work = entry.work
        self._waiting.add(work)
        self.newest = max(self.newest, work.order)
        if work.adapters not in self._heaps:
            self._heaps[work.adapters] = []
            self._lora_counts[len(work.adapters)] += 1
        heapq.heappush(self._heaps[work.adapters], entry)
        heapq.heappush(self._heap, entry)

    def remove(self, work: Work) -> None:
        self._waiting.remove(work)
        self._drop_removed(self._heap)
        heap = self._heaps[work.adapters]
        self._drop_removed(heap)
        if not heap:
            del self._heaps[work.adapters]
            self._lora_counts[len(work.adapters)] -= 1

    def oldest(self) -> Work:
        return self._heap[0].work

    def oldest_with(self, adapters: Collection[Hashable]) -> Work | None:
        """Return the oldest work that needs no other LoRAs than these."""
        sizes = [size for size, heaps in self._lora_counts.items() if heaps and size <= len(adapters)]
        subsets = (frozenset(subset) for size in sizes for subset in combinations(adapters, size))
        found = [self._heaps[subset][0] for subset in subsets if subset in self._heaps]
        return min(found).work if found else None

    def _drop_removed(self, heap: list[Entry]) -> None:
        while heap and heap[0].work not in self._waiting:
            heapq.heappop(heap)
