"""Write the film: copy the packets of its pieces and of its sound into one MP4 file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from vidgen_ray.errors import MediaError
from vidgen_ray.film.clip_probe import REORDER_FRAMES
from vidgen_ray.film.picture import OpenFile
from vidgen_ray.film.pieces import PieceFolder, PlannedPiece, opened_piece
from vidgen_ray.film.timeline import Timeline
from vidgen_ray.media.files import COMMENT_TAG, FileMetadata, append_xmp, wrap_errors
from vidgen_ray.system.files import new_file


def write_film(
    path: Path,
    pieces: Sequence[PlannedPiece],
    timeline: Timeline,
    folder: PieceFolder,
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
            writer = _Writer(film, timeline)
            for planned in pieces:
                with opened_piece(planned, folder, open_file) as source:
                    if writer.video is None:
                        writer.add_streams(source, sound, opened)
                    writer.copy(source, planned)
            writer.finish()
        if metadata is not None:
            append_xmp(tmp, metadata.xmp)
        sign(tmp)


class _Writer:
    """Copies packets, sound and picture in the order of their time, so that the muxer keeps few of them in memory."""

    def __init__(self, film: Any, timeline: Timeline) -> None:
        self.video: Any = None
        self._film = film
        self._timeline = timeline
        self._header = b""
        self._frames = 0
        self._sound: Iterator[Any] = iter(())
        self._next_sound: Any = None

    def add_streams(self, source: Any, sound: Path | None, opened: ExitStack) -> None:
        """Add a video stream like that of the first piece, and the stream of the sound."""
        template = source.streams.best("video")
        self.video = self._film.add_stream_from_template(template)
        self._header = bytes(template.codec_context.extradata)
        if sound is not None:
            stream = opened.enter_context(av.open(str(sound.absolute()), format="mp4")).streams.audio[0]
            self._sound = self._sound_packets(stream, self._film.add_stream_from_template(stream))
            self._next_sound = next(self._sound, None)

    @staticmethod
    def _sound_packets(stream: Any, target: Any) -> Iterator[Any]:
        for packet in stream.container.demux(stream):
            if packet.size:
                packet.stream = target
                yield packet

    def copy(self, source: Any, planned: PlannedPiece) -> None:
        """Copy the packets of a piece."""
        piece, fps = planned.piece, self._timeline.fps
        stream = source.streams.best("video")
        if bytes(stream.codec_context.extradata) != self._header:
            raise MediaError(f"{piece.item.source.name}: its picture has another H.264 header than the rest of the film")
        start = self._frames
        for packet in source.demux(stream):
            if not packet.size:
                continue
            self._copy_sound_until(self._frames / fps)
            packet.pts = start + round(packet.pts * packet.time_base * fps)
            packet.dts = self._frames - REORDER_FRAMES
            packet.time_base, packet.duration = 1 / fps, 1
            packet.stream = self.video
            self._film.mux(packet)
            self._frames += 1
        if self._frames - start != piece.frames:
            raise MediaError(f"{piece.item.source.name}: got {self._frames - start} frames, must be {piece.frames}")

    def _copy_sound_until(self, seconds: Fraction | None) -> None:
        while self._next_sound is not None:
            if seconds is not None and self._next_sound.dts * self._next_sound.time_base > seconds:
                return
            self._film.mux(self._next_sound)
            self._next_sound = next(self._sound, None)

    def finish(self) -> None:
        """Copy the rest of the sound."""
        self._copy_sound_until(None)
