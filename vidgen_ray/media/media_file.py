"""Media files: checks and errors shared by images and videos, opening with FFmpeg, metadata, and the font of captions and
labels.
"""

from __future__ import annotations

import shlex
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import UUID

from vidgen_ray.errors import MediaError, WriteError
from vidgen_ray.limits import MAX_IMAGE_BYTES, MAX_PIXELS

if TYPE_CHECKING:
    from PIL import ImageFont


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are read, by Pillow's names."""
VIDEO_CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "mjpeg", "dvvideo", "gif"),
    *("prores", "dnxhd", "ffv1", "png", "rawvideo"),
)
"""FFmpeg's decoders that may read a video. FFmpeg has hundreds more, many for formats that hardly any file has."""
SOUND_CODECS = (
    *("aac", "ac3", "alac", "eac3", "flac", "mp2", "mp2float", "mp3", "mp3float", "opus", "libopus", "vorbis"),
    *("pcm_alaw", "pcm_mulaw", "pcm_u8", "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le", "pcm_s32be", "pcm_s32le"),
    *("pcm_f32be", "pcm_f32le", "pcm_bluray", "pcm_dvd"),
)
"""FFmpeg's decoders that may read the sound of a file."""
CLIP_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".ts", ".mts", ".m2ts", ".flv", ".mpg", ".mpeg", ".vob")


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


def silence_ffmpeg() -> None:
    """Turn PyAV's log off again. Call it before a file is opened.

    Other packages turn it on, such as torchvision before 0.26. A thread of a decoder then waits for Python's global lock, while
    the thread that has it closes the decoder and waits for its threads.
    """
    import av

    av.logging.set_level(None)


def open_media(path: Path, container: str | None = None) -> AbstractContextManager[Any]:
    """Return PyAV's container of a local file, as a context manager. `container`: name of its format. Default: detect it.

    Playlists and other files cannot make it read from the network. Decoders outside of the lists above are not started, also
    not to detect the properties of a stream. Raises FFmpeg's errors, which are OSError or ValueError.
    """
    import av

    silence_ffmpeg()
    # PyAV 19 has no such argument: it reads bytes that are not UTF-8 as surrogates, and writes them again.
    decoding = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
    return av.open(  # type: ignore[no-any-return]  # PyAV has no types
        str(path.absolute()),  # absolute, so that FFmpeg never treats it as a URL
        format=container,
        options={"protocol_whitelist": "file", "codec_whitelist": ",".join((*VIDEO_CODECS, *SOUND_CODECS))},
        **decoding,
    )


def decodable_stream(path: Path, opened: Any, kind: Literal["video", "audio"]) -> Any:
    """Return the best stream of this kind. Raises MediaError if there is none, or if its codec is not permitted."""
    stream, name = opened.streams.best(kind), {"video": "video", "audio": "sound"}[kind]
    if stream is None or stream.codec_context is None:
        raise MediaError(f"{path}: has no {name}, or none with a supported codec")
    permitted = VIDEO_CODECS if kind == "video" else SOUND_CODECS
    if (codec := stream.codec_context.name) not in permitted:
        codecs = f"{'-c:v ffv1 ' * (kind == 'video')}-c:a flac"
        convert = f"convert the file, such as with `ffmpeg -i {shlex.quote(path.name)} {codecs} out.mkv`"
        raise MediaError(f"{path}: got {name} in {codec}, must be in one of {', '.join(permitted)}; {convert}")
    return stream


COMMENT_TAG, MATROSKA_XMP_TAG = "comment", "XMP"
XMP_BOX = UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes
"""Type of the `uuid` box with an XMP packet in MP4 and MOV (XMP specification, part 3)."""
MAX_XMP_BYTES = 64_000_000
"""Larger packets are not read."""
PNG_HEADER_BYTES = 33
"""Signature and IHDR chunk, behind which text chunks may stand."""


