"""HunyuanDiT: restyle the image towards the prompt and the style prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    Artefacts,
    Image,
    Item,
    ReadText,
    StageParams,
    diffusers_step_callback,
    noise_generator,
    pixels_to_uint8,
)
from vidgen_ray.stages.loading import TiledParams, TiledStage, diffusers_classes, load_pipeline, move_networks, set_vae_tiles
from vidgen_ray.stages.memory_table import ShotWork, StageMemory, activation_bytes, network_work, weight_bytes
from vidgen_ray.stages.schedules import SCHEDULES, ScheduleParams
from vidgen_ray.stages.speed import CompileParams, compile_blocks, require_sdpa_backend, sdpa_backend

_SCHEDULE = SCHEDULES["hunyuandit-1.2"]
_DEFAULT_STEPS, _DEFAULT_GUIDANCE = _SCHEDULE.steps, _SCHEDULE.guidance
MT5_TOKENS = 256
CANVASES: Mapping[float, tuple[tuple[int, int], ...]] = {
    1: ((1024, 1024), (1280, 1280)),
    4 / 3: ((1024, 768), (1152, 864), (1280, 960)),
    3 / 4: ((768, 1024), (864, 1152), (960, 1280)),
    16 / 9: ((1280, 768),),
    9 / 16: ((768, 1280),),
}
"""Ratio of the sides of an image -> widths and heights that the published weights were trained on."""
LARGEST_CANVAS_PX = 1280 * 1280
_NETWORKS = ("hunyuan/transformer", "hunyuan/text_encoder", "hunyuan/text_encoder_2", "hunyuan/vae")
"""Its networks in the memory table."""
REPEATED_BLOCKS = ("HunyuanDiTBlock",)
"""Class of the transformer's blocks, which diffusers does not state for this network."""


class HunyuanDiTParams(CompileParams, TiledParams, ScheduleParams):
    schedule_actor: ClassVar[str] = "hunyuan"

    standard_shapes: bool = True
    """Run at the nearest size that the published weights were trained on. Not needed for random weights."""


