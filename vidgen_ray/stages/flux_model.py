"""FLUX.1 weights, loaded once per process: pipelines for text to image and image to image, and the loaded LoRAs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

from cachetools import LRUCache
from pydantic import Field

from vidgen_ray.errors import StageError
from vidgen_ray.nets.finite import NOT_FINITE, is_finite
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import StageParams, torch_dtype
from vidgen_ray.stages.host_weights import move_networks
from vidgen_ray.stages.loading import load_pipeline, set_vae_tiles
from vidgen_ray.stages.lora_adapters import LoraAdapters
from vidgen_ray.stages.memory import FP8

T5 = "text_encoder_2"
"""Name of T5 among the components of diffusers' pipelines."""
T5_CHANNELS = 4096
SCHNELL_TEXT_TOKENS = 256
"""T5 tokens that FLUX.1-schnell was trained with. diffusers would silently accept more."""
CACHED_PROMPTS = 64
"""Prompts whose embeddings are cached. An embedding takes 4 MB at 512 tokens in bfloat16."""
DEFAULT_STEPS = 28
"""Default steps of FLUX.1-dev."""
SCHNELL_STEPS = 4
"""Default steps of FLUX.1-schnell."""


class FluxParams(StageParams):
    vae_tile_px: Literal[512, 256] | None = None
    """Side of the tiles in which the autoencoder decodes, for large images on small GPUs. `None` decodes whole images."""
    text_encoder: Literal["gpu", "swapped", "cpu"] = "gpu"
    """Place of T5. gpu: with the other networks. swapped: T5 and the transformer take turns in GPU memory, for each new prompt.
    cpu: T5 stays in host memory and runs there."""
    quantize: Literal["none", "fp8_storage"] = "none"
    """Storage of the transformer's weights. fp8_storage: 8 bits (e4m3), converted to `dtype` layer by layer."""
    text_tokens: int = Field(512, ge=1, le=512)
    """T5 tokens of the prompt. At most 256 are used for schnell."""
    true_cfg_scale: float = Field(4.0, ge=1)
    """Classifier-free guidance scale for shots with a negative prompt. Adds a second pass per step."""
    adapters_kept: int = Field(4, ge=1)
    """LoRAs that stay loaded, and the maximum per shot. The least recently used one is unloaded first."""

    def for_key(self) -> dict[str, Any]:
        values = super().for_key()
        # They change no bytes.
        del values["adapters_kept"]
        if self.text_encoder != "cpu" or self.device == "cpu":
            del values["text_encoder"]
        # Options that profiles of earlier versions lack.
        return {
            name: value for name, value in values.items() if (name, value) not in (("vae_tile_px", None), ("quantize", "none"))
        }


def prompt_bytes(params: FluxParams) -> int:
    """Return the bytes of the embedding of a prompt."""
    return params.text_tokens * T5_CHANNELS * (4 if params.dtype == "float32" else 2)


