"""Overview of an output folder, from its manifest: counts, failures, slowest shots, least alike shots, cost and disk use."""

from __future__ import annotations

import heapq
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vidgen_ray.outputs.manifest import REPLACED, SHOT_FILES, manifest_batches
from vidgen_ray.outputs.reviews import clip_digest, read_reviews
from vidgen_ray.outputs.storage import Storage

LISTED = 5
"""Shots in each list."""
MAX_MESSAGE_LENGTH = 200
MAX_COSTS = 1000
"""Scripts and characters whose cost is counted. Those after them count in the total only."""
CostOf = Literal["all", "script", "character"]
_CostKey = tuple[CostOf, str | None, str | None]
"""`of`, `name` and `currency` of a cost."""


@dataclass(slots=True)
class FailureGroup:
    """Failures with the same stage and class of error."""

    stage: str
    error: str
    count: int
    example: str
    """Id of the first one in the order of the manifest."""
    script: str
    line: int | None
    message: str
    """Message of the example."""


@dataclass(slots=True)
class ListedShot:
    """A shot that stands out."""

    id: str
    script: str
    line: int | None
    value: float
    """Seconds of all stages, or the worst likeness of the clip, -1 to 1."""


@dataclass(slots=True)
class Cost:
    """Cost of the finished shots of a folder, of a script, or of a character."""

    of: CostOf
    name: str | None
    """Name of the script or character."""
    currency: str | None
    """`None` if the price is the user's. Shots with another currency have an entry of their own."""
    cost: float = 0.0
    """Cost of the GPU seconds of all stages."""
    clips: int = 0
    """Finished shots of known cost."""
    accepted: int = 0
    """Clips of these that their review accepts."""
    cost_per_clip: float | None = None
    cost_per_accepted: float | None = None
    """`cost` of all clips, divided by the accepted ones. `None` without any."""


@dataclass(slots=True)
class Overview:
    """Figures that `vidgen status` prints."""

    counts: dict[str, int]
    """Status -> number of shots."""
    failures: list[FailureGroup]
    """Most frequent first."""
    slowest: list[ListedShot]
    least_alike: list[ListedShot]
    seconds: float
    """Seconds of all stages of all shots."""
    gpu_seconds: float
    shot_bytes: int
    """Bytes of the images and clips."""
    costs: list[Cost]
    """All shots, then scripts and characters by their cost. Empty if no shot has a cost."""
    cache_bytes: int | None = field(default=None)
    """Bytes of the stage cache. `None` in an object store."""


def overview(storage: Storage) -> Overview:
    """Read the manifest. Memory use does not grow with the number of shots, only of reviews. Raises OSError."""
    counts: Counter[str] = Counter(done=0, failed=0)
    groups: dict[tuple[str, str], FailureGroup] = {}
    slowest: list[tuple[float, str, ListedShot]] = []
    least: list[tuple[float, str, ListedShot]] = []
    seconds = gpu_seconds = 0.0
    shot_bytes = 0
    costs: dict[_CostKey, Cost] = {}
    accepted = {digest for digest, review in read_reviews(storage).items() if review.verdict == "accept"}
    for batch in manifest_batches(storage):
        for row in batch.to_pylist():
            counts[row["status"]] += 1
            if row["status"] == "failed":
                _count_failure(groups, row)
                continue
            if row["status"] == REPLACED:
                continue
            seconds += row["seconds"] or 0
            gpu_seconds += row["gpu_seconds"] or 0
            shot_bytes += sum(row[f"{name}_bytes"] or 0 for name in SHOT_FILES)
            if row["cost"] is not None:
                _add_cost(costs, row, is_accepted=clip_digest(row) in accepted)
            _keep(slowest, row, row["seconds"], largest=True)
            worst = row["clip_likeness_worst"] if row["num_frames"] else row["image_likeness"]
            _keep(least, row, worst, largest=False)
    return Overview(
        dict(counts),
        sorted(groups.values(), key=lambda group: -group.count),
        [shot for _, _, shot in sorted(slowest, key=lambda entry: -entry[2].value)],
        [shot for _, _, shot in sorted(least, key=lambda entry: entry[2].value)],
        round(seconds, 1),
        round(gpu_seconds, 1),
        shot_bytes,
        _with_means(costs.values()),
        _bytes_below(storage.local / "cache") if storage.local else None,
    )


def _count_failure(groups: dict[tuple[str, str], FailureGroup], row: Mapping[str, Any]) -> None:
    key = row["failure_stage"] or "", row["failure_error"] or ""
    if key in groups:
        groups[key].count += 1
        return
    message = " ".join((row["failure_message"] or "").split())
    groups[key] = FailureGroup(*key, 1, row["id"], row["script"], row["line"], message[:MAX_MESSAGE_LENGTH])


def _add_cost(costs: dict[_CostKey, Cost], row: Mapping[str, Any], *, is_accepted: bool) -> None:
    """Add the cost of a shot to that of the folder, of its script and of its character."""
    metadata = json.loads(row["metadata"] or "{}")
    character = metadata.get("character") if isinstance(metadata, dict) else None
    keys: list[_CostKey] = [("all", None, row["currency"]), ("script", row["script"], row["currency"])]
    if isinstance(character, str) and character:
        keys.append(("character", character, row["currency"]))
    for key in keys:
        if key not in costs and len(costs) >= MAX_COSTS:
            continue
        entry = costs.setdefault(key, Cost(*key))
        entry.cost += row["cost"]
        entry.clips += 1
        entry.accepted += is_accepted


def _with_means(costs: Collection[Cost]) -> list[Cost]:
    """Return the costs, if any shot has cost something, with their means."""
    if not any(entry.cost for entry in costs):
        return []
    for entry in costs:
        entry.cost = round(entry.cost, 6)
        entry.cost_per_clip = round(entry.cost / entry.clips, 6)
        entry.cost_per_accepted = round(entry.cost / entry.accepted, 6) if entry.accepted else None
    return sorted(costs, key=lambda entry: (get_args(CostOf).index(entry.of), -entry.cost))


def _keep(kept: list[tuple[float, str, ListedShot]], row: Mapping[str, Any], value: float | None, *, largest: bool) -> None:
    """Add the shot to a heap of the `LISTED` shots with the largest or smallest values."""
    if value is None:
        return
    heapq.heappush(kept, (value if largest else -value, row["id"], ListedShot(row["id"], row["script"], row["line"], value)))
    if len(kept) > LISTED:
        heapq.heappop(kept)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            # Removed meanwhile.
            except FileNotFoundError:
                continue
    return total
