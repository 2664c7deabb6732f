"""All routes of the API, the health checks and the OpenAPI document."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi

from vidgen_ray.online.api import characters, files, images, models, shots, video_content, video_events, videos
from vidgen_ray.online.api.deps import ServerDep
from vidgen_ray.online.api.error_responses import error_responses
from vidgen_ray.online.api.response_models import SHOT_PARTS, Health, ImagesResponse

health = APIRouter(tags=["health"])


@health.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """Respond with 200 while the process is alive."""
    return Health()


@health.get("/readyz", response_model=Health, responses={503: error_responses()[503]})
async def readyz(server: ServerDep) -> Health:
    """Respond with 200 if jobs can be stored."""
    await asyncio.to_thread(server.store.ping)
    return Health()


def add_api(app: FastAPI) -> None:
    """Add the API's routes and OpenAPI document to the app."""
    # Before videos: /v1/videos/{video_id} matches /v1/videos/characters, too.
    for module in (characters, videos, video_content, video_events, images, shots, models, files):
        app.include_router(module.router)
    app.include_router(health)
    # Replacing the method is FastAPI's documented way to extend the document.
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's document, without the validation errors (422) that this app answers with 400, plus our own schemas."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Pictures"] = ImagesResponse.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schemas["Pictures"].pop("$defs", {})
    schemas |= SHOT_PARTS
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    app.openapi_schema = document
    return document
