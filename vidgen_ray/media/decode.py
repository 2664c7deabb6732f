"""Decode video files with PyAV. Videos of others are decoded in a child process."""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from vidgen_ray.errors import MediaError
from vidgen_ray.limits import MAX_CLIP_BYTES, MAX_PIXELS, VIDEO_DECODE_BYTES, VIDEO_DECODE_S
from vidgen_ray.media.encode import CHECKSUM_TAG, checksum
from vidgen_ray.media.media_file import check_is_file, check_pixels, decodable_stream, open_media, wrap_errors
from vidgen_ray.stages.base import Frames, Image

Backend = Literal["decord", "pyav"]

_CONTAINERS = {
    "mov": "MP4 or MOV",
    "matroska": "Matroska or WebM",
    "avi": "AVI",
    "mpeg": "MPEG-2 (.mpg)",
    "mpegts": "MPEG-2 (.ts, .mts)",
    "gif": "GIF",
}
_TS_PACKET_BYTES = 188
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

    def shown(self) -> tuple[Path, int, int, Fraction, int]:
        """Return path, width and height of an upright frame, frames per second and number of frames."""
        width, height = (self.height, self.width) if self.quarter_turns % 2 else (self.width, self.height)
        return self.path, width, height, self.fps, self.frame_count


class VideoReader(ABC):
    """Random access to the frames of a video. Returned by `open_video`, and a context manager.

    Frames are rotated upright. Pixels are assumed to be square, alpha is dropped, HDR is not tone-mapped.
    The colour matrix is taken from the file's tag. Untagged files are read as BT.601, which FFmpeg uses when it writes them.
    The decoder may conceal damage inside a frame, as video players do.
    """

    backend: ClassVar[Backend]

    def __init__(self, path: Path, width: int, height: int, fps: Fraction, frame_count: int) -> None:
        self.path = path
        self.width = width
        self.height = height
        self.fps = fps
        """Frames per second. The average if the frame rate varies."""
        self.frame_count = frame_count

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


def open_video(path: Path, *, backend: Backend = "pyav") -> VideoReader:
    """Open a video of this project or of the user, in this process. For videos of others, see `open_foreign_video`.

    No other file is read: playlists are rejected and URLs are not opened. Only MP4 and MOV store their length, so other
    truncated files have fewer frames.
    `backend`: decord seeks to a frame, PyAV decodes all frames before it, so decord is faster for single frames in random
    order, and slower for all others. The pixels are the same. decord has the FFmpeg of 2018: use it for clips of this project
    only. It is used if it is installed and exact for the file, else PyAV.
    Raises MediaError if the file is missing, of another format or truncated, has no video, frames above MAX_PIXELS or a codec
    that is not in VIDEO_CODECS.
    """
    header = _read_header(path)
    decord_reader = _open_decord(header) if backend == "decord" else None
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
            codec, fps, metadata = stream.codec_context.name, Fraction(stream.average_rate or 0), dict(opened.metadata)
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
    """Return FFmpeg's name of the container, detected from its first bytes.

    FFmpeg's own detection would also accept playlists and scripts that refer to other files.
    """
    check_is_file(path)
    with wrap_errors(f"{path}: cannot be read"), path.open("rb") as file:
        head = file.read(_TS_PACKET_BYTES + 9)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:4] == b"\0\0\1\xba":
        return "mpeg"
    # Cameras put the time in four bytes before each packet.
    if any(head[start : start + 1] == head[start + _TS_PACKET_BYTES + start :][:1] == b"G" for start in (0, 4)):
        return "mpegts"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    raise MediaError(f"{path}: not a supported video format ({', '.join(_CONTAINERS.values())})")


@contextmanager
def open_video_stream(path: Path, container: str | None = None) -> Iterator[tuple[Any, Any]]:
    """Open PyAV's container and its best video stream, checked and ready to decode. See `open_media`."""
    with open_media(path, container or video_container(path)) as opened:
        stream = decodable_stream(path, opened, "video")
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
        super().__init__(*header.shown())
        self._header = header
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
        super().__init__(*header.shown())
        self._video = video

    def _decode(self, indices: list[int]) -> Frames:
        try:
            frames: Frames = self._video.get_batch(indices).asnumpy()
        except Exception:  # DECORDError, whose text is a location in its C++ code
            raise MediaError(f"{self.path}: cannot be decoded, damaged in or before the requested frames") from None
        return frames

    def close(self) -> None:
        self._video = None


_REPLY = struct.Struct("<I")
"""Before each reply of a child process: bytes of its error message, or 0."""
_PROPERTIES = struct.Struct("<IIqqI")
"""Reply to a path: width and height in pixels, frames per second as numerator and denominator, number of frames."""
_MAX_MESSAGE_BYTES = 10_000
_idle: list[subprocess.Popen[bytes]] = []
"""Child processes without a file."""


