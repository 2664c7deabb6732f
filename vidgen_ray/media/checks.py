"""Checks and sentences that images and videos share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from vidgen_ray.errors import MediaError, WriteError

MAX_PIXELS = 40_000_000
"""Of one image or one frame that is read; checked before its pixels are decoded."""


@contextmanager
def wrap_errors(sentence: str, kind: type[MediaError] = MediaError) -> Iterator[None]:
    """Turn whatever the block raises into an error of this kind that begins with this sentence.

    Whatever, because Pillow's and FFmpeg's decoders raise almost any type on damaged bytes.
    """
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise kind(f"{sentence}: {reason}") from None


def wrap_write_errors(path: Path) -> AbstractContextManager[None]:
    """Turn whatever the block raises into a WriteError that names the file."""
    return wrap_errors(f"{path}: cannot be written", WriteError)


def check_is_file(path: Path) -> None:
    if not path.is_file():
        raise MediaError(f"{path}: {'not a file' if path.exists() else 'no such file'}")


def check_pixels(path: Path, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(f"{path}: got {width}×{height} pixels, must be at most {MAX_PIXELS / 1e6:g} megapixels")
