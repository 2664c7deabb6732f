"""Run the graph in one process, without Ray. Batch and online executors produce the same bytes."""

from __future__ import annotations

import base64
import html
import io
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, Self, TypedDict, TypeVar, Unpack, overload

import numpy as np
from PIL import Image as PILImage
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from vidgen_ray.content_keys import ShotPlan, ShotPlanner, params_of
from vidgen_ray.errors import NOT_A_URL, URL_START, FieldError, MediaError, ScriptError, UsageError, shortened_value
from vidgen_ray.graph import STAGE_BY_NAME, STAGES, check_profile, chunked_stages_of, is_chunked, stages_of
from vidgen_ray.licences import Requirement, ShotLicences, UsedWeights, require_licence
from vidgen_ray.media.images import encode_png, read_image, rgb_of, write_png
from vidgen_ray.media.media_file import CLIP_SUFFIXES
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import shot_without_row
from vidgen_ray.outputs.records import HD_FILE, IMAGE_FILE, VIDEO_FILE, ShotRecord, StepRecord
from vidgen_ray.planner.cluster import profile_for, this_machine
from vidgen_ray.planner.gpu_memory import ShotSizes, swap_groups
from vidgen_ray.profile import Profile, ProvenanceSettings
from vidgen_ray.provenance.record import InputFile, altered_record, mark_of, metadata_of, with_label
from vidgen_ray.provenance.signing import check_signing, sign_result
from vidgen_ray.render.cache_writer import CacheMode, cache_settings
from vidgen_ray.render.oom_fallback import OomFallback, prepare_gpu
from vidgen_ray.render.shot_files import ShotFiles
from vidgen_ray.render.step_runner import (
    LIKENESS,
    LikenessTooLow,
    StepFailed,
    StepRunner,
    best_try,
    check_likeness,
    chunk_frames_of,
    chunk_unit,
    clip_chunks,
    join_records,
)
from vidgen_ray.render.weights_on_gpu import WeightsCheck, WeightSwapper
from vidgen_ray.safety import Consent
from vidgen_ray.script.check import check_shot
from vidgen_ray.script.read import file_problem
from vidgen_ray.shot import LoraRef, Shot, VideoLora
from vidgen_ray.stages.base import ChunkedStage, Frames, Item, ProgressCallback, Stage, progress_callback
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.console import Console, ElapsedColumn
from vidgen_ray.system.free_memory import free_gpu_memory


