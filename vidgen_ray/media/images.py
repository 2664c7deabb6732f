"""Read and write image files as RGB arrays."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from warnings import catch_warnings, simplefilter

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from vidgen_ray.errors import InputChanged, MediaError
from vidgen_ray.limits import MAX_JPEG_SCANS, MAX_PIXELS
from vidgen_ray.media.media_file import (
    IMAGE_FORMATS,
    FileMetadata,
    check_image_file,
    check_pixels,
    png_with_metadata,
    wrap_errors,
    wrap_write_errors,
)
from vidgen_ray.stages.base import Image

PNG_LEVEL = 2
"""zlib compression level. Compared to the default of 6, a photo takes a third of the time and 10% more bytes."""
START_OF_SCAN = b"\xff\xda"
"""Marker before each scan of a JPEG."""


def read_image(path: Path, sha256: str | None = None) -> Image:
    """Read an image file as RGB (H, W, 3).

    EXIF rotation is applied, alpha is composited over white, and animations give their first frame. 16-bit grey is scaled to
    8 bits. CMYK is converted by Pillow's formula. Colour profiles are not applied.
    Raises MediaError for a format that is not in IMAGE_FORMATS, more than MAX_PIXELS, and truncated or damaged files, and
    InputChanged if the content does not have the digest `sha256`.
    """
    check_image_file(path)
    with wrap_errors(f"{path}: cannot be read as an image"):
        source = path if sha256 is None else io.BytesIO(path.read_bytes())
    # The bytes that are decoded are those that are checked.
    if isinstance(source, io.BytesIO) and hashlib.sha256(source.getbuffer()).hexdigest() != sha256:
        raise InputChanged(path)
    with _opened(path, source) as image:
        _check_scans(path, source, image)
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(str(path), image)


def rgb_of(image: PILImage.Image) -> Image:
    """Return an image in memory as `read_image` returns a file of it. Raises MediaError."""
    name = f"a PIL image of mode {image.mode}"
    with wrap_errors(f"{name}: cannot be read"):
        return _to_rgb(name, ImageOps.exif_transpose(image))


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file in pixels, before its EXIF rotation. Reads the header only.

    Raises MediaError if the header says that `read_image` would reject the file.
    """
    check_image_file(path)
    with _opened(path, path) as image:
        _check_mode(str(path), image)
        return image.size


def verify_image(path: Path) -> None:
    """Decode an image file and drop the pixels. Needs less memory than `read_image`, and raises the same errors."""
    check_image_file(path)
    with _opened(path, path) as image:
        _check_mode(str(path), image)
        _check_scans(path, path, image)
        image.load()


@contextmanager
def _opened(path: Path, source: Path | io.BytesIO) -> Iterator[PILImage.Image]:
    """Open the image in `source`. `path` is for error messages. Errors of the block are errors of the image."""
    with wrap_errors(f"{path}: cannot be read as an image"):
        try:
            with catch_warnings():
                # Pillow's own limit is above MAX_PIXELS, so images that only cause a warning are rejected as well.
                simplefilter("error", PILImage.DecompressionBombWarning)
                opened = PILImage.open(source, formats=IMAGE_FORMATS)
        except UnidentifiedImageError:
            raise MediaError(f"{path}: not a supported image format ({', '.join(IMAGE_FORMATS)})") from None
        except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning):
            raise MediaError(f"{path}: too large, must be at most {MAX_PIXELS / 1e6:g} megapixels") from None
        with opened as image:
            check_pixels(path, *image.size)
            yield image


def _check_scans(path: Path, source: Path | io.BytesIO, image: PILImage.Image) -> None:
    """Raise MediaError for a JPEG with many scans, a few kilobytes of which take minutes to decode."""
    # Pillow calls a JPEG that lists further images MPO.
    if not isinstance(image, JpegImageFile):
        return
    content = source.getvalue() if isinstance(source, io.BytesIO) else source.read_bytes()
    # In the data of a scan, FF is followed by 00.
    if (scans := content.count(START_OF_SCAN)) > MAX_JPEG_SCANS:
        raise MediaError(f"{path}: got a JPEG with {scans} scans, must be at most {MAX_JPEG_SCANS}; save it again")


def _to_rgb(name: str, image: PILImage.Image) -> Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
    _check_mode(name, image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba)
    # Converting RGB to RGB would copy the pixels.
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _check_mode(name: str, image: PILImage.Image) -> None:
    if image.mode in ("I", "F"):
        # The file does not define which values are black and white.
        raise MediaError(f"{name}: got 32 bits per channel, must be 8 or 16")


def encode_png(image: Image, metadata: FileMetadata | None = None) -> bytes:
    """Encode an image (H, W, 3) as PNG. The same image with the same metadata always gives the same bytes."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue() if metadata is None else png_with_metadata(buffer.getvalue(), metadata)


def write_png(path: Path, image: Image, metadata: FileMetadata | None = None) -> None:
    """Write an image (H, W, 3) as PNG. Raises WriteError."""
    with wrap_write_errors(path):
        path.write_bytes(encode_png(image, metadata))


def centre_crop(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Return the middle of an image (H, W, 3) or of frames (T, H, W, 3), at most as large as they are. Copies nothing."""
    top, left = (pixels.shape[-3] - height) // 2, (pixels.shape[-2] - width) // 2
    return pixels[..., top : top + height, left : left + width, :]


def cover_crop(image: Image, width: int, height: int) -> Image:
    """Crop an image (H, W, 3) to the aspect ratio of width:height around its centre, and scale it to (height, width, 3).

    The filter is Lanczos. The image is not stretched.
    """
    source_height, source_width = image.shape[:2]
    scale = max(width / source_width, height / source_height)
    # The margins may be fractions of a pixel. Rounding them would stretch the image.
    left = max(0.0, (source_width - width / scale) / 2)
    top = max(0.0, (source_height - height / scale) / 2)
    box = (left, top, source_width - left, source_height - top)
    return np.array(PILImage.fromarray(image).resize((width, height), PILImage.Resampling.LANCZOS, box))
