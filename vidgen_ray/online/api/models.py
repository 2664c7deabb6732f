"""Values of the `model` field: the profile, and its fast mode."""

from __future__ import annotations

from fastapi import APIRouter

from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.openapi import error_responses
from vidgen_ray.online.api.response_models import Model, ModelPage

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelPage, responses=error_responses())
async def list_models(server: ServerDep, tenant: TenantDep) -> ModelPage:
    """List the models. The first is the default."""
    return ModelPage(data=[Model(id=name, created=server.started_at) for name in server.models])


@router.get("/v1/models/{model_id}", response_model=Model, responses=error_responses(404))
async def get_model(server: ServerDep, tenant: TenantDep, model_id: str) -> Model:
    """Return a model."""
    name, _ = server.model(model_id)
    return Model(id=name, created=server.started_at)
