"""Encode frames to video files: H.264 for viewing, FFV1 for lossless intermediates."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from vidgen_ray.errors import MediaError, StrictModel
from vidgen_ray.media.media_file import COMMENT_TAG, FileMetadata, append_xmp, silence_ffmpeg, wrap_write_errors
from vidgen_ray.stages.base import Frames

if TYPE_CHECKING:
    import av
    from numpy.typing import NDArray

CHECKSUM_TAG = "PIXELS_CRC32"

Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]

COLOUR_TAGS = {"color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709", "color_range": "tv"}


class Mp4Settings(StrictModel):
    """Compression settings of clips. Every field changes the bytes of the file."""

    crf: int = Field(default=18, ge=1, le=51, description="x264 quality; lower is better and larger, 18 is visually lossless")
    preset: Preset = Field(default="medium", description="x264 preset; slower presets give smaller files")
    threads: int = Field(default=4, ge=1, le=64, description="x264 threads; fixed, because the output depends on the number")


class VideoWriter:
    """Writer of one video stream. The file is deleted if anything fails.

    `conversion`: arguments of FFmpeg's reformatter. `tags`: attributes of the encoder. Frames are uint8, or uint16 with the
    full range of 0 to 65535 if `input_format` is rgb48le.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: int | Fraction,
        *,
        container: str,
        container_options: Mapping[str, str] = {},
        codec: str,
        codec_options: dict[str, str],
        conversion: dict[str, Any],
        metadata: Mapping[str, str] = {},
        tags: Mapping[str, Any] = {},
        input_format: Literal["rgb24", "rgb48le"] = "rgb24",
    ) -> None:
        if width < 1 or height < 1:
            raise MediaError(f"{path}: got {width}×{height} pixels, must be at least 1×1")
        if fps <= 0:
            raise MediaError(f"{path}: got {fps} frames per second, must be above 0")
        self.path = path
        self.frames_written = 0
        self._shape = (height, width, 3)
        self._fps = fps
        self._container_name, self._container_options = container, container_options
        self._codec, self._codec_options = codec, codec_options
        self._conversion = conversion
        self._metadata, self._tags = metadata, tags
        self._input_format = input_format

    def __enter__(self) -> Self:
        import av
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()
        silence_ffmpeg()
        with wrap_write_errors(self.path):
            # bitexact omits FFmpeg's version, dates and random ids. FFmpeg never treats an absolute path as a URL.
            options = {"fflags": "+bitexact", **self._container_options}
            self._container = av.open(str(self.path.absolute()), "w", self._container_name, options=options)
            self._container.metadata.update(self._metadata)
            self._stream = self._container.add_stream(self._codec, rate=self._fps, options=self._codec_options)
            self._stream.height, self._stream.width, _ = self._shape
            self._stream.pix_fmt = self._conversion["format"]
            for name, value in self._tags.items():
                setattr(self._stream.codec_context, name, value)
        return self

    def write(self, frames: NDArray[Any]) -> None:
        """Append frames (T, H, W, 3). The result does not depend on the chunk size. No chunk is kept in memory.

        Raises MediaError if the frames have another size or type than the file, WriteError if they cannot be written.
        """
        import av
        import numpy as np

        kind = "uint8" if self._input_format == "rgb24" else "uint16"
        if frames.dtype != kind or frames.shape[1:] != self._shape:
            raise MediaError(f"{self.path}: got {frames.dtype} frames {frames.shape[1:]}, must be {kind} {self._shape}")
        with wrap_write_errors(self.path):
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=self._input_format)
                self._append(self._reformatter.reformat(frame, threads=1, **self._conversion))

    def _append(self, frame: av.VideoFrame) -> None:
        frame.pts, frame.time_base = self.frames_written, 1 / Fraction(self._fps)
        self._container.mux(self._stream.encode(frame))
        self.frames_written += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if not self.frames_written:
                raise MediaError(f"{self.path}: got no frames, must be at least one")
            self._finish()
        except MediaError:
            self._discard()
            raise

    def _finish(self) -> None:
        with wrap_write_errors(self.path):
            self._container.mux(self._stream.encode())
            self._container.close()

    def _discard(self) -> None:
        with suppress(Exception):  # the first error is reported
            self._container.close()
        self.path.unlink(missing_ok=True)


class Mp4Writer(VideoWriter):
    """Writer of an H.264 MP4 with faststart: `with Mp4Writer(path, 1024, 576, 24, Mp4Settings()) as clip: ...`.

    The pixels are yuv420p, BT.709, limited range, and tagged as such. Players and FFmpeg guess differently for untagged files.
    Frames are written directly to `path`. The file is deleted if the block raises.
    Raises MediaError for an odd width or height (pixels) and for no frames, WriteError if the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: int | Fraction,
        settings: Mp4Settings,
        metadata: FileMetadata | None = None,
    ) -> None:
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        if width % 2 or height % 2:
            raise MediaError(f"{path}: got {width}×{height} pixels, width and height must be even")
        super().__init__(
            path,
            width,
            height,
            fps,
            container="mp4",
            container_options={"movflags": "+faststart"},
            codec="libx264",
            codec_options={
                "crf": str(settings.crf),
                "preset": settings.preset,
                "threads": str(settings.threads),
                # Without this, the result depends on whether the CPU has AVX and, for small videos, on unfilled memory.
                "x264-params": "cpu-independent=1",
                **COLOUR_TAGS,
            },
            conversion={
                "format": "yuv420p",
                "dst_colorspace": Colorspace.ITU709,
                "dst_color_range": ColorRange.MPEG,
                # Area averages the chroma of 2×2 pixels, which decoders invert. On a chart of saturated squares the error at
                # the edges is 2 levels, compared to 21 for bicubic.
                "interpolation": Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
            },
            metadata={COMMENT_TAG: metadata.comment} if metadata else {},
        )
        self._xmp = metadata.xmp if metadata else None

    def _finish(self) -> None:
        super()._finish()
        if self._xmp is not None:
            append_xmp(self.path, self._xmp)

    def write_frame(self, frame: av.VideoFrame) -> None:
        """Append a yuv420p BT.709 frame of limited range without conversion. Its time is replaced by its position.

        Raises MediaError if the frame has another size or format than the file, WriteError if it cannot be written.
        """
        if (frame.height, frame.width, 3) != self._shape or frame.format.name != "yuv420p":
            got = f"{frame.width}×{frame.height} {frame.format.name}"
            raise MediaError(f"{self.path}: got a frame {got}, must be {self._shape[1]}×{self._shape[0]} yuv420p")
        with wrap_write_errors(self.path):
            self._append(frame)


def encode_lossless(path: Path, frames: Frames, fps: int | Fraction) -> None:
    """Write uint8 frames (T, H, W, 3) losslessly as FFV1 in Matroska, for `decode_lossless`.

    Any size from 2×2 pixels, including odd sizes.
    Raises MediaError for no frames, WriteError if the file cannot be written. The file is deleted on an error.
    """
    with VideoWriter(
        path,
        frames.shape[2],
        frames.shape[1],
        fps,
        container="matroska",
        codec="ffv1",
        codec_options={"level": "3", "slices": "4"},
        conversion={"format": "bgr0"},  # the only 8-bit RGB format of FFmpeg's FFV1
        metadata={CHECKSUM_TAG: checksum(frames)},
    ) as video:
        video.write(frames)


def checksum(frames: Frames) -> str:
    """Return the CRC-32 of the pixels as 8 hexadecimal digits."""

    import numpy as np

    return f"{zlib.crc32(np.ascontiguousarray(frames).data):08x}"
