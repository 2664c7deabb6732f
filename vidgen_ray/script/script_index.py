"""Index of a script's ids while it is read: which line has which id."""

from collections.abc import Container, Mapping, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.outputs.id_index import IdIndex, id_hashes


class ScriptIndex:
    """Ids of a script and their lines, in 24 bytes per id."""

    def __init__(self) -> None:
        self._ids = IdIndex()
        self._last_numbers: dict[str, int] = {}

    def lines_of(self, ids: Sequence[str]) -> dict[str, int]:
        """Return id -> line number of those ids that lines have."""
        numbers = self._ids.numbers(id_hashes(ids)).tolist()
        return {id_: number for id_, number in zip(ids, numbers, strict=True) if number >= 0}

    def add(self, lines: Mapping[str, int]) -> None:
        """Add new ids: id -> line number."""
        self.add_hashes(id_hashes(lines), np.fromiter(lines.values(), np.int64, len(lines)))

    def are_new(self, hashes: NDArray[np.bytes_]) -> bool:
        """Return whether the ids with these hashes, see `id_hashes`, all differ and none of them is in the index."""
        return len(np.unique(hashes)) == len(hashes) and bool((self._ids.numbers(hashes) < 0).all())

    def add_hashes(self, hashes: NDArray[np.bytes_], lines: NDArray[np.int64]) -> None:
        """Add new ids, given as hashes, (N,), with their line numbers, (N,)."""
        self._ids.insert(hashes, lines)

    def unused_name(self, name: str, taken: Container[str]) -> str:
        """Return `name`, `name-2`, `name-3`, ... : the first that is neither in the index nor in `taken`."""
        # Without the counter, thousands of lines with the same default id would take quadratic time.
        for number in count(self._last_numbers.get(name, 1)):
            candidate = name if number == 1 else f"{name}-{number}"
            if candidate not in taken and not self.lines_of([candidate]):
                if number > 1:
                    self._last_numbers[name] = number
                return candidate
        raise AssertionError
