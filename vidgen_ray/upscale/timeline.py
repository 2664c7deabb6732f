"""Times of the frames of the result: those of the source, or a higher constant rate with frames drawn between them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from vidgen_ray.errors import MediaError
from vidgen_ray.upscale.source import Source


class Place(NamedTuple):
    """A time between two frames of the source."""

    frame: int
    """Number of the frame at or before the time."""
    share: Fraction
    """Share of the interval to the next frame, from 0 (the frame itself) to below 1. 0 after the last frame."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Frames of the result. Times are in units of `time_base`."""

    fps: Fraction
    """Frames per second. The average if the frame rate varies."""
    time_base: Fraction
    times: Sequence[int]
    """Time of each frame, strictly increasing."""
    last_duration: int


def timeline_of(source: Source, fps: Fraction | None) -> Timeline:
    """Return the times of the result: those of the source, or `fps` frames per second from its first frame to its end.

    Raises MediaError if `fps` is lower than the rate of the source, so that frames would be dropped.
    """
    if fps is None:
        return Timeline(source.fps, source.time_base, source.times, source.last_duration)
    if fps < source.fps:
        rate = f"{float(source.fps):g} frames per second, more than {float(fps):g}"
        raise MediaError(f"{source.path}: has {rate}; frames would be dropped")
    time_base = Fraction(1, math.lcm(fps.numerator, source.time_base.denominator))
    step, start = int(1 / fps / time_base), int(source.times[0] * source.time_base / time_base)
    duration = (source.times[-1] - source.times[0] + source.last_duration) * source.time_base
    count = math.ceil(duration * fps)
    return Timeline(fps, time_base, range(start, start + count * step, step), step)


def places(source: Source, timeline: Timeline, start: int, stop: int) -> list[Place]:
    """Return where frames `start` (inclusive) to `stop` (exclusive) of the result are in the source."""
    found = []
    for number in range(start, stop):
        time = timeline.times[number] * timeline.time_base / source.time_base
        frame = bisect_right(source.times, time) - 1
        is_last = frame == source.frame_count - 1
        interval = 1 if is_last else source.times[frame + 1] - source.times[frame]
        found.append(Place(frame, Fraction(0) if is_last else Fraction(time - source.times[frame]) / interval))
    return found
