"""Routes that create, list, poll, follow, cancel, delete, remix and estimate videos, and jobs with all fields of a shot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from vidgen_ray.graph import file_sizes
from vidgen_ray.online.api.openapi import EVENT_STREAM, JSON, ServerDep, TenantDep, error_responses, request_body
from vidgen_ray.online.api.requests import CreateImages, CreateShot, CreateVideo, RemixVideo
from vidgen_ray.online.api.responses import Estimate, ShotJob, Video, VideoDeleted, VideoPage, shot_response, video_response
from vidgen_ray.online.api_error import INVALID, ApiError, found, invalid, not_found
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.delivered_size import delivered_artefact_of
from vidgen_ray.online.http_fetch import BlockedUrl
from vidgen_ray.online.job_service import check_size, client_fields
from vidgen_ray.online.queue_estimate import JobEstimate, NewJobEstimate
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.budgets import SECONDS_PER_HOUR
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.jobs import Job, JobKind, JobState
from vidgen_ray.online.store.store import UnknownJob
from vidgen_ray.online.uploads import receive, receive_json
from vidgen_ray.online.webhooks import check_webhook
from vidgen_ray.video_models import MODEL_DEFAULTS, without_other_models_defaults

POLL_AFTER = "openai-poll-after-ms"
START_IMAGES = ("input_reference", "image_reference", "reference_url")
"""Fields that name the image that a clip starts from."""
Order = Literal["asc", "desc"]
After = Annotated[str | None, Query(description="Id of the last object of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Maximum number of objects.")]
OrderQuery = Annotated[Order, Query(description="asc: oldest first. desc: newest first.")]
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
    after: After = None,
    limit: Limit = 20,
    order: OrderQuery = "desc",
) -> VideoPage:
    """List the videos of the tenant, page by page."""
    return await video_page(server, tenant, LISTED_KINDS, after, limit, order)


async def video_page(
    server: ServerContext, tenant: Tenant, kinds: Collection[JobKind], after: str | None, limit: int, order: Order
) -> VideoPage:
    """Return a page of the tenant's jobs. Raises ApiError 404 if `after` is not one of them."""
    try:
        page = await asyncio.to_thread(server.store.list, tenant.name, kinds=kinds, after=after, limit=limit, order=order)
    except UnknownJob:
        raise not_found("video", str(after), "after") from None
    data = [video_of(server, job, await server.queue_estimator.estimate(job)) for job in page.jobs]
    ids = [video.id for video in data]
    return VideoPage(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=page.has_more)


@router.get("/v1/videos/{video_id}", response_model=Video, responses=error_responses(404))
async def get_video(response: Response, server: ServerDep, tenant: TenantDep, video_id: str) -> Video:
    """Return the status and progress of a video."""
    job = await find_job(server, tenant, video_id)
    return await _polled(server, response, job)


@router.delete("/v1/videos/{video_id}", response_model=VideoDeleted, responses=error_responses(404))
async def delete_video(server: ServerDep, tenant: TenantDep, video_id: str) -> VideoDeleted:
    """Delete a video. A queued or running job is cancelled."""
    if not await server.job_service.delete(tenant, video_id):
        raise not_found("video", video_id)
    return VideoDeleted(id=video_id)


@router.post("/v1/videos/{video_id}/cancel", response_model=Video, responses=error_responses(404))
async def cancel_video(server: ServerDep, tenant: TenantDep, video_id: str) -> Video:
    """Cancel a video: at once if it is queued, after the current denoising step or frame if it is running.

    Has no effect on a job that has ended.
    """
    job = found(await server.job_service.cancel(tenant, video_id), "video", video_id)
    return video_of(server, job, await server.queue_estimator.estimate(job))


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
    original = await find_job(server, tenant, video_id)
    job = (await created_videos(request, server, tenant, idempotency_key, original))[0]
    return await _polled(server, response, job)


async def created_videos(
    request: Request,
    server: ServerContext,
    tenant: Tenant,
    idempotency_key: str | None,
    original: Job | None = None,
    *,
    is_awaited: bool = False,
) -> list[Job]:
    """Create the jobs of a request, or of a remix of `original`. `is_awaited`: the response is its video. Raises ApiError."""
    async with receive(request, server.settings.uploads) as received:
        body = (CreateVideo if original is None else RemixVideo).parse(received.fields)
        fields, returned = await video_fields(server, tenant, body, original)
    shots = body.repeated(fields)
    if is_awaited and len(shots) > 1:
        raise invalid("n", f"got {len(shots)}, must be 1: the response is one file")
    of_original = "video" if original is None else original.id[6:26]
    return await server.job_service.accept(
        tenant,
        JobKind.VIDEO,
        shots,
        returned,
        idempotency_key=idempotency_key,
        fingerprint=f"{of_original} {received.fingerprint}"[:64],
        is_awaited=is_awaited,
    )


async def find_job(server: ServerContext, tenant: Tenant, job_id: str) -> Job:
    """Return a job of the tenant. Raises ApiError 404."""
    return found(await asyncio.to_thread(server.store.get, job_id, tenant.name), "video", job_id)


