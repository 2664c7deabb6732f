"""`vidgen upscale`: enlarge video files on this machine or on a Ray cluster."""

from __future__ import annotations

import glob
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from vidgen_ray.cli.commands import interruptible, note, remembered_interrupt, with_options
from vidgen_ray.cli.file_options import JsonOption, MarkOptions, check_out, details_option
from vidgen_ray.errors import NOT_A_URL, StageError, UsageError, VidgenError
from vidgen_ray.media.encode import Preset
from vidgen_ray.media.media_file import CLIP_SUFFIXES
from vidgen_ray.nets.deferred_imports import deferred_packages
from vidgen_ray.outputs.storage import URL
from vidgen_ray.profile import DEFAULT_PROVENANCE
from vidgen_ray.system.console import LINE_EVERY_S, Console
from vidgen_ray.system.quantities import count, duration
from vidgen_ray.upscale.frames import DEFAULT_CRF, DEFAULT_PRESET, Codec, EncodeSettings, codec_of_deep_videos
from vidgen_ray.upscale.join import FORMATS
from vidgen_ray.upscale.network import (
    BUILTIN_MODELS,
    DEFAULT_NETWORK,
    EngineSettings,
    Size,
    UpscaleModel,
    choose_settings,
    default_workers,
    find_model,
)
from vidgen_ray.upscale.run import (
    OnFrame,
    SegmentRunner,
    UpscaleOptions,
    output_path,
    planned_size,
    upscale_file,
    write_preview,
)
from vidgen_ray.upscale.segments import SegmentFailed, Threads
from vidgen_ray.upscale.source import read_source, timeline_of

_FOLDER_SUFFIXES = (*CLIP_SUFFIXES, ".gif", ".qt", ".3gp", ".3g2", ".f4v", ".m2t", ".mk3d")
"""Endings of the videos of a folder: those of the formats that can be read."""
_NAMED_FILES = 5
"""Other files of a folder that a note names."""
_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
_OTHER_FORMATS = {*_FOLDER_SUFFIXES, ".wmv", ".png", ".jpg", ".jpeg", ".webp"} - {*FORMATS}
"""Endings that are not those of a folder."""
DURATION = re.compile(r"(\d+(?:\.\d+)?)s?")
MAX_FPS, MAX_FPS_NUMERATOR = 240, 240_000


def _by_codec(defaults: Mapping[Codec, object]) -> str:
    return ", ".join(f"{default} for {codec}" for codec, default in defaults.items())


