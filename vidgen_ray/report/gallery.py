"""`OUT/index.html`: every shot with its clip, its words and what became of it. One file, no network, opens from disk."""

import heapq
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from vidgen_ray.outputs.manifest import manifest_batches
from vidgen_ray.outputs.storage import storage_at

SHOTS_SHOWN = 500
"""A browser with more players than this is no longer a gallery; the manifest has them all."""
FILE = "index.html"


def write_gallery(out: str | Path) -> Path | str:
    """Write the page from the manifest, failures first. Returns where it lies: a path, or a URL."""
    storage = storage_at(out)
    shown: list[dict[str, Any]] = []
    count: Counter[str] = Counter(done=0, skipped=0, failed=0)
    for batch in manifest_batches(storage):
        rows = batch.to_pylist()
        count.update(row["status"] for row in rows)
        shown = heapq.nsmallest(SHOTS_SHOWN, [*shown, *rows], key=lambda row: (row["status"] != "failed", row["line"] or 0))
    environment = Environment(loader=PackageLoader("vidgen_ray.report", "."), autoescape=True)
    page = environment.get_template("gallery.html").render(rows=shown, count=count, total=count.total())
    storage.write(FILE, page)
    return storage.place(FILE)
