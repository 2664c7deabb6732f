"""Timeline of a film: places shots and title cards on the film's frames, from properties of the clips that are read from their
packets, and divides the film into pieces.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from vidgen_ray.errors import MediaError
from vidgen_ray.film.film_settings import ChosenShot, ClipFormat, FilmSettings, PixelSize
from vidgen_ray.media.decode import open_video_stream
from vidgen_ray.media.media_file import check_is_file, decodable_stream, open_media, wrap_errors

REORDER_FRAMES = 2
"""Frames by which the decoding order may be ahead of the display order: that of x264 with its default B-frames."""


def probe_clip(path: Path) -> ClipFormat:
    """Return the properties of a clip. Raises MediaError if it is missing, damaged or has no frames."""
    check_is_file(path)
    with wrap_errors(f"{path}: cannot be read as a video"), open_video_stream(path) as (opened, stream):
        packets = [packet for packet in opened.demux(stream) if packet.size]
        if not packets or not stream.average_rate:
            raise MediaError(f"{path}: has no frames")
        fps = Fraction(stream.average_rate)
        codec = stream.codec_context
        can_be_copied = (
            codec.name == "h264"
            and codec.pix_fmt == "yuv420p"
            and packets[0].is_keyframe
            and _has_constant_rate([packet.pts for packet in packets], fps, stream.time_base)
        )
        return ClipFormat(
            size=PixelSize(stream.width, stream.height),
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


@contextmanager
def open_sound(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open PyAV's container and its best sound stream. Raises MediaError if there is none."""
    with open_media(path) as opened:
        yield opened, decodable_stream(path, opened, "audio")


def sound_seconds(path: Path) -> float:
    """Return the length of the sound in a file. Raises MediaError if there is none."""
    check_is_file(path)
    with wrap_errors(f"{path}: cannot be read as sound"), open_sound(path) as (opened, stream):
        end = Fraction(0)
        for packet in opened.demux(stream):
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
    if not end:
        raise MediaError(f"{path}: has no sound")
    return float(end)


SAMPLE_RATE = 48_000
"""Samples per second of the film's sound."""
NARRATION_PAUSE_S = 0.3
"""Seconds that a shot stays on screen after its narration."""
FALLBACK_SIZE, FALLBACK_RATE = PixelSize(1280, 720), Fraction(24)
"""Size in pixels and frames per second of a film without clips."""
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class TimelineItem:
    """A shot or title card on the frames of the film."""

    source: ChosenShot
    start: int
    """First frame in the film."""
    frames: int
    fade_in: int
    """Frames shared with the item before. 0 for a cut. The same for `fade_out` and the item after."""
    fade_out: int
    stretch: Fraction
    """Seconds in the film per second of the clip."""

    @property
    def stop(self) -> int:
        return self.start + self.frames


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive frames of the film that are rendered together: of one item, or a cross-fade between two."""

    item: TimelineItem
    first: int
    """First frame, counted in the item."""
    frames: int
    fade_to: TimelineItem | None = None
    """Item that appears during the piece, with its own frames from 0."""


@dataclass(frozen=True, slots=True)
class FilmTimeline:
    size: PixelSize
    fps: Fraction
    items: tuple[TimelineItem, ...]

    @property
    def frames(self) -> int:
        return self.items[-1].stop

    @property
    def seconds(self) -> float:
        return float(self.frames / self.fps)

    @property
    def samples(self) -> int:
        return self.sample_at(self.frames)

    def sample_at(self, frame: int) -> int:
        """Return the number of the sample at which a frame starts."""
        return round(frame * SAMPLE_RATE / self.fps)

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces in order. Together they have every frame of the film once."""
        for number, item in enumerate(self.items):
            alone = item.frames - item.fade_in - item.fade_out
            if alone:
                yield Piece(item, item.fade_in, alone)
            if item.fade_out:
                yield Piece(item, item.frames - item.fade_out, item.fade_out, self.items[number + 1])


def build_timeline(sources: Sequence[ChosenShot], settings: FilmSettings) -> FilmTimeline:
    """Place sources one after another. Size and rate are those of the settings, else those of the most clips."""
    clips = [source.clip for source in sources if source.clip is not None]
    size = settings.size or _even(_most_common([clip.size for clip in clips], FALLBACK_SIZE))
    fps = settings.fps or _most_common([clip.fps for clip in clips], FALLBACK_RATE)
    lengths = [_length(source, settings, fps) for source in sources]
    frames = [count for count, _ in lengths]
    fades = [0, *(_fade(settings, sources[n - 1 : n + 1], frames[n - 1 : n + 1], fps) for n in range(1, len(sources))), 0]
    items, start = [], 0
    for number, (source, (count, stretch)) in enumerate(zip(sources, lengths, strict=True)):
        start -= fades[number]
        items.append(TimelineItem(source, start, count, fades[number], fades[number + 1], stretch))
        start += count
    return FilmTimeline(size, fps, tuple(items))


def _length(source: ChosenShot, settings: FilmSettings, fps: Fraction) -> tuple[int, Fraction]:
    """Return the frames of a source in the film, and its stretch."""
    own = source.settings.duration_s
    if source.clip is None:
        natural = Fraction(settings.still_s if source.title is None else settings.title_s)
    else:
        natural = source.clip.seconds
    seconds = natural if own is None else Fraction(own)
    if source.speech is not None:
        seconds = max(seconds, Fraction(source.speech_s + NARRATION_PAUSE_S))
    stretch = seconds / natural if source.clip is not None and source.settings.fit == "slow" else Fraction(1)
    rounding = math.ceil if source.speech is not None else round
    return max(1, rounding(seconds * fps)), stretch.limit_denominator(1_000_000)


def _fade(settings: FilmSettings, sources: Sequence[ChosenShot], frames: Sequence[int], fps: Fraction) -> int:
    """Return the frames of the transition from one source to the next.

    At most half of either, so that fades never overlap. At most a third of a shot with a caption, which is not shown during
    cross-fades.
    """
    if (sources[1].settings.transition or settings.transition) == "cut":
        return 0
    limits = [count // (3 if source.settings.caption else 2) for source, count in zip(sources, frames, strict=True)]
    return min(round(Fraction(settings.fade_s) * fps), *limits)


def _most_common(values: Sequence[Value], fallback: Value) -> Value:
    """Return the value that occurs most often, the first of several."""
    return Counter(values).most_common(1)[0][0] if values else fallback


def _even(size: PixelSize) -> PixelSize:
    return PixelSize(size.width // 2 * 2, size.height // 2 * 2)