@with_options
def upscale(
    marks: MarkOptions,
    videos: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VIDEO...",
            help="Video files, folders of them, patterns such as 'in/*.mp4', or .txt files with one per line.",
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option("--out", "-o", help="Output folder; for one video also a file (.mp4, .mov, .mkv).", callback=check_out),
    ] = "upscaled",
    scale: Annotated[
        float | None,
        typer.Option("--scale", min=1, max=16, metavar="FACTOR", help="Factor of width and height, from 1 to 16. Default: 2."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="WIDTHxHEIGHT", help="Fit into this size, without stretching. Default: --scale decides."),
    ] = None,
    fps: Annotated[
        str | None,
        typer.Option(
            "--fps",
            metavar="RATE",
            help="Constant frames per second, drawn by RIFE: 60 or 60000/1001. Default: the frames and times of the video.",
        ),
    ] = None,
    deinterlace: Annotated[
        bool,
        typer.Option(
            "--deinterlace",
            help="Make a progressive frame of each interlaced one (bwdif). Default: a note if it is interlaced.",
        ),
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Name of a model (see --list-models), or the path of its weights.", show_default=True
        ),
    ] = DEFAULT_NETWORK,
    denoise: Annotated[
        float | None,
        details_option(
            "--denoise",
            metavar="0..1",
            help="Denoising strength of realesr-general-x4v3, whose two weights are mixed. Default: only the first.",
        ),
    ] = None,
    list_models: Annotated[bool, typer.Option("--list-models", help="Print the names of the models and exit.")] = False,
    codec: Annotated[
        Codec | None, details_option("--codec", help="Video codec of the output. Default: h264, hevc for more than 8 bits.")
    ] = None,
    crf: Annotated[
        int | None,
        details_option(
            "--crf",
            min=0,
            max=63,
            help=f"Quality; lower is better and larger. Default: {_by_codec(DEFAULT_CRF)}.",
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        details_option(
            "--preset",
            help=f"Speed of the encoder, ultrafast to veryslow, as in x264. Default: {_by_codec(DEFAULT_PRESET)}.",
        ),
    ] = None,
    preview: Annotated[
        str | None,
        typer.Option(
            "--preview",
            metavar="SECONDS",
            help="Only write NAME.preview.mp4: this long a part of the middle, left bicubic, right upscaled.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files. Default: that video fails.")] = False,
    address: Annotated[
        str | None,
        typer.Option("--address", "-a", help="Address of a Ray cluster, or `auto`. Default: this machine, without Ray."),
    ] = None,
    device: Annotated[str | None, details_option("--device", help="cpu or cuda. Default: cuda if there is a GPU.")] = None,
    workers: Annotated[
        int | None, details_option("--workers", min=1, max=64, help="Segments made at the same time. Default: 1 per 8 CPUs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Enlarge videos with a super-resolution network.

    Sound, subtitles, chapters, times and colour tags are kept. The same command resumes after a stop.
    A video that fails does not affect the others; the exit code is then 1.
    """
    if list_models:
        for name, description in BUILTIN_MODELS.items():
            typer.echo(f"{name:14} {description}")
        typer.echo("PATH           any .safetensors or .pth file with an RGB super-resolution network that spandrel knows")
        return
    if scale is not None and to is not None:
        raise UsageError("--to: cannot be combined with --scale")
    if URL.match(out):
        raise UsageError(f"--out: got {out!r}, must be a folder or file on a disk")
    if preview is not None and fps is not None:
        raise UsageError("--preview: cannot be combined with --fps, the preview shows the frames of the video")
    if not videos:
        raise UsageError("VIDEO: got nothing, must be video files, folders or patterns")
    if codec != "av1" and crf is not None and crf > 51:
        raise UsageError(f"--crf: got {crf}, must be from 0 to 51 for {codec or 'h264 and hevc'}")
    targets = _targets(list(dict.fromkeys(path for text in videos for path in _named(text))), Path(out))
    network = find_model(model, denoise)
    options = UpscaleOptions(
        model=network,
        encode=_encoding(codec or "h264", crf, preset),
        scale=None if to else (2 if scale is None else scale),
        fit=_parse_size(to) if to else None,
        fps=_parse_fps(fps) if fps else None,
        deinterlace=deinterlace,
        force=force,
        provenance=marks.settings(DEFAULT_PROVENANCE),
    )
    seconds = _parse_seconds(preview) if preview else None
    deep = None if codec else replace(options, encode=_encoding(codec_of_deep_videos(), crf, preset))
    results, usable = _checked(targets, options, deep)
    if usable:
        with (
            interruptible(),
            remembered_interrupt() as check_interrupt,
            redirect_stdout(sys.stderr),
            _runner(address, network, device, workers, check_interrupt) as (settings, runner),
        ):
            for video, target, its_options in usable:
                results.append(_upscale_one(video, target, its_options, settings, runner, seconds, check_interrupt))
                check_interrupt()
    failed = sum("error" in result for result in results)
    if as_json:
        typer.echo(json.dumps({"videos": results, "failed": failed}))
    if failed:
        if len(results) > 1:
            note(f"{failed} of {len(results)} videos failed")
        raise typer.Exit(1)


def _encoding(codec: Codec, crf: int | None, preset: Preset | None) -> EncodeSettings:
    return EncodeSettings(codec=codec, crf=DEFAULT_CRF[codec] if crf is None else crf, preset=preset or DEFAULT_PRESET[codec])


def _checked(
    targets: Sequence[tuple[Path, Path]], options: UpscaleOptions, deep: UpscaleOptions | None
) -> tuple[list[dict[str, Any]], list[tuple[Path, Path, UpscaleOptions]]]:
    """Return the errors of sources that cannot be read or enlarged as asked, and the other videos, targets and options.

    `deep`: options of videos with more than 8 bits per channel, if they differ.
    """
    failures, usable = [], []
    for video, target in targets:
        try:
            source = read_source(video)
            timeline_of(planned_size(source, options)[0], options.fps)
            is_deep = deep is not None and source.bits > 8
            usable.append((video, target, deep if deep is not None and is_deep else options))
            if is_deep and deep is not None and deep.encode.codec == "h264":
                note(f"{video}: becomes H.264 of 10 bits, which few hardware decoders play: this FFmpeg has no encoder of HEVC")
        except (VidgenError, OSError) as error:
            failures.append(_failure(video, target, error))
    return failures, usable


def _upscale_one(
    video: Path,
    target: Path,
    options: UpscaleOptions,
    settings: EngineSettings,
    runner: SegmentRunner,
    preview_s: float | None,
    check_interrupt: Callable[[], None],
) -> dict[str, Any]:
    """Upscale a video, and print its result. Return it, or the error."""
    try:
        with _progress(video.name) as on_progress:
            if preview_s is not None:

                def on_frame(done: int, total: int, made: int) -> None:
                    check_interrupt()
                    on_progress(done, total, made)

                report = write_preview(video, target, options, settings, preview_s, on_progress=on_frame)
            else:
                report = upscale_file(video, target, options, settings, runner, on_progress=on_progress)
    except SegmentFailed as failed:
        return _failure(video, target, f"{video}: {failed.segment} cannot be upscaled: {failed.error}")
    except (VidgenError, OSError) as error:
        return _failure(video, target, error)
    for text in report.notes:
        note(f"{video}: {text}")
    if report.was_finished:
        typer.echo(f"{target}: finished before", err=True)
    else:
        made = report.frames - report.resumed_frames
        rate = made / report.seconds if report.seconds else 0
        text = f"{count(report.frames, 'frame')} of {report.size} in {duration(report.seconds)}, {rate:.2f} frames/s"
        typer.echo(f"{report.out}: {text} with {settings}", err=True)
    return asdict(report)


def _failure(video: Path, target: Path, error: Exception | str) -> dict[str, Any]:
    message = str(error)
    if str(video) not in message and str(target) not in message:
        message = f"{video}: {message}"
    note(message)
    return {"video": str(video), "error": message}


@contextmanager
def _runner(
    address: str | None, model: UpscaleModel, device: str | None, workers: int | None, check_interrupt: Callable[[], None]
) -> Iterator[tuple[EngineSettings, SegmentRunner]]:
    """Yield the settings of the network, and what makes segments: threads of this process, or a Ray cluster."""
    try:
        if address is None:
            with deferred_packages():
                import torch

            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            workers = workers or default_workers(device)
            yield choose_settings(model, device, workers), Threads(workers, check_interrupt)
            return
        from vidgen_ray.engine.ray_cluster import connected
        from vidgen_ray.upscale.ray_runner import RayRunner, settings_on_cluster

        with connected(address, cpus=1):
            yield settings_on_cluster(model), RayRunner(workers, note, check_interrupt)
    except StageError as error:
        raise UsageError(f"--model: {error}") from None


def _named(text: str) -> list[Path]:
    """Return the videos that an argument names, in order. Raises UsageError if it names none."""
    if URL.match(text):
        raise UsageError(f"VIDEO: got {text!r}, {NOT_A_URL}")
    path = Path(text).expanduser()
    if path.is_dir():
        return _videos_in(path)
    if path.suffix.lower() == ".txt" and path.is_file():
        lines = [line.strip() for line in path.read_text("utf-8", errors="replace").splitlines()]
        listed = [line for line in lines if line and not line.startswith("#")]
        if not listed:
            raise UsageError(f"VIDEO: got the list {text!r}, which names no video")
        return [file for line in listed for file in _named(str(path.parent / line))]
    if not path.exists() and glob.has_magic(text):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise UsageError(f"VIDEO: no file matches {text!r}")
        return files
    return [path]


def _videos_in(folder: Path) -> list[Path]:
    """Return the videos of a folder, by the endings of their names, and print which files are none. Raises UsageError."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    videos = [file for file in files if file.suffix.lower() in _FOLDER_SUFFIXES]
    if not videos:
        raise UsageError(f"VIDEO: got the folder {str(folder)!r}, which has no video ({', '.join(_FOLDER_SUFFIXES)})")
    if others := [file.name for file in files if file not in videos]:
        names = ", ".join(others[:_NAMED_FILES]) + (", ..." if len(others) > _NAMED_FILES else "")
        note(f"{folder}: left out {count(len(others), 'file')} without the ending of a video that can be read: {names}")
    return videos


def _targets(videos: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Return each video with its output file. Raises UsageError if two have the same, or one would replace a source."""
    is_folder = out.is_dir() or out.suffix.lower() not in FORMATS
    if is_folder and not out.is_dir() and out.suffix.lower() in _OTHER_FORMATS:
        raise UsageError(f"--out: got {str(out)!r}, must be a folder or end in {', '.join(FORMATS)}")
    if not is_folder and len(videos) > 1:
        raise UsageError(f"--out: got the file {str(out)!r} for {len(videos)} videos, must be a folder")
    if is_folder and out.is_file():
        raise UsageError(f"--out: got {str(out)!r}, must be a folder or end in {', '.join(FORMATS)}")
    targets = [(video, output_path(video, out, is_folder=is_folder)) for video in videos]
    sources = {video.absolute() for video in videos}
    names: dict[Path, Path] = {}
    for video, target in targets:
        if target.absolute() in sources:
            raise UsageError(f"--out: {target} would replace a source; choose another folder")
        if (other := names.setdefault(target, video)) != video:
            raise UsageError(f"VIDEO: {other} and {video} would both become {target}; upscale them to different folders")
    return targets


def _parse_size(text: str) -> Size:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"--to: got {text!r}, must be WIDTHxHEIGHT in pixels, such as 1920x1080")
    return int(match[1]), int(match[2])


def _parse_fps(text: str) -> Fraction:
    try:
        fps = Fraction(text)
    except (ValueError, ZeroDivisionError):
        fps = Fraction(0)
    if not 1 <= fps <= MAX_FPS or fps.numerator > MAX_FPS_NUMERATOR:
        raise UsageError(f"--fps: got {text!r}, must be from 1 to {MAX_FPS}, such as 60, 59.94 or 60000/1001")
    return fps


def _parse_seconds(text: str) -> float:
    match = DURATION.fullmatch(text)
    if match is None or not float(match[1]):
        raise UsageError(f"--preview: got {text!r}, must be seconds, such as 5s")
    return float(match[1])


@contextmanager
def _progress(name: str) -> Iterator[OnFrame]:
    """Show frames, frames per second and the estimated time left, as a bar or as a line every LINE_EVERY_S."""
    begin = shown = time.monotonic()
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None, state="")

        def on_progress(done: int, total: int, made: int) -> None:
            nonlocal shown
            now = time.monotonic()
            is_resumed = not made and 0 < done < total
            state = f"{done} of {total} frames"
            if made:
                per_frame_s = (now - begin) / made
                state += f", {1 / per_frame_s:.2f} frames/s, {duration((total - done) * per_frame_s)} left"
            bar.update(task, completed=done, total=total, state=state)
            if not console.is_terminal and (is_resumed or now - shown >= LINE_EVERY_S):
                shown = now
                note(f"{name}: {state}")

        yield on_progress
