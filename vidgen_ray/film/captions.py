"""Caption files: SubRip (.srt) and WebVTT (.vtt)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vidgen_ray.film.timeline import Timeline


class Cue(NamedTuple):
    """A caption and when it is shown, in milliseconds."""

    start_ms: int
    stop_ms: int
    text: str


def cues(timeline: Timeline) -> list[Cue]:
    """Return the captions of the shots in order. During a cross-fade there is none."""
    found = []
    for item in timeline.items:
        # A blank line would end the caption in both formats.
        lines = [line.strip() for line in (item.source.settings.caption or "").splitlines()]
        if text := "\n".join(line for line in lines if line):
            start, stop = item.start + item.fade_in, item.stop - item.fade_out
            found.append(Cue(round(start * 1000 / timeline.fps), round(stop * 1000 / timeline.fps), text))
    return found


def srt(captions: Sequence[Cue]) -> str:
    """Return the captions as SubRip."""
    blocks = [
        f"{number}\n{_time(cue.start_ms, ',')} --> {_time(cue.stop_ms, ',')}\n{cue.text}\n"
        for number, cue in enumerate(captions, 1)
    ]
    return "\n".join(blocks)


def vtt(captions: Sequence[Cue]) -> str:
    """Return the captions as WebVTT."""
    blocks = [f"{_time(cue.start_ms, '.')} --> {_time(cue.stop_ms, '.')}\n{_escaped(cue.text)}\n" for cue in captions]
    return "\n".join(["WEBVTT\n", *blocks])


def _time(time_ms: int, separator: str) -> str:
    seconds, milliseconds = divmod(time_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{separator}{milliseconds:03}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
