"""Clips: asked for, listed, followed, cancelled, made again with other words."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from starlette.requests import Request
from starlette.responses import Response

from vidgen_ray.online.api import response_models
from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.error_responses import error_responses
from vidgen_ray.online.api.request_models import VIDEO_FIELDS, checked_names, text, video_fields
from vidgen_ray.online.api.response_models import Video, VideoDeleted, VideoPage, video_of
from vidgen_ray.online.api_error import invalid, not_found
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.uploads import ReceivedRequest, receive
from vidgen_ray.online.job_service import client_fields
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job, JobKind
from vidgen_ray.online.store.store import UnknownJob

POLL_AFTER = "openai-poll-after-ms"
LISTED = (JobKind.VIDEO, JobKind.SHOT)
IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, description="a create that is sent again with it renders once")
]

router = APIRouter(tags=["videos"])


@router.post(
    "/v1/videos",
    response_model=Video,
    openapi_extra=response_models.VIDEO_BODY,
    responses=error_responses(404, 408, 409, 413, 415),
)
async def create_video(
    request: Request, response: Response, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> Video:
    """Ask for a clip. It is stored when this answers; `GET /v1/videos/{video_id}` says how far it is."""
    async with receive(request, server.settings.uploads) as received:
        received.check_files(("input_reference", "image_reference", "face_image"))
        fields, about = await _clip(server, tenant, received)
    (job,) = await server.job_service.accept(
        tenant,
        JobKind.VIDEO,
        [fields],
        about,
        idempotency_key=idempotency_key,
        fingerprint=f"video {received.fingerprint}"[:64],
    )
    _poll_after(server, response)
    return video_of(job)


@router.get("/v1/videos", response_model=VideoPage, responses=error_responses(404))
async def list_videos(
    server: ServerDep,
    tenant: TenantDep,
    after: Annotated[str | None, Query(description="id of the last one of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="by age; desc: the newest first")] = "desc",
) -> VideoPage:
    """The tenant's clips, page by page."""
    try:
        page = await asyncio.to_thread(server.store.list, tenant.name, kinds=LISTED, after=after, limit=limit, order=order)
    except UnknownJob:
        raise not_found("video", str(after)[:100], "after") from None
    data = [video_of(job) for job in page.jobs]
    ids = [video.id for video in data]
    return VideoPage(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=page.has_more)


@router.get("/v1/videos/{video_id}", response_model=Video, responses=error_responses(404))
async def get_video(response: Response, server: ServerDep, tenant: TenantDep, video_id: str) -> Video:
    """How far a clip is."""
    job = await job_of(server, tenant, video_id)
    _poll_after(server, response)
    return video_of(job)


@router.delete("/v1/videos/{video_id}", response_model=VideoDeleted, responses=error_responses(404))
async def delete_video(server: ServerDep, tenant: TenantDep, video_id: str) -> VideoDeleted:
    """Forget a clip. One that is being made is cancelled."""
    if not await server.job_service.delete(tenant, video_id):
        raise not_found("video", video_id[:100])
    return VideoDeleted(id=video_id)


@router.post("/v1/videos/{video_id}/cancel", response_model=Video, responses=error_responses(404))
async def cancel_video(server: ServerDep, tenant: TenantDep, video_id: str) -> Video:
    """Stop making a clip: at once where it waits, else after the denoising step or frame at hand. What has ended stays."""
    job = await server.job_service.cancel(tenant, video_id)
    if job is None:
        raise not_found("video", video_id[:100])
    return video_of(job)


@router.post(
    "/v1/videos/{video_id}/remix",
    response_model=Video,
    openapi_extra=response_models.REMIX_BODY,
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
    """The same clip with other words, or whatever else the body says otherwise; the seed stays unless it is named."""
    before = await job_of(server, tenant, video_id)
    async with receive(request, server.settings.uploads) as received:
        received.check_files(())
        fields, about = await _clip(
            server, tenant, received, client_fields(before.shot, server.settings, server.job_service.uploads), before
        )
    (job,) = await server.job_service.accept(
        tenant,
        JobKind.VIDEO,
        [fields],
        {**about, "remixed_from": before.id},
        idempotency_key=idempotency_key,
        fingerprint=f"{before.id[6:26]} {received.fingerprint}"[:64],
    )
    _poll_after(server, response)
    return video_of(job)


async def job_of(server: ServerContext, tenant: Tenant, job_id: str) -> Job:
    """Raises ApiError 404."""
    job = await asyncio.to_thread(server.store.get, job_id, tenant.name)
    if job is None:
        raise not_found("video", job_id[:100])
    return job


async def _clip(
    server: ServerContext,
    tenant: Tenant,
    received: ReceivedRequest,
    base: Mapping[str, Any] | None = None,
    before: Job | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the shot, and what the client gets back with the job."""
    given = checked_names(received.fields, VIDEO_FIELDS)
    model_named = "model" in given
    if before is not None:
        given.setdefault("model", before.request.get("model"))
        given.setdefault("prompt", before.shot.prompt)
    model, meant = server.model(given.get("model"))
    # What is named takes the place of what was: a model says in which mode, a person who it is.
    replaced = {"mode"} if model_named else set()
    if {"character", "face_image"} & given.keys():
        replaced |= {"face_image", "face_index"}
    begun = {**meant, **{name: value for name, value in (base or {}).items() if name not in replaced}}
    fields = {**begun, **video_fields(given, {**server.serving_profile.profile.defaults, **begun})}
    for name in ("input_reference", "image_reference"):
        if files := received.files(name):
            if len(files) > 1 or "image" in fields:
                raise invalid(name, "a clip starts from one picture")
            fields["image"] = await server.image_references.store_file(tenant, files[0], name)
        elif name in given:
            fields["image"] = await server.image_references.resolve(tenant, given[name], name)
    fields |= await person(server, tenant, received, given)
    return fields, {"model": model, "user": text(given, "user")}


async def person(server: ServerContext, tenant: Tenant, received: ReceivedRequest, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say who is in the picture."""
    photos = await server.image_references.store_files(tenant, received.files("face_image"), "face_image")
    if photos and "face_image" in given:
        raise invalid("face_image", "came as files and as ids; give either")
    if "face_image" in given:
        photos += await server.image_references.resolve_all(tenant, given["face_image"], "face_image")
    fields = {"character": given.get("character"), "face_image": photos or None}
    return {name: value for name, value in fields.items() if value is not None}


def _poll_after(server: ServerContext, response: Response) -> None:
    response.headers[POLL_AFTER] = str(round(server.settings.poll_after_s * 1000))
