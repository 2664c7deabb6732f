"""Names that requests can use: values of the `model` field, and LoRAs."""

from __future__ import annotations

from fastapi import APIRouter

from vidgen_ray.online.api.openapi import ServerDep, TenantDep, error_responses
from vidgen_ray.online.api.response_models import LoadedLora, LoadedLoras, Lora, LoraPage, Model, ModelPage

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
