"""Properties of a clip that decide how it is placed in a film, read from its packets without decoding a frame."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from vidgen_ray.errors import MediaError
from vidgen_ray.film.settings import Size
from vidgen_ray.media.files import check_is_file, check_pixels, open_media, wrap_errors

REORDER_FRAMES = 2
"""Frames by which the decoding order may be ahead of the display order: that of x264 with its default B-frames."""


class Clip(NamedTuple):
    """Properties of a video file."""

    size: Size
    fps: Fraction
    frames: int
    has_sound: bool
    header: bytes | None
    """H.264 parameter sets. Clips with the same header can be joined by copying packets. `None` if that is impossible."""

    @property
    def seconds(self) -> Fraction:
        return self.frames / self.fps


def probe_clip(path: Path) -> Clip:
    """Return the properties of a clip. Raises MediaError if it is missing, damaged or has no frames."""
    check_is_file(path)
    with (
        wrap_errors(f"{path}: cannot be read as a video"),
        open_media(path) as opened,
    ):
        stream = opened.streams.best("video")
        if stream is None or stream.codec_context is None or not stream.average_rate:
            raise MediaError(f"{path}: has no video, or none with a supported codec")
        check_pixels(path, stream.width, stream.height)
        packets = [packet for packet in opened.demux(stream) if packet.size]
        if not packets:
            raise MediaError(f"{path}: has no frames")
        fps = Fraction(stream.average_rate)
        codec = stream.codec_context
        can_be_copied = (
            codec.name == "h264"
            and codec.pix_fmt == "yuv420p"
            and packets[0].is_keyframe
            and _has_constant_rate([packet.pts for packet in packets], fps, stream.time_base)
        )
        return Clip(
            size=Size(stream.width, stream.height),
            fps=fps,
            frames=len(packets),
            has_sound=opened.streams.best("audio") is not None,
            header=bytes(codec.extradata or b"") or None if can_be_copied else None,
        )


def _has_constant_rate(times: list[int | None], fps: Fraction, time_base: Fraction) -> bool:
    """Return true if the frames start at 0, one per 1/fps seconds, and are at most REORDER_FRAMES ahead of their order."""
    if None in times:
        return False
    numbers = [time * time_base * fps for time in times if time is not None]
    return sorted(numbers) == list(range(len(numbers))) and all(
        position - number <= REORDER_FRAMES for position, number in enumerate(numbers)
    )


def sound_seconds(path: Path) -> float:
    """Return the length of the sound in a file. Raises MediaError if there is none."""
    check_is_file(path)
    with (
        wrap_errors(f"{path}: cannot be read as sound"),
        open_media(path) as opened,
    ):
        stream = opened.streams.best("audio")
        if stream is None or stream.codec_context is None:
            raise MediaError(f"{path}: has no sound, or none with a supported codec")
        end = Fraction(0)
        for packet in opened.demux(stream):
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
    if not end:
        raise MediaError(f"{path}: has no sound")
    return float(end)
