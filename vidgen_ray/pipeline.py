"""The graph in one process, without Ray: the reference that the batch and online executors equal byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image as PILImage

from vidgen_ray.atomic import write_atomically
from vidgen_ray.graph import ShotPlan, ShotPlanner, check_profile, params_of, stages_of
from vidgen_ray.media import encode_png
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import ShotRecord
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.script import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, Stage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.steps import StepFailed, StepRunner, finish, upscale_in_order


class GeneratedVideo(TypedDict):
    """What `generate_video` gives."""

    image: PILImage.Image
    video: Path | None
    hd_video: Path | None
    record: ShotRecord


class VideoGenerationPipeline:
    """Renders shots one at a time in this process. Stages are loaded when a shot first needs them, and kept.

    `out` is an output folder as a batch run writes it, so a shot rendered there before is not rendered again.
    """

    def __init__(self, profile: Profile, out: Path, *, keep_stages: bool = False, use_cache: bool = True) -> None:
        check_profile(profile)
        self.profile = profile
        self.outputs = OutputFolder(out)
        self.outputs.prepare()
        self._keep_stages = keep_stages
        self._cache = self.outputs.stage_cache if use_cache or keep_stages else None
        self._loaded: dict[str, Stage[Any]] = {}

    @classmethod
    def from_profile(cls, name_or_path: str, out: str | Path = "out") -> VideoGenerationPipeline:
        """A built-in profile by name, or a profile file by path."""
        return cls(load_profile(name_or_path), Path(out))

    def generate_video(
        self,
        prompt: str,
        *,
        face_image: str | Path | PILImage.Image | None = None,
        lora_path: str | Path | None = None,
        **fields: Any,
    ) -> GeneratedVideo:
        """Render one shot; `fields` are those of a Shot (use_hunyuan_style, num_frames, scale, seed, ...).

        Raises ScriptError for a wrong field and StepFailed where a stage cannot do its work.
        """
        shot_fields = {"prompt": prompt, **fields}
        if lora_path is not None:
            shot_fields["lora"] = str(lora_path)
        if face_image is not None:
            shot_fields["face_image"] = str(self._as_file(face_image))
        shot = check_shot(shot_fields, "generate_video", self.profile.defaults)
        record = self.render(shot)
        folder = self.outputs.shot_folder(shot.id or "")
        return GeneratedVideo(
            image=PILImage.open(folder / "image.png"),
            video=folder / "video.mp4" if "video.mp4" in record.files else None,
            hd_video=folder / "hd.mp4" if "hd.mp4" in record.files else None,
            record=record,
        )

    def plan(self, shot: Shot) -> ShotPlan:
        try:
            return ShotPlanner(params_of(self.profile, stages_of(shot)), self.profile.encode)(shot)
        except OSError as error:
            raise StepFailed("plan", error) from error

    def render(self, shot: Shot) -> ShotRecord:
        """Render a checked shot, unless it is done already. Raises StepFailed."""
        plan = self.plan(shot)
        if (record := self.outputs.done(plan, self._keep_stages)) is not None:
            return record
        stages = [self._stage(stage) for stage in stages_of(shot)]
        upscaler = next((s for s in stages if isinstance(s, RealESRGANStage)), None)
        gpus = {stage.name: self.profile.actor_of(type(stage)).gpus for stage in stages}
        runner = StepRunner([s for s in stages if s is not upscaler], gpus, self._cache)
        item, records = runner.run(plan, Item(shot))
        return finish(
            plan,
            item,
            records,
            upscale_in_order(upscaler, shot, item.artefacts["frames"]) if upscaler else None,
            outputs=self.outputs,
            encode=self.profile.encode,
            upscaler_gpus=gpus[upscaler.name] if upscaler else 0.0,
            keep_stages=self._keep_stages,
        )

    def close(self) -> None:
        """Let go of all weights."""
        for stage in self._loaded.values():
            stage.close()
        self._loaded.clear()

    def _stage(self, stage_class: type[Stage[Any]]) -> Stage[Any]:
        if stage_class.name not in self._loaded:
            stage = stage_class(self.profile.params(stage_class))
            stage.load()
            self._loaded[stage_class.name] = stage
        return self._loaded[stage_class.name]

    def _as_file(self, face_image: str | Path | PILImage.Image) -> Path:
        """A picture in memory is stored by its content beside the results, so that its shot can be repeated."""
        if not isinstance(face_image, PILImage.Image):
            return Path(face_image).absolute()
        content = encode_png(np.asarray(face_image.convert("RGB")))
        path = self.outputs.root / "inputs" / f"{hashlib.sha256(content).hexdigest()[:16]}.png"
        if not path.exists():
            write_atomically(path, content)
        return path.absolute()
