"""Hostile and unusual images: the door of photos, start images and uploads."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.hostile.case import Case, content, refused, used

RED = Image.new("RGB", (80, 64), (200, 30, 30))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_png(width: int, height: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a grey 1-bit PNG that Pillow would not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    extra = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def flipped(data: bytes, seed: int = 3) -> bytes:
    """Return the bytes with twenty bits flipped, none of them in the first hundred."""
    rng = np.random.default_rng(seed)
    mutant = bytearray(data)
    for position in rng.integers(100, len(data), 20):
        mutant[position] ^= 1 << int(rng.integers(8))
    return bytes(mutant)


def many_scans(scans: int = 500, *, as_mpo: bool = False) -> bytes:
    """Return a progressive JPEG whose last scan, which changes nothing, is repeated."""
    mpo = {"save_all": True, "append_images": [RED]} if as_mpo else {}
    jpeg = encoded(RED, "MPO" if as_mpo else "JPEG", progressive=True, **mpo)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * scans + jpeg[-2:]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RED, "JPEG", exif=exif)


def huge(path: Path) -> None:
    """Write a PNG that is followed by zeros."""
    path.write_bytes(encoded(RED, "PNG"))
    os.truncate(path, 600 * 2**20)


def pages() -> bytes:
    """Return a TIFF whose list of pages is endless: the second page names itself as the next one."""
    tiff = bytearray(encoded(Image.new("L", (8, 8)), "TIFF", save_all=True, append_images=[Image.new("L", (8, 8))] * 2))
    first = struct.unpack_from("<I", tiff, 4)[0]
    entries = struct.unpack_from("<H", tiff, first)[0]
    struct.pack_into("<I", tiff, first + 2 + entries * 12, first)
    return bytes(tiff)


FORMATS = "not a supported image format"
BROKEN = "cannot be read as an image"

IMAGES: list[Case] = [
    refused("empty file", FORMATS, content(b"")),
    refused("1-bit PNG of 50,000 x 50,000 pixels", "too large", content(lambda: grey_png(50_000, 50_000, bytes(6251 * 500)))),
    refused("PNG below Pillow's own limit", "too large", content(grey_png(10_000, 10_000, bytes(1251 * 10)))),
    refused("PNG above 40 megapixels", "40 megapixels", content(grey_png(8000, 6000, bytes(1001 * 10)))),
    refused(
        "PNG with 100 MB of compressed text",
        BROKEN,
        content(lambda: grey_png(8, 8, bytes(16), (b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)))),
    ),
    refused(
        "PNG with a compressed colour profile of 100 MB",
        BROKEN,
        content(lambda: grey_png(8, 8, bytes(16), (b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)))),
    ),
    refused("file of 600 MB", "must have at most 536,870,912", huge),
    refused("truncated JPEG", BROKEN, content(encoded(NOISE, "JPEG")[:-600])),
    refused("truncated PNG", BROKEN, content(encoded(NOISE, "PNG")[:-600])),
    refused("PNG with flipped bits", BROKEN, content(flipped(encoded(NOISE, "PNG")))),
    refused("JPEG with 500 scans", "scans, must be at most 100", content(many_scans())),
    refused("MPO with 500 scans", "scans, must be at most 100", content(lambda: many_scans(as_mpo=True))),
    refused("SVG with a file URL, named .png", FORMATS, content(b'<svg><image href="file:///etc/passwd"/></svg>')),
    refused("HTML named .png", FORMATS, content(b"<html><script>alert(1)</script>")),
    refused("PostScript named .png", FORMATS, content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")),
    refused("playlist named .png", FORMATS, content(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")),
    refused("pickle named .png", FORMATS, content(b"\x80\x04cposix\nsystem\n(S'true'\ntR.")),
    refused("TIFF of 32-bit floats with NaN", "32 bits", content(encoded(Image.new("F", (8, 8), np.nan), "TIFF"))),
    refused("AVIF", FORMATS, content(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + bytes(200))),
    refused("PPM", FORMATS, content(encoded(RED, "PPM"))),
    refused("video named .png", FORMATS, content(b"\0\0\0\x1cftypisom\0\0\2\0isomiso2avc1mp41")),
    refused("HEIC", FORMATS, content(b"\0\0\0\x20ftypheic\0\0\0\0mif1heic" + bytes(200))),
    used("1 x 1 pixel", content(encoded(RED.resize((1, 1)), "PNG"))),
    used("CMYK JPEG", content(encoded(RED.convert("CMYK"), "JPEG"))),
    used("16-bit PNG", content(encoded(Image.fromarray(np.full((64, 64), 40_000, np.uint16)), "PNG"))),
    used("palette with alpha", content(encoded(RED.convert("P"), "PNG", transparency=0))),
    used("animated GIF: its first frame", content(encoded(RED, "GIF", save_all=True, append_images=[NOISE]))),
    used("animated WebP: its first frame", content(encoded(RED, "WEBP", save_all=True, append_images=[NOISE]))),
    used("JPEG rotated by EXIF", content(rotated())),
    used("TIFF with an endless list of pages: its first page", content(pages())),
    used("JPEG with an appended zip", content(encoded(RED, "JPEG") + b"PK\x03\x04 an appended zip")),
]
