"""The files of a job that is completed: whole or in ranges, and small pictures made of them."""

from __future__ import annotations

import asyncio
import io
from contextlib import ExitStack
from functools import lru_cache
from math import ceil
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query
from PIL import Image as PILImage
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from vidgen_ray.media import cover_crop, open_video, read_image
from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.error_responses import error_responses
from vidgen_ray.online.api_error import ApiError, not_found
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.outputs.folder import OutputFolder

Variant = Literal["video", "thumbnail", "spritesheet", "sd", "image"]
KINDS = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}
THUMBNAIL_PX = 512
TILE_PX = 160
TILES = 25
"""At most, evenly spread over the clip."""
REMEMBERED = 128
"""Small pictures, of some 50 kB each."""
DAY_S = 86_400
CONDITIONS = {
    "parameters": [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": about}
        for name, about in (
            ("Range", "bytes=FIRST-LAST, or several of these; what cannot be read counts as none"),
            ("If-Range", "the ETag of the file that the range is of"),
            ("If-None-Match", "ETags of what the client has"),
        )
    ]
}
"""What the framework does not see, since it is the response that reads it."""

router = APIRouter()


@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    tags=["videos"],
    openapi_extra=CONDITIONS,
    responses={
        **error_responses(404, 409, 416),
        200: {"description": "The file", "content": {kind: {} for kind in KINDS.values()}},
        206: {"description": "A part of it", "content": {**{kind: {} for kind in KINDS.values()}, "multipart/byteranges": {}}},
        304: {"description": "The client has it"},
    },
)
async def video_content(
    request: Request, server: ServerDep, tenant: TenantDep, video_id: str, variant: Annotated[Variant, Query()] = "video"
) -> Response:
    """The clip (`video`: enlarged where it was asked for; `sd`: as the model made it), its picture (`image`), a small one
    (`thumbnail`, WebP), or some frames side by side (`spritesheet`, JPEG)."""
    job = await asyncio.to_thread(server.store.get, video_id, tenant.name)
    if job is None:
        raise not_found("video", video_id[:100])
    if job.state != JobState.COMPLETED:
        headers = {"x-should-retry": "false"}
        raise ApiError(409, f"{job.id} is {job.state}, there is no file", code="not_completed", headers=headers)
    return await content_of(server, job, variant, request)


@router.head(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    tags=["videos"],
    openapi_extra=CONDITIONS,
    responses={**error_responses(404, 409, 416), 200: {"description": "As GET"}, 206: {"description": "As GET"}},
)
async def video_content_head(
    request: Request, server: ServerDep, tenant: TenantDep, video_id: str, variant: Annotated[Variant, Query()] = "video"
) -> Response:
    """The headers of the file: its type, length and ETag."""
    return await video_content(request, server, tenant, video_id, variant)


