"""Decode video files with decord where it is known to be exact, else with PyAV.

Frames of untrusted videos are decoded in a child process.
"""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from vidgen_ray.errors import MediaError
from vidgen_ray.limits import MAX_CLIP_BYTES, MAX_PIXELS, VIDEO_DECODE_BYTES, VIDEO_DECODE_S
from vidgen_ray.media.encode import CHECKSUM_TAG, checksum
from vidgen_ray.media.media_file import check_is_file, check_pixels, open_media, wrap_errors
from vidgen_ray.stages.base import Frames, Image

Backend = Literal["decord", "pyav"]

_CONTAINERS = {"mov": "MP4 or MOV", "matroska": "Matroska or WebM", "avi": "AVI"}
_DECODE_THREADS = 4
_H264_IDR = 5


@dataclass(frozen=True, slots=True)
class _Header:
    """Properties of a video, read from the container, its packets and the first frame."""

    path: Path
    container: str
    codec: str
    pixel_format: str
    width: int
    """Stored width in pixels, before the rotation by `quarter_turns`. The same holds for `height`."""
    height: int
    quarter_turns: int
    """Counter-clockwise quarter turns that make the image upright."""
    interlaced: bool
    fps: Fraction
    frame_count: int
    clean_keyframes: bool
    """H.264 only: no frame after a keyframe depends on a frame before it (closed GOPs)."""
    metadata: dict[str, str]


class VideoReader(ABC):
    """Random access to the frames of a video. Returned by `open_video`, and a context manager.

    Frames are rotated upright. Pixels are assumed to be square, alpha is dropped, HDR is not tone-mapped.
    The colour matrix is taken from the file's tag. Untagged files are read as BT.601, which FFmpeg uses when it writes them.
    The decoder may conceal damage inside a frame, as video players do.
    """

    backend: ClassVar[Backend]

    def __init__(self, header: _Header) -> None:
        self._header = header
        self.path = header.path
        sideways = header.quarter_turns % 2
        self.width = header.height if sideways else header.width
        self.height = header.width if sideways else header.height
        self.fps = header.fps
        """Frames per second. The average if the frame rate varies."""
        self.frame_count = header.frame_count

    def frames(self, start: int, stop: int) -> Frames:
        """Return frames `start` (inclusive) to `stop` (exclusive), (stop - start, H, W, 3). Raises MediaError."""
        if not 0 <= start <= stop <= self.frame_count:
            raise MediaError(f"{self.path}: got frames {start} to {stop}, must be within 0 to {self.frame_count}")
        return self.frames_at(range(start, stop))

    def frames_at(self, indices: Sequence[int]) -> Frames:
        """Return frames in the order of `indices`, (len(indices), H, W, 3). Indices may repeat. Raises MediaError."""
        out_of_range = [index for index in indices if not 0 <= index < self.frame_count]
        if out_of_range:
            raise MediaError(f"{self.path}: got frame {out_of_range[0]}, must be from 0 to {self.frame_count - 1}")
        if not len(indices):
            return np.empty((0, self.height, self.width, 3), np.uint8)
        if (size := len(indices) * self.height * self.width * 3) > MAX_CLIP_BYTES:
            got = f"{len(indices)} frames of {self.width}×{self.height} pixels at once, which need {size / 2**30:.0f} GB"
            raise MediaError(f"{self.path}: got {got}, must be at most {MAX_CLIP_BYTES / 2**30:g} GB; cut the video")
        with wrap_errors(f"{self.path}: cannot be decoded"):
            return self._decode([int(index) for index in indices])

    @abstractmethod
    def _decode(self, indices: list[int]) -> Frames: ...

    @abstractmethod
    def close(self) -> None:
        """Close the file. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_video(path: Path, *, backend: Literal["auto", "pyav"] = "auto") -> VideoReader:
    """Open an MP4, MOV, Matroska, WebM or AVI file, with decord if it is installed and exact for this file, else with PyAV.

    decord seeks to a frame. PyAV decodes all frames before it. The pixels are the same.
    No other file is read: playlists are rejected and URLs are not opened. Matroska and AVI do not store their length, so a
    truncated file has fewer frames.
    Raises MediaError if the file is missing, of another format or truncated, or has no video or frames above MAX_PIXELS.
    """
    header = _read_header(path)
    decord_reader = _open_decord(header) if backend == "auto" else None
    return decord_reader or _PyavReader(header)


def decode_lossless(path: Path) -> Frames:
    """Return the frames (T, H, W, 3) of a file written by `encode_lossless`. Raises MediaError if the file is damaged."""
    header = _read_header(path)
    with _PyavReader(header) as video:
        frames = video.frames(0, video.frame_count)
    # FFV1 has its own checksums, but FFmpeg conceals slices that fail them.
    if checksum(frames) != header.metadata.get(CHECKSUM_TAG):
        raise MediaError(f"{path}: the frames do not match the checksum; the file is damaged or not from encode_lossless")
    return frames


def _read_header(path: Path) -> _Header:
    container = video_container(path)
    with wrap_errors(f"{path}: cannot be read as {_CONTAINERS[container]}"):
        with open_video_stream(path, container) as (opened, stream):
            first = next(opened.decode(stream), None)
            codec, fps, metadata = stream.codec_context.name, stream.average_rate, dict(opened.metadata)
        if first is None or not fps:
            raise MediaError(f"{path}: has no frames")
        _to_rgb(first)  # raises for unsupported colour spaces, which decord would convert wrongly
        frame_count, clean_keyframes = 0, True
        for packet in read_packets(path, container):
            frame_count += not packet.is_discard
            if packet.is_keyframe and codec == "h264":
                clean_keyframes &= _H264_IDR in _nal_types(bytes(packet), packet.stream.codec_context.extradata)
    return _Header(
        path=path,
        container=container,
        codec=codec,
        pixel_format=first.format.name,
        width=first.width,
        height=first.height,
        quarter_turns=round(first.rotation / 90) % 4,
        interlaced=first.interlaced_frame,
        fps=fps,
        frame_count=frame_count,
        clean_keyframes=clean_keyframes,
        metadata=metadata,
    )


def video_container(path: Path) -> str:
    """Return FFmpeg's name of the container, detected from the first 12 bytes.

    FFmpeg's own detection would also accept playlists and scripts that refer to other files.
    """
    check_is_file(path)
    with wrap_errors(f"{path}: cannot be read"), path.open("rb") as file:
        head = file.read(12)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        return "avi"
    raise MediaError(f"{path}: not a supported video format ({', '.join(_CONTAINERS.values())})")


@contextmanager
def open_video_stream(path: Path, container: str | None = None) -> Iterator[tuple[Any, Any]]:
    """Open PyAV's container and its best video stream, checked and ready to decode. See `open_media`."""
    with open_media(path, container) as opened:
        stream = opened.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise MediaError(f"{path}: has no video, or none with a supported codec")
        check_pixels(path, stream.width, stream.height)
        # Frames may be larger than declared in the header.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.thread_type, stream.thread_count = "AUTO", _DECODE_THREADS
        yield opened, stream


