"""Images of the form: store one when it is chosen, find the face in a photo, and show stored images."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import UploadFile

from vidgen_ray.errors import StageError
from vidgen_ray.media import image_size
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.face_check import PhotoFiles
from vidgen_ray.online.previews import encode_thumbnail
from vidgen_ray.online.web.forms import FormError
from vidgen_ray.online.web.page_context import PageContext

ImageControl = Literal["photo", "image"]
FIELD = "face_image"
"""Name of the photo in the messages of the face stage."""


@dataclass(frozen=True, slots=True)
class Box:
    """Box of a face, in pixels of the photo."""

    x: int
    y: int
    width: int
    height: int
    chosen: bool
    """The face that is used."""


@dataclass(frozen=True, slots=True)
class FormImage:
    """Stored image of the form."""

    id: str
    control: ImageControl
    width: int = 0
    """Pixels. 0, like `height`, if the image was not opened again."""
    height: int = 0
    faces: Sequence[Box] = ()


async def store_image(context: PageContext, tenant: Tenant, file: UploadFile, control: ImageControl) -> FormImage:
    """Store a chosen image, and find the faces of a photo. Raises FormError for a photo without a face, ApiError."""
    uploads, face_check = context.server.job_service.uploads, context.server.face_check
    upload = await uploads.store(tenant, file.file, control)
    path = uploads.find(tenant.name, upload.id)
    assert path is not None
    width, height = await asyncio.to_thread(image_size, path)
    faces: tuple[Box, ...] = ()
    if control == "photo":
        try:
            (detected,) = await face_check.run_exclusively(lambda: face_check.check(PhotoFiles([path])))
        except StageError as error:
            raise FormError({control: face_message(error)}) from None
        faces = tuple(_box(face.box, face is detected.chosen) for face in detected.faces)
    return FormImage(upload.id, control, width, height, faces)


async def thumbnail_of(context: PageContext, tenant: Tenant, upload_id: str) -> bytes | None:
    """Return a small WebP of a stored image, or `None` if the tenant has no such image."""
    uploads = context.server.job_service.uploads
    path = await asyncio.to_thread(uploads.find, tenant.name, upload_id)
    return None if path is None else await asyncio.to_thread(encode_thumbnail, await uploads.read(path))


def face_message(error: StageError) -> str:
    """Return the face stage's message as a sentence, without the name of the field."""
    text = str(error).removeprefix("instantid: ").removeprefix(f"{FIELD}: ").replace(f"{FIELD} ", "photo ")
    return f"{text[:1].upper()}{text[1:]}."


def _box(box: tuple[float, float, float, float], chosen: bool) -> Box:
    left, top, right, bottom = (round(value) for value in box)
    return Box(left, top, right - left, bottom - top, chosen)
