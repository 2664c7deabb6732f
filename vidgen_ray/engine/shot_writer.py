"""Write the files of one shot: image and clip at once, the upscaled clip as its chunks arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.step_runner import with_pictures
from vidgen_ray.graph import stages_of
from vidgen_ray.media import Mp4Settings, Mp4Writer, write_png
from vidgen_ray.outputs.folder import OutputFolder, ShotDraft
from vidgen_ray.outputs.records import LikenessRecord, ShotRecord, StepRecord
from vidgen_ray.outputs.stage_cache import StageCache, face_to_json
from vidgen_ray.stages.base import Frames, Item


class ShotFiles:
    """The files of one shot while they are made: picture and clip at once, the large clip as its chunks arrive.

    `close` it in any case; what was not committed is gone then.
    """

    def __init__(
        self, plan: ShotPlan, item: Item, outputs: OutputFolder, encode: Mp4Settings, keep_stages: bool = False
    ) -> None:
        """Writes what is known already. Raises MediaError or OSError where it cannot be written."""
        self._plan = plan
        self._encode = encode
        self._stages = outputs.stage_cache if keep_stages else None
        self._hd: Mp4Writer | None = None
        self._hd_open = ExitStack()
        self._likeness = LikenessRecord.of(item.artefacts)
        artefacts = with_pictures(item, ("image",)).artefacts
        with ExitStack() as stack:
            self._draft = stack.enter_context(outputs.draft(plan))
            write_png(self._draft.path("image.png"), artefacts["image"])
            if "frames" in artefacts:
                write_clip(self._draft.path("video.mp4"), [artefacts["frames"]], plan.shot.fps, encode)
            self._open = stack.pop_all()

    def add(self, enlarged: Frames) -> None:
        """The next frames of the large clip, (T, H, W, 3)."""
        if self._hd is None:
            height, width = enlarged.shape[1:3]
            writer = Mp4Writer(self._draft.path("hd.mp4"), width, height, self._plan.shot.fps, self._encode)
            self._hd = self._hd_open.enter_context(writer)
        self._hd.write(enlarged)

    def commit(self, records: Sequence[StepRecord]) -> ShotRecord:
        """Make the shot done."""
        self._hd_open.close()
        if self._stages is not None:
            _write_stages(self._draft, self._stages)
        return self._draft.commit(records, self._likeness)

    def close(self) -> None:
        with self._open:
            self._hd_open.close()


def write_clip(path: Path, chunks: Iterable[Frames], fps: int | Fraction, encode: Mp4Settings) -> None:
    """Encode chunks of frames, each (T, H, W, 3), as they come."""
    chunks = iter(chunks)
    first = next(chunks)
    with Mp4Writer(path, width=first.shape[2], height=first.shape[1], fps=fps, settings=encode) as writer:
        writer.write(first)
        for chunk in chunks:
            writer.write(chunk)


def _write_stages(draft: ShotDraft, cache: StageCache) -> None:
    for stage, step in zip(stages_of(draft.plan.shot), draft.plan.steps, strict=True):
        artefacts = cache.get(step.key, stage.writes) if stage.debug_file else None
        if not stage.debug_file or artefacts is None:
            continue
        if "face" in artefacts:
            draft.path(stage.debug_file).write_text(face_to_json(artefacts["face"]))
        else:
            write_png(draft.path(stage.debug_file), artefacts["image"])
