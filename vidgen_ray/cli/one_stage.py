"""`vidgen shot` and `vidgen stage`: render one shot, or run a single stage on an image or a clip, in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from vidgen_ray.cli.commands import interruptible, note, note_no_face
from vidgen_ray.cli.file_options import JsonOption, LabelledMarkOptions
from vidgen_ray.cli.options import (
    AspectOption,
    ConsentOption,
    KeepOption,
    ModeOption,
    OutOption,
    ProfileOption,
    SeedOption,
    SetOption,
    UntilOption,
    changes_until,
    local_path,
    parse_fields,
    with_consent,
)
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.errors import MediaError, SetupError, UsageError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.images import cover_crop, read_image, write_png
from vidgen_ray.media.media_file import CLIP_SUFFIXES, FileMetadata
from vidgen_ray.outputs.stage_cache import face_from_json, face_to_json, likeness_to_json
from vidgen_ray.pipeline import VideoGenerationPipeline, process_video_file, progress_bar
from vidgen_ray.planner.cluster import profile_for, this_machine
from vidgen_ray.planner.gpu_memory import swap_groups
from vidgen_ray.profile import AUTO, Profile
from vidgen_ray.provenance.record import InputFile, ProvenanceRecord, SourceType, altered_record, metadata_of, with_label
from vidgen_ray.provenance.signing import check_signing, sign_result
from vidgen_ray.render.oom_fallback import OomFallback, prepare_gpu
from vidgen_ray.render.shot_files import write_clip
from vidgen_ray.render.step_runner import StepFailed, with_images
from vidgen_ray.script.check import check_shot
from vidgen_ray.shot import MODEL_FIELDS, Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, FaceFeatures, Frames, Item, Stage, progress_callback
from vidgen_ray.stages.identity import pose_image
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.console import Console
from vidgen_ray.system.files import write_atomically


def stage(
    name: Annotated[str, typer.Argument(help=f"Stage to run: {', '.join(STAGE_BY_NAME)}.")],
    marks: LabelledMarkOptions,
    source: Annotated[Path | None, typer.Argument(help="Input file: an image, a clip or face.json. Not used by flux.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", parser=local_path, help="Output file: .png, .mp4 or .json.")
    ] = Path("out.png"),
    profile: ProfileOption = AUTO,
    seed: SeedOption = 0,
    fields: SetOption = None,
    consent: ConsentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a single stage on an image or a clip."""
    chosen = marks.applied(profile_for(profile))
    # Results of a single stage are not cached.
    again = interruptible("Run the same command again.")
    with again, progress_bar(Console(stderr=True)) as on_progress, progress_callback(on_progress):
        is_media = run_one_stage(chosen, name, source, out, with_consent(parse_fields(fields), consent), seed)
    marking = chosen.provenance
    note = {"metadata": marking.metadata, "label": marking.label, "signed": marking.signing_key is not None}
    typer.echo(json.dumps({"out": str(out), "provenance": note if is_media else None}) if as_json else str(out))


