"""Wan 2.2: generate a clip from an image and a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, StageParams
from vidgen_ray.stages.context_parallel import ATTENTION_BACKENDS, divide, divide_columns
from vidgen_ray.stages.first_block_cache import cached_bytes, computed_share
from vidgen_ray.stages.loading import diffusers_classes, load_pipeline
from vidgen_ray.stages.lora import FEW_STEP_LORA, merge_lora
from vidgen_ray.stages.memory_table import (
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
from vidgen_ray.stages.schedules import SCHEDULES
from vidgen_ray.stages.speed import Fp8Params
from vidgen_ray.stages.video import CLIP_PROMPT_FIELDS, PromptedVideoParams, PromptedVideoStage, clip_host_bytes
from vidgen_ray.system.model_files import PIPELINE_INDEX

if TYPE_CHECKING:
    import torch

GUIDANCE_A14B, GUIDANCE_TI2V = (SCHEDULES[name].guidance for name in ("wan2.2-i2v-a14b", "wan2.2-ti2v-5b"))
"""Default guidance scales of the two models."""
_COMPUTED_SHARES = {0.05: 0.63, 0.1: 0.41, 0.2: 0.26}
"""Threshold of `first_block_cache` -> seconds relative to those without. From diffusers #11180, with Wan 2.1."""
CHANNELS_A14B, CHANNELS_TI2V = 5120, 3072
"""Channels of a token in the transformers of the two models."""
PIXELS_A14B, PIXELS_TI2V = 16 * 16, 32 * 32
"""Pixels of a token of a latent frame."""
_TEXT_ENCODER = "wan/text_encoder"
DECODED_FRAMES = 9
"""Frames of the clip whose memory was traced: the autoencoder works on four frames at a time."""
TILE_PX, TILE_STEP_PX = 256, 192
"""Side of diffusers' tiles of the autoencoder, and the distance between them."""


class WanParams(PromptedVideoParams, Fp8Params):
    schedule_actor: ClassVar[str] = "wan"

    flow_shift: float | None = Field(default=None, gt=0)
    """Shift of the noise schedule. Published: 3 to 5, higher for more pixels. `None`: that of the weights, or of `schedule`."""

    @model_validator(mode="after")
    def _check_shift(self) -> Self:
        if self.flow_shift is not None and self.schedule is not None:
            raise ValueError(f"flow_shift must be left out with schedule {self.schedule}, whose shift is stated")
        return self


