"""Routes that estimate what a job would take, without creating it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from vidgen_ray.engine.calls import OUTPUT
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.api.openapi import JSON, ServerDep, TenantDep, error_responses, request_body
from vidgen_ray.online.api.requests import CreateShot, CreateVideo
from vidgen_ray.online.api.response_models import Estimate, video_response
from vidgen_ray.online.api.shots import shot_fields
from vidgen_ray.online.api.videos import video_fields
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.queue_estimate import JobEstimate, NewJobEstimate
from vidgen_ray.online.request_limits import check_size
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import JobKind
from vidgen_ray.online.uploads import receive
from vidgen_ray.profile import Profile

SECONDS_PER_HOUR = 3600

router = APIRouter()


@router.post(
    "/v1/shots/estimate",
    tags=["shots"],
    response_model=Estimate,
    openapi_extra=request_body(CreateShot, JSON),
    responses=error_responses(404, 408, 413, 415),
)
async def estimate_shot(request: Request, server: ServerDep, tenant: TenantDep) -> Estimate:
    """Estimate the job that `POST /v1/shots` would create from the same body, without creating it."""
    fields, _ = await shot_fields(request, server)
    return await _estimate(server, tenant, JobKind.SHOT, [fields], {"model": server.model(None)[0]})


@router.post(
    "/v1/videos/estimate",
    tags=["videos"],
    response_model=Estimate,
    openapi_extra=request_body(CreateVideo),
    responses=error_responses(404, 408, 413, 415),
)
async def estimate_video(request: Request, server: ServerDep, tenant: TenantDep) -> Estimate:
    """Estimate the job that `POST /v1/videos` would create from the same body, without creating it.

    Images of the body are stored as uploads.
    """
    async with receive(request, server.settings.uploads) as received:
        body = CreateVideo.parse(received.fields)
        fields, returned = await video_fields(server, tenant, body)
    return await _estimate(server, tenant, JobKind.VIDEO, body.repeated(fields), returned)


async def _estimate(
    server: ServerContext, tenant: Tenant, kind: JobKind, shots: Sequence[Mapping[str, Any]], returned: Mapping[str, Any]
) -> Estimate:
    job = await asyncio.to_thread(server.job_service.new_job, tenant, kind, shots[0], returned)
    check_size(tenant.limits, job.shot, len(shots))
    if job.state.is_final:
        new = NewJobEstimate(0, 0.0, {})
    else:
        new = await server.queue_estimator.estimate_new(job.shot)
    seconds = {stage: round(len(shots) * each, 3) for stage, each in new.stage_seconds.items()}
    gpu_seconds = sum(each for stage, each in seconds.items() if _uses_gpu(stage, server.serving_profile.profile))
    price = server.settings.gpu_hour_price
    video = video_response(job, JobEstimate(None, None, 0.0), server.serving_profile.licences)
    return Estimate.model_validate(
        {
            **video.model_dump(include={"model", "seconds", "size", "model_size", "scale", "hd_size", "fps", "num_frames"}),
            "render_s": round(sum(seconds.values()), 3),
            "stage_durations": seconds,
            "gpu_seconds": round(gpu_seconds, 3),
            "queue_position": new.queue_position,
            "queue_wait_s": round(new.wait_s, 3),
            "cost": None if price is None else round(gpu_seconds * price / SECONDS_PER_HOUR, 6),
            "is_rendered": job.state.is_final,
            "results": len(shots),
        }
    )


def _uses_gpu(stage: str, profile: Profile) -> bool:
    return stage != OUTPUT and profile.actor_of(STAGE_BY_NAME[stage]).device != "cpu"
