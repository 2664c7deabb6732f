"""Routes that return the files of a job, or create a video and respond with its file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Security
from fastapi.security import HTTPAuthorizationCredentials
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from vidgen_ray.graph import file_sizes
from vidgen_ray.online.api.openapi import ServerDep, TenantDep, bearer, error_responses, request_body
from vidgen_ray.online.api.requests import CreateVideo
from vidgen_ray.online.api.responses import outputs_of
from vidgen_ray.online.api.video_routes import (
    IdempotencyKey,
    completed_while_connected,
    created_videos,
    find_job,
)
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.delivered_size import delivered_artefact_of
from vidgen_ray.online.previews import encode_preview, newest_preview
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import CLIP_FILES, IMAGE_FILE, VIDEO_FILE

Variant = Literal[
    "video", "hd", "thumbnail", "spritesheet", "sd", "image", "preview", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"
]  # fmt: skip
"""A number is that video of a request with `n`, as in SGLang."""
VariantQuery = Annotated[Variant, Query()]


async def content_tenant(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    server: ServerDep,
    video_id: str,
    variant: VariantQuery = "video",
    signature: Annotated[str | None, Query(description="Of a signed URL, which needs no API key.")] = None,
    key: Annotated[str | None, Query(description="Of a signed URL: public id of the key that signed it.")] = None,
    expires: Annotated[str | None, Query(description="Of a signed URL: when it expires, in seconds since 1970.")] = None,
) -> Tenant:
    """Authenticate a request as `tenant_of`, or by the signature of its URL."""
    if signature is None:
        tenant = await server.auth.api_tenant(request, credentials.credentials if credentials else None)
    else:
        tenant = await asyncio.to_thread(server.auth.signed_tenant, request, video_id, variant)
    server.body_budget.reserve(tenant, request)
    return tenant


ContentTenantDep = Annotated[Tenant, Depends(content_tenant)]
_FILES: dict[str, tuple[str, ...]] = {
    "sd": (VIDEO_FILE,),
    "image": (IMAGE_FILE,),
    "thumbnail": (IMAGE_FILE,),
    "preview": (IMAGE_FILE,),
    "spritesheet": (VIDEO_FILE, IMAGE_FILE),
}
"""Variant -> the files that it is served from, in order of preference."""
PREVIEWS = {"thumbnail": ".webp", "preview": ".webp", "spritesheet": ".jpg"}
"""Variant -> suffix, of variants that are made on request."""
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}
MAX_AGE_S = 86_400
CONDITIONS = {
    "parameters": [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}
        for name, description in (
            ("Range", "`bytes=FIRST-LAST`, or several ranges separated by commas. An invalid header is ignored."),
            ("If-Range", "ETag of the file that the range belongs to. The whole file is sent if it has changed."),
            ("If-None-Match", "ETags that the client has cached, or `*`"),
            ("If-Match", "ETags of the file that the client accepts, or `*`"),
        )
    ]
}
"""Request headers that the response reads, for the OpenAPI document."""

router = APIRouter()


@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    tags=["videos"],
    openapi_extra=CONDITIONS,
    responses={
        **error_responses(404, 409, 412, 416),
        200: {"description": "The file", "content": {kind: {} for kind in MEDIA_TYPES.values()}},
        206: {
            "description": "Part of the file",
            "content": {**{kind: {} for kind in MEDIA_TYPES.values()}, "multipart/byteranges": {}},
        },
        204: {"description": "`preview` of a job without a finished image"},
        304: {"description": "The client has the current file"},
    },
)
async def video_content(
    request: Request,
    server: ServerDep,
    tenant: ContentTenantDep,
    video_id: str,
    variant: VariantQuery = "video",
) -> Response:
    """Download the result of a completed job.

    `video` is the clip of the requested size; `hd` is the larger clip, if `scale` asks for one; `sd` is the clip before
    upscaling; `image` is its first image (PNG); `thumbnail` is a small image (WebP); `spritesheet` shows some frames side by
    side (JPEG). A number, from 0, is that video of a request with `n`. `preview` also
    works before the job is completed: the newest intermediate image, then the animated clip before upscaling (WebP).
    """
    job = await find_job(server, tenant, video_id)
    if variant == "preview" and job.state in (JobState.QUEUED, JobState.IN_PROGRESS):
        return await _intermediate(server, job, request)
    if variant.isdecimal():
        outputs = outputs_of(job)
        if int(variant) >= len(outputs):
            raise _no_variant(variant, f"the number of outputs is {len(outputs)}. The first is 0.")
        job, variant = await find_job(server, tenant, outputs[int(variant)]), "video"
    if job.state != JobState.COMPLETED:
        headers = {"x-should-retry": "false"}
        raise ApiError(409, f"{job.id} is {job.state} and has no file.", code="not_completed", headers=headers)
    return await content_response(server, job, variant, request)


@router.head(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    tags=["videos"],
    openapi_extra=CONDITIONS,
    responses={**error_responses(404, 409, 412, 416), 200: {"description": "As GET"}, 206: {"description": "As GET"}},
)
async def video_content_head(
    request: Request,
    server: ServerDep,
    tenant: ContentTenantDep,
    video_id: str,
    variant: VariantQuery = "video",
) -> Response:
    """Return the headers of the file: media type, length and ETag."""
    return await video_content(request, server, tenant, video_id, variant)


async def content_response(server: ServerContext, job: Job, variant: str, request: Request) -> Response:
    """Respond with a file of a completed job, or with 304. Raises ApiError 404 for a file that does not exist."""
    folder, digests = await asyncio.to_thread(_files, server.outputs, job)
    name = _file_name(job, digests, variant)
    suffix = PREVIEWS.get(variant, name[name.rindex(".") :])
    etag = f'"{digests[name]}{f"-{variant}" if variant in PREVIEWS else ""}"'
    headers = {
        "ETag": etag,
        "Cache-Control": f"private, max-age={MAX_AGE_S}",
        "Content-Disposition": f'inline; filename="{job.id}{suffix}"',
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    if _has_current(request, etag):
        return Response(status_code=304, headers=headers)
    media_type, path = MEDIA_TYPES[suffix], f"{folder}/{name}"
    try:
        if variant in PREVIEWS:
            content = await asyncio.to_thread(encode_preview, server.outputs, path, variant, digests[name])
            return Response(content, media_type=media_type, headers=headers)
        return await asyncio.to_thread(
            StoredFileResponse, server.outputs.storage.local_copy(path), media_type=media_type, headers=headers
        )
    except FileNotFoundError:
        raise _expired(job) from None


async def _intermediate(server: ServerContext, job: Job, request: Request) -> Response:
    """Respond with the preview of a job that has not ended, or with 204 if there is none yet."""
    preview = await asyncio.to_thread(newest_preview, server, job)
    if preview is None:
        return Response(status_code=204, headers={"Cache-Control": "no-store"})
    etag = f'"{preview.key}"'
    # It changes with every stage, so a browser must ask again.
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    if _has_current(request, etag):
        return Response(status_code=304, headers=headers)
    return Response(preview.webp, media_type=MEDIA_TYPES[".webp"], headers=headers)


def _has_current(request: Request, etag: str) -> bool:
    """Return whether the client has the file with this ETag. Raises ApiError 412 if it accepts only another one."""
    wanted, cached = (
        [tag.strip() for tag in request.headers.get(name, "").split(",")] for name in ("if-match", "if-none-match")
    )
    if wanted != [""] and not {"*", etag} & {*wanted}:
        raise ApiError(412, f"If-Match: the ETag of the file is {etag}", code="precondition_failed", param="If-Match")
    return not {"*", etag}.isdisjoint(tag.removeprefix("W/") for tag in cached)


class StoredFileResponse(FileResponse):
    """Response with a file and range requests. Keeps a local copy of the file until it is sent.

    Starlette answers range errors as plain text. Here 416 is an `ApiError`, and an invalid header is ignored (RFC 9110, 14.2).
    """

    def __init__(self, local_copy: AbstractContextManager[Path], **options: Any) -> None:
        """Raises FileNotFoundError."""
        with ExitStack() as stack:
            local = stack.enter_context(local_copy)
            super().__init__(local, stat_result=local.stat(), **options)
            self._local_copy = stack.pop_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            try:
                await super().__call__(scope, receive, _raise_range_errors(send))
            except _InvalidRange:
                headers = [header for header in scope["headers"] if header[0] != b"range"]
                await super().__call__({**scope, "headers": headers}, receive, send)
        finally:
            await asyncio.to_thread(self._local_copy.close)


class _InvalidRange(Exception):
    """The Range header cannot be parsed."""


def _raise_range_errors(send: Send) -> Send:
    """Wrap `send` to raise ApiError 416 or _InvalidRange instead of sending Starlette's responses."""

    async def checked_send(message: Message) -> None:
        status = message.get("status")
        if status == 400:
            raise _InvalidRange
        if status == 416:
            content_range = dict(message["headers"])[b"content-range"].decode()
            text = f"Range: the file has {content_range.rpartition('/')[2]} bytes."
            headers = {"Content-Range": content_range}
            raise ApiError(416, text, code="range_not_satisfiable", param="Range", headers=headers)
        await send(message)

    return checked_send


