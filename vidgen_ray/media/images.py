"""Image files to RGB arrays and back."""

import io
from pathlib import Path
from warnings import catch_warnings, simplefilter

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from vidgen_ray.errors import MediaError
from vidgen_ray.media.checks import MAX_PIXELS, check_is_file, check_pixels, wrap_errors, wrap_write_errors
from vidgen_ray.stages.base import Image

PNG_LEVEL = 2
"""Of zlib: a photograph takes a third of the time of its default, 6, and a tenth more bytes."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


def read_image(path: Path) -> Image:
    """An image file as people see it: upright by its EXIF, alpha over white, the first picture of an animation.

    16-bit greys are scaled to 8 bits. CMYK becomes RGB by Pillow's formula; colour profiles are not applied.
    Raises MediaError for a format not in IMAGE_FORMATS, more than MAX_PIXELS, and truncated or damaged files.
    """
    check_is_file(path)
    with wrap_errors(f"{path}: cannot be read as an image"), _open(path) as picture:
        check_pixels(path, *picture.size)
        return _to_rgb(path, ImageOps.exif_transpose(picture))


def _open(path: Path) -> PILImage.Image:
    try:
        with catch_warnings():
            # Pillow's own limit is above MAX_PIXELS, so whatever it only warns of is refused as well.
            simplefilter("error", PILImage.DecompressionBombWarning)
            return PILImage.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise MediaError(f"{path}: not an image of a kind that is read ({', '.join(IMAGE_FORMATS)})") from None
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning):
        raise MediaError(f"{path}: too large, must be at most {MAX_PIXELS / 1e6:g} megapixels") from None


def _to_rgb(path: Path, picture: PILImage.Image) -> Image:
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.uint32)
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode in ("I", "F"):
        # Nothing in such a file says which numbers are black and white.
        raise MediaError(f"{path}: got 32 bits a channel, must be 8 or 16")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", layer.size, "white"), layer)
    return np.array(picture.convert("RGB"))


def encode_png(image: Image) -> bytes:
    """PNG of an (H, W, 3) image; the same bytes every time."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def write_png(path: Path, image: Image) -> None:
    """Raises WriteError."""
    with wrap_write_errors(path):
        path.write_bytes(encode_png(image))


def cover_crop(image: Image, width: int, height: int) -> Image:
    """(H, W, 3) -> (height, width, 3): the largest centred part of that shape, scaled by Lanczos, never stretched."""
    source_height, source_width = image.shape[:2]
    scale = max(width / source_width, height / source_height)
    # Half of what is cut off. Fractions of a pixel stay: rounding the box would stretch the picture.
    left = max(0.0, (source_width - width / scale) / 2)
    top = max(0.0, (source_height - height / scale) / 2)
    box = (left, top, source_width - left, source_height - top)
    return np.array(PILImage.fromarray(image).resize((width, height), PILImage.Resampling.LANCZOS, box))
