"""Gallery: `OUT/index.html` with the clip, the prompt and the result of every shot. Works offline, from disk."""

import heapq
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from vidgen_ray.errors import UsageError
from vidgen_ray.outputs.manifest import manifest_batches
from vidgen_ray.outputs.storage import storage_at
from vidgen_ray.stages.likeness import sampled_frames

MAX_SHOTS = 500
"""Maximum number of shots in the gallery. Browsers become slow with more players."""
FILE = "index.html"
MARKS = (b'name="generator" content="vidgen"', b"<title>vidgen: ")
"""One of these is in every gallery. Early versions wrote the title only."""


def check_no_other_page(out: str | Path) -> None:
    """Raise UsageError if the folder has an `index.html` that vidgen has not written."""
    page = storage_at(out).read(FILE)
    if page is not None and not any(mark in page for mark in MARKS):
        raise UsageError(
            f"{storage_at(out).place(FILE)}: exists and is not from vidgen; move it, or choose another output folder"
        )


def write_gallery(out: str | Path) -> Path | str:
    """Write the gallery from the manifest, failures first. Return its path or URL."""
    storage = storage_at(out)
    shown: list[dict[str, Any]] = []
    count: Counter[str] = Counter(done=0, skipped=0, failed=0)
    for batch in manifest_batches(storage):
        rows = batch.to_pylist()
        count.update(row["status"] for row in rows)
        shown = heapq.nsmallest(MAX_SHOTS, [*shown, *rows], key=lambda row: (row["status"] != "failed", row["line"] or 0))
    environment = Environment(loader=PackageLoader("vidgen_ray.report", "."), autoescape=True)
    page = environment.get_template("gallery.html").render(rows=shown, count=count, total=count.total(), likeness=likeness_text)
    storage.write(FILE, page)
    return storage.place(FILE)


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
