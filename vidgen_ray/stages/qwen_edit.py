"""Qwen-Image-Edit: restyle the image by an instruction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vidgen_ray.shot import REFERENCE, Shot
from vidgen_ray.stages.base import (
    Artefacts,
    Item,
    StageParams,
    diffusers_step_callback,
    noise_generator,
    pixels_to_uint8,
)
from vidgen_ray.stages.first_block_cache import FirstBlockCacheParams, FirstBlockCaches, cached_bytes
from vidgen_ray.stages.loading import (
    ImageParams,
    ImageStage,
    autoencoder_peaks,
    diffusers_classes,
    load_pipeline,
    set_vae_tiles,
    speed_up_transformers,
)
from vidgen_ray.stages.memory_table import (
    RESULT_COPIES,
    Phase,
    ShotWork,
    StageMemory,
    activation_bytes,
    memory_of_phases,
    network_work,
    offload_work,
    stored,
    weight_bytes,
)
from vidgen_ray.stages.schedules import SCHEDULES, ScheduleParams
from vidgen_ray.stages.speed import Fp8Params

_DEFAULT_STEPS = SCHEDULES["qwen-image-edit"].steps
_DEFAULT_GUIDANCE = SCHEDULES["qwen-image-edit"].guidance
_CHANNELS, _PIXELS_PER_TOKEN, _TEXT_TOKENS = 3072, 16 * 16, 1024
"""Channels of a token in the transformer, its pixels, and the tokens of the longest prompt."""
SEEN_PIXELS = 1024 * 1024
"""Pixels that the pipeline scales each image to."""
MAX_PHOTOS = 2
"""Photos that the model reads beside the image: it was trained with one to three images."""
_TEXT_ENCODER, _TRANSFORMER, _VAE = "qwen_edit/text_encoder", "qwen_edit/transformer", "qwen_edit/vae"
RESTYLE = "Redraw the image in this style: {style}. Keep the composition, the people and their faces."
DESCRIBE = "Redraw the image so that it matches this description: {prompt}. Keep the composition, the people and their faces."
NO_NEGATIVE = " "
"""Negative prompt of the reference. Without one, the pipeline uses no guidance."""


class QwenEditParams(ImageParams, FirstBlockCacheParams, Fp8Params, ScheduleParams):
    """Parameters of Qwen-Image-Edit."""

    schedule_actor: ClassVar[str] = "qwen_edit"


class QwenEditStage(ImageStage[QwenEditParams]):
    """`image` (H, W, 3), H and W multiples of 16 -> `image` of the same size, restyled by an instruction.

    The instruction contains the style prompt or, without one, the shot's prompt. With `identity: reference` up to two
    `photos` are further reference images. The model has no strength: `style_strength` has no effect.
    A `guidance.qwen_edit` of 1 or less turns guidance off, and the negative prompt has no effect.
    Source: Qwen Team 2025, Qwen-Image, arXiv:2508.02324; diffusers `QwenImageEditPlusPipeline`.
    """

    name: ClassVar[str] = "qwen_edit"
    label: ClassVar[str] = "Qwen-Image-Edit"
    activity: ClassVar[str] = "Restyling the image"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "use_hunyuan_style": True,
            "style_model": "qwen-edit",
            "style_prompt": "watercolour",
            "face_image": ("photo.jpg",),
            "identity": REFERENCE,
        },
        {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "watercolour"},
    )
    chosen_by: ClassVar[str] = "restyled_by"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImageEditPlusPipeline",)
    reads: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "style_prompt",
        "steps.qwen_edit",
        "guidance.qwen_edit",
        "seed",
    )
    takes: ClassVar[tuple[str, ...]] = ("image",)
    debug_file: ClassVar[str | None] = "style.png"
    Params: ClassVar[type[StageParams]] = QwenEditParams

    @classmethod
    def work(cls, params: QwenEditParams, shot: Shot) -> ShotWork:
        prompts = 2 if _is_guided(shot) else 1
        # The pipeline scales the image and the photos to 1024x1024 pixels each. All are tokens of one sequence.
        seen = 1 + (min(len(shot.face_image), MAX_PHOTOS) if shot.uses_reference_photos else 0)
        pixels = shot.width * shot.height
        step = network_work("qwen_edit/step", pixels + seen * SEEN_PIXELS)
        coding = network_work("qwen_edit/encode", SEEN_PIXELS).times(seen) + network_work("qwen_edit/decode", pixels)
        transformer = stored(_TRANSFORMER, params.quantize)
        copies = offload_work((_TEXT_ENCODER, _VAE, transformer, _VAE), params.dtype, cpu_offload=params.cpu_offload)
        fixed = network_work("qwen_edit/text").times(prompts) + coding + copies
        return ShotWork(step.times(prompts * (shot.steps.qwen_edit or _DEFAULT_STEPS)), fixed)

    @classmethod
    def memory(cls, params: QwenEditParams, shot: Shot) -> StageMemory | None:
        dtype, pixels = params.dtype, shot.width * shot.height
        seen = 1 + (min(len(shot.face_image), MAX_PHOTOS) if shot.uses_reference_photos else 0)
        transformer = stored(_TRANSFORMER, params.quantize)
        weights = {network: weight_bytes(network, dtype) for network in (_TEXT_ENCODER, transformer, _VAE)}
        encode, decode = autoencoder_peaks("qwen_edit", params, pixels, SEEN_PIXELS)
        tokens = (pixels + seen * SEEN_PIXELS) // _PIXELS_PER_TOKEN + _TEXT_TOKENS
        cached = (2 if _is_guided(shot) else 1) * cached_bytes(params, tokens, _CHANNELS)
        phases = (
            Phase(_TEXT_ENCODER, activation_bytes("qwen_edit/text", 0, dtype)),
            Phase(_VAE, encode),
            Phase(transformer, activation_bytes("qwen_edit/step", pixels + seen * SEEN_PIXELS, dtype) + cached),
            Phase(_VAE, decode),
        )
        return memory_of_phases(weights, phases, cpu_offload=params.cpu_offload, results=pixels * 3 * RESULT_COPIES)

    def load(self) -> None:
        (QwenImageEditPlusPipeline,) = diffusers_classes(self.params, "QwenImageEditPlusPipeline")

        self.pipe = load_pipeline(QwenImageEditPlusPipeline, self.params, cpu_offload=self.params.cpu_offload)
        speed_up_transformers(self.pipe, self.params)
        self.caches = FirstBlockCaches(self.pipe, self.params)

    def run(self, item: Item) -> Artefacts:
        from PIL import Image as PILImage

        shot, image = item.shot, item.image
        height, width = image.shape[:2]
        photos = item.photos[:MAX_PHOTOS] if self.uses_identity(shot) else ()
        set_vae_tiles(self.pipe.vae, self.params.vae_tile_px)
        with self.caches.steps(guided=_is_guided(shot)):
            (restyled,) = self.pipe(
                image=[PILImage.fromarray(each) for each in (image, *photos)],
                prompt=instruction(shot.prompt, shot.style_prompt),
                negative_prompt=shot.negative_prompt or NO_NEGATIVE,
                true_cfg_scale=_guidance(shot),
                height=height,
                width=width,
                num_inference_steps=shot.steps.qwen_edit or _DEFAULT_STEPS,
                generator=noise_generator(self.generator_seed(shot)),
                output_type="pt",
                **diffusers_step_callback(self.name),
            ).images
        return {"image": pixels_to_uint8(restyled)}


def _guidance(shot: Shot) -> float:
    return _DEFAULT_GUIDANCE if shot.guidance.qwen_edit is None else shot.guidance.qwen_edit


def _is_guided(shot: Shot) -> bool:
    """Return whether each step has a second pass, for the negative prompt."""
    return _guidance(shot) > 1


def instruction(prompt: str, style_prompt: str | None) -> str:
    """Return what the model is asked to do."""
    return RESTYLE.format(style=style_prompt) if style_prompt else DESCRIBE.format(prompt=prompt)
