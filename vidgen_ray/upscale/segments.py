"""One video to upscale: its size, its segments, and how a segment is made."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from itertools import pairwise, repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from vidgen_ray.errors import Cancelled, MediaError
from vidgen_ray.provenance.record import labelled
from vidgen_ray.shot import Shot
from vidgen_ray.system.files import new_file
from vidgen_ray.upscale.frames import (
    MIN_FRAMES_HEVC,
    SEGMENT_SUFFIX,
    EncodeSettings,
    FrameInterpolator,
    FrameReader,
    Pixels,
    interpolated,
    write_segment,
)
from vidgen_ray.upscale.network import DEFAULT_SHOT, EngineSettings, Size, UpscaleModel, UpscaleNetwork
from vidgen_ray.upscale.source import FrameTimes, VideoSource, places, timeline_of

_T = TypeVar("_T")

MAX_SEGMENT_FRAMES, MIN_SEGMENT_FRAMES = 120, 24
SEGMENT_PIXELS = MAX_SEGMENT_FRAMES * 640 * 360
"""Pixels of the source in a segment. Larger frames take longer, so their segments have fewer, down to the minimum."""
FRAMES_AHEAD = 4
"""Decoded frames that wait for the network."""
CALLS_AHEAD = 2
"""Calls of the network that run or wait while a frame is encoded, relative to those that run at the same time."""
MAX_SCALE = 16
CHECK_S = 0.5
"""Seconds between two checks for an interrupt while threads make segments."""


class Segment(NamedTuple):
    """Frames `start` (inclusive) to `stop` (exclusive) of the result."""

    number: int
    start: int
    stop: int

    @property
    def file_name(self) -> str:
        return f"{self.number:06}{SEGMENT_SUFFIX}"

    def __str__(self) -> str:
        return f"frames {self.start} to {self.stop - 1}"


class SegmentFailed(Exception):
    """A segment cannot be made. `error` is the reason."""

    def __init__(self, segment: Segment, error: Exception) -> None:
        self.segment = segment
        self.error = error
        super().__init__(segment, error)


@dataclass(frozen=True)
class UpscaleTarget:
    """Everything that decides the pixels of an upscaled video. Two workers with the same target make the same files."""

    source: VideoSource
    model: UpscaleModel | None
    """`None` keeps the size of the frames."""
    size: Size
    encode: EncodeSettings
    settings: EngineSettings
    fps: Fraction | None = None
    """Frames per second of the result. `None` keeps the times of the source."""
    label: str | None = None
    """Text drawn into the lower right corner of every frame."""
    shot: Shot = DEFAULT_SHOT
    """Fields of the upscaling stage."""

    @cached_property
    def timeline(self) -> FrameTimes:
        return timeline_of(self.source, self.fps)

    @property
    def segments(self) -> list[Segment]:
        length = max(MIN_SEGMENT_FRAMES, min(MAX_SEGMENT_FRAMES, SEGMENT_PIXELS // (self.source.width * self.source.height)))
        total = len(self.timeline.times)
        starts = [start for start in range(0, total, length) if start == 0 or total - start >= MIN_FRAMES_HEVC]
        return [Segment(n, start, stop) for n, (start, stop) in enumerate(pairwise([*starts, total]))]


def scaled(source: VideoSource, scale: float) -> Size:
    """Return the size of the video enlarged by `scale`, rounded to even numbers as encoders need them. Raises MediaError."""
    if not 1 <= scale <= MAX_SCALE:
        raise MediaError(f"scale: got {scale:g}, must be from 1 to {MAX_SCALE}")
    return _even(source.width * scale), _even(source.height * scale)


def fitted(source: VideoSource, size: Size) -> tuple[VideoSource, Size]:
    """Return the largest size within `size` that does not stretch the picture, and the source with square pixels.

    Raises MediaError if that is smaller than the source.
    """
    shown_width = source.width * source.pixel_aspect
    scale: Fraction = min(size[0] / shown_width, Fraction(size[1], source.height))
    width, height = _even(float(shown_width * scale)), _even(float(source.height * scale))
    if scale < 1:
        raise MediaError(f"{source.path}: has {source.width}x{source.height} pixels, more than the size {size[0]}x{size[1]}")
    return replace(source, pixel_aspect=Fraction(1)), (width, height)


def _even(value: float) -> int:
    return max(2, round(value / 2) * 2)


class SegmentWorker:
    """Makes segments of one target. Holds a network and an open source.

    Two threads may write segments: the frames of one are computed while the encoder of the other one finishes.
    """

    def __init__(self, target: UpscaleTarget) -> None:
        """Load the network. Raises StageError or SetupError."""
        self._target = target
        self._network = (
            None if target.model is None else UpscaleNetwork(target.model, target.settings, target.size, target.shot)
        )
        self._reader = FrameReader(target.source)
        self._computing = threading.Lock()
        # As many threads as a call of the network: further ones would wait for the CPUs of the calls at the same time.
        threads = target.settings.threads_per_call
        self._interpolator = None if target.fps is None else FrameInterpolator(target.settings.device, threads)

    def write(self, segment: Segment, path: Path, on_frame: Callable[[], None]) -> None:
        """Write the file of a segment. `on_frame` is called after each frame, and ends the work if it raises.

        Raises MediaError, StageError, and what `on_frame` raises. Decoder, network and encoder run at the same time.
        """
        target = self._target

        def computed() -> Generator[Pixels, None, None]:
            with (
                self._computing,
                closing(ahead(self._source_frames(segment), FRAMES_AHEAD)) as decoded,
                closing(upscale_frames(decoded, self._network)) as upscaled,
            ):
                for pixels in upscaled:
                    yield pixels if target.label is None else labelled(pixels[None], target.label)[0]
                    on_frame()

        with new_file(path) as tmp, closing(computed()) as frames:
            count = segment.stop - segment.start
            write_segment(tmp, frames, count, target.size, target.timeline.fps, target.source, target.encode)

    def _source_frames(self, segment: Segment) -> Iterator[Pixels]:
        """Return the frames of a segment before they are upscaled."""
        if self._interpolator is None:
            return self._reader.read(segment.start, segment.stop)
        wanted = places(self._target.source, self._target.timeline, segment.start, segment.stop)
        last = wanted[-1]
        frames = self._reader.read(wanted[0].frame, last.frame + (2 if last.share else 1))
        return interpolated(frames, wanted, self._interpolator)

    def close(self) -> None:
        self._reader.close()


def upscale_frames(frames: Iterator[Pixels], network: UpscaleNetwork | None) -> Generator[Pixels, None, None]:
    """Yield an upscaled frame for each frame, in order. Without a network, yield the frames.

    A frame that equals the one before is not computed again.
    Calls of the network run in threads, and others wait for them, while this one waits or encodes.
    """
    if network is None:
        yield from frames
        return
    settings = network.settings
    distinct = _without_repeats(frames)
    calls: deque[tuple[Future[Pixels], int]] = deque()
    pool = ThreadPoolExecutor(settings.parallel_calls)
    try:
        for pixels, count in distinct:
            calls.append((pool.submit(network, pixels), count))
            if len(calls) > CALLS_AHEAD * settings.parallel_calls:
                upscaled, count = calls.popleft()
                yield from repeat(upscaled.result(), count)
        for upscaled, count in calls:
            yield from repeat(upscaled.result(), count)
    finally:
        pool.shutdown(cancel_futures=True)


def _without_repeats(frames: Iterator[Pixels]) -> Iterator[tuple[Pixels, int]]:
    """Yield each frame that differs from the one before, and the number of times that it comes in a row."""
    last, count = next(frames, None), 1
    if last is None:
        return
    for pixels in frames:
        if np.array_equal(pixels, last):
            count += 1
        else:
            yield last, count
            last, count = pixels, 1
    yield last, count


def ahead(items: Iterator[_T], count: int) -> Generator[_T, None, None]:
    """Yield the items of an iterator that runs in a thread, up to `count` items ahead. Closing it waits for the thread."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]  # not `end`
        finally:
            pool.shutdown(cancel_futures=True)


