"""Hostile and unusual videos: the door of `vidgen upscale`, `vidgen stage` and of characters in the API."""

import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av

from tests.hostile.case import Case, content, refused, used
from tests.hostile.images import NOISE, encoded
from tests.upscale.videos import audio_only, write_video

FORMATS = "not a supported video format"


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


def patched(box: bytes, offset: int, value: int) -> bytes:
    """Return the clip with a 32-bit number of a box replaced."""
    clip = bytearray(good_mp4())
    struct.pack_into(">I", clip, clip.index(box) + offset, value)
    return bytes(clip)


VIDEOS: list[Case] = [
    refused("empty file", FORMATS, content(b"")),
    refused("text named .mp4", FORMATS, content(b"this is not a video, it only says so\n" * 50)),
    refused("image named .mp4", FORMATS, content(encoded(NOISE, "PNG"))),
    refused("playlist of local files", FORMATS, content(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")),
    refused("playlist of a metadata server", FORMATS, content(b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/\n")),
    refused("ffconcat list", FORMATS, content(b"ffconcat version 1.0\nfile /etc/passwd\n")),
    refused("playlist behind the first bytes of an MP4", "", lambda path: path.write_bytes(good_mp4()[:12] + b"#EXTM3U")),
    refused("MP4 without its index", "", lambda path: path.write_bytes(good_mp4().replace(b"moov", b"skip"))),
    refused("MP4 with 60% of its bytes", "", lambda path: path.write_bytes(good_mp4()[: len(good_mp4()) * 6 // 10])),
    refused("header without frames", "", lambda path: path.write_bytes(good_mp4()[: good_mp4().index(b"mdat")])),
    refused("sound only", "has no video", audio_only),
    refused("MP4 without frames", "", no_frames),
    refused("MP4 with its index first and without its end", "", without_its_end),
    used("header with 65,535 x 65,535 pixels", lambda path: path.write_bytes(patched(b"avc1", 28, 0xFFFFFFFF))),
    used("header with 1,000,000,000 frames", lambda path: path.write_bytes(patched(b"stts", 12, 10**9))),
    used("1 frame", lambda path: write_video(path, 1)),
    used("odd size", lambda path: write_video(path, 3, size=(61, 41), pixel_format="yuv444p")),
    used("variable frame rate", lambda path: write_video(path, 3, times=[0, 100, 150])),
    used("10-bit HDR", lambda path: write_video(path, 3, pixel_format="yuv420p10le", colour=(9, 9, 16, 1))),
    used("rotation matrix", lambda path: write_video(path, 3, rotation=90)),
    used("AV1, which decord cannot read", lambda path: write_video(path, 3, codec="libsvtav1")),
]
