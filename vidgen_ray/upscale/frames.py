"""Frames of a video: read a range as RGB, draw frames between others with RIFE, and encode a segment to a file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from av.codec import codecs_available
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray
from pydantic import Field

from vidgen_ray.errors import MediaError
from vidgen_ray.media.decode import open_video_stream
from vidgen_ray.media.encode import Mp4Settings, Preset, VideoWriter
from vidgen_ray.media.filters import through_filter
from vidgen_ray.media.media_file import wrap_errors
from vidgen_ray.stages.base import torch_threads
from vidgen_ray.stages.rife import frames_between
from vidgen_ray.upscale.source import HLG, PQ, Place, VideoSource
from vidgen_ray.weights import resolve

_THREADS = Path("/proc/self/task")


def end_real_time_priority() -> None:
    """Give the threads of this process that have a real-time priority the normal one.

    As root, SVT-AV1 gives the calling thread and its own threads the highest real-time priority (SCHED_FIFO 99) when it opens.
    Other threads and programs then do not run, and child processes inherit it. Does nothing without Linux's /proc.
    """
    if not _THREADS.is_dir():
        return
    for thread in _THREADS.iterdir():
        # A thread may have ended.
        with suppress(ProcessLookupError):
            if os.sched_getscheduler(int(thread.name)) in (os.SCHED_FIFO, os.SCHED_RR):
                os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))


Pixels = NDArray[Any]
"""RGB (H, W, 3): uint8, or uint16 with the full range of 0 to 65535 for sources of more than 8 bits."""
TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INP
# Area averages the chroma of 2x2 pixels, which decoders invert.
TO_YUV = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class FrameReader:
    """Reads ranges of frames. A range that follows the last one continues to decode, any other one seeks."""

    def __init__(self, source: VideoSource) -> None:
        self._source = source
        self._decoded: Generator[Any, None, None] | None = None
        self._next = 0
        self._reformatter = VideoReformatter()

    def read(self, start: int, stop: int) -> Iterator[Pixels]:
        """Yield the upright frames from `start` (inclusive) to `stop` (exclusive).

        Raises MediaError if a frame cannot be decoded, has another size, or is not where the packets say.
        """
        path = self._source.path
        if self._decoded is None or start != self._next:
            self.close()
            self._decoded, self._next = _progressive(self._source, start), start
        while self._next < stop:
            with wrap_errors(f"{path}: frame {self._next} cannot be decoded"):
                frame = next(self._decoded, None)
                if frame is None:
                    expected = f"must have {self._source.frame_count} as its packets declare"
                    raise MediaError(f"{path}: ends after {self._next} frames, {expected}")
                if (frame.width, frame.height) != self._source.stored_size:
                    raise MediaError(f"{path}: changes its size in frame {self._next}, must keep one size")
                pixels = _to_rgb(frame, self._source, self._reformatter)
            self._next += 1
            yield pixels

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        decoded, self._decoded = self._decoded, None
        if decoded is not None:
            decoded.close()


def _progressive(source: VideoSource, start: int) -> Generator[Any, None, None]:
    """Yield the frames from `start` on, deinterlaced if the source is."""
    if source.deinterlacer is None:
        yield from _decoded(source, start)
        return
    # A frame is made of those before and after it.
    before = min(1, start)
    with closing(_decoded(source, start - before)) as frames:
        yield from islice(through_filter(frames, source.deinterlacer), before, None)


def _decoded(source: VideoSource, start: int) -> Generator[Any, None, None]:
    """Yield the decoded frames from `start` on."""
    seek_time = source.seek_time(start)
    if seek_time is not None:
        frames = _decoded_from(source, seek_time, start)
        if (first := next(frames, None)) is not None:
            yield first
            yield from frames
            return
    for index, frame in enumerate(_decoded_from(source, None, 0)):
        if index >= start:
            yield frame


def _decoded_from(source: VideoSource, seek_time: int | None, start: int) -> Iterator[Any]:
    """Yield the frames from `start` on, found by their times after a seek. Yields none if the seek went too far.

    Raises MediaError if a frame is missing or comes twice.
    """
    with open_video_stream(source.path, source.container) as (opened, stream):
        if seek_time is not None:
            opened.seek(seek_time, stream=stream, backward=True, any_frame=False)
        index = start
        for frame in opened.decode(stream):
            if source.keyframe_times:
                if index == start and seek_time is not None:
                    if frame.pts is None or frame.pts > source.times[start]:
                        return
                    if frame.pts < source.times[start]:
                        continue
                if index >= source.frame_count or frame.pts != source.times[index]:
                    raise MediaError(f"{source.path}: frame {index} is missing or damaged, the decoder gave another one")
            yield frame
            index += 1


def _to_rgb(frame: Any, source: VideoSource, reformatter: VideoReformatter) -> Pixels:
    target = "rgb24" if source.bits == 8 else "rgb48le"
    if frame.format.is_rgb:
        converted = reformatter.reformat(frame, format=target, threads=1)
    else:
        converted = reformatter.reformat(
            frame,
            format=target,
            src_colorspace=source.colour.matrix,
            src_color_range=ColorRange.JPEG if source.colour.full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=TO_RGB,
            threads=1,
        )
    pixels = np.asarray(converted.to_ndarray())
    return np.ascontiguousarray(np.rot90(pixels, source.quarter_turns)) if source.quarter_turns else pixels


Codec = Literal["h264", "hevc", "av1"]

ENCODERS: dict[Codec, str] = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
DEFAULT_CRF: dict[Codec, int] = {"h264": 17, "hevc": 20, "av1": 25}
DEFAULT_PRESET: dict[Codec, Preset] = {"h264": "faster", "hevc": "medium", "av1": "medium"}
"""x264's `faster` at CRF 17 has 0.2 dB more than `medium` at 18, and 13 % more bytes, in 40 % less time."""
SVT_PRESETS = {
    "ultrafast": 12,
    "superfast": 11,
    "veryfast": 10,
    "faster": 9,
    "fast": 8,
    "medium": 7,
    "slow": 5,
    "slower": 4,
    "veryslow": 2,
}
"""x264's name of a preset -> preset of SVT-AV1."""
SEGMENT_SUFFIX = ".mp4"
MIN_FRAMES_HEVC = 3
"""Fewest frames with B-frames. x265 takes the decoding times of fewer frames from memory that it has not initialised."""


