"""Settings of a film, and the choice of its shots: their order, their settings and their files in the output folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, ValidationError, field_validator, model_validator

from vidgen_ray.errors import (
    NOT_A_URL,
    URL_START,
    FieldError,
    MissingShots,
    ScriptError,
    StrictModel,
    UsageError,
    allowed_of,
    known_fields,
    shortened_value,
)
from vidgen_ray.limits import MAX_PIXELS
from vidgen_ray.media.encode import Mp4Settings
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import REPLACED, manifest_batches
from vidgen_ray.outputs.records import HD_FILE, IMAGE_FILE, VIDEO_FILE
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.report.shot_text import place_in_script
from vidgen_ray.script.lines import file_error, read_yaml_file

_SIZE = re.compile(r"(\d{1,5})[x×](\d{1,5})")
_MIN_SIDE_PX = 16
_FILES = ("font", "music", "narration")
"""Fields that hold the path of a file."""

Transition = Literal["cut", "fade"]
_Model = TypeVar("_Model", bound=BaseModel)


class PixelSize(NamedTuple):
    """Width and height in pixels, both even."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def _size(value: Any) -> Any:
    """Parse `1280x720`."""
    if isinstance(value, PixelSize):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("must be WIDTHxHEIGHT, such as 1280x720")
    size = PixelSize(int(match[1]), int(match[2]))
    if min(size) < _MIN_SIDE_PX or size.width % 2 or size.height % 2 or size.width * size.height > MAX_PIXELS:
        raise ValueError(f"must be even numbers from {_MIN_SIDE_PX}, at most {MAX_PIXELS / 1e6:g} megapixels together")
    return size


def _rate(value: Any) -> Any:
    """Parse frames per second: 24, 12.5 or `30000/1001`."""
    try:
        rate = Fraction(str(value)).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if isinstance(value, bool) or not 1 <= rate <= 240:
        raise ValueError("must be frames per second from 1 to 240, such as 24, 12.5 or 30000/1001")
    return rate


FilmSize = Annotated[PixelSize, BeforeValidator(_size, json_schema_input_type=str), PlainSerializer(str)]
FilmRate = Annotated[Fraction, BeforeValidator(_rate, json_schema_input_type=float | str), PlainSerializer(str)]
_Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=2000)]


class ShotSettings(StrictModel):
    """Settings of one shot in a film. Also read from the fields of this name in the `metadata` of the shot."""

    caption: Text | None = Field(None, description="Text shown while the shot is on screen.")
    narration: Text | None = Field(None, description="Text to speak during the shot, if the film has a `voice`.")
    duration_s: _Seconds | None = Field(None, description="Seconds on screen. Default: the length of the clip.")
    fit: Literal["hold", "slow"] = Field(
        "hold",
        description="How a clip gets its `duration_s`. hold: repeat the last frame, or cut. slow: play slower, or faster.",
    )
    transition: Transition | None = Field(None, description="Transition from what comes before. Default: that of the film.")


SHOT_FIELDS = tuple(ShotSettings.model_fields)


class FilmEntry(ShotSettings):
    """One entry of `shots`: a shot of the output folder, or a title card."""

    id: str | None = Field(None, description="Id of a finished shot.")
    title: Text | None = Field(None, description="Text of a title card, in place of a shot.")

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if (self.id is None) == (self.title is None):
            raise ValueError("must have either id, for a shot, or title, for a title card")
        return self


