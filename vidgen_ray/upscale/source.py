"""Properties of a video file that its upscaled version must keep, read from the packets and the first frame, and the times
of the result's frames.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from av.sidedata.sidedata import Type as SideData

from vidgen_ray.errors import MediaError
from vidgen_ray.media.decode import open_video_stream, read_packets, video_container
from vidgen_ray.media.filters import BT709, UNSPECIFIED, through_filter
from vidgen_ray.media.media_file import wrap_errors

_FIELD_FRAMES = 500
"""Frames in which fields are looked for."""
_FALSELY_INTERLACED = 0.25
"""Share of progressive frames that may look interlaced, as those with fine lines do."""
_BOTTOM_FIRST = 3, 4
"""FFmpeg's numbers of the orders of fields in which the bottom field is shown first."""
AV_TIME_BASE = 1_000_000
"""FFmpeg's units of a second for the duration of a file."""
MAX_MISSING_S = 1.0
"""Seconds by which a file may declare to be longer than its frames, without a note."""
BT601 = 6
"""FFmpeg's number of a colour matrix, SMPTE 170M, whose numbers are those of BT.601."""
FULL_RANGE = 2
PQ, HLG = 16, 18
"""FFmpeg's numbers of the transfer functions of HDR video."""
LARGEST_SD = 1024, 576
"""Width and height in pixels up to which players take untagged video for BT.601."""
LOST_SIDE_DATA = {
    SideData.DYNAMIC_HDR_PLUS: "HDR10+ metadata is dropped; static HDR metadata is kept",
    SideData.DOVI_RPU_BUFFER: "Dolby Vision metadata is dropped; static HDR metadata is kept",
    SideData.DOVI_METADATA: "Dolby Vision metadata is dropped; static HDR metadata is kept",
    SideData.A53_CC: "closed captions inside the picture's stream (CEA-608, CEA-708) are dropped",
    SideData.STEREO3D: "the tag of 3D video is dropped",
    SideData.SPHERICAL: "the tag of spherical video is dropped",
    SideData.ICC_PROFILE: "the ICC profile is dropped",
}
"""Data of frames that encoders do not take over -> note."""


@dataclass(frozen=True, slots=True)
class Colour:
    """Colour tags of a video, as FFmpeg's numbers."""

    matrix: int
    """Never unspecified: that of the tag, else the one that players assume for the size."""
    primaries: int
    transfer: int
    full_range: bool


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """Times of the frames of a video, in units of `time_base`."""

    fps: Fraction
    """Frames per second. The average if the frame rate varies."""
    time_base: Fraction
    times: Sequence[int]
    """Time of each frame, strictly increasing."""
    last_duration: int
    """Duration of the last frame."""

    @property
    def duration(self) -> Fraction:
        """Return the seconds from the first frame to the end of the last one."""
        return (self.times[-1] - self.times[0] + self.last_duration) * self.time_base


@dataclass(frozen=True, slots=True)
class VideoSource(FrameTimes):
    """A video file and the times of its frames."""

    path: Path
    container: str
    """FFmpeg's name of the format: mov, matroska or avi."""
    width: int
    """Width in pixels of an upright frame. The same for `height`."""
    height: int
    stored_size: tuple[int, int]
    """Width and height in pixels before the rotation by `quarter_turns`."""
    quarter_turns: int
    """Counter-clockwise quarter turns that make a frame upright."""
    bits: int
    """Bits per channel."""
    pixel_aspect: Fraction
    """Width of a pixel divided by its height, of an upright frame."""
    colour: Colour
    keyframe_times: tuple[int, ...]
    """Times of keyframes, in order. Empty if frames can only be reached by decoding all frames before."""
    hdr: HdrMetadata
    deinterlacer: str | None
    """FFmpeg filter through which frames are read. `None` if they are read as they are."""
    notes: tuple[str, ...]
    """Properties of this file that are not kept, and assumptions."""

    @property
    def frame_count(self) -> int:
        return len(self.times)

    def seek_time(self, frame: int) -> int | None:
        """Return the time of a keyframe from which decoding gives this frame exactly. `None`: decode from the start.

        That is the last but one keyframe before the frame: after the last one, frames may still depend on frames before it
        (open GOPs, intra refresh).
        """
        before = bisect_right(self.keyframe_times, self.times[frame])
        return self.keyframe_times[before - 2] if before > 2 else None