async def content_of(server: ServerContext, job: Job, variant: Variant, request: Request) -> Response:
    """A file of a completed job, or what of it the request asks for. Raises ApiError 404 or 416."""
    folder, files = await asyncio.to_thread(_files, server.outputs, job)
    name = _name(files, variant)
    small = variant in ("thumbnail", "spritesheet")
    suffix = {"thumbnail": ".webp", "spritesheet": ".jpg"}.get(variant, name[name.rindex(".") :])
    etag = f'"{files[name]}{f"-{variant}" if small else ""}"'
    headers = {
        "ETag": etag,
        "Cache-Control": f"private, max-age={DAY_S}",
        "Content-Disposition": f'inline; filename="{job.id}{suffix}"',
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    if small:
        make = _thumbnail if variant == "thumbnail" else _spritesheet
        content = await asyncio.to_thread(make, server.outputs, folder, name, files[name])
        return Response(content, media_type=KINDS[suffix], headers=headers)
    opened = ExitStack()
    try:
        place = f"shots/{folder}/{name}"
        path = await asyncio.to_thread(opened.enter_context, server.outputs.storage.local_copy(place))
        size = path.stat().st_size
    except FileNotFoundError:
        raise _gone(job) from None
    _check_range(request, size, etag, opened)
    return _OpenedFile(opened, path, media_type=KINDS[suffix], headers=headers)


class _OpenedFile(FileResponse):
    """A file that is let go of when it was sent, or nobody wants the rest."""

    def __init__(self, opened: ExitStack, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.to_thread(self._opened.close)


def _files(outputs: OutputFolder, job: Job) -> tuple[str, dict[str, str]]:
    """The shot's folder, and file name -> digest. Raises ApiError 404 where it is not there any more."""
    done = outputs.find(job.key)
    if done is None:
        raise _gone(job)
    folder = done.record().shot.id
    assert folder is not None
    return folder, done.summary.sha256


def _name(files: dict[str, str], variant: Variant) -> str:
    wanted = {
        "video": ("hd.mp4", "video.mp4", "image.png"),
        "sd": ("video.mp4",),
        "image": ("image.png",),
        "thumbnail": ("image.png",),
        "spritesheet": ("video.mp4", "image.png"),
    }[variant]
    name = next((name for name in wanted if name in files), None)
    if name is None:
        raise ApiError(404, f"variant: there is no {variant} of a picture", code="variant_not_found", param="variant")
    return name


def _gone(job: Job) -> ApiError:
    return ApiError(404, f"The files of {job.id} are not there any more", code="expired")


def _check_range(request: Request, size: int, etag: str, opened: ExitStack) -> None:
    """A range that cannot be read is none, says HTTP; one beyond the end is an error. Starlette's answers are plain text."""
    asked = request.headers.get("range")
    if asked is None or request.headers.get("if-range", etag) != etag:
        return
    bounds = _bounds(asked)
    if bounds and all(_within(first, last, size) for first, last in bounds):
        return
    if bounds and not any(_within(first, last, size) for first, last in bounds):
        opened.close()
        headers = {"Content-Range": f"bytes */{size}"}
        raise ApiError(416, f"Range: the file has {size} bytes", code="range_not_satisfiable", param="Range", headers=headers)
    request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]


def _bounds(asked: str) -> list[tuple[int | None, int | None]]:
    """First and last byte of each range; none where the header is not of that form."""
    unit, _, ranges = asked.partition("=")
    out = []
    for part in ranges.split(",") if unit.strip().lower() == "bytes" else []:
        first, dash, last = part.strip().partition("-")
        digits = all(side == "" or (side.isascii() and side.isdigit() and len(side) < 19) for side in (first, last))
        if not dash or not (first or last) or not digits:
            return []
        bound = int(first) if first else None, int(last) if last else None
        if bound[0] is not None and bound[1] is not None and bound[0] > bound[1]:
            return []
        out.append(bound)
    return out


def _within(first: int | None, last: int | None, size: int) -> bool:
    return first < size if first is not None else bool(last) and size > 0


@lru_cache(REMEMBERED)
def _thumbnail(outputs: OutputFolder, shot_id: str, name: str, digest: str) -> bytes:
    with outputs.storage.local_copy(f"shots/{shot_id}/{name}") as path:
        picture = PILImage.fromarray(read_image(path))
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), PILImage.Resampling.LANCZOS)
    return _encoded(picture, "WEBP")


@lru_cache(REMEMBERED)
def _spritesheet(outputs: OutputFolder, shot_id: str, name: str, digest: str) -> bytes:
    """Frames in rows, as many in a row as there are rows."""
    with outputs.storage.local_copy(f"shots/{shot_id}/{name}") as path:
        if name.endswith(".mp4"):
            with open_video(path) as clip:
                count = min(TILES, clip.frame_count)
                frames = clip.frames_at([round(i * (clip.frame_count - 1) / max(1, count - 1)) for i in range(count)])
        else:
            frames = read_image(path)[None]
    height, width = frames.shape[1:3]
    tile = TILE_PX, max(1, round(TILE_PX * height / width))
    columns = ceil(len(frames) ** 0.5)
    sheet = PILImage.new("RGB", (columns * tile[0], ceil(len(frames) / columns) * tile[1]))
    for number, frame in enumerate(frames):
        place = number % columns * tile[0], number // columns * tile[1]
        sheet.paste(PILImage.fromarray(cover_crop(np.ascontiguousarray(frame), *tile)), place)
    return _encoded(sheet, "JPEG")


def _encoded(picture: PILImage.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=85)
    return buffer.getvalue()