class FilmSettings(StrictModel):
    """Description of a film. Relative paths in a file are relative to its folder."""

    title: Text | None = Field(None, description="Text of a title card at the start. Also the title in the file's metadata.")
    scene_titles: bool = Field(False, description="Put a title card before each scene, from `scene` in the shots' metadata.")
    title_s: _Seconds = Field(3.0, description="Seconds of a title card without `duration_s`.")
    size: FilmSize | None = Field(
        None, description="WIDTHxHEIGHT in pixels. Default: that of most shots. Other shots are scaled to fit, with black bars."
    )
    fps: FilmRate | None = Field(None, description="Frames per second, from 1 to 240. Default: that of most shots.")
    variant: Literal["hd", "video"] = Field("hd", description="hd: upscaled clips where there are any. video: clips before.")
    transition: Transition = Field("cut", description="Transition between shots: cut, or fade for a cross-fade.")
    fade_s: _Seconds = Field(
        0.5,
        description="Seconds of a cross-fade. At most half of the shorter neighbour is used, a third of a shot with a caption.",
    )
    still_s: _Seconds = Field(3.0, description="Seconds of a shot that has an image but no clip, without `duration_s`.")
    captions: Literal["file", "burn", "none"] = Field(
        "file",
        description="file: write captions as .srt and .vtt beside the film. burn: draw them into the picture, without files.",
    )
    timeline: Literal["otio", "fcpxml"] | None = Field(
        None,
        description="Also write the film as an edit: otio (OpenTimelineIO, extra `film`), or fcpxml (Final Cut, Resolve).",
    )
    font: Path | None = Field(None, description="Font of titles and burnt-in captions (.ttf, .otf). Default: DejaVu Sans.")
    music: Path | None = Field(None, description="Sound file, repeated to the end of the film and faded out.")
    music_db: float = Field(-6.0, ge=-60, le=12, description="Gain of the music in dB.")
    narration: Path | None = Field(None, description="Sound file that starts with the film. The music is lowered under it.")
    voice: str | None = Field(
        None,
        description="Speak the `narration` of the shots: espeak-ng:LANGUAGE, or piper:VOICE.onnx (extra `narration`).",
    )
    loudness_lufs: float = Field(-16.0, ge=-70, le=-5, description="Integrated loudness of the film (EBU R 128).")
    encode: Mp4Settings | None = Field(
        None, description="Compression of what is rendered. Default: that of the clips, so that unchanged ones can be copied."
    )
    shots: tuple[FilmEntry, ...] | None = Field(
        None, min_length=1, description="Shots and title cards in order. Default: all shots in the order of the script."
    )

    @model_validator(mode="after")
    def _check_narration(self) -> Self:
        if self.narration is not None and self.voice is not None:
            raise ValueError("got both narration and voice, must be one of them")
        return self

    @field_validator(*_FILES)
    @classmethod
    def _check_file(cls, path: Path | None) -> Path | None:
        if path is not None and URL_START.match(str(path)):
            raise ValueError(NOT_A_URL)
        if path is not None and not path.is_file():
            raise ValueError(f"must be an existing file (looked for {path.absolute()})")
        return path


def read_film_file(path: Path) -> dict[str, Any]:
    """Return the checked fields of a YAML film file, with absolute paths. Raises ScriptError that names the field."""
    content = read_yaml_file(path) or {}
    if not isinstance(content, dict):
        raise file_error(path, type(content).__name__, "must be fields such as `title: A day at sea`")
    return checked_fields(content, path.parent, path.name)


def checked_fields(fields: Mapping[str, Any], folder: Path, source: str) -> dict[str, Any]:
    """Return the fields of a film, with paths relative to `folder` made absolute. Raises ScriptError that names `source`."""
    files = {name: fields[name] for name in _FILES if isinstance(fields.get(name), str)}
    paths = {name: file if URL_START.match(file) else str(folder.absolute() / file) for name, file in files.items()}
    film_settings({**fields, **paths}, source)
    return {**fields, **paths}


def film_settings(fields: Mapping[str, Any], source: str) -> FilmSettings:
    """Validate the fields of a film. Raises ScriptError with all invalid fields; `source` is named in the messages."""
    return _validated(FilmSettings, fields, source)


def shot_settings(metadata: Mapping[str, Any], source: str) -> ShotSettings:
    """Return the settings in the metadata of a shot. Other keys are ignored. Raises ScriptError."""
    return _validated(ShotSettings, {name: metadata[name] for name in SHOT_FIELDS if name in metadata}, source)


def _validated(model: type[_Model], fields: Mapping[str, Any], source: str) -> _Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise ScriptError([_field_error(detail, source) for detail in error.errors(include_url=False)]) from None


def _field_error(detail: Any, source: str) -> FieldError:
    """Return pydantic's error as `film.yaml, shots[2].duration_s: got -1, must be greater than 0`."""
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).removeprefix(".")
    if detail["type"] == "extra_forbidden":
        names = (FilmEntry if field.startswith("shots[") else FilmSettings).model_fields
        return FieldError(source, None, field, "an unknown field", known_fields(str(detail["loc"][-1]), names))
    got = "the fields" if isinstance(detail["input"], dict) else shortened_value(detail["input"])
    return FieldError(source, None, field or None, got, allowed_of(detail))


_COLUMNS = ("script", "line", "id", "status", "metadata", "failure_stage", "failure_message")
VARIANT_FILES = {"hd": (HD_FILE, VIDEO_FILE), "video": (VIDEO_FILE, HD_FILE)}
"""Variant -> files of a shot, the first that exists is used."""


class ShotCandidate(NamedTuple):
    """A shot that may be part of the film."""

    id: str
    metadata: Mapping[str, Any] | None = None
    """`metadata` of its line. `None`: that of its record."""
    reason: str | None = None
    """Why the shot is not finished, if it is known."""


class ClipFormat(NamedTuple):
    """Properties of a video file."""

    size: PixelSize
    fps: Fraction
    frames: int
    has_sound: bool
    header: bytes | None
    """H.264 parameter sets. Clips with the same header can be joined by copying packets. `None` if that is impossible."""

    @property
    def seconds(self) -> Fraction:
        return self.frames / self.fps


