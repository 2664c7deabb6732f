"""Checks and sentences that images and videos share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vidgen_ray.errors import CannotWrite, MediaError

MAX_PIXELS = 40_000_000
"""Of one image or one frame that is read; checked before its pixels are decoded."""


@contextmanager
def failing_as(sentence: str) -> Iterator[None]:
    """Turn whatever the block raises into a MediaError that begins with this sentence.

    Whatever, because Pillow's and FFmpeg's decoders raise almost any type on damaged bytes.
    """
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{sentence}: {_reason(error)}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever the block raises into a CannotWrite that names the file."""
    try:
        yield
    except Exception as error:
        raise CannotWrite(f"{path}: cannot be written: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def check_is_file(path: Path) -> None:
    if not path.is_file():
        raise MediaError(f"{path}: {'not a file' if path.exists() else 'no such file'}")


def check_pixels(path: Path, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(f"{path}: got {width}×{height} pixels, must be at most {MAX_PIXELS / 1e6:g} megapixels")
