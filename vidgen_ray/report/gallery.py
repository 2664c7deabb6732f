"""`OUT/index.html`: every shot with its clip, its words and what became of it. One file, no network, opens from disk."""

from pathlib import Path

from jinja2 import Environment, PackageLoader

from vidgen_ray.atomic import write_atomically
from vidgen_ray.outputs.manifest import read_manifest

SHOTS_SHOWN = 500
"""A browser with more players than this is no longer a gallery; the manifest has them all."""


def write_gallery(out: Path) -> Path:
    """Write the page from the manifest, failures first."""
    rows = sorted(read_manifest(out), key=lambda row: (row.status != "failed", row.line or 0))
    environment = Environment(loader=PackageLoader("vidgen_ray.report", "."), autoescape=True)
    count = {status: sum(row.status == status for row in rows) for status in ("done", "skipped", "failed")}
    page = environment.get_template("gallery.html").render(rows=rows[:SHOTS_SHOWN], count=count, total=len(rows))
    path = out / "index.html"
    write_atomically(path, page)
    return path