class ChosenShot(NamedTuple):
    """A title card, or a finished shot with the file to show."""

    name: str
    """Id of the shot, or `title card N`."""
    settings: ShotSettings
    title: str | None = None
    """Text of a title card."""
    path: str | None = None
    """Clip or image, relative to the output folder. `None` for a title card."""
    sha256: str = ""
    is_clip: bool = False
    scene: str | None = None
    """Title of the scene."""
    clip: ClipFormat | None = None
    """Properties of the clip, once they have been read."""
    speech: str | None = None
    """Path of the sound file with the spoken narration."""
    speech_s: float = 0.0


def manifest_candidates(storage: Storage) -> list[ShotCandidate]:
    """Return the shots of the manifest in the order of their scripts; several scripts in the order of their names.

    Shots of lines that their script no longer has are left out.
    """
    rows = [
        row | {"metadata": json.loads(row["metadata"] or "{}")}
        for batch in manifest_batches(storage, _COLUMNS)
        for row in batch.to_pylist()
        if row["status"] != REPLACED
    ]
    return [
        ShotCandidate(
            row["id"],
            row["metadata"],
            f"failed in {row['failure_stage']}: {row['failure_message']}" if row["status"] == "failed" else None,
        )
        for row in sorted(rows, key=place_in_script)
    ]


def with_reasons(candidates: Iterable[ShotCandidate], of_manifest: Iterable[ShotCandidate]) -> list[ShotCandidate]:
    """Return the candidates with the reasons of the manifest's."""
    reasons = {candidate.id: candidate.reason for candidate in of_manifest}
    return [candidate._replace(reason=reasons.get(candidate.id)) for candidate in candidates]


def choose_shots(
    outputs: OutputFolder,
    settings: FilmSettings,
    candidates: Sequence[ShotCandidate],
    ids: Sequence[str] | None,
    *,
    skip_missing: bool,
) -> list[ChosenShot]:
    """Return title cards and finished shots in the order of the film.

    The order is that of `ids`, else of the settings' `shots`, else of the candidates.
    Raises MissingShots for unfinished shots, unless they are skipped, and UsageError if nothing is left.
    """
    known = {candidate.id: candidate for candidate in candidates}
    chosen, missing = [], []
    scene: str | None = None
    if settings.title is not None:
        chosen.append(ChosenShot("title", ShotSettings(), title=settings.title))
    entries = _entries(settings, candidates, ids)
    for number, entry in enumerate(entries, 1):
        if entry.id is None:
            chosen.append(ChosenShot(f"title card at position {number}", entry, title=entry.title))
            continue
        candidate = known.get(entry.id, ShotCandidate(entry.id))
        shot = _finished(outputs, settings, candidate, entry)
        if shot is None:
            missing.append(f"{entry.id}: {candidate.reason or f'not finished in {outputs.url}'}")
            continue
        if settings.scene_titles and shot.scene is not None and shot.scene != scene:
            scene = shot.scene
            chosen.append(ChosenShot(f"title card of scene {scene!r}", ShotSettings(), title=scene))
        chosen.append(shot)
    if missing and not skip_missing:
        raise MissingShots(missing, len(entries))
    if not any(shot.path for shot in chosen):
        raise UsageError(f"{outputs.url}: has no finished shots for a film; render a script into it first")
    return chosen


def _entries(settings: FilmSettings, candidates: Iterable[ShotCandidate], ids: Sequence[str] | None) -> Sequence[FilmEntry]:
    if ids is not None:
        own = {entry.id: entry for entry in settings.shots or ()}
        return [own.get(shot_id) or FilmEntry(id=shot_id) for shot_id in ids]
    return settings.shots or [FilmEntry(id=candidate.id) for candidate in candidates]


def _finished(outputs: OutputFolder, settings: FilmSettings, candidate: ShotCandidate, entry: FilmEntry) -> ChosenShot | None:
    """Return the shot with the file to show, or `None` if it is not finished, or failed when it was last rendered."""
    done = outputs.find_by_id(candidate.id) if candidate.reason is None else None
    if done is None:
        return None
    metadata = done.shot.metadata if candidate.metadata is None else candidate.metadata
    of_shot = shot_settings(metadata, f"shot {candidate.id}, metadata")
    merged = of_shot.model_copy(update={name: getattr(entry, name) for name in entry.model_fields_set & set(SHOT_FIELDS)})
    files = done.files
    clip = next((name for name in VARIANT_FILES[settings.variant] if name in files), None)
    name = clip or IMAGE_FILE
    scene = metadata.get("scene")
    return ChosenShot(
        candidate.id,
        merged,
        path=f"{done.folder}/{name}",
        sha256=files[name].sha256,
        is_clip=clip is not None,
        scene=scene if isinstance(scene, str) and scene.strip() else None,
    )