async def video_fields(
    server: ServerContext, tenant: Tenant, request: CreateVideo, original: Job | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the shot, and the values that are returned with the job. Raises ApiError."""
    earlier = original.request.get("model") if original is not None else None
    # The profile may have changed since: then the default.
    model, model_fields = server.model(request.model or (earlier if earlier in server.models else None))
    base: dict[str, Any] = dict(model_fields)
    if original is not None:
        # The model replaces the mode and the video model of the original, a face replaces its face.
        replaced = {"mode", "video_model"} if request.model or model != earlier else set()
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
    model_names, webhook = server.stored_model(model), webhook_of(server, request.webhook)
    returned = {**model_names, "user": request.user, "deadline_s": request.deadline_s, **webhook}
    if hd_beside:
        returned["hd"] = True
    if original is not None:
        returned["remixed_from"] = original.id
    return {**fields, **await face_fields(server, tenant, request)}, returned


def webhook_of(server: ServerContext, url: str | None) -> dict[str, Any]:
    """Return the webhook of a request as a value to store with the job. Raises ApiError 400."""
    if url is None:
        return {}
    try:
        check_webhook(url, server.settings.webhooks)
    except BlockedUrl as error:
        raise invalid("webhook", str(error), "webhook_not_allowed") from None
    return {"webhook": url}


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
        await server.faces_of(tenant, fields["face_image"], "input_references")
    return fields


def video_of(server: ServerContext, job: Job, estimate: JobEstimate) -> Video:
    """Return a job as OpenAI's Video."""
    cost = _cost(server, job.gpu_seconds) if job.state == JobState.COMPLETED else None
    return video_response(job, estimate, server.serving_profile.licences, cost)


def _cost(server: ServerContext, gpu_seconds: float) -> float | None:
    """Return the cost of seconds of a GPU, or `None` if the server has no price."""
    price = server.settings.gpu_hour_price
    return None if price is None else round(gpu_seconds * price / SECONDS_PER_HOUR, 6)


async def _polled(server: ServerContext, response: Response, job: Job) -> Video:
    """Return a job for a client that polls it, and set the header that says when to poll again."""
    estimate = await server.queue_estimator.estimate(job)
    response.headers[POLL_AFTER] = str(round(estimate.poll_after_s * 1000))
    return video_of(server, job, estimate)


_EVENTS = {
    "description": "`video.queued` and `video.in_progress` events with the Video after each change. The last event is "
    "`video.completed`, `video.failed`, `video.cancelled` or `video.deleted`.",
    "content": EVENT_STREAM,
}


@router.get(
    "/v1/videos/{video_id}/events", response_class=EventSourceResponse, responses={**error_responses(404), 200: _EVENTS}
)
async def video_events(
    server: ServerDep,
    tenant: TenantDep,
    video_id: str,
    last_event_id: Annotated[str | None, Header(description="Id of the last event received. It is not sent again.")] = None,
) -> EventSourceResponse:
    """Stream the events of a job until it ends. The stream of an ended job is its last event."""
    job = await find_job(server, tenant, video_id)
    return server.event_streams.respond(tenant, _events(server, job, last_event_id))


async def _events(server: ServerContext, job: Job, last_event_id: str | None) -> AsyncIterator[ServerSentEvent]:
    async for current in server.job_feed.follow(job, may_close=True):
        if current is None:
            yield ServerSentEvent(event="video.deleted", data=VideoDeleted(id=job.id).model_dump_json())
        # The last event is always sent: a browser that missed it would reconnect forever.
        elif current.state.is_final or str(current.version) != last_event_id:
            estimate = await server.queue_estimator.estimate(current)
            data = video_of(server, current, estimate).model_dump_json(exclude_none=True)
            yield ServerSentEvent(data, event=f"video.{current.state}", id=str(current.version))


shot_router = APIRouter(tags=["shots"])


@shot_router.post(
    "/v1/shots",
    response_model=ShotJob,
    openapi_extra=request_body(CreateShot, JSON),
    responses=error_responses(404, 408, 409, 413, 415),
)
async def create_shot(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> ShotJob:
    """Create a job from the fields of a script line, as JSON. Files are ids of uploads, LoRAs are names of this server."""
    fields, returned, fingerprint = await shot_fields(request, server)
    (job,) = await server.job_service.accept(
        tenant,
        JobKind.SHOT,
        [fields],
        returned,
        idempotency_key=idempotency_key,
        fingerprint=f"shot {fingerprint}"[:64],
    )
    return shot_response(job, client_fields(job.shot, server.settings, server.job_service.uploads))


async def shot_fields(request: Request, server: ServerContext) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the fields of the shot in the body of a request, the values that are stored with the job, and the fingerprint of
    the body. Raises ApiError."""
    received = await receive_json(request, server.settings.uploads)
    return *fields_of_shot(server, received.fields), received.fingerprint


def fields_of_shot(server: ServerContext, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the shot in a body, and the values that are stored with the job. Raises ApiError."""
    fields = CreateShot.parse(body).model_dump(exclude_unset=True)
    returned = {
        **server.stored_model(server.model(None)[0]),
        "deadline_s": fields.pop("deadline_s", None),
        **webhook_of(server, fields.pop("webhook", None)),
    }
    return fields, returned


@shot_router.get("/v1/shots/{shot_id}", response_model=ShotJob, responses=error_responses(404))
async def get_shot(server: ServerDep, tenant: TenantDep, shot_id: str) -> ShotJob:
    """Return a job of any kind with all fields of its shot. Its files and events are at `/v1/videos/{id}`."""
    job = await find_job(server, tenant, shot_id)
    return shot_response(job, client_fields(job.shot, server.settings, server.job_service.uploads))


estimate_router = APIRouter()


@estimate_router.post(
    "/v1/shots/estimate",
    tags=["shots"],
    response_model=Estimate,
    openapi_extra=request_body(CreateShot, JSON),
    responses=error_responses(404, 408, 413, 415),
)
async def estimate_shot(request: Request, server: ServerDep, tenant: TenantDep) -> Estimate:
    """Estimate the job that `POST /v1/shots` would create from the same body, without creating it."""
    fields, returned, _ = await shot_fields(request, server)
    return await _estimate(server, tenant, JobKind.SHOT, [fields], returned)


@estimate_router.post(
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
    job = await in_write_thread(server.job_service.new_job, tenant, kind, shots[0], returned)
    check_size(tenant.limits, job.shot, len(shots))
    if job.state.is_final:
        new = NewJobEstimate(0, 0.0, {})
    else:
        new = await server.queue_estimator.estimate_new(job)
    seconds = {stage: round(len(shots) * each, 3) for stage, each in new.stage_seconds.items()}
    gpu_seconds = server.serving_profile.gpu_seconds(seconds)
    video = video_of(server, job, JobEstimate(None, None, 0.0))
    return Estimate.model_validate(
        {
            **video.model_dump(
                include={"model", "seconds", "size", "model_size", "scale", "hd_size", "fps", "num_frames", "licences"}
            ),
            "render_s": round(sum(seconds.values()), 3),
            "stage_durations": seconds,
            "gpu_seconds": round(gpu_seconds, 3),
            "queue_position": new.queue_position,
            "queue_wait_s": round(new.wait_s, 3),
            "cost": _cost(server, gpu_seconds),
            "is_rendered": job.state.is_final,
            "results": len(shots),
        }
    )


async def completed_jobs(server: ServerContext, jobs: Sequence[Job]) -> list[Job]:
    """Wait until all jobs are completed and return them. Raises ApiError if one fails, and 504 after `wait_s` seconds."""
    try:
        async with asyncio.timeout(server.settings.wait_s):
            return [require_completed(await server.job_feed.ended(job)) for job in jobs]
    except TimeoutError:
        raise ApiError(
            504,
            f"The result took longer than {server.settings.wait_s:g} s. Its job continues, see /v1/shots/{jobs[0].id}",
            code="timeout",
            type="server_error",
            headers={"x-should-retry": "false"},
        ) from None


async def completed_while_connected(
    server: ServerContext, tenant: Tenant, request: Request, jobs: Sequence[Job], idempotency_key: str | None
) -> list[Job]:
    """Wait as `completed_jobs`. If the client closes the connection, cancel the jobs of a request without a key, and raise
    ClientDisconnect."""
    waiting = asyncio.create_task(completed_jobs(server, jobs))
    connection = asyncio.create_task(_disconnected(request))
    async with cancelled_if_abandoned(server, tenant, jobs, idempotency_key):
        try:
            await asyncio.wait((waiting, connection), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientDisconnect
            return waiting.result()
        finally:
            waiting.cancel()
            connection.cancel()


@asynccontextmanager
async def cancelled_if_abandoned(
    server: ServerContext, tenant: Tenant, jobs: Sequence[Job], idempotency_key: str | None
) -> AsyncIterator[None]:
    """Cancel the jobs if the client goes away during the block. With a key the same request may wait for them again."""
    try:
        yield
    except (ClientDisconnect, asyncio.CancelledError, GeneratorExit):
        # Ray Serve cancels the handler when its proxy loses the connection, perhaps while it cancels the jobs.
        if idempotency_key is None:
            await asyncio.shield(asyncio.gather(*(server.job_service.cancel(tenant, job.id) for job in jobs)))
        raise


async def _disconnected(request: Request) -> None:
    """Return when the client closes the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def require_existing(job: Job | None) -> Job:
    """Raise ApiError if the job was deleted."""
    if job is None:
        raise ApiError(404, "The result was deleted while it was rendered.", code="deleted")
    return job


def require_completed(job: Job | None) -> Job:
    """Raise ApiError if the job was deleted, cancelled or failed."""
    job = require_existing(job)
    # Retrying the request would give the same result.
    headers = {"x-should-retry": "false"}
    if job.state == JobState.CANCELLED:
        raise ApiError(409, f"{job.id} was cancelled.", code="cancelled", headers=headers)
    if job.error is not None:
        error, status = job.error, 400 if job.error.type == INVALID else 500
        raise ApiError(status, error.message, code=error.code, param=error.param, type=error.type, headers=headers)
    return job