def process_video_file(profile: Profile, stage: type[ChunkedStage[Any]], shot: Shot, source: Path, out: Path) -> Path:
    """Upscale a clip, or draw frames between its frames, as `vidgen upscale` does. See `upscale.run.process_clip`."""
    # The only import of a room by the core: clips are upscaled in one way, by the command and by the library.
    from vidgen_ray.upscale import run

    return run.process_clip(profile, stage, shot, source, out)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[ProgressCallback]:
    """Show a bar per stage in this block. Yields the callback that moves them. Default `console`: standard output."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), ElapsedColumn())
    bars = Progress(*columns, console=console)
    tasks: dict[str, TaskID] = {}
    current: str | None = None
    last_s = bars.get_time()

    def finish_current() -> None:
        """Fill the bar of a stage that is followed by another one. Not all stages report steps."""
        if current is not None:
            total = bars.tasks[tasks[current]].total or 1
            bars.update(tasks[current], completed=total, total=total)
            bars.stop_task(tasks[current])

    def on_progress(stage: str, step: int, steps: int) -> None:
        nonlocal current, last_s
        bars.start()
        if stage != current:
            finish_current()
            if stage in tasks:
                bars.reset(tasks[stage])
            else:
                label = STAGE_BY_NAME[stage].label if stage in STAGE_BY_NAME else stage
                tasks[stage] = bars.add_task(label, total=None)
            # The first report of some stages comes at their end.
            bars.tasks[tasks[stage]].start_time = last_s
            current = stage
        bars.update(tasks[stage], completed=step, total=steps or None)
        last_s = bars.get_time()

    try:
        yield on_progress
        finish_current()
    finally:
        if tasks:
            bars.stop()


MAX_INLINE_BYTES = 20_000_000
"""Largest clip that a notebook gets inside of its page, in bytes. A larger one is shown as its path."""


@dataclass(frozen=True, eq=False)
class GeneratedVideo(Mapping[str, Any]):
    """Result of `generate_video`. `result["image"]` and `result.image` are the same."""

    image: PILImage.Image
    video: Path | str | None
    """Path, or URL if the output folder is in an object store. `None` if the shot has no clip."""
    hd_video: Path | str | None
    """The upscaled clip. `None` if the shot has none."""
    record: ShotRecord

    def __getitem__(self, name: str) -> Any:
        if name not in [*self]:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def _repr_html_(self) -> str:
        """Show the image and the largest clip in a notebook."""
        # With its mark, since the notebook keeps it when it is saved.
        png = encode_png(np.asarray(self.image.convert("RGB")), mark_of(self.image))
        parts = [f'<img src="{_data_url("image/png", png)}" alt="{html.escape(self.record.shot.prompt)}">']
        clip = self.hd_video or self.video
        if isinstance(clip, Path) and clip.stat().st_size <= MAX_INLINE_BYTES:
            url = _data_url("video/mp4", clip.read_bytes())
            parts.append(f'<video src="{url}" controls loop muted playsinline width="{self.image.width}"></video>')
        if clip is not None:
            parts.append(f"<div><code>{html.escape(str(clip))}</code></div>")
        return "".join(parts)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_S = TypeVar("_S", bound=Stage[Any])

Photo = str | Path | PILImage.Image | np.ndarray[Any, Any] | bytes
"""A path, a PIL image, an array of RGB pixels (H, W, 3), or the bytes of an image file."""


_Lora = str | LoraRef | Mapping[str, str | float]


class _ShotFields(TypedDict, total=False):
    """Fields of a shot for editors and type checkers. `Shot` has their descriptions, ranges and defaults."""

    # generated: keywords
    id: str | None
    negative_prompt: str | None
    mode: Literal["quality", "fast"]
    seed: int | None
    image_model: Literal["flux", "klein", "remote", "none"]
    width: int
    height: int
    continue_from: str | None
    face_index: int | None
    identity: str
    identity_strength: float
    identity_start: float
    identity_end: float
    pose: Literal["photo", "none"]
    refine_strength: float
    min_identity: float | None
    max_tries: int
    lora: _Lora | Sequence[_Lora]
    lora_strength: float
    use_hunyuan_style: bool
    style_model: Literal["hunyuan", "qwen-edit"]
    style_prompt: str | None
    style_strength: float
    generate_video: bool
    video_model: str
    motion_prompt: str | None
    video_lora: _Lora | VideoLora | Sequence[_Lora | VideoLora]
    num_frames: int | str
    extend: int
    fps: int
    interpolation: Literal[1, 2, 4, 8]
    fps_out: int | None
    motion_bucket_id: int
    noise_aug_strength: float
    upscale_video: bool
    scale: Literal[2, 3, 4]
    upscaler: str
    crop_width: int | None
    crop_height: int | None
    aspect: str | None
    steps: Mapping[str, int]
    guidance: Mapping[str, float]
    metadata: Mapping[str, Any]
    # end


class GenerateFields(_ShotFields, total=False):
    """Arguments of `generate_video` but `prompt` and `image`."""

    face_image: Photo | Sequence[Photo] | None
    consent: Consent | Mapping[str, str] | str | None
    last_image: Photo | None
    lora_path: str | Path | None
    on_progress: ProgressCallback | None


_P = ParamSpec("_P")
_R = TypeVar("_R")

_one_call = threading.Lock()
"""Held by the call that computes, after the lock of its pipeline, but not while it waits for a server. One lock for all
pipelines: torch's number of threads and default dtype, and the classes that libraries change while they load weights, belong to
the process."""
_this_thread = threading.local()
"""Has `computes` in the thread of the call in progress, and in those that run its `on_progress`."""


@contextmanager
def _computing() -> Iterator[None]:
    """Mark this thread as part of the call in progress."""
    before = getattr(_this_thread, "computes", False)
    _this_thread.computes = True
    try:
        yield
    finally:
        _this_thread.computes = before


@contextmanager
def _others_compute() -> Iterator[None]:
    """Let calls of other pipelines compute during this block, in which a server does."""
    _one_call.release()
    try:
        yield
    finally:
        _one_call.acquire()


def _in_turn(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let calls of a pipeline run, and those of this process compute, one after another.

    A call inside of another one would wait for itself: UsageError.
    """

    @wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        pipeline = args[0]
        assert isinstance(pipeline, VideoGenerationPipeline), "of a method"
        if getattr(_this_thread, "computes", False):
            raise UsageError(
                "a call of a pipeline is in progress in this thread; on_progress and signal handlers must not call a "
                "pipeline. To stop the call, raise an exception in on_progress"
            )
        with pipeline._turn, _one_call, _computing():
            return method(*args, **kwargs)

    return call


