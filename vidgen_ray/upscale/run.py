"""Upscale a video file: plan it, make its segments, resume after a kill, join them.

Or write a preview with both versions side by side.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from itertools import tee
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from filelock import FileLock, Timeout
from pydantic import ValidationError

from vidgen_ray.errors import FrozenModel, MediaError, SetupError, UsageError
from vidgen_ray.media.media_file import append_xmp
from vidgen_ray.profile import DEFAULT_PROVENANCE, Detail, Profile, ProvenanceSettings
from vidgen_ray.provenance.record import InputFile, Operation, ProvenanceRecord, SourceType, altered_record, metadata_of
from vidgen_ray.provenance.signing import check_signing, sign_result
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import ChunkedStage, StageParams, progress_reporter
from vidgen_ray.stages.realesrgan import RealESRGANStage, weights_file
from vidgen_ray.stages.rife import RifeStage
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.files import abandoned, new_file, remove, write_atomically
from vidgen_ray.upscale.frames import INTERPOLATOR, EncodeSettings, FrameReader, Pixels, write_segment
from vidgen_ray.upscale.join import FORMATS, join_segments, plan_copies
from vidgen_ray.upscale.network import (
    DEFAULT_SHOT,
    EngineSettings,
    Size,
    UpscaleModel,
    UpscaleNetwork,
    choose_settings,
    settings_for,
)
from vidgen_ray.upscale.segments import Segment, SegmentFailed, Threads, UpscaleTarget, fitted, scaled, upscale_frames
from vidgen_ray.upscale.source import VideoSource, read_source, timeline_of
from vidgen_ray.weights import resolve

WORK_FOLDER = ".vidgen-upscale"
"""Folder beside the output files: segments of unfinished videos, and what the finished ones were made from."""
_FORMAT = 1
"""Raised when the same request gives other files than before."""


class SegmentRunner(Protocol):
    """Makes segments, in this process or elsewhere."""

    workers: int
    """Segments that are made on one machine at the same time. They share its memory."""

    def __call__(
        self, target: UpscaleTarget, segments: Sequence[Segment], folder: Path, on_frame: Callable[[Segment], None]
    ) -> None:
        """Write the file of each segment to the folder. Calls `on_frame` for each upscaled frame.

        Raises SegmentFailed for the first segment that fails, and errors of loading the network.
        """


@dataclass(frozen=True, slots=True)
class UpscaleOptions:
    """Request of a user. Exactly one of `scale` and `fit` is set."""

    model: UpscaleModel | None
    """`None` keeps the size of the frames, and only `fps` changes the video."""
    encode: EncodeSettings
    scale: float | None = 2
    """Factor of width and height."""
    fit: Size | None = None
    """Size in pixels that the result fits in."""
    fps: Fraction | None = None
    """Frames per second of the result, drawn by RIFE. `None` keeps the times of the source."""
    deinterlace: bool = False
    """Make a progressive frame of each interlaced one."""
    force: bool = False
    """Replace existing files."""
    provenance: ProvenanceSettings = DEFAULT_PROVENANCE
    """Settings of the marking as altered by an algorithm, or as AI-generated if its source is."""
    operation: Operation = "upscale"
    """Name of the command in the provenance record."""
    shot: Shot = DEFAULT_SHOT
    """Fields of the upscaling stage, beside the network and the scale."""

    def record(self, video: Path) -> ProvenanceRecord | None:
        """Return the provenance record of the result for a source, or `None` if nothing is written."""
        network = "" if self.model is None else "realesrgan" if self.operation == "stage" else self.model.name
        stages = [name for name in (network, "rife" if self.fps is not None else "") if name]
        # Recorded video is partly generated if a network has drawn frames of it.
        altered: SourceType = "algorithmicallyEnhanced" if self.fps is None else "compositeWithTrainedAlgorithmicMedia"
        return altered_record(InputFile.read(video, digest(video)), self.operation, stages, self.provenance, altered)


@dataclass(frozen=True, slots=True)
class UpscaleReport:
    """Result of one video."""

    video: str
    """Path of the source."""
    out: str
    frames: int
    size: str
    """WIDTHxHEIGHT in pixels."""
    seconds: float
    """Seconds that this run took for it."""
    metadata: Detail
    """Provenance metadata that was written."""
    resumed_frames: int = 0
    """Frames that an earlier, killed run had made."""
    was_finished: bool = False
    """True if an earlier run with the same request had finished it."""
    notes: tuple[str, ...] = ()
    """Properties of the source that are not kept."""


class _Plan(FrozenModel):
    """Record of a started or finished video, beside its segments."""

    request: str
    """Hash of everything that decides the file, apart from `settings`."""
    settings: EngineSettings
    """Settings of the first run. Later ones keep them, so that all segments are made alike."""
    finished: tuple[int, int] | None = None
    """Size in bytes and time of the last change in ns of the finished file."""


OnFrame = Callable[[int, int, int], None]
"""Called with the frames that are done, of how many, and the frames made by this run."""


def upscale_file(
    video: Path,
    out: Path,
    options: UpscaleOptions,
    settings: EngineSettings,
    runner: SegmentRunner,
    *,
    on_progress: OnFrame = lambda done, total, made: None,
) -> UpscaleReport:
    """Upscale a video to `out`, which appears when it is complete. After a kill, the same call continues.

    Raises MediaError for a source that cannot be read, an output that exists or cannot be written; SegmentFailed; StageError or
    SetupError if the network cannot run.
    """
    begin = time.monotonic()
    work = out.parent / WORK_FOLDER / out.name
    record = work.with_name(f"{out.name}.json")
    check_signing(options.provenance)
    if options.provenance.signing_key is not None and FORMATS[out.suffix.lower()] == "matroska":
        raise MediaError(f"{out}: Matroska files cannot be signed (C2PA); choose .mp4 or .mov, or do not pass a key")
    source, size = planned_size(read_source(video.absolute(), deinterlace=options.deinterlace), options)
    kept, not_copied = plan_copies(source, out.suffix.lower())
    timeline = timeline_of(source, options.fps)
    request = _request(source, size, options)
    plan = _read_plan(record)
    finished = plan is not None and plan.request == request and plan.finished is not None

    def report(resumed: int, *, was_finished: bool = False) -> UpscaleReport:
        return UpscaleReport(
            video=str(video),
            out=str(out),
            frames=len(timeline.times),
            size=f"{size[0]}x{size[1]}",
            seconds=round(time.monotonic() - begin, 3),
            resumed_frames=resumed,
            was_finished=was_finished,
            notes=(*source.notes, *not_copied),
            metadata=options.provenance.metadata,
        )

    if out.exists() and not options.force:
        if finished and plan is not None and plan.finished == _version(out):
            return report(0, was_finished=True)
        raise MediaError(
            f"{out}: exists and is not the result of this command; choose another output, or replace it with --force"
        )
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work.with_name(f"{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MediaError(f"{out}: another process is making it") from None
    try:
        if plan is None or plan.request != request or finished:
            remove(work)
            work.mkdir()
            plan = _Plan(request=request, settings=settings_for(source, options.model, settings, runner.workers))
            write_atomically(record, plan.model_dump_json())
        for path in abandoned(work):
            remove(path)
        label, shot = options.provenance.label, options.shot
        target = UpscaleTarget(source, options.model, size, options.encode, plan.settings, options.fps, label, shot)
        segments = target.segments
        missing = [segment for segment in segments if not (work / segment.file_name).exists()]
        total = len(timeline.times)
        resumed = total - sum(segment.stop - segment.start for segment in missing)
        made = 0

        def count(_segment: Segment) -> None:
            nonlocal made
            made += 1
            on_progress(resumed + made, total, made)

        on_progress(resumed, total, 0)
        if missing:
            runner(target, missing, work, count)
        provenance = options.record(video)
        made_segments = [work / segment.file_name for segment in segments]

        def sign(file: Path) -> None:
            sign_result(file, provenance, options.provenance, video)

        metadata = metadata_of(provenance)
        join_segments(out, made_segments, target, kept, metadata, sign)
        write_atomically(record, plan.model_copy(update={"finished": _version(out)}).model_dump_json())
        remove(work)
    finally:
        lock.release()
    return report(resumed)


def output_path(video: Path, out: Path, *, is_folder: bool) -> Path:
    """Return the output file of a video. In a folder, MP4 and MOV stay what they are, and other formats become Matroska."""
    if not is_folder:
        return out
    suffix = video.suffix.lower()
    return out / f"{video.stem}{suffix if suffix in FORMATS else '.mkv'}"


def planned_size(source: VideoSource, options: UpscaleOptions) -> tuple[VideoSource, Size]:
    """Return the size of the result, and the source with the aspect ratio of pixels that it has then. Raises MediaError."""
    if options.fit is not None:
        return fitted(source, options.fit)
    return source, scaled(source, options.scale or 1)


def _request(source: VideoSource, size: Size, options: UpscaleOptions) -> str:
    content: dict[str, Any] = {
        "format": _FORMAT,
        "source": digest(source.path),
        "model": None if options.model is None else options.model.key,
        "fields": [repr(attrgetter(name)(options.shot)) for name in RealESRGANStage.reads],
        "size": size,
        "pixel_aspect": str(source.pixel_aspect),
        "deinterlacer": source.deinterlacer,
        "encode": options.encode.model_dump(),
        "fps": None if options.fps is None else [str(options.fps), digest(resolve(INTERPOLATOR))],
        "provenance": options.provenance.for_key(),
        "versions": {"ffmpeg": av.library_versions, "torch": version("torch"), "spandrel": version("spandrel")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _read_plan(record: Path) -> _Plan | None:
    try:
        return _Plan.model_validate_json(record.read_bytes())
    except (OSError, ValidationError):
        return None


def process_clip(profile: Profile, stage: type[ChunkedStage[Any]], shot: Shot, source: Path, out: Path) -> Path:
    """Upscale a clip by the shot's `scale` and `upscaler`, or draw frames for its `fps_out`, with its sound. Return `out`.

    `stage` is the RealESRGAN or the RIFE stage. An existing file is replaced. Raises UsageError for another stage or a wrong
    suffix of `out`, MediaError, SetupError, WriteError, and StepFailed.
    """
    from vidgen_ray.render.step_runner import StepFailed

    if out.suffix.lower() not in FORMATS:
        raise UsageError(f"out: got {str(out)!r}, must end in {', '.join(FORMATS)} for a clip")
    if not issubclass(stage, RealESRGANStage | RifeStage):
        raise UsageError(f"stage: got {stage.name}, must be realesrgan or rife for a clip")
    upscales = issubclass(stage, RealESRGANStage)
    params: StageParams = profile.params(RealESRGANStage) if upscales else profile.params(RifeStage)
    clip_fps = read_source(source).fps
    fps = clip_fps * stage.frame_factor(shot.model_copy(update={"fps": clip_fps}))
    options = UpscaleOptions(
        model=UpscaleModel(shot.upscaler, weights_file(params.weights, shot.upscaler)) if upscales else None,
        encode=EncodeSettings(crf=profile.encode.crf, preset=profile.encode.preset, threads=profile.encode.threads),
        scale=shot.scale if upscales else 1,
        fps=None if upscales else fps,
        force=True,
        provenance=profile.provenance,
        operation="stage",
        shot=shot,
    )
    settings = choose_settings(options.model, params.device, 1)

    # Frames are counted in threads.
    report_progress = progress_reporter()

    def report(done: int, total: int, made: int) -> None:
        report_progress(stage.name, done, total)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        upscale_file(source, out, options, settings, Threads(1), on_progress=report)
    except SegmentFailed as failed:
        raise StepFailed(stage.name, failed.error) from failed
    except OSError as error:
        raise SetupError(f"{out}: cannot be written ({error.strerror})") from None
    return out


def write_preview(
    video: Path,
    out: Path,
    options: UpscaleOptions,
    settings: EngineSettings,
    seconds: float,
    *,
    on_progress: OnFrame,
) -> UpscaleReport:
    """Write `seconds` from the middle of the video to NAME.preview.mp4 beside `out`, at a constant rate and without sound.

    Raises MediaError, StageError and SetupError.
    """
    import cv2

    begin = time.monotonic()
    path = out.with_name(f"{out.stem}.preview.mp4")
    if path.exists() and not options.force:
        raise MediaError(f"{path}: exists; replace it with --force")
    source, size = planned_size(read_source(video, deinterlace=options.deinterlace), options)
    count = min(source.frame_count, max(1, round(seconds * source.fps)))
    start = (source.frame_count - count) // 2
    on_progress(0, count, 0)
    settings = settings_for(source, options.model, settings, 1)
    network = None if options.model is None else UpscaleNetwork(options.model, settings, size, options.shot)
    reader = FrameReader(source)

    def pairs() -> Iterator[Pixels]:
        originals, frames = tee(reader.read(start, start + count))
        for number, (pixels, upscaled) in enumerate(zip(originals, upscale_frames(frames, network), strict=True), 1):
            yield np.concatenate([cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), upscaled], axis=1)
            on_progress(number, count, number)

    record = options.record(video)
    try:
        with new_file(path) as tmp:
            write_segment(tmp, pairs(), count, (2 * size[0], size[1]), source.fps, source, options.encode)
            if record is not None:
                append_xmp(tmp, record.metadata().xmp)
    finally:
        reader.close()
    return UpscaleReport(
        video=str(video),
        out=str(path),
        frames=count,
        size=f"{2 * size[0]}x{size[1]}",
        seconds=round(time.monotonic() - begin, 3),
        notes=source.notes,
        metadata=options.provenance.metadata,
    )
