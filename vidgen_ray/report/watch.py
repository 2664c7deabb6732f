"""Live gallery: serves an output folder on this machine, with the rows of a run in progress."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.paths import SHOTS
from vidgen_ray.outputs.storage import storage_at
from vidgen_ray.report.gallery import film_names, gallery_data, page_of
from vidgen_ray.report.thumbnails import FOLDER as THUMBNAILS

REFRESH_S = 3
"""Seconds between two requests of an open page for new rows."""
SHOWN = (SHOTS, THUMBNAILS)
"""Folders whose files are served, besides films."""
HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


def gallery_app(out: Path) -> Starlette:
    """Return an application that serves the gallery of a folder. Raises SetupError if the folder does not exist."""
    if not out.is_dir():
        raise SetupError(f"{out}: no such folder; pass the output folder of a run")
    storage = storage_at(out)
    root = out.resolve()

    def page(request: Request) -> Response:
        return HTMLResponse(page_of({**gallery_data(storage), "refresh_s": REFRESH_S}), headers=HEADERS)

    def rows(request: Request) -> Response:
        return JSONResponse(gallery_data(storage), headers=HEADERS)

    def file(request: Request) -> Response:
        path = (root / request.path_params["path"]).resolve()
        is_shown = any(path.is_relative_to(root / folder) for folder in SHOWN)
        is_shown = is_shown or (path.parent == root and path.name in film_names(storage))
        return FileResponse(path, headers=HEADERS) if is_shown and path.is_file() else Response("Not found", 404)

    return Starlette(routes=[Route("/", page), Route("/rows.json", rows), Route("/{path:path}", file)])
