"""Pieces of the picture: rendered once, kept in a folder beside the film under the key of their content, and joined with the
sound into one MP4 file.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from vidgen_ray.errors import MediaError
from vidgen_ray.film.film_settings import FilmSettings
from vidgen_ray.film.picture import OpenFile, burnt_caption, piece_frames
from vidgen_ray.film.timeline import REORDER_FRAMES, FilmTimeline, Piece, TimelineItem, probe_clip
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.media.media_file import COMMENT_TAG, FileMetadata, append_xmp, open_media, wrap_errors
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.files import PREFIX, abandoned, new_file, remove, temporary_file

PIECE_FORMAT = 1
"""Part of the keys. Increase it when the same settings give other frames."""


class PlannedPiece(NamedTuple):
    """A piece and where its packets come from."""

    piece: Piece
    key: str | None
    """Name of the rendered file without `.mp4`. `None` if the packets of the clip are copied."""


def keep_only(folder: Path, names: Set[str]) -> None:
    """Remove all other files of a folder of rendered pieces, except temporary files of running processes."""
    for path in abandoned(folder):
        remove(path)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in names and not path.name.startswith(PREFIX):
            remove(path)


def plan_pieces(timeline: FilmTimeline, settings: FilmSettings, folder: Path) -> list[PlannedPiece]:
    """Decide for each piece of the film whether it is copied or rendered.

    All packets of a film need the same H.264 header. If nothing must be rendered, it is that of the clips; else it is the
    encoder's, and clips with another header are rendered as well.
    """
    pieces = list(timeline.pieces())
    headers = [_header_of_unchanged(piece, timeline, settings) for piece in pieces]
    header = headers[0] if len(set(headers)) == 1 else None
    if header is None:
        header = encoder_header(timeline, settings, folder)
    return [
        PlannedPiece(piece, None if own == header else piece_key(piece, timeline, settings))
        for piece, own in zip(pieces, headers, strict=True)
    ]


def _header_of_unchanged(piece: Piece, timeline: FilmTimeline, settings: FilmSettings) -> bytes | None:
    """Return the H.264 header of a clip that is shown as it is, else `None`."""
    source = piece.item.source
    clip = source.clip
    is_unchanged = (
        clip is not None
        and (clip.size, clip.fps) == (timeline.size, timeline.fps)
        and (piece.first, piece.frames) == (0, clip.frames)
        and piece.item.stretch == 1
        and piece.fade_to is None
        and not burnt_caption(piece, settings)
    )
    return clip.header if is_unchanged and clip is not None else None


def encoder_header(timeline: FilmTimeline, settings: FilmSettings, folder: Path) -> bytes:
    """Return the H.264 header of rendered pieces, which depends on size, rate and settings of the encoder."""
    black = np.zeros((1, timeline.size.height, timeline.size.width, 3), np.uint8)
    path = temporary_file(folder)
    try:
        with Mp4Writer(path, *timeline.size, timeline.fps, encode_settings(settings)) as video:
            video.write(black)
        header = probe_clip(path).header
    finally:
        path.unlink(missing_ok=True)
    if header is None:
        raise MediaError(f"{timeline.size} at {timeline.fps} frames per second: FFmpeg writes no H.264 header")
    return header


def encode_settings(settings: FilmSettings) -> Mp4Settings:
    return settings.encode or Mp4Settings()


def piece_key(piece: Piece, timeline: FilmTimeline, settings: FilmSettings) -> str:
    """Return the key of a rendered piece: equal keys have equal frames. The position in the film is not part of it."""
    return content_key(
        {
            "format": PIECE_FORMAT,
            "ffmpeg": av.library_versions,
            "size": timeline.size,
            "fps": str(timeline.fps),
            "encode": encode_settings(settings).model_dump(),
            "items": [
                _description(item, burnt_caption(piece, settings), settings)
                for item in (piece.item, piece.fade_to)
                if item is not None
            ],
            "first": piece.first,
            "frames": piece.frames,
        }
    )


def _description(item: TimelineItem, caption: str | None, settings: FilmSettings) -> dict[str, Any]:
    has_text = caption is not None or item.source.title is not None
    return {
        "source": item.source.sha256,
        "title": item.source.title,
        "stretch": str(item.stretch),
        "caption": caption,
        "font": digest(settings.font) if has_text and settings.font is not None else None,
    }


def content_key(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def render_pieces(
    pieces: Sequence[PlannedPiece],
    timeline: FilmTimeline,
    settings: FilmSettings,
    folder: Path,
    open_file: OpenFile,
    on_piece: Callable[[int], None],
    metadata: FileMetadata | None = None,
) -> int:
    """Render the pieces that are missing in the folder. Return how many. Calls `on_piece` with the number of pieces ready.

    `metadata`: that of their files.
    Raises MediaError if a clip cannot be decoded.
    """
    rendered = 0
    for number, (piece, key) in enumerate(pieces, 1):
        if key is not None and not (path := folder / f"{key}.mp4").exists():
            with (
                new_file(path) as tmp,
                Mp4Writer(tmp, *timeline.size, timeline.fps, encode_settings(settings), metadata) as video,
            ):
                for frame in piece_frames(piece, timeline, settings, open_file):
                    video.write_frame(frame)
                if video.frames_written != piece.frames:
                    raise MediaError(f"{piece.item.source.name}: got {video.frames_written} frames, must be {piece.frames}")
            rendered += 1
        on_piece(number)
    return rendered


@contextmanager
def opened_piece(planned: PlannedPiece, folder: Path, open_file: OpenFile) -> Iterator[Any]:
    """Open the file with the packets of a piece."""
    piece, key = planned
    if key is not None:
        with av.open(str((folder / f"{key}.mp4").absolute()), format="mp4") as opened:
            yield opened
        return
    assert piece.item.source.path is not None
    with (
        open_file(piece.item.source.path) as path,
        open_media(path) as opened,
    ):
        yield opened


def write_film(
    path: Path,
    pieces: Sequence[PlannedPiece],
    timeline: FilmTimeline,
    folder: Path,
    open_file: OpenFile,
    sound: Path | None,
    title: str | None,
    metadata: FileMetadata | None = None,
    sign: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write the film to `path`, which appears when it is complete. Raises MediaError if a piece does not fit.

    `sign` signs the finished file in place.
    Every frame has its own position: times of the pieces are replaced, so their rounding does not add up.
    """
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with wrap_errors(f"{path}: cannot be joined"), new_file(path) as tmp:
        with av.open(str(tmp.absolute()), "w", "mp4", options=options) as film, ExitStack() as opened:
            if title is not None:
                film.metadata["title"] = title
            if metadata is not None:
                film.metadata[COMMENT_TAG] = metadata.comment
            with opened_piece(pieces[0], folder, open_file) as first:
                template = first.streams.best("video")
                picture = film.add_stream_from_template(template)
                header = bytes(template.codec_context.extradata)
            packets = [_picture_packets(pieces, timeline, folder, open_file, picture, header)]
            if sound is not None:
                stream = opened.enter_context(av.open(str(sound.absolute()), format="mp4")).streams.audio[0]
                packets.insert(0, _sound_packets(stream, film.add_stream_from_template(stream)))
            # In the order of their time, so that the muxer keeps few of them in memory.
            for _, packet in heapq.merge(*packets, key=itemgetter(0)):
                film.mux(packet)
        if metadata is not None:
            append_xmp(tmp, metadata.xmp)
        sign(tmp)