def open_foreign_video(path: Path, *, own_process: bool = False) -> ForeignVideoReader:
    """Open a video of others as `open_video` does, in a child process that may crash, hang, or need too much memory.

    `own_process`: a new process that reads this file only. Default: one that may have read other files without an error.
    Raises MediaError as `open_video` does, also for a read that crashes or takes longer than VIDEO_DECODE_S.
    """
    child = None
    if not own_process:
        with suppress(IndexError):
            child = _idle.pop()
    if child is None or child.poll() is not None:
        # Each thread of BLAS would take address space, which is limited. Modules are those of this process, not of its folder.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(_module_folders())
        arguments = [sys.executable, "-P", "-m", __name__, str(VIDEO_DECODE_S)]
        pipe = subprocess.PIPE
        child = subprocess.Popen(arguments, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    try:
        return ForeignVideoReader(path, child, keep=not own_process)
    except BaseException:
        _end(child)
        raise


def _module_folders() -> list[str]:
    """Return `sys.path` without entries in which Python itself finds no module: paths that are no text, a deleted folder."""
    folders = [entry for entry in sys.path if isinstance(entry, str)]
    with suppress(FileNotFoundError):
        return [entry or os.getcwd() for entry in folders]
    return [entry for entry in folders if entry]


def sample_frames(path: Path, count: int, start_frames: int) -> Generator[Image, None, None]:
    """Yield up to `count` frames (H, W, 3), spread evenly over the first `start_frames` frames of a video of others.

    Raises MediaError as `open_foreign_video`, which gets a process of its own.
    """
    with open_foreign_video(path, own_process=True) as video:
        frame_count = min(video.frame_count, start_frames)
        yield from video.each_frame(sorted({number * frame_count // count for number in range(count)}))


class ForeignVideoReader(VideoReader):
    """Reader whose frames are decoded by a child process."""

    backend = "pyav"

    def __init__(self, path: Path, child: subprocess.Popen[bytes], *, keep: bool) -> None:
        """`keep`: use the process again when the file is closed."""
        self.path = path
        self._child: subprocess.Popen[bytes] | None = child
        self._keep = keep
        _ask(child, str(path.absolute()))
        width, height, rate, scale, frame_count = _PROPERTIES.unpack(self._reply(_PROPERTIES.size))
        check_pixels(path, width, height)
        super().__init__(path, width, height, Fraction(rate, scale), frame_count)

    def each_frame(self, indices: Sequence[int]) -> Generator[Image, None, None]:
        """Yield frames (H, W, 3) in the order of `indices`, without keeping them. Raises MediaError."""
        assert self._child is not None
        # A process with replies that are not read is not used again.
        keep, self._keep = self._keep, False
        _ask(self._child, indices)
        for _ in indices:
            pixels = self._reply(self.height * self.width * 3)
            yield np.frombuffer(pixels, np.uint8).reshape(self.height, self.width, 3)
        self._keep = keep

    def _decode(self, indices: list[int]) -> Frames:
        frames = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        in_order = sorted(range(len(indices)), key=indices.__getitem__)
        for slot, image in zip(in_order, self.each_frame([indices[slot] for slot in in_order]), strict=True):
            frames[slot] = image
        return frames

    def _reply(self, size: int) -> bytes:
        """Return a reply of this size in bytes. Raises MediaError with the message of an error."""
        assert self._child is not None
        assert self._child.stdout is not None
        pipe = self._child.stdout
        status = pipe.read(_REPLY.size)
        if len(status) == _REPLY.size:
            (message_bytes,) = _REPLY.unpack(status)
            if message_bytes:
                message = pipe.read(min(message_bytes, _MAX_MESSAGE_BYTES)).decode("utf-8", "surrogateescape")
                raise MediaError(f"{self.path}{message.removeprefix(str(self.path.absolute()))}")
            if len(reply := pipe.read(size)) == size:
                return reply
        # Its output has ended, so it has ended or is about to.
        if self._child.wait() == -signal.SIGALRM:
            raise MediaError(f"{self.path}: could not be decoded within {VIDEO_DECODE_S:g} s")
        raise MediaError(f"{self.path}: the decoder crashed; the file is damaged, or needs too much memory")

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None and self._keep:
            _ask(child, None)
            _idle.append(child)
        elif child is not None:
            _end(child)


def _ask(child: subprocess.Popen[bytes], request: str | Sequence[int] | None) -> None:
    assert child.stdin is not None
    # Its output ends, too.
    with suppress(BrokenPipeError):
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    with suppress(BrokenPipeError), child:
        pass


def _end_all() -> None:
    while _idle:
        _end(_idle.pop())


atexit.register(_end_all)
# A forked process must not use the processes of its parent.
os.register_at_fork(after_in_child=_idle.clear)


def _serve_frames(timeout_s: float) -> None:
    """Reply to the requests of the standard input, until it ends: a path, numbers of frames of that video, or null to close it.

    The process ends if a request takes longer than `timeout_s`.
    """
    resource.setrlimit(resource.RLIMIT_AS, (VIDEO_DECODE_BYTES, VIDEO_DECODE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output, video = sys.stdout.buffer, None
    for line in sys.stdin.buffer:
        # Without a handler, the signal ends the process, also while FFmpeg decodes.
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        request = json.loads(line)
        try:
            if isinstance(request, str):
                video = open_video(Path(request))
                rate, scale = video.fps.as_integer_ratio()
                output.write(_REPLY.pack(0))
                output.write(_PROPERTIES.pack(video.width, video.height, rate, scale, video.frame_count))
            elif video is not None and request is None:
                video.close()
            elif video is not None:
                for index in request:
                    (frame,) = video.frames(index, index + 1)
                    # A reader that is slow to take a frame is no slow video.
                    left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0)
                    output.write(_REPLY.pack(0))
                    output.write(frame.tobytes())
                    output.flush()
                    signal.setitimer(signal.ITIMER_REAL, left_s)
        except MediaError as error:
            message = str(error).encode("utf-8", "surrogateescape")[:_MAX_MESSAGE_BYTES]
            output.write(_REPLY.pack(len(message)) + message)
        output.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _serve_frames(float(sys.argv[1]))
