"""Edits of a film for editing programs (OpenTimelineIO, FCPXML): clips with handles, cross-fades, sound stems, captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from vidgen_ray.errors import SetupError, install_command
from vidgen_ray.film.film_settings import FilmSettings, PixelSize
from vidgen_ray.film.picture import OpenFile
from vidgen_ray.film.pieces import PlannedPiece, content_key, piece_key, render_pieces
from vidgen_ray.film.sound import Tracks, write_stem
from vidgen_ray.film.timeline import SAMPLE_RATE, FilmTimeline, Piece, TimelineItem
from vidgen_ray.media.media_file import FileMetadata
from vidgen_ray.system.files import write_atomically

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML cannot hold."""


class _EditClip(NamedTuple):
    """A shot or title card between two cuts. Numbers are frames of the film's rate."""

    name: str
    media: Path
    size: PixelSize
    start: int
    """First frame in the film. Cross-fades are cut in their middle."""
    frames: int
    media_start: int
    """Frame of the media that is shown first."""
    media_frames: int
    """Frames of the media. Those before `media_start` and after the last one that is shown are handles."""
    fade: int
    """Frames of the cross-fade from the clip before, half of which (rounded down) are before the cut. 0 for a cut."""

    @property
    def has_handles(self) -> bool:
        return self.media_frames > self.frames


class EditCaption(NamedTuple):
    """A caption, in frames of the film."""

    start: int
    frames: int
    text: str


class _Edit(NamedTuple):
    name: str
    clips: Sequence[_EditClip]
    stems: Mapping[str, Path]
    """Name of a track -> sound file as long as the film."""
    captions: Sequence[EditCaption]
    timeline: FilmTimeline


def check_edit(settings: FilmSettings, folder: Path | None) -> None:
    """Raise SetupError if the edit cannot be written, before anything is rendered. `folder`: that of the shots."""
    if settings.timeline is not None and folder is None:
        raise SetupError("timeline: needs the clips on this machine; copy the output folder first")
    if settings.timeline == "otio" and find_spec("opentimelineio") is None:
        raise SetupError(f"timeline: otio needs opentimelineio, which is not installed; {install_command('film')}")


def edit_media(film: Path) -> Path:
    """Return the folder of the media of an edit."""
    return film.with_name(f"{film.stem}.media").absolute()


def write_edit(
    film: Path,
    timeline: FilmTimeline,
    settings: FilmSettings,
    tracks: Tracks,
    captions: Sequence[EditCaption],
    folder: Path,
    open_file: OpenFile,
    marks: Callable[[str | None], FileMetadata | None],
) -> tuple[Path, list[str]]:
    """Write the edit beside the film, with its media in the folder NAME.media. Return its path, and notes.

    `folder`: that of the shots. Clips that are shown as they are, or cut, are used from there. Others are rendered; `marks`
    returns the metadata of a file that shows this file of a shot, or a title card. Media of older edits stay.
    Raises MediaError.
    """
    media = edit_media(film)
    clips, changed = [], []
    for item in timeline.items:
        source, before, after = item.source, item.fade_in // 2, item.fade_out - item.fade_out // 2
        if _is_unchanged(item, timeline):
            assert source.clip is not None
            path, count, size = (folder / str(source.path)).absolute(), source.clip.frames, source.clip.size
        else:
            path, count = _rendered(item, timeline, settings, media, open_file, marks(source.path))
            size = timeline.size
            changed += [source.name] if source.clip is not None else []
        shown = item.frames - before - after
        clips.append(_EditClip(source.name, path, size, item.start + before, shown, before, count, item.fade_in))
    parts = {
        "clips": tracks._replace(narration=(), music=()),
        "narration": tracks._replace(clips=(), music=()),
        "music": tracks._replace(clips=(), narration=()),
    }
    stems = {name: media / f"{name}.wav" for name, part in parts.items() if part}
    for name, path in stems.items():
        write_stem(path, parts[name], timeline)
    edit = _Edit(film.stem, clips, stems, captions, timeline)
    path = film.with_suffix(f".{settings.timeline}")
    write_atomically(path, _otio(edit) if settings.timeline == "otio" else _fcpxml(edit))
    return path, _notes(edit, changed)


def _is_unchanged(item: TimelineItem, timeline: FilmTimeline) -> bool:
    """Return whether the frames of an item are those of its clip. `header`: the clip has a constant rate."""
    clip = item.source.clip
    is_plain = clip is not None and clip.header is not None and clip.fps == timeline.fps and item.stretch == 1
    return is_plain and clip is not None and item.frames <= clip.frames


def _rendered(
    item: TimelineItem,
    timeline: FilmTimeline,
    settings: FilmSettings,
    folder: Path,
    open_file: OpenFile,
    marks: FileMetadata | None,
) -> tuple[Path, int]:
    """Render an item with all frames of its clip, without captions and cross-fades. Return the file and its frames."""
    clip = item.source.clip
    count = max(item.frames, 0 if clip is None else int(clip.seconds * item.stretch * timeline.fps))
    piece, plain = Piece(item, 0, count), settings.model_copy(update={"captions": "none"})
    key = content_key({"piece": piece_key(piece, timeline, plain), "marks": None if marks is None else marks.xmp})
    render_pieces([PlannedPiece(piece, key)], timeline, plain, folder, open_file, lambda _: None, marks)
    return folder / f"{key}.mp4", count