@dataclass(frozen=True, slots=True)
class HdrMetadata:
    """Static HDR metadata (SMPTE ST 2086, CTA-861.3)."""

    mastering: tuple[Fraction, ...] | None = None
    """x and y of red, green, blue and white, then minimum and maximum luminance in cd/m²."""
    light: tuple[int, int] | None = None
    """MaxCLL and MaxFALL in cd/m²."""


def read_source(path: Path, *, deinterlace: bool = False) -> VideoSource:
    """Read the properties of a video. All packets are read, one frame is decoded.

    `deinterlace`: also decode the first _FIELD_FRAMES, to find out whether and how it is interlaced.
    Raises MediaError if it is missing, no video of a supported format, or truncated.
    """
    container = video_container(path)
    with wrap_errors(f"{path}: cannot be read"):
        with open_video_stream(path, container) as (opened, stream):
            first = next(opened.decode(stream), None)
            fps, time_base = stream.average_rate or stream.guessed_rate, Fraction(stream.time_base)
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            declared_s = (opened.duration or 0) / AV_TIME_BASE
            is_interlaced, tagged_order = first is not None and first.interlaced_frame, stream.codec_context.field_order
        packets = [
            (packet.pts, packet.duration or 0, bool(packet.is_keyframe))
            for packet in read_packets(path, container)
            if not packet.is_discard
        ]
        if first is None or not fps or not packets:
            raise MediaError(f"{path}: has no frames")
    quarter_turns = round(first.rotation / 90) % 4
    sideways = quarter_turns % 2
    colour, notes = _colour_of(first)
    order = None
    if deinterlace:
        order, notes_on_fields = _field_order(path, container, is_interlaced, tagged_order)
        notes += notes_on_fields
    elif is_interlaced:
        notes.append("is interlaced, and upscaled with its combs; --deinterlace makes progressive frames")
    times, keyframe_times, notes_on_times = _times_of(packets, Fraction(fps), time_base)
    frames_s = float(times.duration)
    if declared_s > frames_s + MAX_MISSING_S:
        # Matroska and AVI files have no list of frames that shows that a part is missing. Sound may also be longer.
        notes.append(f"the file declares {declared_s:.1f} s, its frames end after {frames_s:.1f} s")
    return VideoSource(
        fps=times.fps,
        time_base=times.time_base,
        times=times.times,
        last_duration=times.last_duration,
        path=path,
        container=container,
        width=first.height if sideways else first.width,
        height=first.width if sideways else first.height,
        stored_size=(first.width, first.height),
        quarter_turns=quarter_turns,
        bits=max(component.bits for component in first.format.components),
        pixel_aspect=1 / aspect if sideways else aspect,
        colour=colour,
        keyframe_times=keyframe_times,
        hdr=_hdr_of(first),
        deinterlacer=None if order is None else f"bwdif=mode=send_frame:parity={order}:deint=all",
        notes=(*notes, *notes_on_times, *_lost(first)),
    )


def _field_order(path: Path, container: str, is_interlaced: bool, tag: int) -> tuple[str | None, list[str]]:
    """Return `tff` or `bff`, the field that comes first, or `None` if the frames are progressive, and notes.

    The pixels decide (FFmpeg's idet), since tags are often missing or wrong. If nothing moves, those of the file do.
    `tag`: FFmpeg's number of the order.
    """
    with wrap_errors(f"{path}: cannot be decoded"), open_video_stream(path, container) as (opened, stream):
        read = [frame.metadata for frame in through_filter(islice(opened.decode(stream), _FIELD_FRAMES), "idet")]
    progressive, *counts = (float(read[-1][f"lavfi.idet.single.{name}"]) for name in ("progressive", "tff", "bff"))
    interlaced = sum(counts)
    if is_interlaced and not progressive + interlaced:
        return "bff" if tag in _BOTTOM_FIRST else "tff", []
    found = f"{interlaced:.0f} of the first {len(read)} frames are interlaced"
    if interlaced <= _FALSELY_INTERLACED * (progressive + interlaced):
        return None, [f"{found}; --deinterlace changes nothing"]
    notes = [f"{found}; the others are deinterlaced, too"] if progressive > interlaced else []
    return "bff" if counts[1] > counts[0] else "tff", notes