class FluxModel:
    """FLUX pipelines with their LoRAs. Use `FluxModel.shared(params)`: stages of one process with the same weights share it."""

    _instances: ClassVar[WeakValueDictionary[tuple[Path, str, str, str], FluxModel]] = WeakValueDictionary()

    @classmethod
    def shared(cls, params: FluxParams) -> FluxModel:
        """Return the model of this process for these weights, dtype, storage and device, loaded on first use."""
        key = (params.weights, params.dtype, params.quantize, params.device)
        model = cls._instances.get(key)
        if model is None:
            model = cls._instances[key] = cls(params)
        return model

    def __init__(self, params: FluxParams) -> None:
        import torch
        from diffusers import FluxImg2ImgPipeline, FluxPipeline

        from vidgen_ray.nets.fp8 import store_in_fp8

        self.text_to_image = load_pipeline(FluxPipeline, params, place=False)
        self.dtype = torch_dtype(params.dtype)
        if params.quantize == FP8:
            store_in_fp8(self.text_to_image.transformer, self.dtype)
        # Not `from_pipe`: it casts the shared weights to float32 in place.
        components = {k: v for k, v in self.text_to_image.components.items() if k not in ("image_encoder", "feature_extractor")}
        scheduler = components.pop("scheduler")
        self.image_to_image = FluxImg2ImgPipeline(scheduler=type(scheduler).from_config(scheduler.config), **components)
        self.image_to_image.set_progress_bar_config(disable=True)
        self.device = params.device
        stored = None if params.quantize == "none" else self.dtype
        self.adapters = LoraAdapters(self.text_to_image, params.adapters_kept, "FLUX", dtype=stored)
        self._t5_on_gpu = params.text_encoder == "gpu"
        for name, network in self.text_to_image.components.items():
            if isinstance(network, torch.nn.Module) and (self._t5_on_gpu or name != T5):
                network.to(params.device)
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
        set_vae_tiles(self.text_to_image.vae, params.vae_tile_px)
        embeds, pooled = self._encode_prompt(shot.prompt, tokens, params)
        arguments: dict[str, Any] = {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "width": shot.width,
            "height": shot.height,
            "max_sequence_length": tokens,
            "output_type": "np",
        }
        if shot.negative_prompt:
            embeds, pooled = self._encode_prompt(shot.negative_prompt, tokens, params)
            arguments |= {
                "negative_prompt_embeds": embeds,
                "negative_pooled_prompt_embeds": pooled,
                "true_cfg_scale": params.true_cfg_scale,
            }
        return arguments

    def _encode_prompt(self, prompt: str, tokens: int, params: FluxParams) -> tuple[Any, Any]:
        """Return the embeddings of a prompt by T5 and CLIP. The last `CACHED_PROMPTS` prompts are cached."""
        key = (prompt, tokens, self.adapters.active_in_text_encoder)
        if (embeddings := self._embeddings.get(key)) is None:
            with self._t5_ready(params.text_encoder):
                embeds, pooled, _ = self.text_to_image.encode_prompt(
                    prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=tokens
                )
            if not (is_finite(embeds) and is_finite(pooled)):
                raise StageError(NOT_FINITE)
            embeddings = self._embeddings[key] = embeds, pooled
        return embeddings

    @contextmanager
    def _t5_ready(self, place: str) -> Iterator[None]:
        """Have T5 where it encodes prompts in the block: on the device of the model, or in host memory.

        diffusers runs T5 on the device of its weights and returns the embeddings on that of the model.
        """
        t5, transformer = getattr(self.text_to_image, T5), self.text_to_image.transformer
        if self.device == "cpu":
            yield
        elif place == "swapped":
            self._move_t5("cpu")
            move_networks([transformer], "cpu")
            move_networks([t5], self.device)
            try:
                yield
            finally:
                move_networks([t5], "cpu")
                move_networks([transformer], self.device)
        else:
            self._move_t5("cpu" if place == "cpu" else self.device)
            yield

    def _move_t5(self, device: str) -> None:
        if self._t5_on_gpu != (device != "cpu"):
            move_networks([getattr(self.text_to_image, T5)], device)
            self._t5_on_gpu = device != "cpu"

    def move(self, device: str) -> None:
        """Move the weights and the cached prompt embeddings to `device`."""
        if device == self.device:
            return
        self.device = device
        networks = {name: network for name, network in self.text_to_image.components.items() if name != T5 or self._t5_on_gpu}
        move_networks(networks.values(), device)
        for key, (embeds, pooled) in list(self._embeddings.items()):
            self._embeddings[key] = embeds.to(device), pooled.to(device)

    def loras_active(self, loras: Sequence[LoraRef]) -> AbstractContextManager[None]:
        """Run the block with exactly these LoRAs active. Outside of it the weights are bitwise those without LoRAs."""
        return self.adapters.active(loras)
