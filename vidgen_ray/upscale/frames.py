"""Read the frames of a range of a video as RGB, and convert RGB back to the encoder's format. Exact about which frame it is."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray

from vidgen_ray.errors import MediaError
from vidgen_ray.media.decode import open_video_stream
from vidgen_ray.media.files import wrap_errors
from vidgen_ray.upscale.source import Colour, Source

Pixels = NDArray[Any]
"""RGB (H, W, 3): uint8, or uint16 with the full range of 0 to 65535 for sources of more than 8 bits."""
TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INP
# Area averages the chroma of 2x2 pixels, which decoders invert.
TO_YUV = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class FrameReader:
    """Reads ranges of frames. A range that follows the last one continues to decode, any other one seeks."""

    def __init__(self, source: Source) -> None:
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
            self._decoded, self._next = _decoded(self._source, start), start
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


def _decoded(source: Source, start: int) -> Generator[Any, None, None]:
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


def _decoded_from(source: Source, seek_time: int | None, start: int) -> Iterator[Any]:
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


def _to_rgb(frame: Any, source: Source, reformatter: VideoReformatter) -> Pixels:
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


class YuvConverter:
    """Converts RGB pixels (H, W, 3) to 4:2:0 frames of a colour matrix, with 8 or 10 bits."""

    def __init__(self, colour: Colour, bits: int) -> None:
        self._colour = colour
        self.pixel_format = "yuv420p" if bits == 8 else "yuv420p10le"
        self._reformatter = VideoReformatter()

    def convert(self, pixels: Pixels) -> av.VideoFrame:
        """Return the frame of uint8 or uint16 pixels."""
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.dtype == np.uint8 else "rgb48le")
        return self._reformatter.reformat(
            frame,
            format=self.pixel_format,
            dst_colorspace=self._colour.matrix,
            dst_color_range=ColorRange.JPEG if self._colour.full_range else ColorRange.MPEG,
            interpolation=TO_YUV,
            threads=1,
        )
