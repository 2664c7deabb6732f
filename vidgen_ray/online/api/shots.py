"""A job by all the fields of a Shot, for clients of ours."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from vidgen_ray.online.api import response_models
from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.error_responses import error_responses
from vidgen_ray.online.api.request_models import PATH_FIELDS, SHOT_FIELDS, checked_names
from vidgen_ray.online.api.response_models import ShotJob, shot_of
from vidgen_ray.online.api.videos import IdempotencyKey, job_of
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.inputs.uploads import receive
from vidgen_ray.online.job_service import client_fields
from vidgen_ray.online.store.jobs import JobKind
from vidgen_ray.shot import nest_flat_settings

router = APIRouter(tags=["shots"])


@router.post(
    "/v1/shots",
    response_model=ShotJob,
    openapi_extra=response_models.SHOT_BODY,
    responses=error_responses(404, 408, 409, 413, 415),
)
async def create_shot(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> ShotJob:
    """Ask for a shot by a line of a script, as JSON. Files are named by the ids of uploads, LoRAs by the server's names."""
    async with receive(request, server.settings.uploads) as received:
        if received.is_form:
            raise ApiError(415, "Content-Type: must be application/json", code="unsupported_media_type")
    fields = checked_names(nest_flat_settings(received.fields), {*SHOT_FIELDS, *PATH_FIELDS})
    (job,) = await server.job_service.accept(
        tenant,
        JobKind.SHOT,
        [fields],
        {"model": server.model(None)[0]},
        idempotency_key=idempotency_key,
        fingerprint=f"shot {received.fingerprint}"[:64],
    )
    return shot_of(job, client_fields(job.shot, server.settings, server.job_service.uploads))


@router.get("/v1/shots/{shot_id}", response_model=ShotJob, responses=error_responses(404))
async def get_shot(server: ServerDep, tenant: TenantDep, shot_id: str) -> ShotJob:
    """How far any job is, and its shot as it may be sent again. Its files and events are those of `/v1/videos/{id}`."""
    job = await job_of(server, tenant, shot_id)
    return shot_of(job, client_fields(job.shot, server.settings, server.job_service.uploads))
