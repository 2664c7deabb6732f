"""Write the files of one shot, cropped as the shot says, with their provenance records.

Stages and their caches only know whole images and frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vidgen_ray.content_keys import FILE_FIELDS, FILES_FIELDS, ShotPlan
from vidgen_ray.errors import MediaError
from vidgen_ray.graph import chunked_stages_of, clip_length, file_sizes, stages_of
from vidgen_ray.media import FileMetadata, Mp4Settings, Mp4Writer, centre_crop, write_png
from vidgen_ray.outputs.folder import LAST_FRAME, OutputFolder, ShotDraft
from vidgen_ray.outputs.records import CLIP_FILES, IMAGE_FILE, LikenessRecord, ProvenanceNote, ShotRecord, StepRecord
from vidgen_ray.outputs.stage_cache import StageCache, face_to_json
from vidgen_ray.provenance.record import (
    DEFAULT,
    GENERATED,
    ProvenanceRecord,
    ProvenanceSettings,
    SourceType,
    metadata_of,
    provenance_of_input,
    with_label,
)
from vidgen_ray.provenance.signing import sign_file
from vidgen_ray.render.step_runner import ForeignArtefacts, before_chunks, check_made_by, with_images
from vidgen_ray.safety import Safety
from vidgen_ray.shot import LORA_FIELDS, NESTED_FIELDS, Shot
from vidgen_ray.stages.base import Artefacts, Frames, Item, Stage

SIZES = ("width", "height", "crop_width", "crop_height")
SWITCHES = (
    "lora",
    "video_lora",
    "use_hunyuan_style",
    "style_model",
    "mode",
    "identity",
    "image_model",
    "video_model",
    "upscale_video",
    "generate_video",
)
"""Fields that decide which stages a shot passes. A test compares them with the stages."""
UNREAD_PROMPT = "(no stage reads the prompt)"
DIGEST_PREFIX = "sha256:"
"""Starts the name of a file in a record. Paths are private, and differ between machines for the same shot."""
BUILTIN_PREFIX = "builtin:"


def shot_record(
    plan: ShotPlan, artefact: str, settings: ProvenanceSettings, until: type[Stage[Any]] | None = None
) -> ProvenanceRecord | None:
    """Return the record of the file that is written from an artefact of a shot. `None` if nothing is written.

    `until`: the last stage behind the file, for an intermediate result. Default: the last one that makes the artefact.
    Equal keys give equal records: neither the id of the shot nor the paths of its files are part of them.
    """
    return shot_records(plan, [artefact], settings, until)[artefact]


def shot_records(
    plan: ShotPlan, artefacts: Iterable[str], settings: ProvenanceSettings, until: type[Stage[Any]] | None = None
) -> dict[str, ProvenanceRecord | None]:
    """Return artefact -> the record of the file that is written from it. See `shot_record`."""
    if settings.metadata == "off":
        return dict.fromkeys(artefacts)
    line = script_line(plan) if settings.metadata == "full" else None
    records: dict[str, ProvenanceRecord | None] = {}
    for artefact in artefacts:
        stages = stages_behind(plan.shot, artefact, until)
        names = tuple(stage.name for stage in stages)
        source_type = _source_type(plan.shot, artefact, stages)
        records[artefact] = ProvenanceRecord(source_type=source_type, key=plan.key, stages=names, shot=line)
    return records


def stages_behind(shot: Shot, artefact: str, until: type[Stage[Any]] | None = None) -> list[type[Stage[Any]]]:
    """Return the stages of a shot whose results are part of an artefact, in order. Stages that only measure are not."""
    behind: list[type[Stage[Any]]] = []
    needed = {artefact}
    stages = stages_of(shot)
    for stage in reversed(stages if until is None else stages[: stages.index(until) + 1]):
        if needed & set(stage.writes):
            behind.append(stage)
            needed |= set(stage.needs(shot))
    return behind[::-1]


def _source_type(shot: Shot, artefact: str, stages: list[type[Stage[Any]]]) -> SourceType | None:
    if artefact != "image" or shot.image is None or shot.continue_from is not None:
        return "trainedAlgorithmicMedia"
    start = provenance_of_input(Path(shot.image)).known_type
    if not stages or start in GENERATED:
        return start
    return "compositeWithTrainedAlgorithmicMedia"


def script_line(plan: ShotPlan) -> dict[str, Any]:
    """Return the fields of a shot that decide its files, with all values. Files are named by their digest.

    Fields that no stage of the shot reads are not part of its key, so they are left out, or have their default.
    """
    shot = _without_effectless(plan.shot)
    read = {name for stage in stages_of(shot) for name in (*stage.reads, *stage.identity_fields)}
    fields = {*SWITCHES, *SIZES, *FILE_FIELDS, *(name.partition(".")[0] for name in read)} & Shot.model_fields.keys()
    values = shot.model_dump(mode="json", include=fields, exclude_none=True)
    for name in values.keys() & set(NESTED_FIELDS):
        values[name] = {key: value for key, value in values[name].items() if f"{name}.{key}" in read}
    for name in FILE_FIELDS:
        if name in values:
            values[name] = f"{DIGEST_PREFIX}{plan.inputs[values[name]]}"
    for name in FILES_FIELDS:
        if name in values:
            values[name] = [f"{DIGEST_PREFIX}{plan.inputs[path]}" for path in values[name]]
    for name in LORA_FIELDS:
        for lora in values.get(name, ()):
            if not lora["path"].startswith(BUILTIN_PREFIX):
                lora["path"] = f"{DIGEST_PREFIX}{plan.inputs[lora['path']]}"
    return {name: values[name] for name in Shot.model_fields if values.get(name) not in (None, [], {})}


def _without_effectless(shot: Shot) -> Shot:
    """Return the shot with the default of every switch that does not change its way through the stages."""
    for name in SWITCHES:
        # Some defaults do not fit other models.
        with suppress(ValidationError):
            other = Shot.model_validate({**shot.model_dump(), name: Shot.model_fields[name].default})
            if _way(other) == _way(shot):
                shot = other
    # A script line of a continued shot names the start image instead.
    return shot.model_copy(update={"continue_from": None})


def _way(shot: Shot) -> list[tuple[Any, ...]]:
    """Return the stages of a shot, and the choices that decide their weights and inputs."""
    return [(stage, stage.needs(shot), *(getattr(shot, name) for name in stage.weight_fields)) for stage in stages_of(shot)]


def line_with_files(line: Mapping[str, Any], files: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return a script line with the paths of the files that it names by digest, and the fields whose files are unknown.

    `files`: sha256 -> path.
    """
    unknown = dict[str, None]()

    def found(field: str, name: str) -> str:
        digest = name.removeprefix(DIGEST_PREFIX)
        if digest != name and digest not in files:
            unknown[field] = None
        return files.get(digest, name)

    replaced = {"prompt": UNREAD_PROMPT, **line}
    for field in {*FILE_FIELDS, *FILES_FIELDS, *LORA_FIELDS} & line.keys():
        value = line[field]
        if isinstance(value, str):
            replaced[field] = found(field, value)
        else:
            replaced[field] = [
                found(field, each) if isinstance(each, str) else {**each, "path": found(field, each["path"])} for each in value
            ]
    return replaced, list(unknown)


