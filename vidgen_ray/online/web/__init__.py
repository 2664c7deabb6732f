"""Web page at `/`. It creates and shows the same jobs as the API."""

from fastapi import APIRouter, FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.web.pages import LOOK_FOLDER, STATIC, PageContext, api_page_routes, auth_routes, clip_routes, page_routes


def add_page(app: FastAPI, server: ServerContext) -> None:
    """Add the page's routes and static files to the app."""
    context = PageContext(server)
    router = APIRouter(include_in_schema=False)
    for add_routes in (page_routes, clip_routes, auth_routes, api_page_routes):
        add_routes(router, context)
    app.include_router(router)
    app.mount("/static", _StaticFiles(directory=STATIC, packages=[LOOK_FOLDER]), name="static")


class _StaticFiles(StaticFiles):
    """Static files with cache headers. URLs with a query contain a digest of the files, so browsers may cache them forever."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if scope["query_string"] else "no-cache"
        return response