def _files(outputs: OutputFolder, job: Job) -> tuple[str, dict[str, str]]:
    """Return the folder of the job's shot, and the digest of each file by name. Raises ApiError 404 if they are gone.

    Digests are those of the signed bytes: a file that is rendered and signed again has the same key but another signature.
    """
    done = outputs.find_by_key(job.key)
    if done is None:
        raise _expired(job)
    return done.folder, {name: file.signed_sha256 or file.sha256 for name, file in done.files.items()}


def _file_name(job: Job, digests: Mapping[str, str], variant: str) -> str:
    """Return the name of the file that a variant is served from. Raises ApiError 404."""
    delivered = CLIP_FILES.get(delivered_artefact_of(job), IMAGE_FILE)
    finished = CLIP_FILES.get(list(file_sizes(job.shot))[-1], IMAGE_FILE)
    larger = () if finished == delivered else (finished,)
    names = {**_FILES, "video": (delivered,), "hd": larger}[variant]
    name = next((name for name in names if name in digests), None)
    if name is None:
        hd = "this video has no clip that is larger than the delivered one. Create one with `scale`."
        raise _no_variant(variant, hd if variant == "hd" else f"an image has no {variant}.")
    return name


def _no_variant(variant: str, why: str) -> ApiError:
    return ApiError(404, f"variant: got {variant}, but {why}", code="variant_not_found", param="variant")


def _expired(job: Job) -> ApiError:
    return ApiError(404, f"The files of {job.id} were deleted.", code="expired")


sync_router = APIRouter(tags=["videos"])


@sync_router.post(
    "/v1/videos/sync",
    response_class=Response,
    openapi_extra=request_body(CreateVideo),
    responses={
        **error_responses(404, 408, 409, 413, 415, 504),
        200: {"description": "The file", "content": {kind: {} for kind in MEDIA_TYPES.values()}},
    },
)
async def create_video_sync(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """Create a video, wait for it and return its file, as `GET /v1/videos/{video_id}/content` does.

    The header `X-Request-Id` is the id of the video. Closing the connection cancels it, unless the request has an
    `Idempotency-Key`: then the same request waits for the same video again.
    """
    with server.event_streams.waiting(tenant):
        jobs = await created_videos(request, server, tenant, idempotency_key, is_awaited=True)
        (done,) = await completed_while_connected(server, tenant, request, jobs, idempotency_key)
    response = await content_response(server, done, "video", request)
    response.headers["X-Request-Id"] = done.id
    response.headers["X-Model"] = str(done.request.get("model"))
    response.headers["X-Inference-Time-S"] = f"{sum(done.stage_seconds.values()):.3f}"
    return response