class VideoGenerationPipeline:
    """Renders shots one at a time in this process. Stages are loaded on first use and stay loaded.

    A context manager: `close` releases the weights at the end of the block. Threads may share a pipeline. Calls, also those of
    several pipelines, run one after another, but others compute while a pipeline waits for a server. A call from `on_progress`
    raises UsageError.

    `out` is an output folder or its URL, in the format of batch runs: shots that are finished there are not rendered again.
    `cache` tells which results of stages are kept there: `none`, `images` or `all`, with the clips.
    """

    def __init__(
        self,
        profile: Profile,
        out: str | Path,
        *,
        keep_stages: bool = False,
        cache: CacheMode = "all",
        require_licence: Requirement | None = None,
    ) -> None:
        check_profile(profile)
        check_signing(profile.provenance)
        self.profile = profile
        self.outputs = OutputFolder(out)
        self.outputs.prepare()
        self._turn = threading.Lock()
        """Held by the call in progress."""
        self._keep_stages = keep_stages
        self._cache = cache_settings(cache, keep_stages, wait=True).open(self.outputs.stage_cache)
        self._check_weights = WeightsCheck()
        self._loaded: dict[str, Stage[Any]] = {}
        self._licences = ShotLicences(profile)
        self._required_licence = require_licence
        self._swapper = WeightSwapper(self._loaded, ())
        self._oom_fallback = OomFallback()
        self._sizes = ShotSizes()

    @classmethod
    def from_profile(
        cls,
        name_or_path: str,
        out: str | Path = "out",
        *,
        provenance: ProvenanceSettings | None = None,
        require_licence: Requirement | None = None,
    ) -> VideoGenerationPipeline:
        """Create a pipeline from a built-in profile by name, or from a profile file by path.

        `provenance`, how files are marked as AI-generated, replaces the profile's. `require_licence`: use that the licences of
        all weights behind a shot, and behind the shots that it continues, must allow.
        """
        profile = profile_for(name_or_path).with_provenance(provenance)
        return cls(profile, out, require_licence=require_licence)

    def __getstate__(self) -> NoReturn:
        raise TypeError("a pipeline holds loaded weights and cannot be pickled or copied; create one in each process")

    def generate_video(
        self,
        prompt: str,
        *,
        face_image: Photo | Sequence[Photo] | None = None,
        consent: Consent | Mapping[str, str] | str | None = None,
        image: Photo | None = None,
        last_image: Photo | None = None,
        lora_path: str | Path | None = None,
        on_progress: ProgressCallback | None = None,
        **fields: Unpack[_ShotFields],
    ) -> GeneratedVideo:
        """Render one shot. `fields` are fields of a Shot (use_hunyuan_style, num_frames, scale, seed, ...).

        `face_image` is one or several photos of the same person, and `consent` why this face may be used, which photos of your
        own need: `{"subject": "NAME", "basis": "written", "reference": "FILE"}`. `image` is the start image, `last_image` the
        image that the clip ends with. `on_progress` is called with the name of the running stage, its finished steps and its
        number of steps. By default, notebooks show a progress bar.
        Raises ScriptError for an invalid field, SetupError if weights are not on this machine, LicenceError if they do not
        allow what is required, StepFailed if a stage fails, and what `on_progress` raises.
        """
        return self._generate(
            "generate_video",
            prompt,
            image,
            face_image=face_image,
            consent=consent,
            last_image=last_image,
            lora_path=lora_path,
            on_progress=on_progress,
            **fields,
        )

    def image(self, prompt: str, *, image: Photo | None = None, **fields: Unpack[GenerateFields]) -> PILImage.Image:
        """Generate an image. Takes the arguments of `generate_video`, and raises what it raises."""
        fields["generate_video"] = False
        return self._generate("image", prompt, image, **fields).image

    def animate(self, image: Photo, prompt: str = "animate", **fields: Unpack[GenerateFields]) -> GeneratedVideo:
        """Generate a clip that starts with an image, without upscaling it unless `upscale_video` is true.

        Takes the arguments of `generate_video`, and raises what it raises.
        """
        fields.setdefault("upscale_video", False)
        if image is None:
            raise ScriptError(
                [FieldError("animate", None, "image", "None", "must be an image; generate_video makes a clip without one")]
            )
        return self._generate("animate", prompt, image, **fields)

    @_in_turn
    def _generate(
        self,
        method: str,
        prompt: str,
        image: Photo | None,
        *,
        face_image: Photo | Sequence[Photo] | None = None,
        consent: Consent | Mapping[str, str] | str | None = None,
        last_image: Photo | None = None,
        lora_path: str | Path | None = None,
        on_progress: ProgressCallback | None = None,
        **fields: Unpack[_ShotFields],
    ) -> GeneratedVideo:
        """Render one shot for a method of this name."""
        shot_fields: dict[str, Any] = {"prompt": prompt, **fields}
        if consent is not None:
            shot_fields["consent"] = consent if isinstance(consent, str | Consent) else dict(consent)
        if lora_path is not None:
            shot_fields["lora"] = str(lora_path)
        if image is not None:
            shot_fields["image"] = self._as_file(method, "image", image)
        if last_image is not None:
            shot_fields["last_image"] = self._as_file(method, "last_image", last_image)
        if face_image is not None:
            photos = _as_list(face_image)
            if not photos:
                raise ScriptError([FieldError(method, None, "face_image", "no photos", "must be one or more photos, or None")])
            shot_fields["face_image"] = [self._as_file(method, "face_image", photo) for photo in photos]
        shot = check_shot(shot_fields, method, self.profile.defaults, policy=self.profile.policy)
        with _reporting(on_progress):
            record = self._render(shot)
        shot_id = shot.id or ""
        picture = PILImage.open(io.BytesIO(self.outputs.read(shot_id, IMAGE_FILE)))
        # Decoded here: a later first use by two threads at once would fail.
        picture.load()
        return GeneratedVideo(
            image=picture,
            video=self.outputs.place(shot_id, VIDEO_FILE) if VIDEO_FILE in record.files else None,
            hd_video=self.outputs.place(shot_id, HD_FILE) if HD_FILE in record.files else None,
            record=record,
        )

    @overload
    def upscale(
        self,
        source: PILImage.Image | np.ndarray[Any, Any] | bytes,
        *,
        out: str | Path | None = None,
        on_progress: ProgressCallback | None = None,
        **fields: Unpack[_ShotFields],
    ) -> PILImage.Image: ...

    @overload
    def upscale(
        self,
        source: str | Path,
        *,
        out: str | Path | None = None,
        on_progress: ProgressCallback | None = None,
        **fields: Unpack[_ShotFields],
    ) -> Path | PILImage.Image: ...

    @_in_turn
    def upscale(
        self,
        source: Photo,
        *,
        out: str | Path | None = None,
        on_progress: ProgressCallback | None = None,
        **fields: Unpack[_ShotFields],
    ) -> Path | PILImage.Image:
        """Upscale an image or a clip by `scale`, with `upscaler`. Return the image, or the path of the clip.

        A clip is a path. Its result is written to `out`, by default into the same folder, as `vidgen upscale` writes it: with
        its sound. An image is also written to a file if `out` is given.
        Raises ScriptError for an invalid field, UsageError for an `out` that does not end in .mp4, .mov or .mkv, or in .png for
        an image, MediaError, WriteError and StepFailed.
        """
        shot = check_shot({"prompt": "upscale", **fields}, "upscale", self.profile.defaults)
        if isinstance(source, str | Path) and URL_START.match(str(source)):
            raise ScriptError([FieldError("upscale", None, "source", shortened_value(str(source)), NOT_A_URL)])
        with _reporting(on_progress):
            if isinstance(source, str | Path) and Path(source).suffix.lower() in CLIP_SUFFIXES:
                target = Path(out or Path(source).with_name(f"{Path(source).stem}-x{shot.scale}.mp4"))
                return process_video_file(self.profile, RealESRGANStage, shot, Path(source), target)
            if out is not None and Path(out).suffix.lower() != ".png":
                raise UsageError(f"out: got {str(out)!r}, must end in .png for an image")
            path = Path(self._as_file("upscale", "source", source))
            image = read_image(path)
            (stage,) = self._stages([RealESRGANStage], shot)
            self._swapper.ensure_on_gpu(stage.name)
            try:
                frames = stage.run_chunk(shot, image[None])
            except Exception as error:
                raise StepFailed(stage.name, error) from error
            return self._upscaled_image(frames, path, None if out is None else Path(out))

    def _upscaled_image(self, frames: Frames, source: Path, out: Path | None) -> PILImage.Image:
        """Return an upscaled image (1, H, W, 3) with label and mark. Write it to `out`, if given, and sign it there."""
        marking = self.profile.provenance
        record = altered_record(InputFile.read(source, digest(source)), "stage", [RealESRGANStage.name], marking)
        metadata = metadata_of(record)
        (pixels,) = with_label(frames, marking)
        if out is not None:
            write_png(out, pixels, metadata)
            sign_result(out, record, marking, source)
        image = PILImage.fromarray(pixels)
        if metadata is not None:
            image.info |= {"xmp": metadata.xmp.encode(), "Comment": metadata.comment}
        return image

    def plan(self, shot: Shot) -> ShotPlan:
        """Return the steps and content keys of a shot. Raises StepFailed if one of its files cannot be read."""
        try:
            params = params_of(self.profile, stages_of(shot))
            return ShotPlanner(params, self.profile.encode, self._licences, self.profile.provenance)(shot)
        except OSError as error:
            raise StepFailed("plan", error) from error

    @_in_turn
    def render(self, shot: Shot) -> ShotRecord:
        """Render a checked shot unless it is finished already.

        Raises StepFailed, ScriptError for `continue_from` and files that are no images or LoRAs, and LicenceError.
        """
        return self._render(shot)

    def _render(self, shot: Shot) -> ShotRecord:
        source_licences: tuple[UsedWeights, ...] = ()
        if shot.continue_from is not None and shot.image is None:
            frame, source_licences = self._last_frame(shot.continue_from)
            shot = shot.continued(str(frame))
        return self._render_planned(self.plan(shot).with_source_licences(source_licences))

    def _last_frame(self, shot_id: str) -> tuple[Path, tuple[UsedWeights, ...]]:
        """Return the file with the last frame of a finished shot, and the licences of that shot.

        The shot is rendered again if its last frame was not kept.
        """
        finished = self.outputs.find_by_id(shot_id)
        if finished is None:
            allowed = f"must be the id of a finished shot in {self.outputs.url}"
            raise ScriptError([FieldError("shot", None, "continue_from", repr(shot_id), allowed)])
        if (frame := self.outputs.last_frame(finished)) is not None:
            return frame, finished.licences
        # It may itself continue another shot, whose licences are in its record only.
        self._render_planned(self.plan(finished.shot).with_source_licences(finished.licences).with_last_frame())
        return self._last_frame(shot_id)

    def _render_planned(self, plan: ShotPlan) -> ShotRecord:
        require_licence(self._required_licence, plan.licences)
        if (done := self.outputs.find_finished(plan, self._keep_stages)) is not None:
            return done
        if (wrong := file_problem(plan.shot, self.profile, "shot", decode=True)) is not None:
            raise wrong
        return self._render_unfinished(plan)

    def _render_unfinished(self, plan: ShotPlan) -> ShotRecord:
        stages = self._stages(stages_of(plan.shot), plan.shot)
        runner = StepRunner(
            stages,
            1.0 if any(stage.params.device != "cpu" for stage in stages) else 0.0,
            self._cache,
            check_weights=self._check_weights,
            swapper=self._swapper,
            fallback=self._oom_fallback,
            safety=self.profile.checker,
        )
        failures = []
        with shot_without_row(self.outputs.storage):
            for tried in (plan, *plan.again):
                try:
                    return self._render_try(runner, tried)
                except LikenessTooLow as failure:
                    failures.append(failure)
        raise StepFailed(LIKENESS, best_try(failures))

    def _render_try(self, runner: StepRunner, plan: ShotPlan) -> ShotRecord:
        """Render with one seed. Raises LikenessTooLow as soon as a likeness is below the minimum."""
        item, records = Item(plan.shot), list[StepRecord]()
        for step in plan.steps:
            if not is_chunked(step.stage):
                stage = runner.stages[step.stage]
                with _others_compute() if stage.places(stage.params) else nullcontext():
                    item, new_records = runner.run(plan, item, [step.stage])
                records += new_records
                check_likeness(plan.shot, item.artefacts)
        profile = self.profile
        files = ShotFiles(plan, item, self.outputs, profile.encode, self._keep_stages, profile.provenance, profile.checker)
        with closing(files):
            if chunked := [stage.name for stage in chunked_stages_of(plan.shot)]:
                records += self._chunked(runner, plan, chunked, item, files)
            return files.commit(records)

    def _chunked(
        self, runner: StepRunner, plan: ShotPlan, steps: Sequence[str], item: Item, files: ShotFiles
    ) -> tuple[StepRecord, ...]:
        """Process and encode the clip chunk by chunk. A whole upscaled clip would take gigabytes."""
        records = []
        unit = chunk_unit(plan.shot, chunk_frames_of(self.profile, chunked_stages_of(plan.shot)))
        for chunk in clip_chunks(plan.shot, unit):
            made, chunk_records = runner.run_chunk(plan, steps, chunk, item.artefacts)
            files.add(made)
            records.append(chunk_records)
        return join_records(records)

    @_in_turn
    def close(self) -> None:
        """Release all weights, when the call in progress has ended. A later call loads them again."""
        for stage in self._loaded.values():
            stage.close()
        self._loaded.clear()
        # Models have reference cycles.
        free_gpu_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stages(self, classes: Sequence[type[_S]], shot: Shot) -> list[_S]:
        """Return loaded stages for a shot. On a GPU that is too small for all of them, groups of stages take turns.

        Raises SetupError if the shot does not fit on the GPU, with the size that would, and if weights are not on this machine.
        """
        needed = {stage.name: stage for stage in classes}
        if any(self.profile.actor_of(stage).device != "cpu" for stage in classes):
            machine = this_machine().nodes[0]
            if not self._loaded:
                prepare_gpu(1.0, max(machine.gpus, default=0.0))
            every = [stage for stage in STAGES if stage.name in needed or stage.name in self._loaded]
            groups = swap_groups(self.profile, every, [*self._sizes.shots, shot], machine)
            self._sizes.add(shot)
            self._swapper.regroup(groups)
        for stage_class in classes:
            if stage_class.name not in self._loaded:
                stage = stage_class(self.profile.params(stage_class))
                stage.jobs = self.outputs.remote_jobs
                self._check_weights.before_load([stage])
                self._swapper.ensure_on_gpu(stage.name)
                stage.load()
                self._loaded[stage_class.name] = stage
        # Stored under their own names.
        return [self._loaded[name] for name in needed]  # type: ignore[misc]

    def _as_file(self, method: str, field: str, photo: Photo) -> str:
        """Return the path of a photo. An image in memory is stored in the output folder, so that the shot can be repeated.

        Raises ScriptError for anything else.
        """
        if isinstance(photo, str | Path):
            if URL_START.match(str(photo)):
                # Refused with the other fields.
                return str(photo)
            return str(Path(photo).absolute())
        if isinstance(photo, bytes):
            return str(self.outputs.keep_input(photo, ".image").absolute())
        mark = None
        if isinstance(photo, PILImage.Image):
            # An image that this library has returned stays marked as AI-generated.
            mark = mark_of(photo)
            try:
                photo = rgb_of(photo)
            except MediaError as error:
                raise ScriptError([FieldError(method, None, field, "an unusable image", str(error))]) from None
        is_pixels = isinstance(photo, np.ndarray) and photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3
        if not is_pixels or not photo.size:
            got = f"an array of {photo.dtype} {photo.shape}" if isinstance(photo, np.ndarray) else shortened_value(photo)
            allowed = "must be a path, a PIL image, the bytes of an image file, or an array (H, W, 3) of uint8"
            raise ScriptError([FieldError(method, None, field, got, allowed)])
        return str(self.outputs.keep_input(encode_png(photo, mark), ".png").absolute())