def _notes(edit: _Edit, changed: Sequence[str]) -> list[str]:
    """`changed`: names of clips that were rendered."""
    notes = []
    if changed:
        rate, names = (
            f"{float(edit.timeline.fps):g} frames per second",
            ", ".join([*changed[:5], *(["..."] if len(changed) > 5 else [])]),
        )
        notes.append(f"{len(changed)} clips have another rate than {rate}, or are held or slowed, and were rendered: {names}")
    if whole := sum(not clip.has_handles for clip in edit.clips):
        advice = "frames beyond a cut come from a shorter duration_s, or from transition: fade"
        notes.append(f"{whole} of {len(edit.clips)} clips have no handles in the timeline; {advice}")
    if not edit.stems:
        notes.append("the film has no sound, and the timeline no stems; clips with sound, --music or --narration give them")
    return notes


def _otio(edit: _Edit) -> str:
    import opentimelineio as otio

    rate = float(edit.timeline.fps)

    def span(start: int, count: int, per_s: float = rate) -> otio.opentime.TimeRange:
        return otio.opentime.TimeRange(otio.opentime.RationalTime(start, per_s), otio.opentime.RationalTime(count, per_s))

    film = otio.schema.Timeline(edit.name, global_start_time=otio.opentime.RationalTime(0, rate))
    picture = otio.schema.Track("Picture", kind=otio.schema.TrackKind.Video)
    film.tracks.append(picture)
    for clip in edit.clips:
        if clip.fade:
            fade = span(clip.fade // 2, clip.fade - clip.fade // 2)
            picture.append(otio.schema.Transition("", "SMPTE_Dissolve", fade.start_time, fade.duration))
        media = otio.schema.ExternalReference(clip.media.as_uri(), span(0, clip.media_frames))
        picture.append(otio.schema.Clip(clip.name, media, span(clip.media_start, clip.frames)))
    for stem, file in edit.stems.items():
        track = otio.schema.Track(stem, kind=otio.schema.TrackKind.Audio)
        whole = span(0, edit.timeline.samples, SAMPLE_RATE)
        track.append(otio.schema.Clip(stem, otio.schema.ExternalReference(file.as_uri(), whole), whole))
        film.tracks.append(track)
    film.tracks.markers.extend(
        otio.schema.Marker(caption.text, span(caption.start, caption.frames), metadata={"vidgen": {"kind": "caption"}})
        for caption in edit.captions
    )
    return str(otio.adapters.write_to_string(film, "otio_json"))


def _fcpxml(edit: _Edit) -> bytes:
    timeline, fps = edit.timeline, edit.timeline.fps

    def time(frames: int, per_s: Fraction | int = fps) -> str:
        seconds = Fraction(frames) / per_s
        return f"{seconds.numerator}/{seconds.denominator}s" if seconds else "0s"

    def add(parent: ElementTree.Element, tag: str, **attributes: object) -> ElementTree.Element:
        return ElementTree.SubElement(parent, tag, {key: _NOT_XML.sub("", str(value)) for key, value in attributes.items()})

    root = ElementTree.Element("fcpxml", version="1.9")
    resources = add(root, "resources")
    formats = {size: f"f{n}" for n, size in enumerate(dict.fromkeys([timeline.size, *(clip.size for clip in edit.clips)]))}
    for size, format_id in formats.items():
        add(resources, "format", id=format_id, frameDuration=time(1), width=size.width, height=size.height)
    assets: dict[Path, str] = {}
    for clip in edit.clips:
        if clip.media not in assets:
            assets[clip.media] = f"a{len(assets)}"
            media = {"src": clip.media.as_uri(), "start": "0s", "duration": time(clip.media_frames)}
            picture = {"hasVideo": 1, "videoSources": 1, "format": formats[clip.size]}
            add(resources, "asset", id=assets[clip.media], name=clip.name, **media, **picture)
    length = time(timeline.samples, SAMPLE_RATE)
    for stem, file in edit.stems.items():
        sound = {"hasAudio": 1, "audioSources": 1, "audioChannels": 2, "audioRate": SAMPLE_RATE}
        add(resources, "asset", id=stem, name=stem, src=file.as_uri(), start="0s", duration=length, **sound)
    project = add(add(add(root, "library"), "event", name=edit.name), "project", name=edit.name)
    whole = {"duration": time(timeline.frames), "tcStart": "0s", "tcFormat": "NDF"}
    spine = add(
        add(project, "sequence", format=formats[timeline.size], **whole, audioLayout="stereo", audioRate="48k"), "spine"
    )
    first: ElementTree.Element | None = None
    for clip in edit.clips:
        if clip.fade:
            add(spine, "transition", name="Cross Dissolve", offset=time(clip.start - clip.fade // 2), duration=time(clip.fade))
        place = {"offset": time(clip.start), "start": time(clip.media_start), "duration": time(clip.frames)}
        # The sound of the clips is that of a stem.
        shown = add(spine, "asset-clip", ref=assets[clip.media], name=clip.name, **place, srcEnable="video")
        first = shown if first is None else first
    assert first is not None
    # The first clip starts at 0 in its media, too, so that its time is that of the film.
    for lane, stem in enumerate(edit.stems, 1):
        add(first, "asset-clip", ref=stem, name=stem, lane=-lane, offset="0s", duration=length, audioRole=stem)
    for number, caption in enumerate(edit.captions):
        place = {"offset": time(caption.start), "start": "0s", "duration": time(caption.frames)}
        shown = add(first, "caption", name=caption.text, lane=1, **place, role="SRT?captionFormat=SRT.en")
        add(add(shown, "text"), "text-style", ref=f"ts{number}").text = _NOT_XML.sub("", caption.text)
        add(add(shown, "text-style-def", id=f"ts{number}"), "text-style", font=".AppleSystemUIFont", fontSize=13)
    ElementTree.indent(root)
    for text in root.iter("text"):
        # White space in it would be part of the caption.
        text.text = text[0].tail = None
    return b'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n' + ElementTree.tostring(root)
