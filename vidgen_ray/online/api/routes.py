"""All routes of the API, with those of names that requests can use and the health checks."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, FastAPI

from vidgen_ray.online.api import content_routes, image_routes, input_routes, video_routes
from vidgen_ray.online.api.openapi import ServerDep, TenantDep, error_responses, openapi_document
from vidgen_ray.online.api.responses import Health, LoadedLora, LoadedLoras, Lora, LoraPage, Model, ModelPage, Readiness
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.storage_check import storage_problem

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelPage, responses=error_responses())
@router.get("/models", response_model=ModelPage, responses=error_responses())
async def list_models(server: ServerDep, tenant: TenantDep) -> ModelPage:
    """List the models. The first is the default."""
    return ModelPage(data=[Model(id=name, created=server.started_at) for name in server.models])


@router.get("/v1/models/{model_id:path}", response_model=Model, responses=error_responses(404))
async def get_model(server: ServerDep, tenant: TenantDep, model_id: str) -> Model:
    """Return a model."""
    name, _ = server.model(model_id)
    return Model(id=name, created=server.started_at)


@router.get("/v1/loras", response_model=LoraPage, responses=error_responses())
async def list_loras(server: ServerDep, tenant: TenantDep) -> LoraPage:
    """List the LoRAs that requests can use."""
    return LoraPage(data=[Lora(id=name) for name in sorted(server.settings.loras)])


@router.get("/v1/list_loras", response_model=LoadedLoras, responses=error_responses())
async def list_loaded_loras(server: ServerDep, tenant: TenantDep) -> LoadedLoras:
    """List the LoRAs that requests can use, in SGLang's format."""
    adapters = [LoadedLora(nickname=name, path=name) for name in sorted(server.settings.loras)]
    return LoadedLoras(loaded_adapters=adapters, active={})


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
    problem = await asyncio.to_thread(storage_problem, server.store, server.outputs)
    if problem is not None:
        raise ApiError(503, problem, code="not_ready", type="server_error", headers={"Retry-After": "5"})
    missing = await server.missing()
    return Readiness(status="ok" if missing is None else "waiting", missing=missing)


def add_api(app: FastAPI) -> None:
    """Add the API's routes and OpenAPI document to the app."""
    for each in (
        # Before videos: /v1/videos/{video_id} matches /v1/videos/characters, too.
        input_routes.character_router,
        video_routes.estimate_router,
        video_routes.router,
        content_routes.sync_router,
        content_routes.router,
        image_routes.router,
        video_routes.shot_router,
        router,
        input_routes.file_router,
        health,
    ):
        app.include_router(each)
    # Replacing the method is FastAPI's documented way to extend the document.
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]
