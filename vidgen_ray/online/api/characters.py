"""People who can be named in requests: OpenAI's characters, of photos or of a video in which a face can be seen."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

from fastapi import APIRouter
from starlette.datastructures import UploadFile
from starlette.requests import Request

from vidgen_ray.atomic_files import temporary_file
from vidgen_ray.cache_dir import cache_dir
from vidgen_ray.errors import MediaError, StageError
from vidgen_ray.media import VideoReader, encode_png, open_video, read_image
from vidgen_ray.online.api import response_models
from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.error_responses import error_responses
from vidgen_ray.online.api.request_models import checked_names
from vidgen_ray.online.api.response_models import CharacterDeleted, CharacterPage, CharacterResponse, person_of
from vidgen_ray.online.api_error import ApiError, invalid, not_found
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.uploads import BLOCK_BYTES, receive, too_large
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.characters import NameTaken
from vidgen_ray.stages.base import Image

LOOKS = 16
"""Frames of a video that are looked at, evenly spread over its beginning."""
BEGINNING = 900
"""Frames."""

router = APIRouter(tags=["characters"])


@router.post(
    "/v1/videos/characters",
    response_model=CharacterResponse,
    openapi_extra=response_models.CHARACTER_BODY,
    responses=error_responses(408, 409, 413, 415),
)
async def create_character(request: Request, server: ServerDep, tenant: TenantDep) -> CharacterResponse:
    """Name a person by photos, or by a video: of that the first frame with a face is taken."""
    async with receive(request, server.settings.uploads) as received:
        received.check_files(("image", "video"))
        name = checked_names(received.fields, ("name",)).get("name")
        if not isinstance(name, str) or not name.strip() or len(name) > 128 or not name.isprintable():
            raise invalid("name", "must be 1 to 128 printable letters", "missing_required_parameter")
        images, videos = received.files("image"), received.files("video")
        if bool(images) == bool(videos) or len(videos) > 1:
            raise invalid("video", "give one video, or one or several photos as image", "missing_required_parameter")
        if videos:
            photos = [await server.face_check.run_exclusively(lambda: _from_video(server, tenant, videos[0]))]
        else:
            photos = await server.image_references.store_files(tenant, images, "image")
            await server.face_check.run_exclusively(lambda: _check_faces(server, tenant, photos))
    try:
        character = await asyncio.to_thread(server.store.characters.create, tenant.name, name, photos)
    except NameTaken:
        headers = {"x-should-retry": "false"}
        message = f"name: there is a character {name!r} with other photos; delete it first"
        raise ApiError(409, message, code="name_taken", param="name", headers=headers) from None
    return person_of(character)


@router.get("/v1/videos/characters", response_model=CharacterPage, responses=error_responses())
async def list_characters(server: ServerDep, tenant: TenantDep) -> CharacterPage:
    """All of the tenant's, the newest first."""
    people = [person_of(each) for each in await asyncio.to_thread(server.store.characters.list, tenant.name)]
    ids = [person.id for person in people]
    return CharacterPage(data=people, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


@router.get("/v1/videos/characters/{character_id}", response_model=CharacterResponse, responses=error_responses(404))
async def get_character(server: ServerDep, tenant: TenantDep, character_id: str) -> CharacterResponse:
    """By id or by name."""
    character = await asyncio.to_thread(server.store.characters.get, character_id, tenant.name)
    if character is None:
        raise not_found("character", character_id[:100])
    return person_of(character)


@router.delete("/v1/videos/characters/{character_id}", response_model=CharacterDeleted, responses=error_responses(404))
async def delete_character(server: ServerDep, tenant: TenantDep, character_id: str) -> CharacterDeleted:
    """Forget a person. The photos stay what they are: uploaded files, to be deleted by their ids."""
    if not await asyncio.to_thread(server.store.characters.delete, character_id, tenant.name):
        raise not_found("character", character_id[:100])
    return CharacterDeleted(id=character_id)


def _check_faces(server: ServerContext, tenant: Tenant, photos: list[str]) -> None:
    paths = [server.job_service.uploads.find(tenant.name, photo) for photo in photos]
    try:
        server.face_check.check([read_image(path) for path in paths if path is not None])
    except StageError as error:
        raise invalid("image", str(error).removeprefix("face_image: "), "no_face") from None


def _from_video(server: ServerContext, tenant: Tenant, video: UploadFile) -> str:
    """The id of a photo out of a video."""
    tmp = temporary_file(cache_dir() / "videos")
    try:
        _copy(video, tmp, server.settings.uploads.video_bytes)
        try:
            with open_video(tmp, backend="pyav") as clip:
                photo = _first_with_a_face(server, clip)
        except MediaError as error:
            raise invalid("video", str(error).removeprefix(f"{tmp}: "), "invalid_video") from None
    finally:
        tmp.unlink(missing_ok=True)
    return server.job_service.uploads.store(tenant.name, io.BytesIO(encode_png(photo)), "video").id


def _first_with_a_face(server: ServerContext, clip: VideoReader) -> Image:
    frames = min(clip.frame_count, BEGINNING)
    why = "it has no frames"
    for index in sorted({number * frames // LOOKS for number in range(LOOKS)}):
        frame: Image = clip.frames(index, index + 1)[0]
        try:
            server.face_check.check([frame])
        except StageError as error:
            why = str(error).removeprefix("face_image: ")
        else:
            return frame
    raise invalid(
        "video", f"no frame of its beginning shows a face that can be used; of the last one looked at: {why}", "no_face"
    )


def _copy(video: UploadFile, target: Path, cap_bytes: int) -> None:
    size = 0
    with target.open("wb") as file:
        while block := video.file.read(BLOCK_BYTES):
            size += len(block)
            if size > cap_bytes:
                raise too_large("video", cap_bytes)
            file.write(block)
