"""Shared parts of the video stages: clips of several passes, and the base class of models that read a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    NOT_IN_KEY,
    PROMPT_FIELDS,
    REFERENCE_FRAMES,
    REFERENCE_PIXELS,
    Artefacts,
    Frames,
    Item,
    P,
    ReadText,
    Stage,
    diffusers_step_callback,
    noise_generator,
    part_of_progress,
    pixels_to_uint8,
    reference_work,
    torch_dtype,
)
from vidgen_ray.stages.context_parallel import begin_call
from vidgen_ray.stages.first_block_cache import FirstBlockCacheParams, FirstBlockCaches
from vidgen_ray.stages.loading import OffloadedParams, OffloadedStage, speed_up_transformers
from vidgen_ray.stages.lora import LoraAdapters
from vidgen_ray.stages.memory_table import RESULT_COPIES
from vidgen_ray.stages.schedules import ScheduleParams
from vidgen_ray.stages.speed import is_in_fp8
from vidgen_ray.video_models import VIDEO_MODELS

if TYPE_CHECKING:
    import torch


def clip_host_bytes(shot: Shot) -> int:
    """Return the host memory of the clip of a shot."""
    return shot.width * shot.height * 3 * shot.clip_frames * RESULT_COPIES


def shots_of_passes(shot: Shot) -> list[Shot]:
    """Return one shot for each pass, in order. The first pass is that of the shot without `extend`.

    Further passes have seeds of their own, because the same noise would repeat the same motion. The clip ends with
    `last_image`, so only the last pass has one.
    """
    if not shot.extend:
        return [shot]
    last_images = [*[None] * shot.extend, shot.last_image]
    return [
        shot.model_copy(
            update={
                "extend": 0,
                "last_image": last_image,
                "seed": shot.derived_seed(f"pass {number}") if number else shot.required_seed(),
            }
        )
        for number, last_image in enumerate(last_images)
    ]


class VideoStage(Stage[P]):
    """`image` (H, W, 3) -> `frames` (clip_frames, H, W, 3), in one or several passes."""

    activity: ClassVar[str] = "Generating the clip"
    chosen_by: ClassVar[str] = "clip_by"
    clip_only_fields: ClassVar[tuple[str, ...]] = ("video_model", "num_frames", "extend", "fps")
    common_settings: ClassVar[tuple[str, ...]] = ("steps",)
    takes: ClassVar[tuple[str, ...]] = ("image",)
    writes: ClassVar[tuple[str, ...]] = ("frames",)

    @classmethod
    def relative_fixed_cost(cls, shot: Shot) -> float:
        if reference_work(cls) is not None:
            return super().relative_fixed_cost(shot)
        pixels, frames = shot.width * shot.height / REFERENCE_PIXELS, shot.num_frames / REFERENCE_FRAMES
        return pixels * frames * cls.passes(shot)

    @classmethod
    def passes(cls, shot: Shot) -> int:
        return shot.extend + 1

    @abstractmethod
    def generate(self, item: Item) -> Frames:
        """Return the clip of one pass (num_frames, H, W, 3)."""

    def run(self, item: Item) -> Artefacts:
        """Return the clip of all passes.

        The first frame of a further pass stands for the last frame of the pass before, so it is left out.
        """

        import numpy as np

        shots = shots_of_passes(item.shot)
        if len(shots) == 1:
            return {"frames": self.generate(item)}
        artefacts = item.artefacts.copy()
        parts = []
        for number, shot in enumerate(shots):
            with part_of_progress(number, len(shots)):
                frames = self.generate(Item(shot, artefacts, item.key and f"{item.key}-{number}"))
            artefacts["image"] = frames[-1]
            parts.append(frames[1:] if number else frames)
        return {"frames": np.concatenate(parts)}


class PromptedVideoParams(OffloadedParams, FirstBlockCacheParams, ScheduleParams):
    text_tokens: int = Field(default=512, ge=1, le=1024)
    """Tokens of the prompt that the text encoder reads. Longer prompts are cut."""
    adapters_kept: Annotated[int, NOT_IN_KEY] = Field(default=4, ge=1)
    """LoRAs that stay loaded, and the maximum per shot. The least recently used one is unloaded first."""
    vae_tiling: bool = False
    """Encode and decode in overlapping tiles, which needs less memory and may show seams."""


CLIP_PROMPT_FIELDS = (*PROMPT_FIELDS, "motion_prompt", "num_frames", "extend", "fps")
"""Shot fields that a model reads if it makes a clip from a prompt, beside its steps and its guidance."""
VP = TypeVar("VP", bound=PromptedVideoParams)


class PromptedVideoStage(OffloadedStage[VP], VideoStage[VP]):
    """`image` (H, W, 3) -> `frames` (clip_frames, H, W, 3) by the shot's `video_model`, which reads a prompt.

    The text is the shot's prompt with `motion_prompt` appended: "prompt, motion prompt".
    """

    clip_only_fields: ClassVar[tuple[str, ...]] = (*VideoStage.clip_only_fields, "motion_prompt", "video_lora")
    lora_field: ClassVar[str] = "video_lora"
    weight_fields: ClassVar[tuple[str, ...]] = ("video_lora",)

    default_steps: ClassVar[int]
    passes_in_one_call: ClassVar[bool] = False
    """The passes of a guided step are one batch."""

    @classmethod
    def texts(cls, params: VP, shot: Shot) -> Iterator[ReadText]:
        yield ReadText(prompt_of(shot), params.weights / "tokenizer", params.text_tokens)

    @classmethod
    def prompts_of(cls, shot: Shot) -> int:
        """Return the number of prompts that each step is conditioned on: with guidance two, the second one negative."""
        guidance = getattr(shot.guidance, cls.name)
        return 2 if guidance is None or guidance > 1 else 1

    @classmethod
    def steps_of(cls, shot: Shot) -> int:
        """Return the number of denoising steps of a pass."""
        return getattr(shot.steps, cls.name) or cls.default_steps

    @classmethod
    def lower_memory(cls, params: VP) -> VP | None:
        """Return parameters with tiles in the autoencoder."""
        return None if params.vae_tiling else params.model_copy(update={"vae_tiling": True})

    def load(self) -> None:
        self.pipe = self.load_pipe()
        speed_up_transformers(self.pipe, self.params)
        self.caches = FirstBlockCaches(self.pipe, self.params)
        self.adapters = LoraAdapters(
            self.pipe,
            self.params.adapters_kept,
            self.name,
            "video_lora",
            dtype=torch_dtype(self.params.dtype) if is_in_fp8(self.params) else None,
            is_compiled=self.params.compile,
        )

    @abstractmethod
    def load_pipe(self) -> Any:
        """Return the diffusers pipeline."""

    @abstractmethod
    def call_arguments(self, item: Item) -> Mapping[str, Any]:
        """Return the arguments of the pipeline that only this model has."""

    @abstractmethod
    def guidance(self, shot: Shot) -> float:
        """Return the guidance scale. With 1 or less, the negative prompt has no effect."""

    @abstractmethod
    def decode(self, latents: torch.Tensor, item: Item, generator: torch.Generator) -> torch.Tensor:
        """Return pixels (1, 3, num_frames, H, W), -1 to 1, as the pipeline computes them. `latents`: those of the pipeline."""

    @property
    @abstractmethod
    def size_multiple_px(self) -> int:
        """Number of pixels that width and height must be multiples of with these weights."""

    @property
    def adapter_loads(self) -> int:
        return self.adapters.loads

    def generate(self, item: Item) -> Frames:
        from PIL import Image as PILImage

        shot, image = item.shot, item.image
        height, width = image.shape[:2]
        if height % self.size_multiple_px or width % self.size_multiple_px:
            multiples = f"width and height must be multiples of {self.size_multiple_px}"
            raise StageError(f"image: got {width}x{height}, {multiples} with these weights")
        model = VIDEO_MODELS[self.name]
        if not model.allows(shot.num_frames):
            raise StageError(f"num_frames: got {shot.num_frames}, {model.allowed_instead_of(shot.num_frames)}")
        generator = noise_generator(self.generator_seed(shot))
        self.pipe.vae.use_tiling = self.params.vae_tiling
        negative = {"negative_prompt": self.params.negative_prompt_of(shot) or ""} if self.guidance(shot) > 1 else {}
        begin_call(guided=self.guidance(shot) > 1)
        separate = self.guidance(shot) > 1 and not self.passes_in_one_call
        with self.adapters.active(shot.video_lora), self.caches.steps(guided=separate):
            self.note(*self.adapters.take_notes())
            (latents,) = self.pipe(
                image=PILImage.fromarray(image),
                prompt=prompt_of(shot),
                **negative,
                height=height,
                width=width,
                num_frames=shot.num_frames,
                num_inference_steps=self.steps_of(shot),
                max_sequence_length=self.params.text_tokens,
                generator=generator,
                guidance_scale=self.guidance(shot),
                **self.call_arguments(item),
                **diffusers_step_callback(self.name),
                output_type="latent",
                return_dict=False,
            )
        pixels = self.decode(latents, item, generator)
        return pixels_to_uint8(self.pipe.video_processor.postprocess_video(pixels, output_type="pt")[0])


def prompt_of(shot: Shot) -> str:
    """Return the text that video models read: the prompt, with `motion_prompt` appended."""
    return f"{shot.prompt}, {shot.motion_prompt}" if shot.motion_prompt else shot.prompt
