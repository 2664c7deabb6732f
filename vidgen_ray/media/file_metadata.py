"""Metadata of image and video files: a comment for people and an XMP packet for programs.

XMP is stored where its specification says: in PNG as a text chunk, in JPEG and WebP as Pillow writes it, in MP4 and MOV as a
`uuid` box. Matroska has no place for it, so a tag of its own is used. This module does not know what a packet contains.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from PIL import Image as PILImage

from vidgen_ray.media.checks import IMAGE_FORMATS, check_is_file, wrap_errors, wrap_write_errors
from vidgen_ray.media.container import open_media

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
    check_is_file(path)
    with wrap_errors(f"{path}: cannot be read"), path.open("rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp":
        return _xmp_of_mp4(path)
    if start[:4] == b"\x1aE\xdf\xa3":  # EBML: Matroska or WebM
        return _xmp_of_matroska(path)
    with wrap_errors(f"{path}: not an image or a video"), PILImage.open(path, formats=IMAGE_FORMATS) as image:
        packet = image.info.get("xmp")
    return packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet


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


def _xmp_of_matroska(path: Path) -> str | None:
    with wrap_errors(f"{path}: cannot be read"), open_media(path, "matroska") as opened:
        packet: str | None = opened.metadata.get(MATROSKA_XMP_TAG)
        return packet