class EncodeSettings(Mp4Settings):
    """Compression of upscaled videos. Every field changes the bytes of the file."""

    codec: Codec = "h264"
    crf: int = Field(default=18, ge=0, le=63)
    """Quality, lower is better and larger. The scale depends on the codec."""


def codec_of_deep_videos() -> Codec:
    """Return the codec for more than 8 bits: HEVC, which hardware decodes, or H.264 if FFmpeg has no encoder of it."""
    return "hevc" if ENCODERS["hevc"] in codecs_available else "h264"


def write_segment(
    path: Path,
    frames: Iterable[Pixels],
    count: int,
    size: tuple[int, int],
    fps: Fraction,
    source: VideoSource,
    settings: EncodeSettings,
) -> None:
    """Encode exactly `count` frames of `size` (width, height in pixels).

    Frame i has the time i / fps; the real times are set when segments are joined.
    Raises MediaError if there are fewer or more frames, WriteError if the file cannot be written. It is deleted on an error.
    """
    # By default, SVT-AV1 prints its settings. 1: errors only.
    os.environ.setdefault("SVT_LOG", "1")
    colour = source.colour
    with VideoWriter(
        path,
        *size,
        fps,
        container="mp4",
        codec=ENCODERS[settings.codec],
        codec_options=_options(source, settings, count),
        conversion={
            "format": "yuv420p" if source.bits == 8 else "yuv420p10le",
            "dst_colorspace": colour.matrix,
            "dst_color_range": ColorRange.JPEG if colour.full_range else ColorRange.MPEG,
            "interpolation": TO_YUV,
        },
        tags={
            "sample_aspect_ratio": source.pixel_aspect,
            "colorspace": colour.matrix,
            "color_primaries": colour.primaries,
            "color_trc": colour.transfer,
            "color_range": 2 if colour.full_range else 1,
        },
        input_format="rgb24" if source.bits == 8 else "rgb48le",
    ) as video:
        for pixels in frames:
            video.write(pixels[None])
            if video.frames_written == 1 and settings.codec == "av1":
                # The first frame opens the encoder.
                end_real_time_priority()
        if video.frames_written != count:
            raise MediaError(f"{source.path}: got {video.frames_written} upscaled frames of a segment, must be {count}")


