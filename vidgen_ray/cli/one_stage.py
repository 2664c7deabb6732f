"""`vidgen stage`: one stage on one picture or clip."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from vidgen_ray.atomic_files import write_atomically
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.engine.shot_writer import write_clip
from vidgen_ray.engine.step_runner import StepFailed, with_pictures
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.media import cover_crop, open_video, read_image, write_png
from vidgen_ray.outputs.stage_cache import face_from_json, face_to_json, likeness_to_json
from vidgen_ray.profile import Profile
from vidgen_ray.script.reader import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, FaceFeatures, Frames, Item, Stage, frame_chunks
from vidgen_ray.stages.identity.pose import pose_image
from vidgen_ray.stages.instantid import InstantIDStage

CLIP_ENDINGS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")


def run_one_stage(
    profile: Profile, name: str, source: Path | None, out: Path, fields: Mapping[str, Any], run_seed: int
) -> None:
    """Read `source`, run the stage, write `out`. Raises UsageError, ScriptError for a wrong field, StepFailed."""
    if name not in STAGE_BY_NAME:
        raise UsageError(f"stage: got {name!r}, must be one of {', '.join(STAGE_BY_NAME)}")
    stage_class = STAGE_BY_NAME[name]
    _check_ending(stage_class, out)
    # A stage without a prompt still takes a shot, and every shot has one.
    told = fields if "prompt" in stage_class.reads else {"prompt": name, **fields}
    if "photos" in stage_class.takes and source is not None:
        # Which embeddings are made depends on what the shot will do with the face.
        told = {"face_image": str(source), **told}
    shot = check_shot(told, "vidgen stage", profile.defaults, run_seed)
    artefacts, fps = _read(stage_class, source, shot)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{out.parent}: cannot be made ({error.strerror})") from None
    if "face" in stage_class.needs(shot) and "face" not in artefacts:
        artefacts["face"] = _person(profile, shot)
    with stage_class(profile.params(stage_class)) as stage:
        try:
            if isinstance(stage, ChunkedStage) and out.suffix.lower() == ".mp4":
                chunks = _processed_chunks(stage, shot, artefacts["frames"])
                write_clip(out, chunks, fps * stage.frame_factor(shot), profile.encode)
                return
            (given,) = stage([Item(with_local_loras(shot), artefacts)])
        except Exception as error:
            raise StepFailed(name, error) from error
    _write(given, shot, out, fps, profile)


def _processed_chunks(stage: ChunkedStage[Any], shot: Shot, frames: Frames) -> Iterator[Frames]:
    """Process the clip chunk by chunk. A whole upscaled clip may not fit in memory."""
    for chunk in frame_chunks(len(frames), stage.chunk_frames(stage.params)):
        yield stage.run_chunk(shot, frames[chunk], frames[chunk.stop : chunk.stop + stage.lookahead_frames])


def _check_ending(stage: type[Stage[Any]], out: Path) -> None:
    allowed = {"face": (".json", ".png"), "image": (".png",), "frames": (".mp4",), "hd_frames": (".mp4", ".png")}
    endings = allowed.get(stage.writes[0], (".json",))
    if out.suffix.lower() not in endings:
        raise UsageError(f"--out: got {str(out)!r}, {stage.name} writes {' or '.join(endings)}")


def _read(stage: type[Stage[Any]], source: Path | None, shot: Shot) -> tuple[Artefacts, int | Fraction]:
    """What the stage takes, out of the file; and the frames a second of a clip."""
    if not stage.takes:
        if source is not None:
            raise UsageError(f"SOURCE: got {str(source)!r}, {stage.name} works on the shot's fields alone")
        return Artefacts(), shot.fps
    (kind,) = set(stage.takes) - {"face"} or {"face"}
    if source is None:
        raise UsageError(f"SOURCE: got nothing, {stage.name} needs a file of its {kind}")
    if kind == "frames":
        return _clip(source, shot)
    if kind == "face":
        return Artefacts(face=_face(source)), shot.fps
    picture = read_image(source)
    if kind == "image":
        return Artefacts(image=cover_crop(picture, shot.width, shot.height)), shot.fps
    return Artefacts(photos=(picture,)), shot.fps


def _face(source: Path) -> FaceFeatures:
    try:
        return face_from_json(source.read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"SOURCE: got {str(source)!r}, must be a .json file of the stage instantid ({error})") from None


def _person(profile: Profile, shot: Shot) -> FaceFeatures:
    """The features of the shot's person."""
    if not InstantIDStage.applies(shot):
        raise UsageError("face_image: got nothing, the stage needs a face; name a photo by -s face_image=PHOTO")
    with InstantIDStage(profile.params(InstantIDStage)) as stage:
        try:
            return stage([with_pictures(Item(shot), stage.takes)])[0]["face"]
        except Exception as error:
            raise StepFailed(stage.name, error) from error


def _clip(source: Path, shot: Shot) -> tuple[Artefacts, int | Fraction]:
    if source.suffix.lower() not in CLIP_ENDINGS:
        return Artefacts(frames=read_image(source)[None]), shot.fps
    with open_video(source) as video:
        return Artefacts(frames=video.frames(0, video.frame_count)), Fraction(video.fps)


def _write(given: Artefacts, shot: Shot, out: Path, fps: int | Fraction, profile: Profile) -> None:
    clip: Frames | None = given.get("hd_frames", given.get("frames"))
    if "face" in given and out.suffix.lower() == ".json":
        write_atomically(out, face_to_json(given["face"]))
    elif likeness := given.get("image_likeness", given.get("clip_likeness")):
        write_atomically(out, likeness_to_json(likeness))
    elif "face" in given:
        write_png(out, pose_image(given["face"], shot))
    elif clip is None:
        write_png(out, given["image"])
    elif out.suffix.lower() == ".mp4":
        write_clip(out, [clip], fps, profile.encode)
    elif len(clip) == 1:
        write_png(out, clip[0])
    else:
        raise UsageError(f"--out: got {str(out)!r} for {len(clip)} frames, must be .mp4")
