"""Hostile and unusual files: images, videos, LoRAs of script lines and upscalers of profiles."""

import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import av
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from tests.upscale.videos import audio_only, write_video

Outcome = Literal["refused", "used"]


@dataclass(frozen=True)
class Case:
    """A hostile input. Its class is `refused`, with a message, or `used`."""

    name: str
    outcome: Outcome
    message: str = ""
    """Part of the message of a refused input."""
    field: str | None = None
    """Field of a script line, or `param` of an HTTP error, that the message must name."""
    build: Callable[[Path], Any] = lambda _: None
    """Write the file at this path. For lines and requests: return the line, or the request's arguments."""
    status: int = 0
    """HTTP status of a refused request."""
    ending: str = ""
    """End of the name of the file."""

    def __str__(self) -> str:
        return self.name


def refused(name: str, message: str, build: Callable[[Path], Any], **more: Any) -> Case:
    return Case(name, "refused", message, build=build, **more)


def used(name: str, build: Callable[[Path], Any], **more: Any) -> Case:
    return Case(name, "used", build=build, **more)


def content(data: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    """Return a builder that writes these bytes, or those that a function returns."""

    def build(path: Path) -> None:
        path.write_bytes(data if isinstance(data, bytes) else data())

    return build


# Images: photos, start images and uploads

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
    refused("PNG above 40 megapixels", "40 megapixels", content(grey_png(8000, 6000, bytes(1001 * 10)))),
    refused(
        "PNG with 10 MB of compressed text",
        BROKEN,
        content(lambda: grey_png(8, 8, bytes(16), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10_000_000), 9)))),
    ),
    refused("file of 600 MB", "must have at most 536,870,912", huge),
    refused("truncated JPEG", BROKEN, content(encoded(NOISE, "JPEG")[:-600])),
    refused("PNG with flipped bits", BROKEN, content(flipped(encoded(NOISE, "PNG")))),
    refused("JPEG with 500 scans", "scans, must be at most 100", content(many_scans())),
    refused("MPO with 500 scans", "scans, must be at most 100", content(lambda: many_scans(as_mpo=True))),
    refused("SVG with a file URL, named .png", FORMATS, content(b'<svg><image href="file:///etc/passwd"/></svg>')),
    refused("TIFF of 32-bit floats with NaN", "32 bits", content(encoded(Image.new("F", (8, 8), np.nan), "TIFF"))),
    refused("AVIF", FORMATS, content(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + bytes(200))),
    refused("PPM", FORMATS, content(encoded(RED, "PPM"))),
    used("CMYK JPEG", content(encoded(RED.convert("CMYK"), "JPEG"))),
    used("palette with alpha", content(encoded(RED.convert("P"), "PNG", transparency=0))),
    used("animated GIF: its first frame", content(encoded(RED, "GIF", save_all=True, append_images=[NOISE]))),
    used("JPEG rotated by EXIF", content(rotated())),
    used("TIFF with an endless list of pages: its first page", content(pages())),
    used("JPEG with an appended zip", content(encoded(RED, "JPEG") + b"PK\x03\x04 an appended zip")),
]


# Videos: inputs of `vidgen upscale`, of `vidgen stage` and of characters in the API

VIDEO_FORMATS = "not a supported video format"


@cache
def good_mp4() -> bytes:
    with TemporaryDirectory() as folder:
        return write_video(Path(folder) / "a.mp4", 6).read_bytes()


def no_frames(path: Path) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def without_its_end(path: Path) -> None:
    write_video(path, 40, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-3000])


PAL = {"time_base": Fraction(1, 25)}
"""MPEG-2 has few frame rates."""


def write_as(path: Path, suffix: str, **settings: Any) -> None:
    write_video(path.with_suffix(f".{suffix}"), 6, **settings).rename(path)


def patched(box: bytes, offset: int, value: int) -> bytes:
    """Return the clip with a 32-bit number of a box replaced."""
    clip = bytearray(good_mp4())
    struct.pack_into(">I", clip, clip.index(box) + offset, value)
    return bytes(clip)


