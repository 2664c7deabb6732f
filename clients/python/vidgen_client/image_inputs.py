"""Images that callers pass to the client: paths, bytes, PIL images, URLs and uploads."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from vidgen_client.models import UploadedFile

if TYPE_CHECKING:
    # The client works without Pillow.
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

ImageInput: TypeAlias = Union[str, PathLike[str], bytes, "Image", UploadedFile, Mapping[str, str]]
"""Path, content of an image file, PIL image, `data:` or http(s) URL, upload, or `{"file_id": ...}`."""
URL_PREFIXES = ("data:", "http://", "https://")


def reference_of(image: ImageInput) -> dict[str, str] | None:
    """Return the reference that the API accepts, or `None` if the image must be uploaded."""
    if isinstance(image, UploadedFile):
        return {"file_id": image.id}
    if isinstance(image, Mapping):
        return dict(image)
    if isinstance(image, str) and image.startswith(URL_PREFIXES):
        return {"image_url": image}
    return None


def file_of(image: Any) -> tuple[str, bytes]:
    """Return the name and content of an image file. PIL images become PNG. Raises OSError and TypeError."""
    if isinstance(image, bytes):
        return "image", image
    if isinstance(image, str | PathLike):
        path = Path(image)
        return path.name, path.read_bytes()
    if callable(getattr(image, "save", None)):
        buffer = BytesIO()
        image.save(buffer, "PNG", pnginfo=_mark_of(image))
        return "image.png", buffer.getvalue()
    raise TypeError(f"image: got {type(image).__name__}, must be a path, bytes, a PIL image, a URL or an UploadedFile")


def _mark_of(image: Image) -> PngInfo | None:
    """Return the mark of an AI-generated image for a file with it: Pillow does not write the metadata that it has read."""
    packet = image.info.get("xmp")
    if not isinstance(packet, bytes) or b"DigitalSourceType" not in packet:
        return None
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet.decode("utf-8", "replace"))
    return info
