"""Write the files of one shot, cropped as the shot says, with their provenance records.

Stages and their caches only know whole images and frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import MediaError
from vidgen_ray.graph import chunked_stages_of, clip_length, file_sizes, stages_of
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.media.images import centre_crop, write_png
from vidgen_ray.media.media_file import FileMetadata
from vidgen_ray.outputs.folder import LAST_FRAME, OutputFolder, ShotDraft
from vidgen_ray.outputs.records import CLIP_FILES, IMAGE_FILE, LikenessRecord, ProvenanceNote, ShotRecord, StepRecord
from vidgen_ray.outputs.stage_cache import StageCache, face_to_json
from vidgen_ray.profile import DEFAULT_PROVENANCE, ProvenanceSettings
from vidgen_ray.provenance.record import metadata_of, with_label
from vidgen_ray.provenance.shot_provenance import provenance_record, provenance_records
from vidgen_ray.provenance.signing import sign_file
from vidgen_ray.render.step_runner import ForeignArtefacts, before_chunks, check_made_by, with_images
from vidgen_ray.safety import Safety
from vidgen_ray.stages.base import Artefacts, Frames, Item

IMAGE = "image"
_FILES = {IMAGE: IMAGE_FILE, **CLIP_FILES}
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
        provenance: ProvenanceSettings = DEFAULT_PROVENANCE,
        safety: Safety | None = None,
    ) -> None:
        """Write everything that does not come in chunks. Raises MediaError or OSError if it cannot be written.

        `safety` has checked what stages have made. A start image that no stage changes is checked here: raises UnsafeContent.
        """
        check_made_by(before_chunks(plan), item.artefacts)
        self._plan, self._shot = plan, plan.shot
        self._encode = encode
        self._provenance = provenance
        self._sizes = file_sizes(plan.shot)
        self._records = provenance_records(plan, self._sizes, provenance)
        self._stages = outputs.stage_cache if keep_stages else None
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
        record = next((self._records.get(name) for name, file in _FILES.items() if file == path.name), None)
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
            record = provenance_record(draft.plan, IMAGE, provenance, until=stage)
            write_png(draft.path(stage.debug_file), artefacts["image"], metadata_of(record))