def _as_list(photos: Photo | Sequence[Photo]) -> list[Photo]:
    if isinstance(photos, Sequence) and not isinstance(photos, str | bytes):
        return list(photos)
    return [photos]


@contextmanager
def _reporting(on_progress: ProgressCallback | None) -> Iterator[None]:
    """Report the progress of the block to a callback; without one, in a notebook, to a progress bar.

    Raises what the callback raises, in place of the failure that this causes in the block.
    """
    with ExitStack() as stack:
        if on_progress is None and in_notebook():
            on_progress = stack.enter_context(progress_bar())
        if on_progress is None:
            yield
            return
        callback = _Callback(on_progress)
        stack.enter_context(progress_callback(callback))
        try:
            yield
        except Exception:
            if callback.error is None:
                raise
        if (error := callback.error) is not None:
            # Its own cause, if it has one, in place of the failure of the stage.
            raise error from error.__cause__


class _Callback:
    """Callback of a user. What it raises is kept, and raised again by later calls, also if a stage tries again."""

    def __init__(self, on_progress: ProgressCallback) -> None:
        self._on_progress = on_progress
        self.error: BaseException | None = None

    def __call__(self, stage: str, step: int, steps: int) -> None:
        if self.error is not None:
            raise self.error
        # Clips are enlarged by threads of their own.
        with _computing():
            try:
                self._on_progress(stage, step, steps)
            except BaseException as error:
                self.error = error
                raise
