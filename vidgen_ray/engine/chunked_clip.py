"""Run one chunked stage on a clip file, in this process. Frames are read, processed and encoded chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vidgen_ray.engine.oom_fallback import OomFallback
from vidgen_ray.engine.shot_writer import write_clip
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.media import Mp4Settings, VideoReader, open_video
from vidgen_ray.provenance.record import (
    DEFAULT,
    InputFile,
    ProvenanceSettings,
    altered_record,
    altered_type,
    metadata_of,
    with_label,
)
from vidgen_ray.provenance.signing import sign_result
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import ChunkedStage, Frames, frame_chunks, frames_after
from vidgen_ray.stages.progress import report_progress
from vidgen_ray.system.cache_dir import digest

CLIP_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".ts", ".flv", ".mpg", ".mpeg")


def upscale_clip(
    stage: ChunkedStage[Any],
    shot: Shot,
    source: Path,
    out: Path,
    encode: Mp4Settings,
    provenance: ProvenanceSettings = DEFAULT,
) -> Path:
    """Process a clip and write it to `out`, without sound. Return `out`. The shot's `fps` is replaced by that of the clip.

    The result is marked, labelled and signed as `provenance` says.
    Raises UsageError for a suffix other than .mp4 and for a lower frame rate, MediaError for a clip that cannot be read,
    SetupError and WriteError for one that cannot be written, and StepFailed.
    """
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"out: got {str(out)!r}, must end in .mp4 for a clip")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{out.parent}: cannot be created ({error.strerror})") from None
    # decord keeps all frames that it has decoded in memory.
    with open_video(source, backend="pyav") as video:
        shot = shot.model_copy(update={"fps": Fraction(video.fps)})
        if stage.frame_factor(shot) < 1:
            raise UsageError(f"fps_out: got {shot.fps_out}, must be at least the {float(video.fps):g} of {source}")
        fps = Fraction(video.fps) * stage.frame_factor(shot)
        altered = altered_type(is_interpolated=stage.frame_factor(shot) > 1)
        record = altered_record(InputFile.read(source, digest(source)), "stage", [stage.name], provenance, altered)
        chunks = (with_label(chunk, provenance) for chunk in _processed(stage, shot, video))
        write_clip(out, chunks, fps, encode, metadata_of(record))
    sign_result(out, record, provenance, source)
    return out


def _processed(stage: ChunkedStage[Any], shot: Shot, video: VideoReader) -> Iterator[Frames]:
    """Yield the processed chunks. A whole clip may not fit in memory."""
    total = frames_after(video.frame_count, stage.frame_factor(shot))
    fallback = OomFallback()
    first, frames = 0, video.frames(0, 0)
    for chunk in frame_chunks(total, stage.chunk_frames(stage.params)):
        source = stage.source_frames(shot, chunk)
        # Chunks of an interpolated clip overlap. PyAV would start again at the first frame to return one for the second time.
        stop = min(source.stop, video.frame_count)
        known = frames[source.start - first : stop - first]
        frames, first = np.concatenate([known, video.frames(source.start + len(known), stop)]), source.start
        try:
            result, _ = fallback.run(stage, shot, partial(stage.run_chunk, shot, frames, chunk))
        except Exception as error:
            raise StepFailed(stage.name, error) from error
        yield result
        report_progress(stage.name, chunk.stop, total)
