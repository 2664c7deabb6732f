"""Index of ids in memory: a set of ids, or a map from ids to numbers, in 24 bytes per id."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16
HASH = np.dtype(f"S{HASH_BYTES}")
"""Hash of an id: the first 128 bits of its sha256, so that different ids have different hashes in practice.

NumPy drops zeros at the end of such values. Since all have the same length, they still differ.
"""


def id_hashes(ids: Iterable[str]) -> NDArray[np.bytes_]:
    """Return the hashes of the ids, (N,) of type `HASH`."""
    digests = [hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()[:HASH_BYTES] for id_ in ids]
    return np.frombuffer(b"".join(digests), HASH)


class IdIndex:
    """Map from ids to numbers for millions of entries. Fast if many ids are added and looked up per call.

    Not thread-safe: callers must serialize access.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.bytes_], NDArray[np.int64]]] = []
        """Sorted hashes and their numbers. Each part has at least twice as many as the next one, so there are few parts."""

    def numbers(self, hashes: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Return the number of each id, (N,), or -1 if it is not in the index."""
        found = np.full(len(hashes), -1, np.int64)
        for known, numbers in self._parts:
            positions = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            found = np.where(known[positions] == hashes, numbers[positions], found)
        return found

    def insert(self, hashes: NDArray[np.bytes_], numbers: NDArray[np.int64]) -> None:
        """Add ids, (N,), with their numbers, 0 or more. They must differ and not be in the index."""
        if not len(hashes):
            return
        while self._parts and len(self._parts[-1][0]) < 2 * len(hashes):
            last_hashes, last_numbers = self._parts.pop()
            hashes, numbers = np.concatenate([last_hashes, hashes]), np.concatenate([last_numbers, numbers])
        # Stable sorting is fast for parts that are already sorted.
        order = np.argsort(hashes, kind="stable")
        self._parts.append((hashes[order], numbers[order]))

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._parts)

    def contain(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Return for each id whether it is in the index, (N,)."""
        return self.numbers(id_hashes(ids)) >= 0

    def add_new(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Add `ids`. Return for each one, (N,), whether it is new: neither in the index nor earlier in `ids`."""
        hashes = id_hashes(ids)
        is_new = self.numbers(hashes) < 0
        is_first = np.zeros(len(hashes), bool)
        is_first[np.unique(hashes, return_index=True)[1]] = True
        is_new &= is_first
        self.insert(hashes[is_new], np.zeros(is_new.sum(), np.int64))
        return is_new

    def intersection(self, ids: Sequence[str]) -> set[str]:
        """Return the members of `ids` that are in the index."""
        return {id_ for id_, is_in in zip(ids, self.contain(ids).tolist(), strict=True) if is_in}
