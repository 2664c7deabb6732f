"""Join the segments of an upscaled video and copy everything else from the source: sound, subtitles, chapters, metadata."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import Any

import av

from vidgen_ray.errors import MediaError
from vidgen_ray.media.media_file import (
    COMMENT_TAG,
    MATROSKA_XMP_TAG,
    FileMetadata,
    append_xmp,
    open_media,
    wrap_errors,
    wrap_write_errors,
)
from vidgen_ray.system.files import new_file
from vidgen_ray.upscale.frames import Codec
from vidgen_ray.upscale.segments import UpscaleTarget
from vidgen_ray.upscale.source import FrameTimes, VideoSource

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Suffix of an output file -> FFmpeg's name of the format."""
IN_MP4 = {"aac", "mp3", "mp3float", "ac3", "eac3", "opus", "libopus", "flac", "alac", "mov_text", "dvdsub", "dvd_subtitle"}
"""Codecs of sound and subtitles that players accept in MP4."""
PCM_IN_MOV = {"pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be", "pcm_f32le", "pcm_f32be"}
"""Codecs of uncompressed sound that MOV holds, as cameras and editors write it, and MP4 does not."""
_REORDER_FRAMES: dict[Codec, int] = {"h264": 2, "hevc": 4, "av1": 0}
"""Frames by which the decoding order may be ahead of the display order, at most."""
COPIED = "audio", "subtitle", "attachment"
NOT_COPIED_TAGS = {"encoder", "major_brand", "minor_version", "compatible_brands", "duration", "rotate"}
"""Metadata that describes the file, not the content."""


def plan_copies(source: VideoSource, suffix: str) -> tuple[list[int], list[str]]:
    """Return the indices of the streams that an output file with this suffix can hold, and notes about the others.

    Raises MediaError.
    """
    kept, notes = [], []
    held = FORMATS[suffix]
    with wrap_errors(f"{source.path}: cannot be read"), open_media(source.path, source.container) as opened:
        video, chapters = opened.streams.best("video"), opened.chapters()
        for stream in opened.streams:
            # MP4 stores the titles of chapters as a data stream, which is written again with the chapters.
            if stream.index == video.index or (stream.type == "data" and chapters and source.container == "mov"):
                continue
            # PyAV has no codec context for a codec that FFmpeg does not know, and for attachments.
            codec = stream.codec_context.name if stream.codec_context is not None else None
            name = f"stream {stream.index} ({stream.type}{f', {codec}' if codec else ''})"
            if stream.type not in COPIED or (codec is None and stream.type != "attachment"):
                notes.append(f"{name} is not copied")
            elif not (held == "matroska" or codec in IN_MP4 or (held == "mov" and codec in PCM_IN_MOV)):
                notes.append(f"{name} is not copied, {suffix} cannot hold it; choose an output that ends in .mkv")
            else:
                kept.append(stream.index)
    return kept, notes


