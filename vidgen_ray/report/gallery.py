"""Gallery: `OUT/index.html` with the clip, the prompt and the result of every shot. Works offline, from disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from vidgen_ray.errors import UsageError
from vidgen_ray.outputs.manifest import REPLACED
from vidgen_ray.outputs.storage import Storage, storage_at
from vidgen_ray.report.gallery_rows import gallery_rows
from vidgen_ray.report.thumbnails import OnMade, add_thumbnails

FILE = "index.html"
MARKS = (b'name="generator" content="vidgen"', b"<title>vidgen: ")
"""One of these is in every gallery. Early versions wrote the title only."""
FILM_SUFFIX = ".mp4"


def check_no_other_page(out: str | Path) -> None:
    """Raise UsageError if the folder has an `index.html` that vidgen has not written."""
    storage = storage_at(out)
    page = storage.read(FILE)
    if page is not None and not _is_gallery(page):
        raise UsageError(f"{storage.place(FILE)}: exists and is not from vidgen; move it, or choose another output folder")


def write_gallery(out: str | Path, on_made: OnMade = lambda done, total: None) -> Path | str:
    """Write the gallery, and thumbnails if the folder is on a disk. Return its path or URL. Raises OSError."""
    storage = storage_at(out)
    storage.write(FILE, page_of(gallery_data(storage, on_made)))
    return storage.place(FILE)


def update_gallery(out: str | Path) -> None:
    """Write the gallery again if the folder has one. Raises OSError."""
    page = storage_at(out).read(FILE)
    if page is not None and _is_gallery(page):
        write_gallery(out)


def _is_gallery(page: bytes) -> bool:
    return any(mark in page for mark in MARKS)


def gallery_data(storage: Storage, on_made: OnMade = lambda done, total: None) -> dict[str, Any]:
    """Return what the page shows, as JSON data. Makes the missing thumbnails. Raises OSError."""
    rows, counts = gallery_rows(storage)
    if storage.local is not None:
        add_thumbnails(storage.local, rows, on_made)
    total = sum(counts.values()) - counts.get(REPLACED, 0)
    return {"rows": rows, "counts": counts, "total": total, "films": film_names(storage)}


def film_names(storage: Storage) -> list[str]:
    """Return the names of the films that are directly in the folder."""
    return sorted(name for name in storage.files("") if name.endswith(FILM_SUFFIX) and not name.startswith("."))


def page_of(data: Mapping[str, Any]) -> str:
    """Return the page that shows the data, one HTML file with style and script."""
    environment = Environment(loader=PackageLoader("vidgen_ray.report", "."), autoescape=True)
    script = Markup(environment.loader.get_source(environment, "gallery.js")[0])  # type: ignore[union-attr]  # own file
    return environment.get_template("gallery.html").render(data=data, total=data["total"], script=script)
