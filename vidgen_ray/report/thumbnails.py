"""Thumbnails of the gallery: `OUT/thumbnails/<2>/<id>.webp`. A thumbnail is made once, and again when its image changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image as PILImage

FOLDER = "thumbnails"
SIDE_PX = 320
"""Longest side."""
QUALITY = 75

OnMade = Callable[[int, int], None]
"""Called with the number of thumbnails made and to make."""


def add_thumbnails(root: Path, rows: Sequence[dict[str, Any]], on_made: OnMade) -> None:
    """Make the missing thumbnails of the rows and set their `thumbnail`, a path relative to `root`.

    An image that cannot be read has no thumbnail.
    """
    missing = []
    for row in rows:
        if "image" in row:
            row["thumbnail"] = _place(row)
            if not _is_current(root, row):
                missing.append(row)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda row: _make(root, row), missing)
        for number, row in enumerate(missing, start=1):
            if not next(made):
                del row["thumbnail"]
            on_made(number, len(missing))


def _place(row: Mapping[str, Any]) -> str:
    shot = PurePosixPath(row["image"]).parent
    return f"{FOLDER}/{shot.parent.name}/{shot.name}.webp"


def _is_current(root: Path, row: Mapping[str, Any]) -> bool:
    with suppress(OSError):
        return os.stat(root / row["thumbnail"]).st_mtime >= os.stat(root / row["image"]).st_mtime
    return False


def _make(root: Path, row: Mapping[str, Any]) -> bool:
    try:
        with PILImage.open(root / row["image"]) as image:
            image.thumbnail((SIDE_PX, SIDE_PX))
            target = root / row["thumbnail"]
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced at once, but not flushed to disk: a lost thumbnail is made again.
            unfinished = target.with_suffix(".unfinished")
            image.convert("RGB").save(unfinished, "WEBP", quality=QUALITY)
            unfinished.replace(target)
    except OSError:
        return False
    return True
