"""The page at `/`, for people: the same jobs as the API's, through the same intake."""

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.web.auth_routes import door_routes
from vidgen_ray.online.web.page_context import STATIC, PageContext
from vidgen_ray.online.web.routes import page_routes


def add_page(app: FastAPI, server: ServerContext) -> None:
    """Add the page's routes and static files to the app."""
    site = PageContext(server)
    app.include_router(page_routes(site))
    app.include_router(door_routes(site))
    app.mount("/static", _Static(directory=STATIC), name="static")


class _Static(StaticFiles):
    """The page names these files with a digest of their content, so a browser may keep them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if scope["query_string"] else "no-cache"
        return response