def read_packets(path: Path, container: str) -> Iterator[Any]:
    """Yield the packets of a video, also those that are not shown (`is_discard`). Raises MediaError if it is truncated."""
    with open_video_stream(path, container) as (opened, stream):
        complete = 0
        for packet in opened.demux(stream):
            if packet.is_corrupt:
                raise MediaError(f"{path}: is truncated, got {complete} complete frames of {stream.frames}")
            complete += packet.size > 0 and not packet.is_discard
            if packet.size:
                yield packet


def _nal_types(packet: bytes, extradata: bytes | None) -> set[int]:
    """Return the H.264 NAL unit types in an MP4 packet. Empty if the stream is not in MP4 (avcC) format."""
    kinds: set[int] = set()
    if not extradata or extradata[0] != 1:
        return kinds
    length_bytes = (extradata[4] & 3) + 1
    offset = 0
    while offset + length_bytes < len(packet):
        kinds.add(packet[offset + length_bytes] & 31)
        offset += length_bytes + int.from_bytes(packet[offset : offset + length_bytes])
    return kinds


def _to_rgb(frame: Any) -> Image:
    """Convert a frame to RGB (H, W, 3) with the matrix and range of its tags."""
    from av.video.reformatter import VideoReformatter

    return np.asarray(VideoReformatter().reformat(frame, format="rgb24", threads=1).to_ndarray(), np.uint8)


class _PyavReader(VideoReader):
    """Reader that decodes forwards. A step back restarts at the first frame, which is slow but exact for every codec."""

    backend = "pyav"

    def __init__(self, header: _Header) -> None:
        super().__init__(header)
        self._decoded: Generator[Any, None, None] | None = None
        self._next = 0
        self._last: tuple[int, Image] | None = None

    def _decode(self, indices: list[int]) -> Frames:
        frames = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        for slot in sorted(range(len(indices)), key=indices.__getitem__):
            frames[slot] = self._frame(indices[slot])
        return frames

    def _frame(self, index: int) -> Image:
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        if self._decoded is None or index < self._next:
            self.close()
            self._decoded = self._from_first_frame()
        for frame in self._decoded:
            self._next += 1
            if self._next > index:
                self._last = index, self._upright_rgb(frame)
                return self._last[1]
        raise MediaError(f"{self.path}: ends after {self._next} frames, must have {self.frame_count} as its packets declare")

    def _from_first_frame(self) -> Generator[Any, None, None]:
        with open_video_stream(self.path, self._header.container) as (opened, stream):
            yield from opened.decode(stream)

    def _upright_rgb(self, frame: Any) -> Image:
        if (frame.width, frame.height) != (self._header.width, self._header.height):
            raise MediaError(f"{self.path}: changes its size in frame {self._next - 1}, must keep one size")
        return np.rot90(_to_rgb(frame), self._header.quarter_turns)

    def close(self) -> None:
        decoded, self._decoded, self._next, self._last = self._decoded, None, 0, None
        if decoded is not None:
            decoded.close()