class Threads:
    """Runs segments in threads of this process, on several networks at the same time."""

    def __init__(self, workers: int, check_interrupt: Callable[[], None] = lambda: None) -> None:
        """`check_interrupt` is called in the calling thread, every CHECK_S. It ends the work if it raises."""
        self.workers = workers
        self._check_interrupt = check_interrupt

    def __call__(
        self, target: UpscaleTarget, segments: Sequence[Segment], folder: Path, on_frame: Callable[[Segment], None]
    ) -> None:
        """Write the files of the segments to the folder.

        Raises SegmentFailed for the first one that fails, and what `check_interrupt` raises.
        """
        waiting = deque(segments)
        stop = threading.Event()
        failures: list[SegmentFailed] = []

        def count(segment: Segment) -> None:
            if stop.is_set():
                raise Cancelled
            on_frame(segment)

        def work(worker: SegmentWorker) -> None:
            while not stop.is_set():
                try:
                    segment = waiting.popleft()
                except IndexError:
                    return
                try:
                    worker.write(segment, folder / segment.file_name, partial(count, segment))
                except Cancelled:
                    return
                except Exception as error:
                    failures.append(SegmentFailed(segment, error))
                    stop.set()

        with ExitStack() as opened:
            workers = [opened.enter_context(closing(SegmentWorker(target))) for _ in range(min(self.workers, len(segments)))]
            # Two threads per worker: the second one computes while the encoder of the first one finishes.
            threads = (workers * 2)[: len(segments)]
            # Leaving the block waits for the threads: after Ctrl-C, nothing must be written while the process ends.
            # `Thread.join` is not used to wait: in Python 3.11 and 3.12, an interrupted join makes the next one return at once.
            with ThreadPoolExecutor(len(threads)) as pool:
                try:
                    # Ctrl-C may come while a thread is started, too.
                    futures = [pool.submit(work, worker) for worker in threads]
                    self._check_interrupt()
                    while wait(futures, timeout=CHECK_S).not_done:
                        self._check_interrupt()
                finally:
                    stop.set()
        if failures:
            raise failures[0]
