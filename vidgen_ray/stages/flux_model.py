"""FLUX.1 weights, loaded once per process: pipelines for text to image and image to image, and the loaded LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from cachetools import LRUCache
from pydantic import Field

from vidgen_ray.errors import StageError
from vidgen_ray.nets.finite import NOT_FINITE, is_finite
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import StageParams
from vidgen_ray.stages.loading import load_pipeline
from vidgen_ray.stages.lora_adapters import LoraAdapters

SCHNELL_TEXT_TOKENS = 256
"""T5 tokens that FLUX.1-schnell was trained with. diffusers would silently accept more."""
CACHED_PROMPTS = 64
"""Prompts whose embeddings are cached. An embedding takes 4 MB at 512 tokens in bfloat16."""
DEFAULT_STEPS = 28
"""Default steps of FLUX.1-dev."""
SCHNELL_STEPS = 4
"""Default steps of FLUX.1-schnell."""


class FluxParams(StageParams):
    text_tokens: int = Field(512, ge=1, le=512)
    """T5 tokens of the prompt. At most 256 are used for schnell."""
    true_cfg_scale: float = Field(4.0, ge=1)
    """Classifier-free guidance scale for shots with a negative prompt. Adds a second pass per step."""
    adapters_kept: int = Field(4, ge=1)
    """LoRAs that stay loaded, and the maximum per shot. The least recently used one is unloaded first."""

    def for_key(self) -> dict[str, Any]:
        return {name: value for name, value in super().for_key().items() if name != "adapters_kept"}


class FluxModel:
    """FLUX pipelines with their LoRAs. Use `FluxModel.shared(params)`: stages of one process with the same weights share it."""

    _instances: ClassVar[WeakValueDictionary[tuple[Path, str, str], FluxModel]] = WeakValueDictionary()

    @classmethod
    def shared(cls, params: FluxParams) -> FluxModel:
        """Return the model of this process for these weights, dtype and device, loaded on first use."""
        key = (params.weights, params.dtype, params.device)
        model = cls._instances.get(key)
        if model is None:
            model = cls._instances[key] = cls(params)
        return model

    def __init__(self, params: FluxParams) -> None:
        from diffusers import FluxImg2ImgPipeline, FluxPipeline

        self.text_to_image = load_pipeline(FluxPipeline, params)
        # Not `from_pipe`: it casts the shared weights to float32 in place.
        components = {k: v for k, v in self.text_to_image.components.items() if k not in ("image_encoder", "feature_extractor")}
        scheduler = components.pop("scheduler")
        self.image_to_image = FluxImg2ImgPipeline(scheduler=type(scheduler).from_config(scheduler.config), **components)
        self.image_to_image.set_progress_bar_config(disable=True)
        self.device = params.device
        self.adapters = LoraAdapters(self.text_to_image, params.adapters_kept, "FLUX")
        self._embeddings: LRUCache[tuple[str, int, tuple[tuple[str, float], ...]], tuple[Any, Any]] = LRUCache(CACHED_PROMPTS)

    @property
    def is_schnell(self) -> bool:
        """True for weights distilled to a few steps without guidance, such as FLUX.1-schnell."""
        return not self.text_to_image.transformer.config.guidance_embeds

    @property
    def default_steps(self) -> int:
        return SCHNELL_STEPS if self.is_schnell else DEFAULT_STEPS

    def call_arguments(self, shot: Shot, params: FluxParams) -> dict[str, Any]:
        """Return the arguments that text to image and image to image have in common."""
        tokens = min(params.text_tokens, SCHNELL_TEXT_TOKENS) if self.is_schnell else params.text_tokens
        embeds, pooled = self._encode_prompt(shot.prompt, tokens)
        arguments: dict[str, Any] = {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "width": shot.width,
            "height": shot.height,
            "max_sequence_length": tokens,
            "output_type": "np",
        }
        if shot.negative_prompt:
            embeds, pooled = self._encode_prompt(shot.negative_prompt, tokens)
            arguments |= {
                "negative_prompt_embeds": embeds,
                "negative_pooled_prompt_embeds": pooled,
                "true_cfg_scale": params.true_cfg_scale,
            }
        return arguments

    def _encode_prompt(self, prompt: str, tokens: int) -> tuple[Any, Any]:
        """Return the embeddings of a prompt by T5 and CLIP. The last `CACHED_PROMPTS` prompts are cached."""
        key = (prompt, tokens, self.adapters.active_in_text_encoder)
        if (embeddings := self._embeddings.get(key)) is None:
            embeds, pooled, _ = self.text_to_image.encode_prompt(
                prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=tokens
            )
            if not (is_finite(embeds) and is_finite(pooled)):
                raise StageError(NOT_FINITE)
            embeddings = self._embeddings[key] = embeds, pooled
        return embeddings

    def move(self, device: str) -> None:
        """Move the weights and the cached prompt embeddings to `device`."""
        if device == self.device:
            return
        self.device = device
        self.text_to_image.to(device)
        for key, (embeds, pooled) in list(self._embeddings.items()):
            self._embeddings[key] = embeds.to(device), pooled.to(device)

    def loras_active(self, loras: Sequence[LoraRef]) -> AbstractContextManager[None]:
        """Run the block with exactly these LoRAs active. Outside of it the weights are bitwise those without LoRAs."""
        return self.adapters.active(loras)
