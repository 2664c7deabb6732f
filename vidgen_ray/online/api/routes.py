"""All routes of the API and the health checks."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, FastAPI

from vidgen_ray.online.api import (
    estimates,
    images,
    input_routes,
    models,
    shots,
    video_content,
    video_events,
    video_sync,
    videos,
)
from vidgen_ray.online.api.openapi import ServerDep, error_responses, openapi_document
from vidgen_ray.online.api.response_models import Health, Readiness
from vidgen_ray.online.api_error import ApiError

health = APIRouter(tags=["health"])


@health.get("/healthz", response_model=Health)
@health.get("/health", response_model=Health)
async def healthz() -> Health:
    """Respond with 200 while the process is alive."""
    return Health()


@health.get("/readyz", response_model_exclude_none=True, responses={503: error_responses()[503]})
async def readyz(server: ServerDep) -> Readiness:
    """Respond with 200 if jobs and files can be stored, after writing to the database and the output folder.

    Says what is missing to run jobs.
    """
    problem = await asyncio.to_thread(server.storage_check.problem)
    if problem is not None:
        raise ApiError(503, problem, code="not_ready", type="server_error", headers={"Retry-After": "5"})
    missing = await server.missing()
    return Readiness(status="ok" if missing is None else "waiting", missing=missing)


def add_api(app: FastAPI) -> None:
    """Add the API's routes and OpenAPI document to the app."""
    # Before videos: /v1/videos/{video_id} matches /v1/videos/characters, too.
    app.include_router(input_routes.character_router)
    for module in (estimates, videos, video_sync, video_content, video_events, images, shots, models):
        app.include_router(module.router)
    app.include_router(input_routes.file_router)
    app.include_router(health)
    # Replacing the method is FastAPI's documented way to extend the document.
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]
