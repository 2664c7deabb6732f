"""FLUX.1 weights, loaded once per process: pipelines for text to image and image to image, LoRAs and prompt embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Annotated, Any, ClassVar, Literal, Self
from weakref import WeakValueDictionary

from cachetools import LRUCache
from pydantic import Field, model_validator

from vidgen_ray.errors import StageError
from vidgen_ray.nets.weight_files import NOT_FINITE, is_finite
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import NOT_IN_KEY, torch_dtype
from vidgen_ray.stages.context_parallel import divide
from vidgen_ray.stages.first_block_cache import FirstBlockCache, FirstBlockCacheParams
from vidgen_ray.stages.loading import (
    TiledParams,
    deferred_imports_of,
    diffusers_classes,
    dtypes_kept,
    load_pipeline,
    move_networks,
    pin_networks,
    set_vae_tiles,
)
from vidgen_ray.stages.lora import FEW_STEP_LORA, LoraAdapters, merge_lora
from vidgen_ray.stages.memory_table import FP8
from vidgen_ray.stages.schedules import SCHEDULES, ScheduleParams
from vidgen_ray.stages.speed import compute_in_fp8, speed_up, store_in_fp8

T5 = "text_encoder_2"
"""Name of T5 among the components of diffusers' pipelines."""
T5_CHANNELS = 4096
SCHNELL_TEXT_TOKENS = 256
"""T5 tokens that FLUX.1-schnell was trained with. diffusers would silently accept more."""
CACHED_PROMPTS = 64
"""Prompts whose embeddings are cached in memory. An embedding takes 4 MB at 512 tokens in bfloat16."""
DEFAULT_STEPS = SCHEDULES["flux.1-dev"].steps
"""Default steps of FLUX.1-dev."""
_DEFAULT_GUIDANCE = SCHEDULES["flux.1-dev"].guidance
SCHNELL_STEPS = SCHEDULES["flux.1-schnell"].steps
"""Default steps of FLUX.1-schnell."""


class FluxParams(FirstBlockCacheParams, TiledParams, ScheduleParams):
    schedule_actor: ClassVar[str] = "flux"

    text_encoder: Literal["gpu", "swapped", "cpu"] = "gpu"
    """Place of T5. gpu: with the other networks. swapped: T5 and the transformer take turns in GPU memory, for each new prompt.
    cpu: T5 stays in host memory and runs there."""
    text_tokens: int = Field(default=512, ge=1, le=512)
    """T5 tokens of the prompt. At most 256 are used for schnell."""
    distilled_guidance: bool = True
    """The transformer was distilled to get the guidance as an input, as FLUX.1-dev. `false`: for weights without that, such as
    de-distilled ones; the shot's guidance is then the scale of classifier-free guidance, with two passes per step."""
    true_cfg_scale: float = Field(default=4.0, ge=1)
    """Classifier-free guidance scale for shots with a negative prompt, with distilled guidance. Adds a second pass per step."""
    adapters_kept: Annotated[int, NOT_IN_KEY] = Field(default=4, ge=1)
    """LoRAs that stay loaded, and the maximum per shot. The least recently used one is unloaded first."""
    quantize: Literal["none", "fp8", "fp8_storage"] = "none"
    """Quantisation of the transformer while it is loaded. fp8: weights and activations, computed in 8 bits by torchao, on GPUs
    since Ada and Hopper. fp8_storage: weights in 8 bits (e4m3), converted to `dtype` layer by layer, on any device."""

    def for_key(self) -> dict[str, Any]:
        values = super().for_key()
        # T5 computes on the device of the other networks, unless it stays on the CPU.
        if self.text_encoder != "cpu" or self.device == "cpu":
            values.pop("text_encoder")
        return values

    def uses_negative_prompt(self, shot: Shot) -> bool:
        """Return if each step has a second pass, for the negative prompt of the shot or an empty one."""
        return bool(shot.negative_prompt) or not self.distilled_guidance

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.quantize == FP8 and self.compile:
            raise ValueError("quantize fp8_storage needs compile: false, because the casts of each layer are not compiled")
        return self


