"""Routes that create, list, poll, cancel, delete and remix videos."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from starlette.requests import Request
from starlette.responses import Response

from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.openapi import error_responses, request_body
from vidgen_ray.online.api.request_models import CreateImages, CreateVideo, RemixVideo
from vidgen_ray.online.api.response_models import Video, VideoDeleted, VideoPage, video_response
from vidgen_ray.online.api_error import invalid, not_found
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.uploads import receive
from vidgen_ray.online.job_service import client_fields
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job, JobKind
from vidgen_ray.online.store.store import UnknownJob

POLL_AFTER = "openai-poll-after-ms"
LISTED_KINDS = (JobKind.VIDEO, JobKind.SHOT)
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="Repeating a request with the same key returns the same job."),
]

router = APIRouter(tags=["videos"])


@router.post(
    "/v1/videos",
    response_model=Video,
    openapi_extra=request_body(CreateVideo),
    responses=error_responses(404, 408, 409, 413, 415),
)
async def create_video(
    request: Request, response: Response, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> Video:
    """Create a video. The job is stored before the response is sent. Poll it with `GET /v1/videos/{video_id}`."""
    async with receive(request, server.settings.uploads) as received:
        fields, returned = await _video_fields(server, tenant, CreateVideo.parse(received.fields))
    (job,) = await server.job_service.accept(
        tenant,
        JobKind.VIDEO,
        [fields],
        returned,
        idempotency_key=idempotency_key,
        fingerprint=f"video {received.fingerprint}"[:64],
    )
    await _set_poll_after(server, response, job)
    return video_response(job)


@router.get("/v1/videos", response_model=VideoPage, responses=error_responses(404))
async def list_videos(
    server: ServerDep,
    tenant: TenantDep,
    after: Annotated[str | None, Query(description="Id of the last video of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Maximum number of videos.")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="asc: oldest first. desc: newest first.")] = "desc",
) -> VideoPage:
    """List the videos of the tenant, page by page."""
    try:
        page = await asyncio.to_thread(
            server.store.list, tenant.name, kinds=LISTED_KINDS, after=after, limit=limit, order=order
        )
    except UnknownJob:
        raise not_found("video", str(after)[:100], "after") from None
    data = [video_response(job) for job in page.jobs]
    ids = [video.id for video in data]
    return VideoPage(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=page.has_more)


@router.get("/v1/videos/{video_id}", response_model=Video, responses=error_responses(404))
async def get_video(response: Response, server: ServerDep, tenant: TenantDep, video_id: str) -> Video:
    """Return the status and progress of a video."""
    job = await job_of(server, tenant, video_id)
    await _set_poll_after(server, response, job)
    return video_response(job)


@router.delete("/v1/videos/{video_id}", response_model=VideoDeleted, responses=error_responses(404))
async def delete_video(server: ServerDep, tenant: TenantDep, video_id: str) -> VideoDeleted:
    """Delete a video. A queued or running job is cancelled."""
    if not await server.job_service.delete(tenant, video_id):
        raise not_found("video", video_id[:100])
    return VideoDeleted(id=video_id)


@router.post("/v1/videos/{video_id}/cancel", response_model=Video, responses=error_responses(404))
async def cancel_video(server: ServerDep, tenant: TenantDep, video_id: str) -> Video:
    """Cancel a video: at once if it is queued, after the current denoising step or frame if it is running.

    Has no effect on a job that has ended.
    """
    job = await server.job_service.cancel(tenant, video_id)
    if job is None:
        raise not_found("video", video_id[:100])
    return video_response(job)


@router.post(
    "/v1/videos/{video_id}/remix",
    response_model=Video,
    openapi_extra=request_body(RemixVideo),
    responses=error_responses(404, 408, 409, 413, 415),
)
async def remix_video(
    request: Request,
    response: Response,
    server: ServerDep,
    tenant: TenantDep,
    video_id: str,
    idempotency_key: IdempotencyKey = None,
) -> Video:
    """Create a video from an existing one, with another prompt or other values of any field. The seed stays the same."""
    original = await job_of(server, tenant, video_id)
    async with receive(request, server.settings.uploads) as received:
        fields, returned = await _video_fields(server, tenant, RemixVideo.parse(received.fields), original)
    (job,) = await server.job_service.accept(
        tenant,
        JobKind.VIDEO,
        [fields],
        {**returned, "remixed_from": original.id},
        idempotency_key=idempotency_key,
        fingerprint=f"{original.id[6:26]} {received.fingerprint}"[:64],
    )
    await _set_poll_after(server, response, job)
    return video_response(job)


async def job_of(server: ServerContext, tenant: Tenant, job_id: str) -> Job:
    """Return a job of the tenant. Raises ApiError 404."""
    job = await asyncio.to_thread(server.store.get, job_id, tenant.name)
    if job is None:
        raise not_found("video", job_id[:100])
    return job


async def _video_fields(
    server: ServerContext, tenant: Tenant, request: CreateVideo, original: Job | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the shot, and the values that are returned with the job."""
    model, model_fields = server.model(request.model or (original and original.request.get("model")))
    base: dict[str, Any] = dict(model_fields)
    if original is not None:
        # The model replaces the mode of the original, a face replaces its face.
        replaced = {"mode"} if request.model else set()
        if request.model_fields_set & {"character", "face_image"}:
            replaced |= {"face_image", "face_index"}
        kept = client_fields(original.shot, server.settings, server.job_service.uploads)
        base |= {name: value for name, value in kept.items() if name not in replaced}
    fields = {**base, **request.shot_fields({**server.serving_profile.profile.defaults, **base})}
    if request.input_reference is not None and request.image_reference is not None:
        raise invalid("image_reference", "cannot be combined with input_reference: a clip starts from one image")
    for name in ("input_reference", "image_reference"):
        if (reference := getattr(request, name)) is not None:
            fields["image"] = await server.image_references.resolve(tenant, reference, name)
    return {**fields, **await face_fields(server, tenant, request)}, {"model": model, "user": request.user}


async def face_fields(server: ServerContext, tenant: Tenant, request: CreateVideo | CreateImages) -> dict[str, Any]:
    """Return the fields of the shot that select its face."""
    fields: dict[str, Any] = {} if request.character is None else {"character": request.character}
    if request.face_image:
        fields["face_image"] = await server.image_references.resolve_all(tenant, request.face_image, "face_image")
    return fields


async def _set_poll_after(server: ServerContext, response: Response, job: Job) -> None:
    estimate = await server.queue_estimator.estimate(job)
    response.headers[POLL_AFTER] = str(round(estimate.poll_after_s * 1000))
