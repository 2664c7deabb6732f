"""Routes that create, list, poll, cancel, delete and remix videos."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from starlette.requests import Request
from starlette.responses import Response

from vidgen_ray.graph import file_sizes
from vidgen_ray.limits import MAX_RESULTS
from vidgen_ray.online.api.input_routes import check_faces
from vidgen_ray.online.api.openapi import ServerDep, TenantDep, error_responses, request_body
from vidgen_ray.online.api.requests import CreateImages, CreateVideo, RemixVideo
from vidgen_ray.online.api.response_models import Video, VideoDeleted, VideoPage, video_response
from vidgen_ray.online.api_error import invalid, not_found
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.delivered_size import delivered_artefact_of
from vidgen_ray.online.job_service import client_fields
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job, JobKind
from vidgen_ray.online.store.store import UnknownJob
from vidgen_ray.online.uploads import receive
from vidgen_ray.video_models import MODEL_DEFAULTS, without_other_models_defaults

POLL_AFTER = "openai-poll-after-ms"
START_IMAGES = ("input_reference", "image_reference", "reference_url")
"""Fields that name the image that a clip starts from."""
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
    """Create a video. The job is stored before the response is sent. Poll it with `GET /v1/videos/{video_id}`.

    With `n`, several videos are created and the first is returned. `outputs` lists the ids of all.
    """
    job = (await created_videos(request, server, tenant, idempotency_key))[0]
    return await _polled(server, response, job)


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
    data = [
        video_response(job, await server.queue_estimator.estimate(job), server.serving_profile.licences) for job in page.jobs
    ]
    ids = [video.id for video in data]
    return VideoPage(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=page.has_more)


@router.get("/v1/videos/{video_id}", response_model=Video, responses=error_responses(404))
async def get_video(response: Response, server: ServerDep, tenant: TenantDep, video_id: str) -> Video:
    """Return the status and progress of a video."""
    job = await job_of(server, tenant, video_id)
    return await _polled(server, response, job)


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
    return video_response(job, await server.queue_estimator.estimate(job), server.serving_profile.licences)


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
    job = (await created_videos(request, server, tenant, idempotency_key, original))[0]
    return await _polled(server, response, job)


async def created_videos(
    request: Request,
    server: ServerContext,
    tenant: Tenant,
    idempotency_key: str | None,
    original: Job | None = None,
    max_results: int = MAX_RESULTS,
) -> list[Job]:
    """Create the jobs of a request, or of a remix of `original`. Raises ApiError."""
    async with receive(request, server.settings.uploads) as received:
        body = (CreateVideo if original is None else RemixVideo).parse(received.fields)
        fields, returned = await video_fields(server, tenant, body, original)
    shots = body.repeated(fields)
    if len(shots) > max_results:
        raise invalid("n", f"got {len(shots)}, must be {max_results}: the response is one file")
    of_original = "video" if original is None else original.id[6:26]
    return await server.job_service.accept(
        tenant,
        JobKind.VIDEO,
        shots,
        returned,
        idempotency_key=idempotency_key,
        fingerprint=f"{of_original} {received.fingerprint}"[:64],
    )


async def job_of(server: ServerContext, tenant: Tenant, job_id: str) -> Job:
    """Return a job of the tenant. Raises ApiError 404."""
    job = await asyncio.to_thread(server.store.get, job_id, tenant.name)
    if job is None:
        raise not_found("video", job_id[:100])
    return job


async def video_fields(
    server: ServerContext, tenant: Tenant, request: CreateVideo, original: Job | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the shot, and the values that are returned with the job. Raises ApiError."""
    model, model_fields = server.model(request.model or (original and original.request.get("model")))
    base: dict[str, Any] = dict(model_fields)
    if original is not None:
        # The model replaces the mode and the video model of the original, a face replaces its face.
        replaced = {"mode", "video_model"} if request.model else set()
        own = {**model_fields, **request.model_dump(include={"video_model"}, exclude_unset=True)}
        if own.get("video_model", original.shot.video_model) != original.shot.video_model:
            replaced |= set(MODEL_DEFAULTS)
        if request.model_fields_set & {"character", "face_image", "input_references"}:
            replaced |= {"face_image", "face_index", "consent"}
        kept = client_fields(original.shot, server.settings, server.job_service.uploads)
        base |= {name: value for name, value in kept.items() if name not in replaced}
    defaults = without_other_models_defaults(server.serving_profile.profile.defaults, base)
    fields = {**base, **request.shot_fields({**defaults, **base})}
    size = None if original is None else file_sizes(original.shot)[delivered_artefact_of(original)]
    sizes, hd_beside = request.size_fields({**defaults, **fields}, server.size_rules, size)
    if hd_beside is None and original is not None:
        hd_beside = bool(original.request.get("hd"))
    fields |= sizes
    references = [name for name in START_IMAGES if getattr(request, name) is not None]
    if len(references) > 1:
        raise invalid(references[1], f"cannot be combined with {references[0]}: a clip starts from one image")
    for name in references:
        fields["image"] = await server.image_references.resolve(tenant, getattr(request, name), name)
    if request.last_image is not None:
        fields["last_image"] = await server.image_references.resolve(tenant, request.last_image, "last_image")
    returned: dict[str, Any] = {"model": model, "user": request.user}
    if hd_beside:
        returned["hd"] = True
    if original is not None:
        returned["remixed_from"] = original.id
    return {**fields, **await face_fields(server, tenant, request)}, returned


async def face_fields(server: ServerContext, tenant: Tenant, request: CreateVideo | CreateImages) -> dict[str, Any]:
    """Return the fields of the shot that select its face."""
    fields: dict[str, Any] = {} if request.character is None else {"character": request.character}
    if request.face_image:
        fields["face_image"] = await server.image_references.resolve_all(tenant, request.face_image, "face_image")
    references = request.input_references if isinstance(request, CreateVideo) else None
    if references:
        if "face_image" in fields:
            raise invalid("input_references", "cannot be combined with face_image: both are photos of one face")
        fields["face_image"] = await server.image_references.resolve_all(tenant, references, "input_references")
        # vLLM-Omni's references may show anything. Here they must show a person, which only a look at them tells.
        await server.face_check.run_exclusively(partial(check_faces, server, tenant, fields["face_image"], "input_references"))
    return fields


async def _polled(server: ServerContext, response: Response, job: Job) -> Video:
    """Return a job for a client that polls it, and set the header that says when to poll again."""
    estimate = await server.queue_estimator.estimate(job)
    response.headers[POLL_AFTER] = str(round(estimate.poll_after_s * 1000))
    return video_response(job, estimate, server.serving_profile.licences)