def _sound_packets(stream: Any, target: Any) -> Iterator[tuple[Fraction, Any]]:
    """Yield the packets of the sound with their decoding time in seconds."""
    for packet in stream.container.demux(stream):
        if packet.size:
            seconds = packet.dts * packet.time_base
            packet.stream = target
            yield seconds, packet


def _picture_packets(
    pieces: Sequence[PlannedPiece], timeline: FilmTimeline, folder: Path, open_file: OpenFile, target: Any, header: bytes
) -> Iterator[tuple[Fraction, Any]]:
    """Yield the packets of all pieces with the time in seconds of the frame at their position."""
    number = 0
    for planned in pieces:
        name, start = planned.piece.item.source.name, number
        with opened_piece(planned, folder, open_file) as source:
            stream = source.streams.best("video")
            if bytes(stream.codec_context.extradata) != header:
                raise MediaError(f"{name}: its picture has another H.264 header than the rest of the film")
            for packet in source.demux(stream):
                if not packet.size:
                    continue
                packet.pts = start + round(packet.pts * packet.time_base * timeline.fps)
                packet.dts = number - REORDER_FRAMES
                packet.time_base, packet.duration = 1 / timeline.fps, 1
                packet.stream = target
                yield number / timeline.fps, packet
                number += 1
        if number - start != planned.piece.frames:
            raise MediaError(f"{name}: got {number - start} frames, must be {planned.piece.frames}")