def join_segments(
    path: Path,
    segments: Sequence[Path],
    target: UpscaleTarget,
    kept: Sequence[int],
    metadata: FileMetadata | None,
    sign: Callable[[Path], None],
) -> None:
    """Write the video to `path`, which appears when it is complete.

    `sign` signs the finished file in place.
    Every frame gets its time in the target's timeline. `kept` are indices of streams that are copied packet by packet.
    Raises MediaError if the segments do not have the frames of the source, WriteError if the file cannot be written.
    """
    source, timeline, codec = target.source, target.timeline, target.encode.codec
    file_format = FORMATS[path.suffix.lower()]
    options = {"fflags": "+bitexact"}
    with wrap_write_errors(path), new_file(path) as tmp:
        with open_media(source.path, source.container) as original, ExitStack() as written:
            if file_format in ("mp4", "mov"):
                # Only this kind of tags holds keys such as com.apple.quicktime.make. Players find the others in both kinds.
                own_keys = any("." in key for key in original.metadata)
                options["movflags"] = "+faststart+use_metadata_tags" if own_keys else "+faststart"
            film = written.enter_context(av.open(str(tmp.absolute()), "w", file_format, options=options))
            film.metadata.update({key: value for key, value in original.metadata.items() if key.lower() not in NOT_COPIED_TAGS})
            if metadata is not None:
                # A comment of the source stays.
                if COMMENT_TAG not in {key.lower() for key in film.metadata}:
                    film.metadata[COMMENT_TAG] = metadata.comment
                if file_format == "matroska":
                    film.metadata[MATROSKA_XMP_TAG] = metadata.xmp
            with open_media(segments[0], "mov") as first:
                template = first.streams.best("video")
                video = film.add_stream_from_template(template, opaque=True)  # no encoder is needed
                header = bytes(template.codec_context.extradata or b"")
            video.time_base = timeline.time_base
            if codec == "hevc" and file_format != "matroska":
                video.codec_context.codec_tag = "hvc1"  # the tag that Apple's players require
            _copy_tags(original.streams.best("video"), video)
            targets = {}
            for index in kept:
                stream = original.streams[index]
                targets[index] = film.add_stream_from_template(stream)
                _copy_tags(stream, targets[index])
            if chapters := original.chapters():
                film.set_chapters(chapters)
            upscaled = _video_packets(segments, header, timeline, _REORDER_FRAMES[codec], video)
            for _, packet in heapq.merge(_copied_packets(original, targets), upscaled, key=itemgetter(0)):
                film.mux(packet)
        if metadata is not None and file_format != "matroska":
            append_xmp(tmp, metadata.xmp)
        sign(tmp)


def _copy_tags(source: Any, target: Any) -> None:
    target.metadata.update({key: value for key, value in source.metadata.items() if key.lower() not in NOT_COPIED_TAGS})
    target.disposition = source.disposition


def _copied_packets(original: Any, targets: dict[int, Any]) -> Iterator[tuple[Fraction, Any]]:
    """Yield the packets of the copied streams with their decoding time in seconds."""
    # Attachments have no packets; they are part of the header.
    streams = [original.streams[index] for index in targets if original.streams[index].type != "attachment"]
    if not streams:
        return
    for packet in original.demux(streams):
        if packet.dts is None or not packet.size:
            continue
        index = packet.stream_index
        seconds = packet.dts * packet.time_base
        packet.stream = targets[index]
        yield seconds, packet


def _video_packets(
    segments: Iterable[Path], header: bytes, timeline: FrameTimes, reorder: int, target: Any
) -> Iterator[tuple[Fraction, Any]]:
    """Yield the packets of the segments with the times of the timeline, and their decoding time in seconds.

    Raises MediaError for a wrong number.
    """
    decoding_times = _decoding_times(timeline, reorder)
    first = 0
    for path in segments:
        with open_media(path, "mov") as opened:
            stream = opened.streams.best("video")
            if bytes(stream.codec_context.extradata or b"") != header:
                raise MediaError(f"{path}: has another {stream.codec_context.name} header than the first segment")
            count = 0
            for packet in opened.demux(stream):
                if not packet.size:
                    continue
                frame = first + round(packet.pts * packet.time_base * timeline.fps)
                if frame >= len(timeline.times):
                    raise MediaError(f"{path}: has more frames than it must")
                packet.pts, packet.dts = timeline.times[frame], next(decoding_times)
                following = timeline.times[frame + 1] if frame + 1 < len(timeline.times) else None
                packet.duration = timeline.last_duration if following is None else following - packet.pts
                packet.time_base = timeline.time_base
                if packet.dts > packet.pts:
                    raise MediaError(f"{path}: frame {frame} is decoded later than it is shown")
                seconds = packet.dts * timeline.time_base
                packet.stream = target
                yield seconds, packet
                count += 1
        first += count
    if first != len(timeline.times):
        raise MediaError(f"the segments have {first} frames, must be {len(timeline.times)}")


def _decoding_times(timeline: FrameTimes, reorder: int) -> Iterator[int]:
    """Yield an increasing decoding time for each packet: that of the frame `reorder` positions before."""
    step = max(1, round(1 / timeline.fps / timeline.time_base))
    yield from (timeline.times[0] - (reorder - position) * step for position in range(min(reorder, len(timeline.times))))
    yield from timeline.times[: max(0, len(timeline.times) - reorder)]
