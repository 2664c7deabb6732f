"""Rows of the gallery: what it shows of each shot, read from the manifest, the records of the shots and failures.jsonl."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from vidgen_ray.graph import STAGES
from vidgen_ray.outputs.failures import FILE as FAILURES
from vidgen_ray.outputs.manifest import REPLACED, manifest_batches
from vidgen_ray.outputs.paths import RECORD
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.shot import Shot
from vidgen_ray.stages.likeness import sampled_frames

MAX_SHOTS = 10_000
"""Maximum number of shots in the gallery."""
_KEPT = (stage.debug_file for stage in STAGES if stage.debug_file and stage.debug_file.endswith(".png"))
CHAIN = (*dict.fromkeys(_KEPT), "image.png")
"""Images of a shot, in the order in which the stages make them. The first ones exist with `--keep stages`."""
DEFAULTS = {name: field.get_default(call_default_factory=True) for name, field in Shot.model_fields.items()}


class GalleryRows(NamedTuple):
    """Rows and counts of a gallery."""

    rows: list[dict[str, Any]]
    """Failures first, then in the order of the script."""
    counts: dict[str, int]
    """Status -> number of shots, including those that are not shown."""


def gallery_rows(storage: Storage, limit: int = MAX_SHOTS) -> GalleryRows:
    """Return the rows of a gallery, at most `limit`. Reads one small file per finished shot. Raises OSError."""
    counts: Counter[str] = Counter(done=0, skipped=0, failed=0)
    chosen: list[dict[str, Any]] = []
    for batch in manifest_batches(storage):
        counts.update(batch.column("status").to_pylist())
        rows = [row for row in batch.to_pylist() if row["status"] != REPLACED]
        chosen = heapq.nsmallest(limit, [*chosen, *rows], key=_order)
    failed_fields = _failed_fields(storage, {row["id"] for row in chosen if row["status"] == "failed"})
    return GalleryRows([_row(storage, row, failed_fields) for row in chosen], dict(counts))


def _order(row: Mapping[str, Any]) -> tuple[bool, str, int]:
    return row["status"] != "failed", row["script"], row["line"] or 0


def _row(storage: Storage, row: Mapping[str, Any], failed_fields: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    shown = {name: row[name] for name in ("id", "script", "line", "status", "prompt", "width", "height", "num_frames", "fps")}
    shown |= {name: row[name] for name in ("image", "video", "hd_video", "seconds", "seed", "mode")}
    shown |= {"likeness": _likeness(row), "likeness_text": likeness_text(row)}
    metadata = _object(row["metadata"])
    shown |= {name: str(metadata[name]) for name in ("character", "style", "scene", "caption") if metadata.get(name)}
    if row["status"] == "failed":
        shown["failure"] = f"{row['failure_stage']}: {row['failure_message']}"
        fields = failed_fields.get(row["id"], {})
    else:
        folder = str(PurePosixPath(row["image"]).parent) if row["image"] else ""
        record = _record(storage, folder, row["ended_at"]) if folder else {}
        files = record.get("files") or {}
        shown["chain"] = [f"{folder}/{name}" for name in CHAIN if name in files]
        fields = record.get("shot") or {}
    fields = {name: value for name, value in fields.items() if value != DEFAULTS.get(name) and value not in (None, [], {})}
    shown["fields"] = fields
    shown["loras"] = [PurePosixPath(lora["path"]).stem for lora in fields.get("lora") or () if isinstance(lora, dict)]
    return {name: value for name, value in shown.items() if value not in (None, [], {})}


def _likeness(row: Mapping[str, Any]) -> float | None:
    """Return the worst likeness of the clip, otherwise that of the image. `None` without a face, -1 if none was found."""
    if row["frames_without_face"] is None:
        return None
    worst = row["image_likeness"] if row["num_frames"] is None else row["clip_likeness_worst"]
    return -1.0 if worst is None else round(worst, 3)


def likeness_text(row: Mapping[str, Any]) -> str | None:
    """Return `face 0.62, clip 0.58, worst 0.51; 1 of 5 frames without a face`. `None` for a shot without a face."""
    missing, image, mean = (row[name] for name in ("frames_without_face", "image_likeness", "clip_likeness_mean"))
    if missing is None:
        return None
    text = "no face found in the image" if image is None else f"face {image:.2f}"
    if row["num_frames"] is None:
        return text
    if mean is None:
        return f"{text}, no face found in the clip"
    text += f", clip {mean:.2f}, worst {row['clip_likeness_worst']:.2f}"
    return f"{text}; {missing} of {len(sampled_frames(row['num_frames']))} frames without a face" if missing else text


@lru_cache(MAX_SHOTS)
def _record(storage: Storage, folder: str, ended_at: str) -> dict[str, Any]:
    """Return the content of shot.json. `ended_at` of the row tells the records of a shot apart, for `vidgen watch`."""
    return _object(storage.read(f"{folder}/{RECORD}") or b"{}")


def _failed_fields(storage: Storage, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Return the fields of failed lines by their id."""
    if not ids:
        return {}
    fields = {}
    for line in _failures(storage, ids):
        fields[line.pop("failure")["id"]] = line
    return fields


def _failures(storage: Storage, ids: set[str]) -> Iterator[dict[str, Any]]:
    with suppress(FileNotFoundError), storage.local_copy(FAILURES) as path:
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            line = _object(text)
            failure = line.get("failure")
            if isinstance(failure, dict) and failure.get("id") in ids:
                yield line


def _object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Anything else gives an empty one."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {}