def _times_of(
    packets: Sequence[tuple[int | None, int, bool]], fps: Fraction, time_base: Fraction
) -> tuple[FrameTimes, tuple[int, ...], tuple[str, ...]]:
    """Return the times of the frames, those of keyframes, and notes. AVI has none: its frames are shown at a constant rate.

    `packets`: time, duration, and true for a keyframe.
    """
    rate = fps.limit_denominator(100_000)
    shown = sorted((time, *rest) for time, *rest in packets if time is not None)
    times = tuple(time for time, _, _ in shown)
    if len(times) < len(packets) or any(a >= b for a, b in pairwise(times)):
        notes = ("some frames have the same time or none; frames are shown at a constant rate",) if times else ()
        return FrameTimes(rate, 1 / fps, tuple(range(len(packets))), 1), (), notes
    last = shown[-1][1] or (times[-1] - times[-2] if len(times) > 1 else max(1, round(1 / fps / time_base)))
    return FrameTimes(rate, time_base, times, last), tuple(time for time, _, is_keyframe in shown if is_keyframe), ()


def _colour_of(frame: Any) -> tuple[Colour, list[str]]:
    full_range = int(frame.color_range) == FULL_RANGE or frame.format.name.startswith("yuvj")
    tags = Colour(int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc), full_range)
    if frame.format.is_rgb:
        return Colour(BT709, tags.primaries, tags.transfer, False), ["RGB is encoded as YUV (BT.709)"]
    if tags.matrix not in (0, UNSPECIFIED):
        return tags, []
    is_sd = frame.width <= LARGEST_SD[0] and frame.height <= LARGEST_SD[1]
    matrix, name = (BT601, "BT.601") if is_sd else (BT709, "BT.709")
    # The upscaled file is larger, so players would assume another matrix for it.
    return Colour(matrix, tags.primaries, tags.transfer, tags.full_range), [f"has no colour tag; {name} is assumed and tagged"]


def _lost(frame: Any) -> list[str]:
    """Return what of the picture is not kept."""
    notes = []
    components = frame.format.components
    if not frame.format.is_rgb and len(components) >= 3 and components[1].height == frame.height:
        notes.append("its chroma has more than half of the resolution; the upscaled chroma is stored as 4:2:0")
    if any(component.is_alpha for component in components):
        notes.append("alpha is dropped")
    if max(component.bits for component in components) > 10:
        notes.append("more than 10 bits per channel are stored as 10")
    notes += sorted({text for kind, text in LOST_SIDE_DATA.items() if kind in frame.side_data})
    return notes


def _hdr_of(frame: Any) -> HdrMetadata:
    mastering: tuple[Fraction, ...] | None = None
    light: tuple[int, int] | None = None
    if (raw := frame.side_data.get(SideData.MASTERING_DISPLAY_METADATA)) is not None:
        # AVMasteringDisplayMetadata: 10 rationals of two 32-bit integers, then the flags has_primaries and has_luminance.
        *numbers, has_primaries, has_luminance = struct.unpack_from("=22i", bytes(raw))
        if has_primaries and has_luminance:
            mastering = tuple(Fraction(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True))
    if (raw := frame.side_data.get(SideData.CONTENT_LIGHT_LEVEL)) is not None:
        light = struct.unpack_from("=2I", bytes(raw))
    return HdrMetadata(mastering, light)


class Place(NamedTuple):
    """A time between two frames of the source."""

    frame: int
    """Number of the frame at or before the time."""
    share: Fraction
    """Share of the interval to the next frame, from 0 (the frame itself) to below 1. 0 after the last frame."""


def timeline_of(source: VideoSource, fps: Fraction | None) -> FrameTimes:
    """Return the times of the result: those of the source, or `fps` frames per second from its first frame to its end.

    Raises MediaError if `fps` is lower than the rate of the source, so that frames would be dropped.
    """
    if fps is None:
        return source
    if fps < source.fps:
        rate = f"{float(source.fps):g} frames per second, more than {float(fps):g}"
        raise MediaError(f"{source.path}: has {rate}; frames would be dropped")
    time_base = Fraction(1, math.lcm(fps.numerator, source.time_base.denominator))
    step, start = int(1 / fps / time_base), int(source.times[0] * source.time_base / time_base)
    count = math.ceil(source.duration * fps)
    return FrameTimes(fps, time_base, range(start, start + count * step, step), step)


def places(source: VideoSource, timeline: FrameTimes, start: int, stop: int) -> list[Place]:
    """Return where frames `start` (inclusive) to `stop` (exclusive) of the result are in the source."""
    found = []
    for number in range(start, stop):
        time = timeline.times[number] * timeline.time_base / source.time_base
        frame = bisect_right(source.times, time) - 1
        is_last = frame == source.frame_count - 1
        interval = 1 if is_last else source.times[frame + 1] - source.times[frame]
        found.append(Place(frame, Fraction(0) if is_last else Fraction(time - source.times[frame]) / interval))
    return found
