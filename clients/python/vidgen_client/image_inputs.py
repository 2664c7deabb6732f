"""Images that callers pass to the client: paths, bytes, PIL images, URLs and uploads."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

from vidgen_client.errors import ClientError
from vidgen_client.models import UploadedFile

if TYPE_CHECKING:
    # The client works without Pillow.
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

ImageInput: TypeAlias = Union[str, PathLike[str], bytes, "Image", UploadedFile, Mapping[str, str]]
"""Path, content of an image file, PIL image, `data:` or http(s) URL, upload, or `{"file_id": ...}`."""
URL_PREFIXES = ("data:", "http://", "https://")
MB = 1_000_000
Kind = Literal["image", "video"]
MAX_BYTES: Mapping[Kind, int] = {"image": 25 * MB, "video": 100 * MB}
"""Largest file that is read, in bytes: the limits of a server."""
STARTS: Mapping[Kind, re.Pattern[bytes]] = {
    "image": re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM....\0\0\0\0|II[*+]\0|MM\0[*+]", re.DOTALL),
    "video": re.compile(
        rb"....(ftyp|moov|mdat|free|skip|wide)|\x1aE\xdf\xa3|RIFF....AVI |\0\0\1\xba|G.{187}G|.{4}G.{191}G|GIF8[79]a", re.DOTALL
    ),
}
"""First bytes of the files that are read: those of the formats that a server accepts."""
START_BYTES = 201


def reference_of(image: ImageInput) -> dict[str, str] | None:
    """Return the reference that the API accepts, or `None` if the image must be uploaded."""
    if isinstance(image, UploadedFile):
        return {"file_id": image.id}
    if isinstance(image, Mapping):
        return dict(image)
    if isinstance(image, str) and image.startswith(URL_PREFIXES):
        return {"image_url": image}
    return None


def file_of(image: Any, kind: Kind = "image") -> tuple[str, bytes]:
    """Return the name and content of an image file, or of a video. PIL images become PNG.

    An assistant may pass any path: only regular files that start as such a file does are read. Raises ClientError, OSError and
    TypeError.
    """
    if isinstance(image, bytes):
        return kind, image
    if isinstance(image, str | PathLike):
        return Path(image).name, _read(Path(image), kind)
    if callable(getattr(image, "save", None)):
        return "image.png", _png_of(image)
    raise TypeError(f"image: got {type(image).__name__}, must be a path, bytes, a PIL image, a URL or an UploadedFile")


def _read(path: Path, kind: Kind) -> bytes:
    limit = MAX_BYTES[kind]
    # No file has a NUL in its name.
    if "\0" in str(path) or not stat.S_ISREG(path.stat().st_mode):
        raise ClientError(f"{path}: not sent, must be a regular file")
    with path.open("rb") as file:
        content = file.read(START_BYTES)
        if not STARTS[kind].match(content):
            raise ClientError(f"{path}: not sent, must be {'an image' if kind == 'image' else 'a video'}")
        content += file.read(limit)
    if len(content) > limit:
        raise ClientError(f"{path}: not sent, must be at most {limit // MB} MB")
    return content


def _png_of(image: Image) -> bytes:
    """Return an image as PNG, upright as a file of it is read: Pillow does not write its EXIF rotation. Raises ClientError."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    buffer = BytesIO()
    try:
        # The only mode of image files that PNG does not have.
        (upright.convert("RGB") if upright.mode == "CMYK" else upright).save(buffer, "PNG", pnginfo=_mark_of(image))
    except OSError as error:
        raise ClientError(f"image: not sent: {error}") from None
    return buffer.getvalue()


def _mark_of(image: Image) -> PngInfo | None:
    """Return the mark of an AI-generated image for a file with it: Pillow does not write the metadata that it has read."""
    packet = image.info.get("xmp")
    if not isinstance(packet, bytes) or b"DigitalSourceType" not in packet:
        return None
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet.decode("utf-8", "replace"))
    return info
