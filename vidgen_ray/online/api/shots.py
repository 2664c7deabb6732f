"""Routes that create and return jobs with all fields of a shot."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from vidgen_ray.online.api.openapi import JSON, ServerDep, TenantDep, error_responses, request_body
from vidgen_ray.online.api.requests import CreateShot
from vidgen_ray.online.api.response_models import ShotJob, shot_response
from vidgen_ray.online.api.videos import IdempotencyKey, job_of
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.job_service import client_fields
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import JobKind
from vidgen_ray.online.uploads import receive

router = APIRouter(tags=["shots"])


@router.post(
    "/v1/shots",
    response_model=ShotJob,
    openapi_extra=request_body(CreateShot, JSON),
    responses=error_responses(404, 408, 409, 413, 415),
)
async def create_shot(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> ShotJob:
    """Create a job from the fields of a script line, as JSON. Files are ids of uploads, LoRAs are names of this server."""
    fields, fingerprint = await shot_fields(request, server)
    (job,) = await server.job_service.accept(
        tenant,
        JobKind.SHOT,
        [fields],
        {"model": server.model(None)[0]},
        idempotency_key=idempotency_key,
        fingerprint=f"shot {fingerprint}"[:64],
    )
    return shot_response(job, client_fields(job.shot, server.settings, server.job_service.uploads))


async def shot_fields(request: Request, server: ServerContext) -> tuple[dict[str, Any], str]:
    """Return the fields of the shot in the body of a request, and the fingerprint of the body. Raises ApiError."""
    async with receive(request, server.settings.uploads) as received:
        if received.is_form:
            raise ApiError(415, "Content-Type: must be application/json", code="unsupported_media_type")
    return CreateShot.parse(received.fields).model_dump(exclude_unset=True), received.fingerprint


@router.get("/v1/shots/{shot_id}", response_model=ShotJob, responses=error_responses(404))
async def get_shot(server: ServerDep, tenant: TenantDep, shot_id: str) -> ShotJob:
    """Return a job of any kind with all fields of its shot. Its files and events are at `/v1/videos/{id}`."""
    job = await job_of(server, tenant, shot_id)
    return shot_response(job, client_fields(job.shot, server.settings, server.job_service.uploads))
