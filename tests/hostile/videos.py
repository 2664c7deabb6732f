"""Hostile and unusual videos: the door of `vidgen upscale`, `vidgen stage` and of characters in the API."""

import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.hostile.case import Case, content, refused, used
from tests.hostile.images import NOISE, encoded
from tests.upscale.videos import audio_only, write_video

FORMATS = "not a supported video format"


@cache
def good_mp4() -> bytes:
    with TemporaryDirectory() as folder:
        return write_video(Path(folder) / "a.mp4", 6).read_bytes()


def patched(box: bytes, offset: int, value: int) -> bytes:
    """Return the clip with a 32-bit number of a box replaced."""
    clip = bytearray(good_mp4())
    struct.pack_into(">I", clip, clip.index(box) + offset, value)
    return bytes(clip)


VIDEOS: list[Case] = [
    refused("empty file", "video", FORMATS, content(b"")),
    refused("text named .mp4", "video", FORMATS, content(b"this is not a video, it only says so\n" * 50)),
    refused("image named .mp4", "video", FORMATS, content(encoded(NOISE, "PNG"))),
    refused("playlist of local files", "video", FORMATS, content(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")),
    refused("playlist of a metadata server", "video", FORMATS, content(b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/\n")),
    refused("ffconcat list", "video", FORMATS, content(b"ffconcat version 1.0\nfile /etc/passwd\n")),
    refused(
        "playlist behind the first bytes of an MP4", "video", "", lambda path: path.write_bytes(good_mp4()[:12] + b"#EXTM3U")
    ),
    refused("MP4 without its index", "video", "", lambda path: path.write_bytes(good_mp4().replace(b"moov", b"skip"))),
    refused("MP4 with 60% of its bytes", "video", "", lambda path: path.write_bytes(good_mp4()[: len(good_mp4()) * 6 // 10])),
    refused("header without frames", "video", "", lambda path: path.write_bytes(good_mp4()[: good_mp4().index(b"mdat")])),
    refused("sound only", "video", "has no video", audio_only),
    used("header with 65,535 x 65,535 pixels", "video", lambda path: path.write_bytes(patched(b"avc1", 28, 0xFFFFFFFF))),
    used("header with 1,000,000,000 frames", "video", lambda path: path.write_bytes(patched(b"stts", 12, 10**9))),
    used("1 frame", "video", lambda path: write_video(path, 1)),
    used("odd size", "video", lambda path: write_video(path, 3, size=(61, 41), pixel_format="yuv444p")),
    used("variable frame rate", "video", lambda path: write_video(path, 3, times=[0, 100, 150])),
    used("10-bit HDR", "video", lambda path: write_video(path, 3, pixel_format="yuv420p10le", colour=(9, 9, 16, 1))),
    used("rotation matrix", "video", lambda path: write_video(path, 3, rotation=90)),
    used("AV1, which decord cannot read", "video", lambda path: write_video(path, 3, codec="libsvtav1")),
]
