"""Splits of a data set: groups of clips that belong into one split, and the split of each group.

A group is everything that is connected by an equal prompt, person or script, or by `continue_from`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vidgen_ray.errors import UsageError, shortened

SplitKey = Literal["prompt", "character", "source"]
# Keys are named so that the key of a shot sorts last: a group keeps its smallest key when shots are added.
KEYS: dict[SplitKey, str] = {
    "prompt": "SELECT id, 'prompt ' || prompt AS key FROM clips SEMI JOIN chosen USING (id) WHERE prompt IS NOT NULL",
    "character": """SELECT id, 'character ' || character AS key FROM clips SEMI JOIN chosen USING (id)
            WHERE character IS NOT NULL
        UNION ALL SELECT id, 'photo ' || unnest(face_image) AS key FROM clips SEMI JOIN chosen USING (id)""",
    "source": "SELECT id, 'script ' || script AS key FROM clips SEMI JOIN chosen USING (id)",
}
"""Key -> SQL of the ids and keys of clips. A person is a character, and each face photo."""
CHAINS = """SELECT id, 'shot ' || id AS key FROM clips
    UNION ALL SELECT id, 'shot ' || continue_from AS key FROM clips WHERE continue_from IS NOT NULL"""


class Group(NamedTuple):
    """Clips that belong into one split."""

    number: int
    key: str
    """The smallest of its keys, such as `prompt a boat`."""
    clips: int
    splits: list[str]
    """Splits of its clips that are exported already."""


def parse_splits(text: str | None) -> dict[str, float]:
    """Parse `train=0.9,val=0.1`. Raises UsageError."""
    if text is None:
        return {"train": 1.0}
    splits: dict[str, float] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([A-Za-z0-9_]+)\s*=\s*([0-9.]+)\s*", part)
        if found is None or found[1] in splits or found[2].count(".") > 1 or not 0 < float(found[2]) <= 1:
            raise UsageError(
                f"--split: got {part.strip()!r}, must be NAME=SHARE such as val=0.1, each name once, above 0 up to 1"
            )
        splits[found[1]] = float(found[2])
    if abs(sum(splits.values()) - 1) > 1e-6:
        raise UsageError(f"--split: the shares add up to {sum(splits.values()):g}, must be 1")
    return splits


def assign_splits(database: duckdb.DuckDBPyConnection, splits: Mapping[str, float], by: Sequence[SplitKey]) -> None:
    """Create the table `splits` with the split of each id in `chosen`.

    A group with exported clips (table `done`) keeps their split. That of another group follows from the hash of its smallest
    key. Raises UsageError if clips connect groups of several splits, or groups are too large for the shares.
    """
    if len(splits) == 1:
        database.execute(f"CREATE TABLE splits AS SELECT id, '{next(iter(splits))}' AS split FROM chosen")
        return
    groups = _groups(database, by)
    if connected := next((group for group in groups if len(group.splits) > 1), None):
        raise _connected(database, connected, by)
    chosen = {group.number: group.splits[0] for group in groups if group.splits}
    places = {group.number: _place(group.key) for group in groups if not group.splits}
    edges = np.cumsum([0.0, *splits.values()])
    names = list(splits)
    for number, place in places.items():
        chosen[number] = names[min(int(np.searchsorted(edges, place, "right")) - 1, len(names) - 1)]
    if len(places) == len(groups):
        for name, (low, high) in zip(names, pairwise(edges), strict=True):
            counts = Counter(chosen.values())
            spare = [number for number in places if counts[chosen[number]] > 1]
            # Few groups can miss a small split by chance. It gets the nearest one.
            if spare and not counts[name]:
                chosen[min(spare, key=lambda number: abs(places[number] - (low + high) / 2))] = name
        _check_shares(groups, chosen, splits, by)
    table = pyarrow.table({"number": [*chosen], "split": pyarrow.array(chosen.values(), pyarrow.string())})
    database.register("chosen_splits", table)
    database.execute("CREATE TABLE splits AS SELECT id, split FROM members JOIN chosen_splits USING (number)")
    database.unregister("chosen_splits")


def _place(key: str) -> float:
    """Return a number from 0 to 1 that depends only on the key."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13


def _groups(database: duckdb.DuckDBPyConnection, by: Sequence[SplitKey]) -> list[Group]:
    """Create the table `members` with the group of each id in `chosen`. Return the groups, sorted by their keys."""
    database.execute(f"CREATE TABLE keys AS {' UNION ALL '.join([*(KEYS[name] for name in by), CHAINS])}")
    numbered = "SELECT dense_rank() OVER (ORDER BY id) - 1 AS shot, dense_rank() OVER (ORDER BY key) - 1 AS key FROM keys"
    edges = database.execute(numbered).fetchnumpy()
    shots, keys = (np.asarray(edges[name], np.int64) for name in ("shot", "key"))
    n_shots = int(shots.max()) + 1
    size = n_shots + int(keys.max()) + 1
    graph = coo_array((np.ones(len(shots), bool), (shots, n_shots + keys)), (size, size))
    _, labels = connected_components(graph, directed=False)
    database.register("labels", pyarrow.table({"shot": np.arange(n_shots), "number": labels[:n_shots]}))
    database.execute(
        """CREATE TABLE members AS SELECT id, number FROM chosen
        JOIN (SELECT DISTINCT id, dense_rank() OVER (ORDER BY id) - 1 AS shot FROM keys) USING (id) JOIN labels USING (shot)"""
    )
    database.unregister("labels")
    found = database.execute(
        """SELECT number, min(key) AS first, count(DISTINCT id),
            coalesce(list_sort(list(DISTINCT split) FILTER (split IS NOT NULL)), [])
        FROM members JOIN keys USING (id) LEFT JOIN done USING (id) GROUP BY number ORDER BY first"""
    )
    return [Group(*row) for row in found.fetchall()]


def _check_shares(
    groups: Sequence[Group], chosen: Mapping[int, str], splits: Mapping[str, float], by: Sequence[SplitKey]
) -> None:
    sizes = Counter[str]()
    for group in groups:
        sizes[chosen[group.number]] += group.clips
    largest = max(groups, key=lambda group: group.clips)
    for name, share in splits.items():
        expected = share * sizes.total()
        is_off = not sizes[name] or abs(sizes[name] - expected) > max(expected / 2, 1)
        if is_off and largest.clips > expected / 2:
            others = [key for key in KEYS if key not in by] if len(by) == 1 else by
            raise UsageError(
                f"--split {name}={share:g}: would have {sizes[name]:,} of {sizes.total():,} clips. Clips of the same "
                f"{' or '.join(by)}, or of a continued chain, are never divided; the largest such group, with "
                f"{shortened(largest.key)}, has {largest.clips:,} clips. Try "
                f"{', '.join(f'--split-by {key}' for key in others)}, or other shares"
            )


def _connected(database: duckdb.DuckDBPyConnection, group: Group, by: Sequence[SplitKey]) -> UsageError:
    """Return the error of clips that connect clips of several splits."""
    rows = database.execute(
        "SELECT id, split FROM members LEFT JOIN done USING (id) WHERE number = ? ORDER BY id", [group.number]
    ).fetchall()
    new = ", ".join([id_ for id_, split in rows if split is None][:3]) or "a changed clip"
    known = " and ".join(f"{next(id_ for id_, split in rows if split == name)} of {name}" for name in group.splits)
    return UsageError(
        f"--split-by {','.join(by)}: {new} connects {known}, through {shortened(group.key)} or other keys. Exported clips keep "
        "their split: leave the new clips out with --where, or export to another folder"
    )
