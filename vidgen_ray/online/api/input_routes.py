"""Routes for inputs that requests refer to by id: uploaded images, and characters from photos or from a video."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable
from contextlib import closing, nullcontext
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from vidgen_ray.errors import MediaError, StageError
from vidgen_ray.limits import FORM_TEXT_BYTES
from vidgen_ray.media.decode import sample_frames
from vidgen_ray.media.images import encode_png
from vidgen_ray.online.api.content_routes import StoredFileResponse
from vidgen_ray.online.api.openapi import FORM, ServerDep, TenantDep, error_responses, request_body
from vidgen_ray.online.api.requests import CreateCharacter, CreateFile
from vidgen_ray.online.api.responses import (
    CharacterDeleted,
    CharacterErased,
    CharacterPage,
    CharacterResponse,
    FileDeleted,
    FilePage,
    UploadedFile,
    file_response,
)
from vidgen_ray.online.api_error import ApiError, found, invalid, not_found
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.inputs import PREFIXES, NameTaken, UploadInUse, UploadMissing
from vidgen_ray.online.uploads import copy_capped, receive
from vidgen_ray.stages.base import Image
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.files import private_folder, temporary_file

FILES_PER_PAGE = 1000

file_router = APIRouter(tags=["files"])


@file_router.post(
    "/v1/files",
    response_model=UploadedFile,
    openapi_extra=request_body(CreateFile, FORM),
    responses=error_responses(408, 413, 415),
)
async def create_file(request: Request, server: ServerDep, tenant: TenantDep) -> UploadedFile:
    """Upload an image, or with the purpose `batch` the input file of a batch. Identical files have the same id."""
    caps, uploads = server.settings.uploads, server.job_service.uploads
    async with receive(request, caps, max(caps.image_bytes, caps.batch_bytes) + FORM_TEXT_BYTES) as received:
        form = CreateFile.parse(received.fields)
        if form.purpose == "batch":
            upload = await in_write_thread(uploads.add_batch, tenant, form.file.file, form.details)
        else:
            upload = await uploads.store(tenant, form.file.file, "file", form.details)
    return file_response(upload)


@file_router.get("/v1/files", response_model=FilePage, responses=error_responses())
async def list_files(
    server: ServerDep,
    tenant: TenantDep,
    purpose: Annotated[str | None, Query(description="vision, batch or batch_output. Default: all.")] = None,
    after: Annotated[str | None, Query(description="Id of the last upload of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Maximum number of uploads, of which a page has 1,000.")] = 1000,
    order: Annotated[Literal["asc", "desc"], Query(description="asc: oldest first. desc: newest first.")] = "desc",
) -> FilePage:
    """List the uploads of the tenant, page by page."""
    length = min(limit, FILES_PER_PAGE) if purpose is None or purpose in PREFIXES else 0
    of_purpose = next((known for known in PREFIXES if known == purpose), None)
    found = await asyncio.to_thread(server.store.uploads.list, tenant.name, after, length + 1, order, of_purpose)
    data = [file_response(upload) for upload in found[:length]]
    has_more = bool(length) and len(found) > length
    return FilePage(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=has_more)


@file_router.get("/v1/files/{file_id}", response_model=UploadedFile, responses=error_responses(404))
async def get_file(server: ServerDep, tenant: TenantDep, file_id: str) -> UploadedFile:
    """Return size and time of an upload."""
    upload = await asyncio.to_thread(server.store.uploads.get, file_id, tenant.name)
    return file_response(found(upload, "file", file_id))


@file_router.get(
    "/v1/files/{file_id}/content",
    response_class=Response,
    responses={
        **error_responses(404, 416),
        200: {"description": "The file", "content": {"application/octet-stream": {}}},
        206: {"description": "Part of the file", "content": {"application/octet-stream": {}, "multipart/byteranges": {}}},
    },
)
async def file_content(server: ServerDep, tenant: TenantDep, file_id: str) -> Response:
    """Download an upload, as it was sent."""
    path = found(await asyncio.to_thread(server.job_service.uploads.find, tenant.name, file_id), "file", file_id)
    # Never shown by a browser: it is a file of a client.
    headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
    try:
        return StoredFileResponse(nullcontext(path), media_type="application/octet-stream", headers=headers)
    except FileNotFoundError:
        raise not_found("file", file_id) from None


@file_router.delete("/v1/files/{file_id}", response_model=FileDeleted, responses=error_responses(404, 409))
async def delete_file(server: ServerDep, tenant: TenantDep, file_id: str) -> FileDeleted:
    """Delete an upload. The file stays on disk while another tenant has uploaded it or an open job needs it."""
    try:
        is_deleted = await in_write_thread(server.job_service.uploads.delete, tenant.name, file_id)
    except UploadInUse as error:
        raise ApiError(409, str(error), code="file_in_use", headers={"x-should-retry": "false"}) from None
    if not is_deleted:
        raise not_found("file", file_id)
    return FileDeleted(id=file_id)


SEARCHED_FRAMES = 16
"""Frames in which a face is searched, spread evenly over the start of the video."""
START_FRAMES = 900
"""Length of the start of the video."""

character_router = APIRouter(tags=["characters"])


@character_router.post(
    "/v1/videos/characters",
    response_model=CharacterResponse,
    openapi_extra=request_body(CreateCharacter, FORM),
    responses=error_responses(408, 409, 413, 415),
)
async def create_character(request: Request, server: ServerDep, tenant: TenantDep) -> CharacterResponse:
    """Create a character from photos of one face, or from a video: its first frame with a face becomes the photo."""
    async with receive(request, server.settings.uploads) as received:
        form = CreateCharacter.parse(received.fields)
        if bool(form.image) == (form.video is not None):
            raise invalid("video", "send either photos as image, or one video", "missing_required_parameter")
        if (video := form.video) is not None:
            photo = await server.face_check.thread.run(tenant.name, _photo_from_video, server, video)
            photos = [(await server.job_service.uploads.store(tenant, io.BytesIO(photo), "video")).id]
        else:
            photos = await server.image_references.resolve_all(tenant, form.image, "image")
        consent = await in_write_thread(server.job_service.consent_of_character, tenant, photos, form.consent)
        if form.video is None:
            await server.faces_of(tenant, photos, "image")
    try:
        character = await in_write_thread(server.store.characters.create, tenant.name, form.name, photos, consent)
    except UploadMissing as error:
        raise invalid("image", f"the upload {error} was deleted meanwhile", "file_not_found") from None
    except NameTaken:
        message = f"name: the character {form.name!r} exists with other photos. Delete it first."
        headers = {"x-should-retry": "false"}
        raise ApiError(409, message, code="name_taken", param="name", headers=headers) from None
    return CharacterResponse.model_validate(character)


@character_router.get("/v1/videos/characters", response_model=CharacterPage, responses=error_responses())
async def list_characters(server: ServerDep, tenant: TenantDep) -> CharacterPage:
    """List all characters of the tenant, newest first."""
    data = [
        CharacterResponse.model_validate(each) for each in await asyncio.to_thread(server.store.characters.list, tenant.name)
    ]
    return CharacterPage(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


@character_router.get("/v1/videos/characters/{character_id}", response_model=CharacterResponse, responses=error_responses(404))
async def get_character(server: ServerDep, tenant: TenantDep, character_id: str) -> CharacterResponse:
    """Return a character by id or name."""
    character = await asyncio.to_thread(server.store.characters.get, character_id, tenant.name)
    return CharacterResponse.model_validate(found(character, "character", character_id))


@character_router.delete(
    "/v1/videos/characters/{character_id}", response_model=CharacterDeleted, responses=error_responses(404)
)
async def delete_character(server: ServerDep, tenant: TenantDep, character_id: str) -> CharacterDeleted:
    """Delete a character by id. Its photos remain uploads: delete them with `DELETE /v1/files/{file_id}`."""
    if not await in_write_thread(server.store.characters.delete, character_id, tenant.name):
        raise not_found("character", character_id)
    return CharacterDeleted(id=character_id)


@character_router.delete("/v1/characters/{character_id}", response_model=CharacterErased, responses=error_responses(404, 409))
async def erase_character(
    server: ServerDep,
    tenant: TenantDep,
    character_id: str,
    videos: Annotated[bool, Query(description="Also delete the videos and images that were made with the character.")] = False,
) -> CharacterErased:
    """Erase a character by id or name: delete its photos, face features and cached results, and list its videos."""
    known = await asyncio.to_thread(server.store.characters.get, character_id, tenant.name)
    character = found(known, "character", character_id)
    erased = await server.job_service.erase_character(tenant, character, with_videos=videos)
    return CharacterErased(id=character.id, videos_deleted=videos, **erased._asdict())


def _photo_from_video(server: ServerContext, video: UploadFile) -> bytes:
    """Return the first frame that shows a face as PNG. Raises ApiError 400 or 413."""
    tmp = temporary_file(private_folder(cache_dir() / "videos"), 0o600)
    try:
        with tmp.open("wb") as target:
            copy_capped(video.file, target, server.settings.uploads.video_bytes, "video")
        try:
            with closing(sample_frames(tmp, SEARCHED_FRAMES, START_FRAMES)) as frames:
                return encode_png(_first_frame_with_face(server, frames))
        except MediaError as error:
            raise invalid("video", str(error).removeprefix(f"{tmp}: "), "invalid_video") from None
    finally:
        tmp.unlink(missing_ok=True)


def _first_frame_with_face(server: ServerContext, frames: Iterable[Image]) -> Image:
    reason = "the video has no frames"
    for frame in frames:
        try:
            server.face_check.check([frame])
        except StageError as error:
            reason = str(error).removeprefix("face_image: ")
        else:
            return frame
    message = f"no frame among its first {START_FRAMES} shows a usable face. Last frame searched: {reason}"
    raise invalid("video", message, "no_face")