class WanStage(PromptedVideoStage[WanParams]):
    """`image` (H, W, 3) -> `frames` (clip_frames, H, W, 3), num_frames = 4k + 1. H and W multiples of 16, with TI2V-5B of 32.

    The weights decide about the model: I2V-A14B has two transformers, one for the noisy steps and one for the last steps, and
    TI2V-5B has one, which gets a timestep per token. Guidance of 1 or less needs one pass per step instead of two, and the
    negative prompt has no effect; use it with LoRAs distilled to a few steps. `guidance.wan_2` is that of the last steps.
    I2V-A14B also takes the image that the clip ends with, `last_image` (H, W, 3).
    The autoencoder runs in float32, as in the reference.
    Source: Wan Team 2025, arXiv:2503.20314; diffusers `WanImageToVideoPipeline`.
    """

    name: ClassVar[str] = "wan"
    label: ClassVar[str] = "Wan"
    clip_only_fields: ClassVar[tuple[str, ...]] = (*PromptedVideoStage.clip_only_fields, "last_image")
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"video_model": "wan", "num_frames": 25, "fps": 16},)
    extra_weights: ClassVar[tuple[str, ...]] = (FEW_STEP_LORA,)
    # The folder of TI2V-5B names the pipeline of text to video, with the same components.
    pipelines: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline", "WanPipeline")
    # The model has no condition for fps, but the clip is encoded with it.
    reads: ClassVar[tuple[str, ...]] = (
        *CLIP_PROMPT_FIELDS,
        "video_lora",
        "last_image",
        "steps.wan",
        "guidance.wan",
        "guidance.wan_2",
    )
    Params: ClassVar[type[StageParams]] = WanParams
    default_steps: ClassVar[int] = 40

    @property
    def size_multiple_px(self) -> int:
        patch = self.pipe.transformer.config.patch_size[1]
        return int(self.pipe.vae_scale_factor_spatial * patch)

    @staticmethod
    def latent_frames(frames: int) -> int:
        # The autoencoder makes four frames one.
        return (frames - 1) // 4 + 1

    @classmethod
    def work(cls, params: WanParams, shot: Shot) -> ShotWork:
        one_transformer = _has_one_transformer(params.weights)
        model = "wan-ti2v" if one_transformer else "wan"
        pixels, frames, prompts = shot.width * shot.height, shot.num_frames, cls.prompts_of(shot)
        step = network_work(f"{model}/step", pixels, cls.latent_frames(frames))
        # I2V-A14B encodes a clip that begins with the image, TI2V-5B the image alone.
        encode = network_work(f"{model}/encode", pixels, 1 if one_transformer else frames)
        coding = (encode + network_work(f"{model}/decode", pixels, frames)).in_float32
        transformers = [stored(f"{model}/transformer", params.quantize)] * (1 if one_transformer else 2)
        copies = offload_work((_TEXT_ENCODER, *transformers), params.dtype, cpu_offload=params.cpu_offload)
        copies += offload_work((f"{model}/vae",) * 2, "float32", cpu_offload=params.cpu_offload)
        fixed = network_work("wan/text").times(prompts) + coding + copies
        steps = cls.steps_of(shot)
        computed = steps * computed_share(params, steps, _COMPUTED_SHARES)
        return ShotWork(step.times(prompts * computed), fixed, coding).times(cls.passes(shot))

    @classmethod
    def memory(cls, params: WanParams, shot: Shot) -> StageMemory | None:
        """Memory of I2V-A14B, or of TI2V-5B if the weights are called so or have one transformer."""
        one_transformer = _has_one_transformer(params.weights)
        model = "wan-ti2v" if one_transformer else "wan"
        transformer, second, vae = f"{model}/transformer", f"{model}/transformer_2", f"{model}/vae"
        dtype, pixels = params.dtype, shot.width * shot.height
        transformer_bytes = weight_bytes(stored(transformer, params.quantize), dtype)
        if shot.video_lora:
            transformer_bytes += params.adapters_kept * weight_bytes(f"{model}/lora", dtype)
        weights = {_TEXT_ENCODER: weight_bytes(_TEXT_ENCODER, dtype), vae: weight_bytes(vae, "float32")}
        weights |= dict.fromkeys((transformer,) if one_transformer else (transformer, second), transformer_bytes)
        clip = pixels * shot.num_frames * 3 * 4
        # I2V-A14B encodes a clip that begins with the image, TI2V-5B the image alone.
        encoded = pixels * 3 * 4 if one_transformer else clip
        worked_on = min(pixels, TILE_PX**2) if params.vae_tiling else pixels
        # The curves of the autoencoder are those of float32, which it keeps with any dtype.
        encode, decode = (activation_bytes(f"{model}/{work}", worked_on, "float16") for work in ("encode", "decode"))
        # Overlapping tiles, rows of blended tiles and the clip; without tiles the clip and two copies.
        tiles = clip * TILE_PX**2 // TILE_STEP_PX**2 if params.vae_tiling else 0
        tokens = pixels // (PIXELS_TI2V if one_transformer else PIXELS_A14B) * cls.latent_frames(shot.num_frames)
        channels, networks = (CHANNELS_TI2V, 1) if one_transformer else (CHANNELS_A14B, 2)
        cached = networks * cls.prompts_of(shot) * cached_bytes(params, tokens, channels)
        phases = (
            Phase(_TEXT_ENCODER, activation_bytes("wan/text", 0, dtype)),
            Phase(vae, max(2 * encoded, encoded + encode)),
            Phase(transformer, activation_bytes(f"{model}/step", pixels * cls.latent_frames(shot.num_frames), dtype) + cached),
            Phase(vae, max(decode + max(clip, tiles), 2 * clip + max(clip, tiles))),
        )
        return memory_of_phases(weights, phases, cpu_offload=params.cpu_offload, results=clip_host_bytes(shot))

    @classmethod
    def divided(cls, params: WanParams) -> WanParams | None:
        can_divide = not (params.cpu_offload or params.first_block_cache) and params.attention_backend in ATTENTION_BACKENDS
        return params if can_divide else None

    def load_pipe(self) -> Any:
        (WanImageToVideoPipeline,) = diffusers_classes(self.params, "WanImageToVideoPipeline")

        pipe = load_pipeline(
            WanImageToVideoPipeline,
            self.params,
            accepted_classes=self.pipelines,
            float32_parts=("vae",),
            cpu_offload=self.params.cpu_offload,
        )
        if self.params.flow_shift is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=self.params.flow_shift)
        if self.params.names_extra_weights(FEW_STEP_LORA):
            for part, file in few_step_files(self.params).items():
                merge_lora(pipe, file, "Wan", part)
        for transformer in filter(None, (pipe.transformer, pipe.transformer_2)):
            divide(transformer)
        for part in (pipe.vae.encoder, pipe.vae.decoder):
            divide_columns(part)
        return pipe

    @classmethod
    def weight_files(cls, params: WanParams, shot: Shot) -> tuple[Path, ...]:
        merged = tuple(few_step_files(params).values()) if params.names_extra_weights(FEW_STEP_LORA) else ()
        return (params.weights, *merged, *(Path(lora.path) for lora in shot.video_lora))

    @classmethod
    def needs(cls, shot: Shot) -> tuple[str, ...]:
        return (*super().needs(shot), *(("last_image",) if shot.last_image else ()))

    def call_arguments(self, item: Item) -> Mapping[str, Any]:
        from PIL import Image as PILImage

        arguments: dict[str, Any] = {}
        given = {"last_image": item.shot.last_image, "guidance.wan_2": item.shot.guidance.wan_2}
        for field, value in given.items():
            if value is not None and self.pipe.config.expand_timesteps:
                # The pipeline would ignore an image.
                raise StageError(f"{field}: these weights take none; use Wan 2.2 I2V-A14B")
        if item.shot.last_image is not None:
            arguments["last_image"] = PILImage.fromarray(item.last_image)
        if (second := item.shot.guidance.wan_2) is not None:
            if second > 1 >= self.guidance(item.shot):
                # The pipeline would ignore it.
                raise StageError(f"guidance.wan_2: got {second:g}, needs guidance.wan above 1")
            arguments["guidance_scale_2"] = second
        return arguments

    def guidance(self, shot: Shot) -> float:
        default = GUIDANCE_TI2V if self.pipe.config.expand_timesteps else GUIDANCE_A14B
        return default if shot.guidance.wan is None else shot.guidance.wan

    def decode(self, latents: torch.Tensor, item: Item, generator: torch.Generator) -> torch.Tensor:
        import torch

        vae = self.pipe.vae
        latents = latents.to(vae.dtype)
        mean, std = (
            torch.tensor(numbers, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1, 1)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        # As the pipeline computes it, which rounds in another way than latents * std.
        pixels: torch.Tensor = vae.decode(latents / (1 / std) + mean, return_dict=False)[0]
        return pixels


def few_step_files(params: WanParams) -> dict[str, Path]:
    """Return transformer -> LoRA that distils it to a few steps, with the file names of lightx2v's Wan2.2-Lightning."""
    folder = params.extra_weights_at(FEW_STEP_LORA)
    return {"transformer": folder / "high_noise_model.safetensors", "transformer_2": folder / "low_noise_model.safetensors"}


def _has_one_transformer(weights: Path) -> bool:
    """Return whether the weights are those of TI2V-5B. By their name, if they are not on this machine."""
    if (weights / PIPELINE_INDEX).is_file():
        return not (weights / "transformer_2").is_dir()
    return "ti2v" in str(weights).lower()
