"""Frames to video files: H.264 for people, FFV1 where every bit has to come back."""

from __future__ import annotations

import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from pydantic import BaseModel, ConfigDict, Field

from vidgen_ray.errors import MediaError
from vidgen_ray.media.checks import failing_as
from vidgen_ray.stages.base import Frames

CHECKSUM_TAG = "PIXELS_CRC32"

Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]


class Mp4Settings(BaseModel):
    """How clips are compressed. Every field changes the bytes of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crf: int = Field(18, ge=1, le=51, description="x264's quality: lower is better and larger, 18 looks lossless")
    preset: Preset = Field("medium", description="slower presets give smaller files")
    threads: int = Field(4, ge=1, le=64, description="of x264; a fixed number, because its output depends on it")


class _VideoWriter:
    """Frames in, one video stream out. No file is left behind where anything goes wrong."""

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: int | Fraction,
        *,
        container: str,
        codec: str,
        options: dict[str, str],
        conversion: dict[str, Any],
        metadata: dict[str, str] | None = None,
    ) -> None:
        if fps <= 0:
            raise MediaError(f"{path}: got {fps} frames a second, must be more than 0")
        self.path = path
        self.frames_written = 0
        self._shape = (height, width, 3)
        self._conversion = conversion
        self._reformatter = VideoReformatter()
        with failing_as(f"{path}: cannot be written"):
            # Bitexact leaves out FFmpeg's version, dates and random ids. An absolute path is never taken for a URL.
            muxing = {"fflags": "+bitexact", **({"movflags": "+faststart"} if container == "mp4" else {})}
            self._container = av.open(str(path.absolute()), "w", container, options=muxing)
            self._container.metadata.update(metadata or {})
            self._stream = self._container.add_stream(codec, rate=fps, options=options)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, conversion["format"]

    def write(self, frames: Frames) -> None:
        """Append uint8 (T, H, W, 3) frames. How they are cut into chunks changes nothing; no chunk is kept.

        Raises MediaError where they do not fit the file, or cannot be written.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise MediaError(f"{self.path}: got {frames.dtype} frames {frames.shape[1:]}, must be uint8 {self._shape}")
        with failing_as(f"{self.path}: cannot be written"):
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame = self._reformatter.reformat(frame, threads=1, **self._conversion)
                frame.pts = self.frames_written
                self._container.mux(self._stream.encode(frame))
                self.frames_written += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except MediaError:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def _finish(self) -> None:
        if not self.frames_written:
            raise MediaError(f"{self.path}: got no frames, must be at least one")
        with failing_as(f"{self.path}: cannot be written"):
            self._container.mux(self._stream.encode())
            self._container.close()

    def _discard(self) -> None:
        with suppress(Exception):  # the block's own error is the one to tell
            self._container.close()
        self.path.unlink(missing_ok=True)


class Mp4Writer(_VideoWriter):
    """An H.264 MP4 that plays while it loads: `with Mp4Writer(path, 1024, 576, 24, Mp4Settings()) as clip: clip.write(...)`.

    yuv420p, BT.709, limited range, and tagged so: players guess at untagged files, and guess other than FFmpeg converts.
    The file grows at `path` itself and is removed where the block raises.
    Raises MediaError for an odd width or height (pixels), for no frames, and where the file cannot be written.
    """

    def __init__(self, path: Path, width: int, height: int, fps: int | Fraction, settings: Mp4Settings) -> None:
        if width % 2 or height % 2:
            raise MediaError(f"{path}: got {width}×{height} pixels, width and height must be even")
        super().__init__(
            path,
            width,
            height,
            fps,
            container="mp4",
            codec="libx264",
            options={
                "crf": str(settings.crf),
                "preset": settings.preset,
                "threads": str(settings.threads),
                # Else x264 decides otherwise on a CPU with AVX than on one without.
                "x264-params": "cpu-independent=1",
            },
            conversion={
                "format": "yuv420p",
                "dst_colorspace": Colorspace.ITU709,
                "dst_color_range": ColorRange.MPEG,
                # Area averages the chroma of 2×2 pixels, which is what decoders undo: on a chart of saturated squares it
                # errs by 2 levels at their edges where bicubic errs by 21.
                "interpolation": Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
            },
        )
        codec = self._stream.codec_context
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG


def encode_lossless(path: Path, frames: Frames, fps: int | Fraction) -> None:
    """Write uint8 (T, H, W, 3) frames of any size so that `decode_lossless` gives the same back: FFV1 in Matroska.

    Raises MediaError for no frames, and where the file cannot be written; then no file is left.
    """
    with _VideoWriter(
        path,
        frames.shape[2],
        frames.shape[1],
        fps,
        container="matroska",
        codec="ffv1",
        options={"level": "3", "slices": "4"},
        conversion={"format": "bgr0"},  # the one 8-bit RGB that FFmpeg's FFV1 takes
        metadata={CHECKSUM_TAG: checksum(frames)},
    ) as video:
        video.write(frames)


def checksum(frames: Frames) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(frames)):08x}"
