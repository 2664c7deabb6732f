"""Checks and error handling shared by images and videos."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from vidgen_ray.errors import MediaError, WriteError
from vidgen_ray.limits import MAX_IMAGE_BYTES, MAX_PIXELS

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are read, by Pillow's names."""


@contextmanager
def wrap_errors(message: str, error_class: type[MediaError] = MediaError) -> Iterator[None]:
    """Turn every exception of the block into an `error_class` whose text starts with `message`.

    Pillow's and FFmpeg's decoders raise almost any exception type on damaged files.
    """
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise error_class(f"{message}: {reason}") from None


def wrap_write_errors(path: Path) -> AbstractContextManager[None]:
    """Turn every exception of the block into a WriteError that names the file."""
    return wrap_errors(f"{path}: cannot be written", WriteError)


def check_is_file(path: Path) -> None:
    if not path.is_file():
        raise MediaError(f"{path}: {'not a file' if path.exists() else 'no such file'}")


def check_image_file(path: Path) -> None:
    """Raise MediaError if there is no such file, or if it is too large to be read as an image."""
    check_is_file(path)
    if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
        raise MediaError(f"{path}: has {size:,} bytes, must have at most {MAX_IMAGE_BYTES:,}")


def check_pixels(path: Path, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(f"{path}: got {width}×{height} pixels, must be at most {MAX_PIXELS / 1e6:g} megapixels")