def shot(
    prompt: Annotated[str, typer.Argument(help="Text to render.")],
    marks: LabelledMarkOptions,
    out: OutOption = "out",
    profile: ProfileOption = AUTO,
    face: Annotated[
        list[Path] | None, typer.Option("--face", help="Photo of the person. Repeat for more photos of the same person.")
    ] = None,
    consent: ConsentOption = None,
    lora: Annotated[str | None, typer.Option("--lora", help="LoRA weights, a .safetensors file.")] = None,
    seed: SeedOption = 0,
    mode: ModeOption = None,
    aspect: AspectOption = None,
    until: UntilOption = None,
    fields: SetOption = None,
    keep: KeepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Render one prompt, in this process and without Ray."""
    chosen = marks.applied(profile_for(profile))
    values = with_consent(parse_fields(fields), consent)
    if prompt.startswith("@"):
        note(f"note: {prompt!r} is the prompt; no file is read, `vidgen render FILE.txt` reads one")
    if "prompt" in values:
        raise typer.BadParameter("got prompt, which is the argument PROMPT of this command", param_hint="--set")
    options = {"prompt": prompt, "face_image": [str(photo) for photo in face] if face else None, "lora": lora, "mode": mode}
    options["aspect"] = aspect
    values |= {name: value for name, value in options.items() if value is not None}
    checked = check_shot(values, "shot", chosen.defaults, run_seed=seed, policy=chosen.policy)
    checked = checked.model_copy(update=changes_until(until)).cropped_to_aspect()
    pipeline = VideoGenerationPipeline(chosen, out, keep_stages=bool(keep))
    with interruptible(), progress_bar(Console(stderr=True)) as on_progress, progress_callback(on_progress):
        record = pipeline.render(checked)
    for text in (*map(str, record.cut_texts), *(text for step in record.stages for text in step.notes)):
        note(f"note: {text}")
    note_no_face(record.likeness is not None and record.likeness.image is None, chosen)
    if as_json:
        typer.echo(record.model_dump_json())
    else:
        for file in record.files:
            typer.echo(str(pipeline.outputs.place(checked.id or "", file)))


def run_one_stage(
    profile: Profile, name: str, source: Path | None, out: Path, fields: Mapping[str, Any], run_seed: int
) -> bool:
    """Read `source`, run the stage and write `out`, marked, labelled and signed as the profile says.

    Return whether `out` is an image or a clip that a stage has made: measured values and drawings of them are not marked.

    Raises UsageError, ScriptError for an invalid field, and StepFailed.
    """
    if name not in STAGE_BY_NAME:
        raise UsageError(f"stage: got {name!r}, must be one of {', '.join(STAGE_BY_NAME)}")
    stage_class = STAGE_BY_NAME[name]
    _check_suffix(stage_class, out)
    check_signing(profile.provenance)
    # Every shot requires a prompt, even if the stage does not read it.
    values = fields if "prompt" in stage_class.reads else {"prompt": name, **fields}
    # Without the model of the stage, the shot would have the defaults of another one.
    values = {**{field: value for field, value in stage_class.examples[0].items() if field in MODEL_FIELDS}, **values}
    if "photos" in stage_class.takes and source is not None:
        # The shot's fields select the embeddings, and they apply only to a shot with a face.
        values = {"face_image": str(source), **values}
    shot = check_shot(values, "vidgen stage", profile.defaults, run_seed, policy=profile.policy)
    if profile.actor_of(stage_class).device != "cpu":
        machine = this_machine().nodes[0]
        # Raises SetupError for a shot that does not fit.
        swap_groups(profile, [stage_class], [shot], machine)
        prepare_gpu(1.0, max(machine.gpus, default=0.0))
    is_clip = source is not None and source.suffix.lower() in CLIP_SUFFIXES
    if issubclass(stage_class, ChunkedStage) and is_clip and source is not None:
        process_video_file(profile, stage_class, shot, source, out)
        return True
    artefacts, fps = _read(stage_class, source, shot)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{out.parent}: cannot be created ({error.strerror})") from None
    if "face" in stage_class.needs(shot) and "face" not in artefacts:
        artefacts["face"] = _face_of(profile, shot)
    item = with_images(Item(shot, artefacts), stage_class.needs(shot))
    with stage_class(profile.params(stage_class)) as stage:
        item = Item(with_local_loras(shot), item.artefacts)
        try:
            result, _ = OomFallback().run(stage, shot, lambda: stage(item))
        except Exception as error:
            raise StepFailed(name, error) from error
    record = _record(stage_class, source, profile)
    if is_media := _write(result, shot, out, fps, profile, metadata_of(record)):
        sign_result(out, record, profile.provenance, source)
    return is_media


def _record(stage: type[Stage[Any]], source: Path | None, profile: Profile) -> ProvenanceRecord | None:
    """Return the record of the result: generated from nothing or from a face, or an altered image or clip."""
    settings = profile.provenance
    if source is None or not stage.takes or "face" in stage.takes:
        if settings.metadata == "off":
            return None
        return ProvenanceRecord(source_type="trainedAlgorithmicMedia", operation="stage", stages=(stage.name,))
    altered: SourceType = "compositeWithTrainedAlgorithmicMedia"
    if issubclass(stage, ChunkedStage):
        altered = "algorithmicallyEnhanced"
    elif "frames" in stage.writes:
        altered = "trainedAlgorithmicMedia"
    return altered_record(InputFile.read(source, digest(source)), "stage", [stage.name], settings, altered)


def _note_animation(source: Path) -> None:
    with Image.open(source) as image:
        frames = getattr(image, "n_frames", 1)
    if frames > 1:
        note(f"{source}: has {frames} frames, the first is used; for all of them, convert it to .mp4")


def _check_suffix(stage: type[Stage[Any]], out: Path) -> None:
    allowed = {"face": (".json", ".png"), "image": (".png",), "frames": (".mp4",), "hd_frames": (".mp4", ".png")}
    suffixes = allowed.get(stage.writes[0], (".json",))
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"--out: got {str(out)!r}, must end in {' or '.join(suffixes)} for {stage.name}")


def _read(stage: type[Stage[Any]], source: Path | None, shot: Shot) -> tuple[Artefacts, int | Fraction]:
    """Read the stage's input from the file. Return it with the frames per second of the clip to write."""
    if not stage.takes:
        if source is not None:
            raise UsageError(f"SOURCE: got {str(source)!r}, {stage.name} has no input file")
        return Artefacts(), shot.fps
    (kind,) = set(stage.takes) - {"face"} or {"face"}
    if source is None:
        raise UsageError(f"SOURCE: got nothing, {stage.name} requires an input file ({kind})")
    if kind == "frames":
        return _read_clip(source, shot)
    if kind == "face":
        return Artefacts(face=_read_face(source)), shot.fps
    image = read_image(source)
    if kind == "image":
        return Artefacts(image=cover_crop(image, shot.width, shot.height)), shot.fps
    return Artefacts(photos=(image,)), shot.fps


def _read_face(source: Path) -> FaceFeatures:
    try:
        return face_from_json(source.read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"SOURCE: got {str(source)!r}, must be a .json file written by stage instantid ({error})") from None


def _face_of(profile: Profile, shot: Shot) -> FaceFeatures:
    """Compute the face features from the shot's photos."""
    if not InstantIDStage.applies(shot):
        raise UsageError("face_image: got nothing, the stage needs a face; pass a photo with -s face_image=PHOTO")
    with InstantIDStage(profile.params(InstantIDStage)) as stage:
        try:
            return stage(with_images(Item(shot), stage.takes))["face"]
        except Exception as error:
            raise StepFailed(stage.name, error) from error


def _read_clip(source: Path, shot: Shot) -> tuple[Artefacts, int | Fraction]:
    if source.suffix.lower() not in CLIP_SUFFIXES:
        try:
            image = read_image(source)
        except MediaError as error:
            raise MediaError(f"{error}. If it is a video, name it .mp4, .mkv, .mov, .webm or .avi; convert others") from None
        _note_animation(source)
        return Artefacts(frames=image[None]), shot.fps
    with open_video(source) as video:
        return Artefacts(frames=video.frames(0, video.frame_count)), Fraction(video.fps)


def _write(
    result: Artefacts, shot: Shot, out: Path, fps: int | Fraction, profile: Profile, metadata: FileMetadata | None
) -> bool:
    """Write the result. Return whether it is an image or a clip that the stage has made."""
    clip: Frames | None = result.get("hd_frames", result.get("frames"))
    if clip is None and "image" in result:
        clip = result["image"][None]
    if clip is not None:
        clip = with_label(clip, profile.provenance)
        if out.suffix.lower() == ".mp4":
            write_clip(out, [clip], fps, profile.encode, metadata)
        elif len(clip) == 1:
            write_png(out, clip[0], metadata)
        else:
            raise UsageError(f"--out: got {str(out)!r}, must end in .mp4 for {len(clip)} frames")
        return True
    if "face" in result and out.suffix.lower() == ".json":
        write_atomically(out, face_to_json(result["face"]))
    elif likeness := result.get("image_likeness", result.get("clip_likeness")):
        write_atomically(out, likeness_to_json(likeness))
    elif "face" in result:
        write_png(out, pose_image(result["face"], shot))
    return False