def _options(source: VideoSource, settings: EncodeSettings, count: int) -> dict[str, str]:
    hdr = _hdr_options(source, settings.codec)
    if settings.codec == "h264":
        # Without cpu-independent, the result depends on whether the CPU has AVX and, for small videos, on unfilled memory.
        parameters = ["cpu-independent=1", "open-gop=0", *hdr]
        return {
            "crf": str(settings.crf),
            "preset": settings.preset,
            "threads": str(settings.threads),
            "x264-params": ":".join(parameters),
        }
    if settings.codec == "hevc":
        parameters = ["open-gop=0", "log-level=none", f"pools={settings.threads}", "frame-threads=1", *hdr]
        if source.colour.transfer in (PQ, HLG):
            parameters += ["hdr10-opt=1", "repeat-headers=0"]
        if count < MIN_FRAMES_HEVC:
            parameters.append("bframes=0")
        return {"crf": str(settings.crf), "preset": settings.preset, "x265-params": ":".join(parameters)}
    parameters = [f"lp={settings.threads}", *hdr]
    return {"crf": str(settings.crf), "preset": str(SVT_PRESETS[settings.preset]), "svtav1-params": ":".join(parameters)}


def _hdr_options(source: VideoSource, codec: Codec) -> list[str]:
    """Return the encoder's parameters for static HDR metadata."""
    options = []
    if source.hdr.mastering is not None:
        red, green, blue, white = (source.hdr.mastering[i : i + 2] for i in range(0, 8, 2))
        low, high = source.hdr.mastering[8:]
        points = {"G": green, "B": blue, "R": red, "WP": white}
        if codec == "av1":
            text = "".join(f"{name}({float(x):.5f},{float(y):.5f})" for name, (x, y) in points.items())
            options.append(f"mastering-display={text}L({float(high):.4f},{float(low):.4f})")
        else:
            text = "".join(f"{name}({_scaled(x, 50_000)},{_scaled(y, 50_000)})" for name, (x, y) in points.items())
            name = "master-display" if codec == "hevc" else "mastering-display"
            options.append(f"{name}={text}L({_scaled(high, 10_000)},{_scaled(low, 10_000)})")
    if source.hdr.light is not None:
        name = {"h264": "cll", "hevc": "max-cll", "av1": "content-light"}[codec]
        options.append(f"{name}={source.hdr.light[0]},{source.hdr.light[1]}")
    return options


def _scaled(value: Fraction, unit: int) -> int:
    return round(value * unit)


INTERPOLATOR = "builtin:rife"
"""Weights of RIFE."""


class FrameInterpolator:
    """RIFE in float32. Frames are uint8 or uint16 (H, W, 3). One thread may use it at a time."""

    def __init__(self, device: str, threads: int) -> None:
        """Load the weights. Raises SetupError if they are not on this machine."""
        from vidgen_ray.nets.rife_network import load_rife

        self._network = load_rife(resolve(INTERPOLATOR)).to(device)
        self._threads = threads

    def between(self, first: Pixels, second: Pixels) -> Callable[[Fraction], Pixels]:
        """Return `frames_between` of two frames."""
        import torch

        with torch.inference_mode(), torch_threads(self._threads):
            draw = frames_between(self._network, first, second)

        def drawn(time: Fraction) -> Pixels:
            with torch.inference_mode(), torch_threads(self._threads):
                return draw(time)

        return drawn


def interpolated(frames: Iterator[Pixels], wanted: Sequence[Place], network: FrameInterpolator) -> Iterator[Pixels]:
    """Yield the frame at each place, in order. `frames` starts with the frame of the first place."""
    number, current = wanted[0].frame, next(frames)
    following: Pixels | None = None
    between: Callable[[Fraction], Pixels] | None = None
    for place in wanted:
        while number < place.frame:
            current = next(frames) if following is None else following
            following = between = None
            number += 1
        if not place.share:
            yield current
            continue
        if following is None or between is None:
            following = next(frames)
            between = network.between(current, following)
        yield between(place.share)