class FileMetadata(NamedTuple):
    """Metadata that is written into a file beside its pixels."""

    comment: str
    """One sentence for people, Latin-1."""
    xmp: str
    """XMP packet, at most 1 MB for images."""


def png_with_metadata(content: bytes, metadata: FileMetadata) -> bytes:
    """Return the PNG file `content` with the metadata in text chunks before the pixels."""
    chunks = _png_chunk(b"tEXt", b"Comment\0" + metadata.comment.encode("latin-1"))
    # Keyword, no compression, no language and no translated keyword.
    chunks += _png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp.encode())
    return content[:PNG_HEADER_BYTES] + chunks + content[PNG_HEADER_BYTES:]


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def append_xmp(path: Path, xmp: str) -> None:
    """Append an XMP packet to a finished MP4 or MOV file. Nothing else in the file moves. Raises WriteError."""
    content = XMP_BOX + xmp.encode()
    with wrap_write_errors(path), path.open("ab") as file:
        file.write(struct.pack(">I4s", 8 + len(content), b"uuid") + content)


def read_xmp(path: Path) -> str | None:
    """Return the XMP packet of an image or a video, or `None` if it has none. Raises MediaError if it is neither."""

    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    check_is_file(path)
    with wrap_errors(f"{path}: cannot be read"), path.open("rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp":
        return _xmp_of_mp4(path)
    if start[:4] == b"\x1aE\xdf\xa3":  # EBML: Matroska or WebM
        with wrap_errors(f"{path}: cannot be read"), open_media(path, "matroska") as opened:
            return str(opened.metadata.get(MATROSKA_XMP_TAG, "")).encode(errors="ignore").decode() or None
    with wrap_errors(f"{path}: cannot be read"):
        try:
            with PILImage.open(path, formats=IMAGE_FORMATS) as image:
                stored = image.info.get("xmp")
        except UnidentifiedImageError:
            raise MediaError(f"{path}: {'not an image or a video' if start else 'is empty'}") from None
    return stored.decode("utf-8", "replace") if isinstance(stored, bytes) else stored


def _xmp_of_mp4(path: Path) -> str | None:
    """Walk the boxes of the top level without reading the others."""
    with wrap_errors(f"{path}: cannot be read"), path.open("rb") as file:
        end = path.stat().st_size
        while (begin := file.tell()) + 8 <= end:
            size, kind = struct.unpack(">I4s", file.read(8))
            if size == 1:
                (size,) = struct.unpack(">Q", file.read(8))
            size = size or end - begin
            if kind == b"uuid" and file.read(16) == XMP_BOX and size <= MAX_XMP_BYTES:
                return file.read(begin + size - file.tell()).decode("utf-8", "replace")
            if size < 8:
                return None
            file.seek(begin + size)
    return None


@lru_cache(maxsize=64)
def load_font(path: Path | None, letter_px: int) -> ImageFont.FreeTypeFont:
    """Load a font file, by default the bundled DejaVu Sans. Raises OSError if it is not a font."""
    from PIL import ImageFont

    if path is not None:
        return ImageFont.truetype(str(path), letter_px)
    with resources.as_file(resources.files("vidgen_ray") / "film" / "fonts" / "DejaVuSans.ttf") as bundled:
        return ImageFont.truetype(str(bundled), letter_px)


def missing_letter(text: str, font: ImageFont.FreeTypeFont) -> str | None:
    """Return a letter of the text that the font does not have, or `None`."""
    return next((letter for letter in sorted(set(text)) if _is_missing(letter, font)), None)


@lru_cache(maxsize=10_000)
def _is_missing(letter: str, font: ImageFont.FreeTypeFont) -> bool:
    # Pillow does not tell which letters a font has. It draws the same box for all that are missing.
    drawn = letter.isprintable() and not letter.isspace()
    return drawn and bytes(font.getmask(letter)) == bytes(font.getmask("\U0010ffff"))