VIDEOS: list[Case] = [
    refused("image named .mp4", VIDEO_FORMATS, content(encoded(NOISE, "PNG"))),
    refused("playlist of local files", VIDEO_FORMATS, content(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")),
    refused("ffconcat list", VIDEO_FORMATS, content(b"ffconcat version 1.0\nfile /etc/passwd\n")),
    refused("playlist behind the first bytes of an MP4", "", lambda path: path.write_bytes(good_mp4()[:12] + b"#EXTM3U")),
    refused("MP4 without its index", "", lambda path: path.write_bytes(good_mp4().replace(b"moov", b"skip"))),
    refused("MP4 with 60% of its bytes", "", lambda path: path.write_bytes(good_mp4()[: len(good_mp4()) * 6 // 10])),
    refused("sound only", "has no video", audio_only),
    refused("MP4 without frames", "", no_frames),
    refused("MP4 with its index first and without its end", "", without_its_end),
    used("header with 65,535 x 65,535 pixels", lambda path: path.write_bytes(patched(b"avc1", 28, 0xFFFFFFFF))),
    used("header with 1,000,000,000 frames", lambda path: path.write_bytes(patched(b"stts", 12, 10**9))),
    refused(
        "AVI in MagicYUV", "video in magicyuv, must be in one of h264, ", lambda path: write_as(path, "avi", codec="magicyuv")
    ),
    used("MPEG-2 program stream", lambda path: write_as(path, "mpg", codec="mpeg2video", **PAL)),
    used("MPEG-2 transport stream", lambda path: write_as(path, "ts", codec="mpeg2video", **PAL)),
    used("transport stream of a camera", lambda path: write_as(path, "m2ts", options={"mpegts_m2ts_mode": "1"})),
    used("GIF", lambda path: write_as(path, "gif", codec="gif", pixel_format="rgb8")),
    used("odd size", lambda path: write_video(path, 3, size=(61, 41), pixel_format="yuv444p")),
    used("10-bit HDR", lambda path: write_video(path, 3, pixel_format="yuv420p10le", colour=(9, 9, 16, 1))),
]


# Weights


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(RunsCode(path.with_name("RAN"))))


def pickled_checkpoint(path: Path) -> None:
    import torch

    torch.save({"params": RunsCode(path.with_name("RAN"))}, path)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensors(**shapes: tuple[int, ...]):
    return lambda path: save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, path)


def header(**spans: tuple[int, int]) -> bytes:
    """Return a header of float tensors of one element, each with its begin and end in the data."""
    return json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": span} for name, span in spans.items()}).encode()


LAYER = "transformer.single_transformer_blocks.0.attn.to_q"
UNREADABLE = "not a readable .safetensors file"


def large(path: Path) -> None:
    path.write_bytes(safetensors(header(a=(0, 4)), bytes(4)))
    os.truncate(path, 9 * 2**30)


LORAS: list[Case] = [
    refused("pickle named .safetensors", UNREADABLE, pickled),
    refused("torch checkpoint with code, named .safetensors", UNREADABLE, pickled_checkpoint),
    refused("empty file", UNREADABLE, content(b"")),
    refused("header of 2^63 bytes", "must be at most 16,777,216", content(safetensors(b"{}", length=2**63))),
    refused("header that is not JSON", UNREADABLE, content(safetensors(b"\xff" * 64))),
    refused("header nested 10,000 times", UNREADABLE, content(lambda: safetensors(b'{"a":' * 10_000 + b"0" + b"}" * 10_000))),
    refused("overlapping tensors", UNREADABLE, content(safetensors(header(a=(0, 4), b=(0, 4)), bytes(4)))),
    refused("offsets that do not fit the shape", UNREADABLE, content(safetensors(header(a=(0, 8)), bytes(8)))),
    refused("no tensors", "has no tensors", content(safetensors(b"{}"))),
    refused("file of 9 GB", "must have at most 8,589,934,592", large),
    refused(
        "factors of different rank",
        "have rank 4 and 8",
        tensors(**{f"{LAYER}.lora_A.weight": (4, 16), f"{LAYER}.lora_B.weight": (16, 8)}),
    ),
    refused("half of a layer", "one of its two factors only", tensors(**{f"{LAYER}.lora_A.weight": (4, 16)})),
    refused("keys of a whole model", "has no layers of a LoRA", tensors(**{"model.0.weight": (4, 4)})),
    refused(
        "LoRA of Stable Diffusion 1.5",
        "was trained for Stable Diffusion or SDXL",
        tensors(**{"lora_unet_down_blocks_0_attn.lora_up.weight": (4, 4)}),
    ),
]

UPSCALERS: list[Case] = [
    refused("pickle named .pth", "holds other objects than tensors", pickled, ending=".pth"),
    refused("torch checkpoint with code", "holds other objects than tensors", pickled_checkpoint, ending=".pth"),
    refused("empty .pth", "is damaged", content(b""), ending=".pth"),
    refused("damaged .safetensors", "cannot be loaded", content(b"\xff" * 64), ending=".safetensors"),
]
