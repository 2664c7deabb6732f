"""Run the graph in one process, without Ray. Batch and online executors produce the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image as PILImage

from vidgen_ray.content_keys import ShotPlan, ShotPlanner, params_of
from vidgen_ray.engine.cache_writer import CacheMode, cache_settings
from vidgen_ray.engine.chunks import chunk_frames_of, chunk_unit, clip_chunks, join_records
from vidgen_ray.engine.likeness_check import LIKENESS, LikenessTooLow, best_attempt, check_likeness
from vidgen_ray.engine.shot_writer import ShotFiles
from vidgen_ray.engine.step_runner import StepFailed, StepRunner
from vidgen_ray.engine.weights_check import WeightsCheck
from vidgen_ray.graph import check_profile, chunked_stages_of, is_chunked, stages_of
from vidgen_ray.media import encode_png
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.open_markers import shot_without_row
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.script.reader import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, Stage

Photo = str | Path | PILImage.Image
"""A file, or an image in memory."""


class GeneratedVideo(TypedDict):
    """Result of `generate_video`."""

    image: PILImage.Image
    video: Path | str | None
    """Path, or URL if the output folder is in an object store. `None` if the shot has no clip."""
    hd_video: Path | str | None
    record: ShotRecord


class VideoGenerationPipeline:
    """Renders shots one at a time in this process. Stages are loaded on first use and stay loaded.

    `out` is an output folder or its URL, in the format of batch runs: shots that are finished there are not rendered again.
    `cache` tells which results of stages are kept there: `none`, `images` or `all`, with the clips.
    """

    def __init__(self, profile: Profile, out: str | Path, *, keep_stages: bool = False, cache: CacheMode = "all") -> None:
        check_profile(profile)
        self.profile = profile
        self.outputs = OutputFolder(out)
        self.outputs.prepare()
        self._keep_stages = keep_stages
        self._cache = cache_settings(cache, keep_stages, wait=True).open(self.outputs.stage_cache)
        self._check_weights = WeightsCheck()
        self._loaded: dict[str, Stage[Any]] = {}

    @classmethod
    def from_profile(cls, name_or_path: str, out: str | Path = "out") -> VideoGenerationPipeline:
        """Create a pipeline from a built-in profile by name, or from a profile file by path."""
        return cls(load_profile(name_or_path), out)

    def generate_video(
        self,
        prompt: str,
        *,
        face_image: Photo | Sequence[Photo] | None = None,
        lora_path: str | Path | None = None,
        **fields: Any,
    ) -> GeneratedVideo:
        """Render one shot. `fields` are fields of a Shot (use_hunyuan_style, num_frames, scale, seed, ...).

        `face_image` is one or several photos of the same person.
        Raises ScriptError for an invalid field, SetupError if weights are not on this machine, StepFailed if a stage fails.
        """
        shot_fields = {"prompt": prompt, **fields}
        if lora_path is not None:
            shot_fields["lora"] = str(lora_path)
        if face_image is not None:
            photos = [face_image] if isinstance(face_image, Photo) else face_image
            shot_fields["face_image"] = [str(self._as_file(photo)) for photo in photos]
        shot = check_shot(shot_fields, "generate_video", self.profile.defaults)
        record = self.render(shot)
        shot_id = shot.id or ""
        return GeneratedVideo(
            image=PILImage.open(io.BytesIO(self.outputs.read(shot_id, "image.png"))),
            video=self.outputs.place(shot_id, "video.mp4") if "video.mp4" in record.files else None,
            hd_video=self.outputs.place(shot_id, "hd.mp4") if "hd.mp4" in record.files else None,
            record=record,
        )

    def plan(self, shot: Shot) -> ShotPlan:
        """Return the steps and content keys of a shot. Raises StepFailed if one of its files cannot be read."""
        try:
            return ShotPlanner(params_of(self.profile, stages_of(shot)), self.profile.encode)(shot)
        except OSError as error:
            raise StepFailed("plan", error) from error

    def render(self, shot: Shot) -> ShotRecord:
        """Render a checked shot unless it is finished already. Raises StepFailed."""
        plan = self.plan(shot)
        if (done := self.outputs.find_finished(plan, self._keep_stages)) is not None:
            return done.record()
        stages = [self._stage(stage) for stage in stages_of(shot)]
        on_gpu = any(stage.params.device != "cpu" for stage in stages)
        runner = StepRunner(stages, 1.0 if on_gpu else 0.0, self._cache, check_weights=self._check_weights)
        failures = []
        with shot_without_row(self.outputs.storage):
            for attempt in (plan, *plan.again):
                try:
                    return self._render_attempt(runner, attempt)
                except LikenessTooLow as failure:
                    failures.append(failure)
        raise StepFailed(LIKENESS, best_attempt(failures))

    def _render_attempt(self, runner: StepRunner, plan: ShotPlan) -> ShotRecord:
        """Render with one seed. Raises LikenessTooLow as soon as a likeness is below the minimum."""
        item, records = Item(plan.shot), list[StepRecord]()
        for step in plan.steps:
            if not is_chunked(step.stage):
                item, new_records = runner.run(plan, item, [step.stage])
                records += new_records
                check_likeness(plan.shot, item.artefacts)
        files = ShotFiles(plan, item, self.outputs, self.profile.encode, self._keep_stages)
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

    def close(self) -> None:
        """Release all weights."""
        for stage in self._loaded.values():
            stage.close()
        self._loaded.clear()

    def _stage(self, stage_class: type[Stage[Any]]) -> Stage[Any]:
        if stage_class.name not in self._loaded:
            stage = stage_class(self.profile.params(stage_class))
            self._check_weights.before_load([stage])
            stage.load()
            self._loaded[stage_class.name] = stage
        return self._loaded[stage_class.name]

    def _as_file(self, photo: Photo) -> Path:
        """Return the path of a photo. An image in memory is stored in the output folder, so that the shot can be repeated."""
        if not isinstance(photo, PILImage.Image):
            return Path(photo).absolute()
        return self.outputs.keep_input(encode_png(np.asarray(photo.convert("RGB"))), ".png").absolute()