class HunyuanDiTStage(TiledStage[HunyuanDiTParams]):
    """`image` (H, W, 3) of any size -> `image` of the same size, restyled.

    The style prompt is appended to the shot's prompt: "prompt, style prompt". Bert reads 77 tokens of it and mT5 256, so after
    a long prompt only mT5 reads the style.
    `style_strength` is the fraction of the schedule that is run: steps * style_strength, rounded up. 0 returns the image
    unchanged. A `guidance.hunyuan` of 1 or less turns guidance off, and the negative prompt has no effect.
    The image is not stretched. It is placed on a canvas of a trained size, padded by repeating its edge, and cropped
    afterwards. Each shot is a separate call, so the result does not depend on other shots in the batch.
    Source: Meng et al. 2021, SDEdit, arXiv:2108.01073; Li et al. 2024, Hunyuan-DiT, arXiv:2405.08748.
    """

    name: ClassVar[str] = "hunyuan"
    label: ClassVar[str] = "Style"
    activity: ClassVar[str] = "Restyling the image"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"use_hunyuan_style": True, "style_prompt": "watercolour"},)
    chosen_by: ClassVar[str] = "restyled_by"
    reads: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "style_prompt",
        "style_strength",
        "steps.hunyuan",
        "guidance.hunyuan",
        "seed",
    )
    takes: ClassVar[tuple[str, ...]] = ("image",)
    writes: ClassVar[tuple[str, ...]] = ("image",)
    debug_file: ClassVar[str | None] = "style.png"
    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanDiTPipeline",)
    Params: ClassVar[type[StageParams]] = HunyuanDiTParams

    @classmethod
    def texts(cls, params: HunyuanDiTParams, shot: Shot) -> Iterator[ReadText]:
        yield ReadText(_prompt_of(shot), params.weights / "tokenizer_2", MT5_TOKENS)

    @classmethod
    def work(cls, params: HunyuanDiTParams, shot: Shot) -> ShotWork:
        pixels = prod(_placement(params, shot.width, shot.height).canvas)
        # The step was traced with both prompts.
        prompts = 2 if shot.guidance.hunyuan is None or shot.guidance.hunyuan > 1 else 1
        steps = (shot.steps.hunyuan or _DEFAULT_STEPS) * shot.style_strength * prompts / 2
        coding = network_work("hunyuan/encode", pixels) + network_work("hunyuan/decode", pixels)
        fixed = network_work("hunyuan/text").times(prompts) + coding
        return ShotWork(network_work("hunyuan/step", pixels).times(steps), fixed.times(shot.style_strength > 0))

    @classmethod
    def memory(cls, params: HunyuanDiTParams, shot: Shot) -> StageMemory | None:
        pixels = LARGEST_CANVAS_PX if params.standard_shapes else shot.width * shot.height
        tiles = f":tile{params.vae_tile_px}" if params.vae_tile_px else ""
        curves = ["hunyuan/text", "hunyuan/step", f"hunyuan/decode{tiles}", *(() if tiles else ("hunyuan/encode",))]
        return StageMemory(
            {network: weight_bytes(network, params.dtype) for network in _NETWORKS},
            max(activation_bytes(curve, pixels, params.dtype) for curve in curves),
        )

    def load(self) -> None:
        scheduler_class, _ = diffusers_classes(self.params, "DPMSolverMultistepScheduler", "HunyuanDiTPipeline")
        from vidgen_ray.nets.hunyuandit_img2img import HunyuanDiTImg2ImgPipeline

        params = self.params
        require_sdpa_backend(params.attention_backend)
        self.pipe = load_pipeline(
            HunyuanDiTImg2ImgPipeline, params, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        self.pipe.scheduler = scheduler_class.from_config(self.pipe.scheduler.config)
        if params.compile:
            compile_blocks(self.pipe.transformer, params.device, REPEATED_BLOCKS)

    def move(self, device: str) -> None:
        move_networks(self.pipe.components.values(), device)

    def run(self, item: Item) -> Artefacts:
        from PIL import Image as PILImage

        shot, image = item.shot, item.image
        if shot.style_strength == 0:
            return {"image": image}
        height, width = image.shape[:2]
        set_vae_tiles(self.pipe.vae, self.params.vae_tile_px)
        placement = _placement(self.params, width, height)
        with sdpa_backend(self.params.attention_backend):
            (restyled,) = self.pipe(
                _prompt_of(shot),
                PILImage.fromarray(place_on_canvas(image, placement)),
                strength=shot.style_strength,
                num_inference_steps=shot.steps.hunyuan or _DEFAULT_STEPS,
                guidance_scale=_DEFAULT_GUIDANCE if shot.guidance.hunyuan is None else shot.guidance.hunyuan,
                negative_prompt=self.params.negative_prompt_of(shot),
                generator=noise_generator(self.generator_seed(shot)),
                output_type="pt",
                **diffusers_step_callback(self.name),
            ).images
        return {"image": crop_from_canvas(pixels_to_uint8(restyled), placement)}


def _prompt_of(shot: Shot) -> str:
    return f"{shot.prompt}, {shot.style_prompt}" if shot.style_prompt else shot.prompt


@dataclass(frozen=True, slots=True)
class CanvasPlacement:
    """Position of an image on the canvas of the model: scaled without distortion and centred.

    Sizes are (width, height) in pixels.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    canvas: tuple[int, int]

    @property
    def left_top(self) -> tuple[int, int]:
        """Offset of the scaled image on the canvas, in pixels: half of the padding, rounded down."""
        return (self.canvas[0] - self.scaled[0]) // 2, (self.canvas[1] - self.scaled[1]) // 2


def _placement(params: HunyuanDiTParams, width: int, height: int) -> CanvasPlacement:
    return fit_to_standard_shape(width, height) if params.standard_shapes else fit_to_multiple_of_16(width, height)


def fit_to_standard_shape(width: int, height: int) -> CanvasPlacement:
    """Scale to the largest size that fits on the standard shape of nearest aspect, then nearest area.

    1024x576 is placed on 1280x768.
    """
    ratio = min(CANVASES, key=lambda ratio: abs(ratio - width / height))
    canvas_w, canvas_h = min(CANVASES[ratio], key=lambda sides: abs(prod(sides) - width * height))
    if width * canvas_h >= height * canvas_w:
        scaled = canvas_w, max(1, round(height * canvas_w / width))
    else:
        scaled = max(1, round(width * canvas_h / height)), canvas_h
    return CanvasPlacement((width, height), scaled, (canvas_w, canvas_h))


def fit_to_multiple_of_16(width: int, height: int) -> CanvasPlacement:
    """Keep the size. The canvas is the smallest one with sides that are multiples of 16."""
    return CanvasPlacement((width, height), (width, height), (-(-width // 16) * 16, -(-height // 16) * 16))


def place_on_canvas(image: Image, placement: CanvasPlacement) -> Image:
    """Return the canvas with the image (H, W, 3), padded by repeating the edge of the image."""

    import numpy as np

    scaled = _resized(image, placement.scaled)
    left, top = placement.left_top
    right = placement.canvas[0] - placement.scaled[0] - left
    bottom = placement.canvas[1] - placement.scaled[1] - top
    return np.pad(scaled, ((top, bottom), (left, right), (0, 0)), mode="edge")


def crop_from_canvas(canvas: Image, placement: CanvasPlacement) -> Image:
    """Return the image (H, W, 3) without the padding, at its original size. The inverse of `place_on_canvas`."""

    import numpy as np

    (left, top), (width, height) = placement.left_top, placement.scaled
    return _resized(np.ascontiguousarray(canvas[top : top + height, left : left + width]), placement.size)


def _resized(image: Image, size: tuple[int, int]) -> Image:
    """Resize to (width, height). An image of that size is returned unchanged."""

    import numpy as np
    from PIL import Image as PILImage

    if (image.shape[1], image.shape[0]) == size:
        return image
    return np.array(PILImage.fromarray(image).resize(size, PILImage.Resampling.LANCZOS))