IMAGE = "image"
FILES = {IMAGE: IMAGE_FILE, **CLIP_FILES}
"""Artefact -> file name of a shot's results."""


class ShotFiles:
    """Files of one shot while they are written. The clips that chunked stages make are encoded chunk by chunk.

    Call `close` in any case. It deletes what was not committed.
    """

    def __init__(
        self,
        plan: ShotPlan,
        item: Item,
        outputs: OutputFolder,
        encode: Mp4Settings,
        keep_stages: bool = False,
        provenance: ProvenanceSettings = DEFAULT,
        safety: Safety | None = None,
    ) -> None:
        """Write everything that does not come in chunks. Raises MediaError or OSError if it cannot be written.

        `safety` has checked what stages have made. A start image that no stage changes is checked here: raises UnsafeContent.
        """
        check_made_by(before_chunks(plan), item.artefacts)
        self._plan, self._shot = plan, plan.shot
        self._encode = encode
        self._provenance = provenance
        self._records = shot_records(plan, FILES, provenance)
        self._stages = outputs.stage_cache if keep_stages else None
        self._sizes = file_sizes(plan.shot)
        self._chunked = {stage.writes[0] for stage in chunked_stages_of(plan.shot)}
        self._clips: dict[str, Mp4Writer] = {}
        self._frames = 0
        """Frames of the chunks so far."""
        self._open_clips = ExitStack()
        self._likeness = LikenessRecord.of(item.artefacts)
        self._checker = None if safety is None else safety.version
        artefacts = with_images(item, ("image",), plan.inputs).artefacts
        # Of a clip from the prompt alone.
        if "image" not in artefacts:
            artefacts["image"] = artefacts["frames"][0]
        if safety is not None and "image" not in item.artefacts:
            safety.check_image(artefacts["image"])
        with ExitStack() as stack:
            self._draft = stack.enter_context(outputs.draft(plan))
            image = self._finished(IMAGE, artefacts["image"][None])[0]
            write_png(self._draft.path(IMAGE_FILE), image, self._metadata(IMAGE))
            if "frames" in artefacts and "frames" not in self._chunked:
                frames = self._finished("frames", artefacts["frames"])
                clip = self._draft.path(CLIP_FILES["frames"])
                write_clip(clip, [frames], plan.shot.fps, encode, self._metadata("frames"))
            if plan.keep_last_frame:
                # Without metadata: it is an input of another shot, and its digest is part of that shot's key.
                last = artefacts["frames"][-1] if "frames" in artefacts else artefacts["image"]
                write_png(self._draft.path(LAST_FRAME), last)
            self._open = stack.pop_all()

    def add(self, chunk: Artefacts) -> None:
        """Encode the next chunk of each clip that chunked stages make."""
        check_made_by(self._plan.steps, chunk)
        start, stop = chunk["chunk"]
        if stop <= self._frames:
            # The request was delivered twice.
            return
        if start != self._frames:
            raise ForeignArtefacts(f"the chunk of the frames {start} to {stop}, must begin with frame {self._frames}")
        self._frames = stop
        for name, file in CLIP_FILES.items():
            whole: Frames | None = chunk.get(name)  # type: ignore[assignment]  # an artefact of frames
            if whole is None:
                continue
            if name not in self._clips:
                _, fps = clip_length(self._shot)
                writer = Mp4Writer(self._draft.path(file), *self._sizes[name], fps, self._encode, self._metadata(name))
                self._clips[name] = self._open_clips.enter_context(writer)
            self._clips[name].write(self._finished(name, whole))

    def _finished(self, name: str, frames: Frames) -> Frames:
        """Return frames (T, H, W, 3) of an artefact as they are written: cropped and with the visible label."""
        return with_label(centre_crop(frames, *self._sizes[name]), self._provenance)

    def _metadata(self, name: str) -> FileMetadata | None:
        return metadata_of(self._records[name])

    def commit(self, records: Sequence[StepRecord]) -> ShotRecord:
        """Finish the files and commit the shot. Raises ForeignArtefacts if a chunk is missing."""
        n_frames = clip_length(self._shot)[0] if self._chunked else 0
        if self._frames != n_frames:
            raise ForeignArtefacts(f"chunks of {self._frames} frames, must be {n_frames}")
        self._open_clips.close()
        if self._stages is not None:
            _write_stages(self._draft, self._stages, self._provenance)
        note = ProvenanceNote(metadata=self._provenance.metadata, label=self._provenance.label)
        return self._draft.commit(records, self._likeness, note, self._sign, self._checker)

    def _sign(self, path: Path) -> bool:
        """Sign a finished file, if files are signed. Inputs of other shots and intermediate results are not."""
        record = next((self._records[name] for name, file in FILES.items() if file == path.name), None)
        if record is None or self._provenance.signing_key is None:
            return False
        sign_file(path, record, self._provenance.signing_key)
        return True

    def close(self) -> None:
        # A clip without frames cannot be closed. If it is not committed, it is deleted anyway.
        with self._open, suppress(MediaError, OSError):
            self._open_clips.close()


def write_clip(
    path: Path,
    chunks: Iterable[Frames],
    fps: int | Fraction,
    encode: Mp4Settings,
    metadata: FileMetadata | None = None,
) -> None:
    """Encode chunks of frames, each (T, H, W, 3), one by one."""
    chunks = iter(chunks)
    first = next(chunks)
    with Mp4Writer(path, first.shape[2], first.shape[1], fps, encode, metadata) as writer:
        writer.write(first)
        for chunk in chunks:
            writer.write(chunk)


def _write_stages(draft: ShotDraft, cache: StageCache, provenance: ProvenanceSettings) -> None:
    for stage, step in zip(stages_of(draft.plan.shot), draft.plan.steps, strict=True):
        artefacts = cache.get(step.key, stage.writes) if stage.debug_file else None
        if not stage.debug_file or artefacts is None:
            continue
        if "face" in artefacts:
            draft.path(stage.debug_file).write_text(face_to_json(artefacts["face"]))
        else:
            record = shot_record(draft.plan, IMAGE, provenance, until=stage)
            write_png(draft.path(stage.debug_file), artefacts["image"], metadata_of(record))
