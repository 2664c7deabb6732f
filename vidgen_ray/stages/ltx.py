"""LTX-Video: generate a clip from an image and a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from vidgen_ray.nets.diffusers_private import unpacked_ltx_latents
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, StageParams
from vidgen_ray.stages.first_block_cache import cached_bytes, computed_share
from vidgen_ray.stages.loading import diffusers_classes, load_pipeline
from vidgen_ray.stages.memory_table import (
    Phase,
    ShotWork,
    StageMemory,
    activation_bytes,
    memory_of_phases,
    network_work,
    offload_work,
    weight_bytes,
)
from vidgen_ray.stages.video import CLIP_PROMPT_FIELDS, PromptedVideoParams, PromptedVideoStage, clip_host_bytes

if TYPE_CHECKING:
    import torch

_DEFAULT_GUIDANCE = 3.0
_TEXT_ENCODER, _TRANSFORMER, _VAE = "ltx/text_encoder", "ltx/transformer", "ltx/vae"
_COMPUTED_SHARES = {0.03: 0.81, 0.05: 0.65, 0.1: 0.45, 0.2: 0.31}
"""Threshold of `first_block_cache` -> seconds relative to those without. From diffusers #11180."""
_CHANNELS, _PIXELS_PER_TOKEN = 2048, 32 * 32
"""Channels of a token in the transformer, and its pixels of a latent frame."""
_TILE_PX = 512
"""Side of diffusers' tiles of the autoencoder."""


class LTXParams(PromptedVideoParams):
    schedule_actor: ClassVar[str] = "ltx"

    text_tokens: int = Field(default=128, ge=1, le=512)
    """Tokens of the prompt that the text encoder reads. Longer prompts are cut."""
    decode_timestep: float = Field(default=0.05, ge=0, le=1)
    """Timestep at which the autoencoder decodes, for weights with timestep conditioning (0.9.1 and later)."""
    decode_noise_scale: float = Field(default=0.025, ge=0, le=1)
    """Fraction of noise in the latents that such an autoencoder decodes."""


class LTXStage(PromptedVideoStage[LTXParams]):
    """`image` (H, W, 3) -> `frames` (clip_frames, H, W, 3), num_frames = 8k + 1. H and W are multiples of 32.

    The model is conditioned on fps. Guidance of 1 or less needs one pass per step instead of two, for distilled weights, and
    the negative prompt has no effect.
    Source: HaCohen et al. 2024, LTX-Video, arXiv:2501.00103; diffusers `LTXImageToVideoPipeline`.
    """

    name: ClassVar[str] = "ltx"
    label: ClassVar[str] = "LTX"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"video_model": "ltx", "num_frames": 25, "fps": 25},)
    # The published folders name the pipeline of text to video, with the same components.
    pipelines: ClassVar[tuple[str, ...]] = ("LTXImageToVideoPipeline", "LTXPipeline")
    reads: ClassVar[tuple[str, ...]] = (*CLIP_PROMPT_FIELDS, "video_lora", "steps.ltx", "guidance.ltx")
    Params: ClassVar[type[StageParams]] = LTXParams
    default_steps: ClassVar[int] = 50
    passes_in_one_call: ClassVar[bool] = True

    @property
    def size_multiple_px(self) -> int:
        return 32

    @staticmethod
    def latent_frames(frames: int) -> int:
        # The autoencoder makes eight frames one.
        return (frames - 1) // 8 + 1

    @classmethod
    def work(cls, params: LTXParams, shot: Shot) -> ShotWork:
        pixels, prompts = shot.width * shot.height, cls.prompts_of(shot)
        # The step was traced with both prompts.
        step = network_work("ltx/step", pixels, cls.latent_frames(shot.num_frames)).times(prompts / 2)
        coding = network_work("ltx/encode", pixels) + network_work("ltx/decode", pixels, shot.num_frames)
        copies = offload_work((_TEXT_ENCODER, _VAE, _TRANSFORMER, _VAE), params.dtype, cpu_offload=params.cpu_offload)
        fixed = network_work("ltx/text").times(prompts) + coding + copies
        steps = cls.steps_of(shot)
        computed = steps * computed_share(params, steps, _COMPUTED_SHARES)
        return ShotWork(step.times(computed), fixed).times(cls.passes(shot))

    @classmethod
    def memory(cls, params: LTXParams, shot: Shot) -> StageMemory | None:
        """Memory of the 2B model of version 0.9.0."""
        if "13b" in params.weights.name.lower():
            return None
        dtype, pixels = params.dtype, shot.width * shot.height
        latent_frames = cls.latent_frames(shot.num_frames)
        weights = {network: weight_bytes(network, dtype) for network in (_TEXT_ENCODER, _TRANSFORMER, _VAE)}
        if shot.video_lora:
            weights[_TRANSFORMER] += params.adapters_kept * weight_bytes("ltx/lora", dtype)
        worked_on = min(pixels, _TILE_PX**2) if params.vae_tiling else pixels
        # The curve of decoding includes the clip of the pixels that it works on, in float32. The other tiles come on top.
        tiles = 3 * shot.num_frames * pixels * 3 * 4 if params.vae_tiling else 0
        cached = cls.prompts_of(shot) * cached_bytes(params, pixels // _PIXELS_PER_TOKEN * latent_frames, _CHANNELS)
        phases = (
            Phase(_TEXT_ENCODER, activation_bytes("ltx/text", 0, dtype)),
            Phase(_VAE, activation_bytes("ltx/encode", worked_on, dtype)),
            Phase(_TRANSFORMER, activation_bytes("ltx/step", pixels * latent_frames, dtype) + cached),
            Phase(_VAE, activation_bytes("ltx/decode", worked_on * latent_frames, dtype) + tiles),
        )
        return memory_of_phases(weights, phases, cpu_offload=params.cpu_offload, results=clip_host_bytes(shot))

    def load_pipe(self) -> Any:
        (LTXImageToVideoPipeline,) = diffusers_classes(self.params, "LTXImageToVideoPipeline")

        return load_pipeline(
            LTXImageToVideoPipeline, self.params, accepted_classes=self.pipelines, cpu_offload=self.params.cpu_offload
        )

    def call_arguments(self, item: Item) -> Mapping[str, Any]:
        return {"frame_rate": item.shot.fps}

    def guidance(self, shot: Shot) -> float:
        return _DEFAULT_GUIDANCE if shot.guidance.ltx is None else shot.guidance.ltx

    def decode(self, latents: torch.Tensor, item: Item, generator: torch.Generator) -> torch.Tensor:
        """Decode, with timestep conditioning at a timestep and with some noise in the latents.

        As the pipeline does, except that the noise comes from a CPU generator on every device. The pipeline draws it on the
        GPU, and fails with a CPU generator.
        """
        import torch

        pipe, vae, (height, width, _) = self.pipe, self.pipe.vae, item.image.shape
        size = (
            (item.shot.num_frames - 1) // pipe.vae_temporal_compression_ratio + 1,
            height // pipe.vae_spatial_compression_ratio,
            width // pipe.vae_spatial_compression_ratio,
        )
        latents = unpacked_ltx_latents(pipe, latents, size)
        latents, timestep = latents.to(vae.dtype), None
        if vae.config.timestep_conditioning:
            noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype).to(latents.device)
            scale = torch.tensor([self.params.decode_noise_scale], device=latents.device, dtype=latents.dtype)
            timestep = torch.tensor([self.params.decode_timestep], device=latents.device, dtype=latents.dtype)
            latents = (1 - scale) * latents + scale * noise
        pixels: torch.Tensor = vae.decode(latents, timestep, return_dict=False)[0]
        return pixels