class FluxModel:
    """FLUX pipelines with their LoRAs. Use `FluxModel.shared(params)`: stages of one process with the same weights share it."""

    _instances: ClassVar[WeakValueDictionary[str, FluxModel]] = WeakValueDictionary()

    @classmethod
    def shared(cls, params: FluxParams) -> FluxModel:
        """Return the model of this process for these parameters, loaded on first use."""
        key = params.model_dump_json(exclude={"missing"})
        if (model := cls._instances.get(key)) is None:
            model = cls._instances[key] = cls(params)
        return model

    def __init__(self, params: FluxParams) -> None:
        import torch

        FluxImg2ImgPipeline, FluxPipeline = diffusers_classes(params, "FluxImg2ImgPipeline", "FluxPipeline")

        self.params = params
        self.device = params.device
        self.dtype = torch_dtype(params.dtype)
        """Dtype of the computation, which quantised weights do not have."""
        # Weights in 8 bits go to the GPU after they are quantised.
        on_host = {T5: params.text_encoder != "gpu", "transformer": params.quantize != "none"}
        self.text_to_image = load_pipeline(
            FluxPipeline,
            params,
            host_parts=frozenset(name for name, stays in on_host.items() if stays),
        )
        transformer = self.text_to_image.transformer
        if params.names_extra_weights(FEW_STEP_LORA):
            merge_lora(self.text_to_image, params.extra_weights_at(FEW_STEP_LORA), "FLUX")
        if params.quantize == FP8:
            store_in_fp8(transformer, self.dtype)
        elif params.quantize == "fp8":
            compute_in_fp8(transformer, params.device)
        # Not `from_pipe`: it casts the shared weights to float32 in place.
        components = {k: v for k, v in self.text_to_image.components.items() if k not in ("image_encoder", "feature_extractor")}
        scheduler = components.pop("scheduler")
        with deferred_imports_of(params):
            self.image_to_image = FluxImg2ImgPipeline(scheduler=type(scheduler).from_config(scheduler.config), **components)
        self.image_to_image.set_progress_bar_config(disable=True)
        self.adapters = LoraAdapters(
            self.text_to_image,
            params.adapters_kept,
            "FLUX",
            dtype=None if params.quantize == "none" else self.dtype,
            is_compiled=params.compile,
        )
        self._t5_on_gpu = params.text_encoder == "gpu"
        self._is_turn_of_t5 = False
        """T5 has the place of the transformer in GPU memory. Also after a turn whose end has failed twice."""
        networks = {name: each for name, each in self.text_to_image.components.items() if isinstance(each, torch.nn.Module)}
        for name, network in networks.items():
            if self._t5_on_gpu or name != T5:
                network.to(params.device)
        if params.text_encoder == "swapped":
            # Last: a move of quantised tensors would drop their copies.
            pin_networks([networks[T5], transformer])
        speed_up(transformer, params)
        divide(transformer)
        self.cache = FirstBlockCache(transformer, params) if params.first_block_cache else None
        self._embeddings: LRUCache[tuple[str, int, tuple[tuple[str, float], ...]], tuple[Any, Any]] = LRUCache(CACHED_PROMPTS)

    @property
    def is_schnell(self) -> bool:
        """True for weights distilled to a few steps without guidance, such as FLUX.1-schnell."""
        return self.params.distilled_guidance and not self.text_to_image.transformer.config.guidance_embeds

    @property
    def default_steps(self) -> int:
        return SCHNELL_STEPS if self.is_schnell else DEFAULT_STEPS

    def loras_active(self, loras: Sequence[LoraRef]) -> AbstractContextManager[None]:
        """Run the block with exactly these LoRAs active. Outside of it the weights are bitwise those without LoRAs."""
        return self.adapters.active(loras)

    @contextmanager
    def prepared(self, params: FluxParams) -> Iterator[None]:
        """Have the networks of the model ready for a call with these parameters in the block."""
        pipe = self.text_to_image
        set_vae_tiles(pipe.vae, params.vae_tile_px)
        if self._is_turn_of_t5:
            self._end_turn_of_t5()
        with dtypes_kept(pipe.transformer) if self.params.quantize == FP8 else nullcontext():
            yield

    def call_arguments(self, shot: Shot, params: FluxParams, guidance: float | None) -> dict[str, Any]:
        """Return the arguments that text to image and image to image have in common."""
        tokens = min(params.text_tokens, SCHNELL_TEXT_TOKENS) if self.is_schnell else params.text_tokens
        embeds, pooled = self._encode_prompt(shot.prompt, tokens, params)
        arguments: dict[str, Any] = {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "width": shot.width,
            "height": shot.height,
            "max_sequence_length": tokens,
            "output_type": "pt",
        }
        scale = _DEFAULT_GUIDANCE if guidance is None else guidance
        arguments["guidance_scale"] = scale if params.distilled_guidance else 1.0
        if params.uses_negative_prompt(shot):
            embeds, pooled = self._encode_prompt(shot.negative_prompt or "", tokens, params)
            arguments |= {
                "negative_prompt_embeds": embeds,
                "negative_pooled_prompt_embeds": pooled,
                "true_cfg_scale": params.true_cfg_scale if params.distilled_guidance else scale,
            }
        return arguments

    def _encode_prompt(self, prompt: str, tokens: int, params: FluxParams) -> tuple[Any, Any]:
        """Return the embeddings of a prompt by T5 and CLIP. The last `CACHED_PROMPTS` prompts are cached in memory."""
        key = (prompt, tokens, self.adapters.active_in_text_encoder)
        if (embeddings := self._embeddings.get(key)) is None:
            embeddings = self._embeddings[key] = self._compute_embeddings(prompt, tokens, params.text_encoder)
        return embeddings

    def _compute_embeddings(self, prompt: str, tokens: int, place: str) -> tuple[Any, Any]:
        # As `encode_prompt` of diffusers, which tokenises each prompt twice more, for warnings.
        pipe = self.text_to_image

        def encode(network: Any, tokenizer: Any, length: int) -> Any:
            inputs = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            return network(inputs.input_ids.to(network.device))

        with self._t5_ready(place):
            pooled = encode(pipe.text_encoder, pipe.tokenizer, pipe.tokenizer_max_length).pooler_output.to(self.device)
            embeds = encode(getattr(pipe, T5), pipe.tokenizer_2, tokens)[0].to(self.device)
        if not (is_finite(embeds) and is_finite(pooled)):
            raise StageError(NOT_FINITE)
        return embeds, pooled

    @contextmanager
    def _t5_ready(self, place: str) -> Iterator[None]:
        """Have T5 where it encodes prompts in the block: on the device of the model, or in host memory.

        diffusers runs T5 on the device of its weights and returns the embeddings on that of the model.
        """
        t5, transformer = getattr(self.text_to_image, T5), self.text_to_image.transformer
        if self.device == "cpu":
            yield
        elif place == "swapped":
            self._is_turn_of_t5 = True
            try:
                move_networks([transformer], "cpu")
                move_networks([t5], self.device)
                yield
            finally:
                self._end_turn_of_t5()
        else:
            self._move_t5("cpu" if place == "cpu" else self.device)
            yield

    def _end_turn_of_t5(self) -> None:
        def end() -> None:
            self._move_t5("cpu")
            move_networks([self.text_to_image.transformer], self.device)
            self._is_turn_of_t5 = False

        try:
            end()
        except BaseException:
            with suppress(Exception):
                end()
            raise

    def _move_t5(self, device: str) -> None:
        # Also if it should be there: an error may have left a part elsewhere.
        move_networks([getattr(self.text_to_image, T5)], device)
        self._t5_on_gpu = device != "cpu"

    def move(self, device: str) -> None:
        """Move the weights and the cached prompt embeddings to `device`. After an error, call it again."""
        moves_t5 = self._t5_on_gpu or device == "cpu"
        networks = {name: network for name, network in self.text_to_image.components.items() if name != T5 or moves_t5}
        move_networks(networks.values(), device)
        self.device = device
        for key, (embeds, pooled) in list(self._embeddings.items()):
            self._embeddings[key] = embeds.to(device), pooled.to(device)
