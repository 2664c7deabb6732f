"""`vidgen stage`: one stage on one picture or clip."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from vidgen_ray.errors import FieldError, MediaError, ScriptError
from vidgen_ray.graph import STAGE_BY_NAME, with_local_loras
from vidgen_ray.media import cover_crop, open_video, read_image, write_png
from vidgen_ray.outputs.stage_cache import face_to_json
from vidgen_ray.pipeline import upscale_in_order, write_clip
from vidgen_ray.profile import Profile
from vidgen_ray.script import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Frames, Item, Stage
from vidgen_ray.stages.realesrgan import RealESRGANStage

CLIP_ENDINGS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")


def run_one_stage(
    profile: Profile, name: str, source: Path | None, out: Path, fields: Mapping[str, Any], run_seed: int
) -> None:
    """Read `source`, run the stage, write `out`. Raises ScriptError for a wrong name or field."""
    if name not in STAGE_BY_NAME:
        raise ScriptError([FieldError("vidgen stage", None, "NAME", repr(name), f"must be one of {', '.join(STAGE_BY_NAME)}")])
    stage_class = STAGE_BY_NAME[name]
    # A stage without a prompt still takes a shot, and every shot has one.
    told = fields if "prompt" in stage_class.reads else {"prompt": name, **fields}
    shot = check_shot(told, "vidgen stage", profile.defaults, run_seed)
    artefacts, fps = _read(stage_class, source, shot)
    with stage_class(profile.params(stage_class)) as stage:
        if isinstance(stage, RealESRGANStage) and out.suffix == ".mp4":
            # Chunk by chunk, since a whole clip enlarged four times may not fit in memory.
            out.parent.mkdir(parents=True, exist_ok=True)
            chunks = (chunk.frames for chunk in upscale_in_order(stage, shot, artefacts["frames"]))
            write_clip(out, chunks, fps, profile.encode)
            return
        (given,) = stage([Item(with_local_loras(shot), artefacts)])
    _write(given, out, fps, profile)


def _read(stage: type[Stage[Any]], source: Path | None, shot: Shot) -> tuple[Artefacts, int | Fraction]:
    """What the stage takes, out of the file; and the frames a second of a clip."""
    if not stage.takes:
        return Artefacts(), shot.fps
    (kind,) = stage.takes
    if source is None:
        raise ScriptError([FieldError("vidgen stage", None, "SOURCE", "nothing", f"{stage.name} needs a file of its {kind}")])
    if kind == "frames":
        return _clip(source, shot)
    picture = read_image(source)
    if kind == "image":
        return Artefacts(image=cover_crop(picture, shot.width, shot.height)), shot.fps
    return Artefacts(photo=picture), shot.fps


def _clip(source: Path, shot: Shot) -> tuple[Artefacts, int | Fraction]:
    if source.suffix.lower() not in CLIP_ENDINGS:
        return Artefacts(frames=read_image(source)[None]), shot.fps
    with open_video(source) as video:
        return Artefacts(frames=video.frames(0, video.frame_count)), Fraction(video.fps)


def _write(given: Artefacts, out: Path, fps: int | Fraction, profile: Profile) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    clip: Frames | None = given.get("hd_frames", given.get("frames"))
    if clip is not None and out.suffix == ".mp4":
        write_clip(out, [clip], fps, profile.encode)
    elif clip is not None and len(clip) == 1 and out.suffix == ".png":
        write_png(out, clip[0])
    elif "face" in given and out.suffix == ".json":
        out.write_text(face_to_json(given["face"]))
    elif "face" in given and out.suffix == ".png":
        write_png(out, given["pose"])
    elif "image" in given and out.suffix == ".png":
        write_png(out, given["image"])
    else:
        raise MediaError(f"{out}: {', '.join(given)} cannot be written as {out.suffix or 'a file without ending'}")
