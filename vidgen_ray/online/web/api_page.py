"""Page about the API: its operations, from the OpenAPI document."""

import asyncio
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.web.page_context import PageContext


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the API."""

    method: str
    path: str
    description: str


def api_page_routes(context: PageContext, app: FastAPI) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    async def api_page(request: Request, tenant: Tenant) -> Response:
        if not context.server.settings.docs:
            return context.message(request, 404, "Not found", "The documentation of the API is turned off on this server.")
        groups = await asyncio.to_thread(_operations, app)
        url = f"{request.base_url}".rstrip("/")
        return context.render(request, "api.html", groups=groups, url=url, model=next(iter(context.server.models)))

    router.add_route("/api-docs", context.for_tenant(api_page), ["GET"])
    return router


def _operations(app: FastAPI) -> dict[str, list[Operation]]:
    """Return tag -> operations."""
    groups: dict[str, list[Operation]] = {}
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            if method != "head":
                tag = operation.get("tags", ["other"])[0]
                description = operation.get("description", operation.get("summary", "")).partition("\n\n")[0]
                groups.setdefault(tag, []).append(Operation(method.upper(), path, description))
    return groups