def _open_decord(header: _Header) -> VideoReader | None:
    """Return a reader that uses decord 0.6, or `None` if decord is missing, fails or is not known to be exact for this file.

    Measured against PyAV 18.1: on progressive 8-bit yuv420p H.264 in MP4, with any matrix tag or none, in limited or full
    range, every pixel is equal. decord uses the matrix tag, and a saturated chart is decoded to within 2 levels.
    Other files are not exact. decord has no AV1. Odd heights, interlaced frames and 10 bits differ by up to 91 levels at edges.
    With open GOPs, a seek returns a frame up to three frames late. With intra refresh, it returns a partly decoded frame.
    """
    is_exact = (
        header.container == "mov"
        and header.codec == "h264"
        and header.pixel_format in ("yuv420p", "yuvj420p")
        and header.width % 2 == header.height % 2 == header.quarter_turns == 0
        and not header.interlaced
        and header.clean_keyframes
    )
    if not is_exact:
        return None
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        # With a higher tolerance, decord replaces frames that fail to decode by their neighbours.
        video = decord.VideoReader(str(header.path.absolute()), num_threads=_DECODE_THREADS, fault_tol=1e-6)
        first_shape = video[0].shape
    except Exception:  # DECORDError, or OSError and ImportError if decord does not load; PyAV reports errors of the file
        return None
    if len(video) != header.frame_count or first_shape != (header.height, header.width, 3):
        return None
    return _DecordReader(header, video)


class _DecordReader(VideoReader):
    """Reader that seeks to the keyframe before a frame."""

    backend = "decord"

    def __init__(self, header: _Header, video: Any) -> None:
        super().__init__(header)
        self._video = video

    def _decode(self, indices: list[int]) -> Frames:
        try:
            frames: Frames = self._video.get_batch(indices).asnumpy()
        except Exception:  # DECORDError, whose text is a location in its C++ code
            raise MediaError(f"{self.path}: cannot be decoded, damaged in or before the requested frames") from None
        return frames

    def close(self) -> None:
        self._video = None


HEADER = struct.Struct("<II")
"""Before each frame: its width and height in pixels. Before an error message: 0 and the number of its bytes."""
MAX_MESSAGE_BYTES = 10_000


def sample_frames(path: Path, count: int, start_frames: int, timeout_s: float = VIDEO_DECODE_S) -> Generator[Image, None, None]:
    """Yield up to `count` frames (H, W, 3), spread evenly over the first `start_frames` frames of the video.

    Raises MediaError if the video cannot be decoded, or not within `timeout_s` seconds. Closing the generator ends the child.
    """
    arguments = [sys.executable, "-m", __name__, str(path), str(count), str(start_frames)]
    # Each thread of BLAS would take address space, which is limited.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    expired = threading.Event()
    with subprocess.Popen(arguments, env=environment, **pipes) as child:

        def kill() -> None:
            expired.set()
            child.kill()

        timer = threading.Timer(timeout_s, kill)
        timer.start()
        try:
            assert child.stdout is not None
            while len(header := child.stdout.read(HEADER.size)) == HEADER.size:
                width, height = HEADER.unpack(header)
                if not width:
                    raise MediaError(child.stdout.read(min(height, MAX_MESSAGE_BYTES)).decode("utf-8", "replace"))
                check_pixels(path, width, height)
                pixels = child.stdout.read(width * height * 3)
                if len(pixels) < width * height * 3:
                    break
                yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
            # Its output has ended, so it has ended or is about to.
            returncode = child.wait()
            if expired.is_set():
                raise MediaError(f"{path}: could not be decoded within {timeout_s:g} s")
            if returncode != 0:
                raise MediaError(f"{path}: the decoder crashed; the file is damaged, or needs too much memory")
        finally:
            timer.cancel()
            child.kill()


def write_frames(path: Path, count: int, start_frames: int) -> None:
    """Write the frames, or the reason why the video cannot be decoded, to the standard output."""
    resource.setrlimit(resource.RLIMIT_AS, (VIDEO_DECODE_BYTES, VIDEO_DECODE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    output = sys.stdout.buffer
    try:
        with open_video(path, backend="pyav") as video:
            frame_count = min(video.frame_count, start_frames)
            for index in sorted({number * frame_count // count for number in range(count)}):
                (frame,) = video.frames(index, index + 1)
                output.write(HEADER.pack(video.width, video.height))
                output.write(frame.tobytes())
    except MediaError as error:
        message = str(error).encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
        output.write(HEADER.pack(0, len(message)))
        output.write(message)
    output.flush()


if __name__ == "__main__":
    write_frames(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
