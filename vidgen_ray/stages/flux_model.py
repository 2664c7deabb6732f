"""FLUX.1 weights, loaded once per process: pipelines for text to image and image to image, and the loaded LoRAs."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from cachetools import LRUCache
from pydantic import Field

from vidgen_ray.cache_dir import digest
from vidgen_ray.errors import InputChanged, StageError
from vidgen_ray.nets.finite import NOT_FINITE, is_finite, not_finite
from vidgen_ray.shot import LocalLora, LoraRef, Shot
from vidgen_ray.stages.base import StageParams
from vidgen_ray.stages.loading import load_pipeline

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
        self._adapters_kept = params.adapters_kept
        self._active_loras: tuple[tuple[str, float], ...] = ()
        # Adapter names, least recently used first.
        self._adapters: OrderedDict[str, None] = OrderedDict()
        self.adapter_loads = 0
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
        key = (prompt, tokens, self._active_loras if self._loras_change_text else ())
        if (embeddings := self._embeddings.get(key)) is None:
            embeds, pooled, _ = self.text_to_image.encode_prompt(
                prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=tokens
            )
            if not (is_finite(embeds) and is_finite(pooled)):
                raise StageError(NOT_FINITE)
            embeddings = self._embeddings[key] = embeds, pooled
        return embeddings

    @property
    def _loras_change_text(self) -> bool:
        """True if an active LoRA changes a text encoder."""
        adapters = self.text_to_image.get_list_adapters()
        active_loras = {name for name, _ in self._active_loras}
        return any(active_loras & set(names) for part, names in adapters.items() if part.startswith("text_encoder"))

    def move(self, device: str) -> None:
        """Move the weights and the cached prompt embeddings to `device`."""
        if device == self.device:
            return
        self.device = device
        self.text_to_image.to(device)
        for key, (embeds, pooled) in list(self._embeddings.items()):
            self._embeddings[key] = embeds.to(device), pooled.to(device)

    @contextmanager
    def loras_active(self, loras: Sequence[LoraRef]) -> Iterator[None]:
        """Run the block with exactly these LoRAs active. Outside of it the weights are bitwise those without LoRAs."""
        if not loras:
            yield
            return
        if len(loras) > self._adapters_kept:
            raise StageError(f"lora: got {len(loras)}, must be at most {self._adapters_kept}, the profile's adapters_kept")
        names = [self._adapter(lora) for lora in loras]
        try:
            self.text_to_image.enable_lora()
            self.text_to_image.set_adapters(names, [lora.weight for lora in loras])
            self._active_loras = tuple((name, lora.weight) for name, lora in zip(names, loras, strict=True))
            yield
        finally:
            self._active_loras = ()
            self.text_to_image.disable_lora()

    def _adapter(self, lora: LoraRef) -> str:
        """Return the adapter name of a LoRA file, loaded on first use.

        Raises InputChanged if the file does not have the digest that the shot was planned with.
        """
        file = Path(lora.path)
        if file.suffix != ".safetensors" or not file.is_file():
            raise StageError(f"lora: got {str(file)!r}, must be an existing .safetensors file (other formats may run code)")
        sha256 = lora.sha256 if isinstance(lora, LocalLora) else digest(file)
        name = f"lora_{hashlib.sha256(f'{file.resolve()}/{sha256}'.encode()).hexdigest()[:16]}"
        if name in self._adapters:
            self._adapters.move_to_end(name)
            return name
        while len(self._adapters) >= self._adapters_kept:
            oldest, _ = self._adapters.popitem(last=False)
            with _without_peft_warnings():
                self.text_to_image.delete_adapters(oldest)
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise InputChanged(file)
        with tempfile.TemporaryDirectory(prefix="vidgen-lora-") as folder:
            # diffusers reads a path. The copy has the bytes that were checked.
            copy = Path(folder) / file.name
            copy.write_bytes(content)
            del content
            self._load_adapter(copy, name)
        self.adapter_loads += 1
        self._adapters[name] = None
        return name

    def _load_adapter(self, file: Path, name: str) -> None:
        pipe = self.text_to_image
        source = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
        try:
            factors = pipe.lora_state_dict(str(file.parent), **source)
            _check_shapes(pipe.transformer, factors)
            if (tensor := not_finite(factors)) is not None:
                raise ValueError(f"{tensor} has NaN or infinite values")
            with _without_peft_warnings():
                pipe.load_lora_weights(str(file.parent), adapter_name=name, **source)
        # diffusers' converters of LoRA formats raise many exception types.
        except Exception as error:
            raise StageError(f"lora {file.name}: cannot be loaded into these FLUX weights: {error}") from error
        if self._adapters:
            pipe.disable_lora()
        changed_parts = [part for part, names in pipe.get_list_adapters().items() if name in names]
        if not any(_has_effect(getattr(pipe, part), name) for part in changed_parts):
            if changed_parts:
                with _without_peft_warnings():
                    pipe.delete_adapters(name)
            raise StageError(
                f"lora {file.name}: has no effect on these FLUX weights; it was trained for another model, or not trained"
            )


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """Suppress peft's warnings about several adapters and about deleting an active adapter. Both are intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`|Adapter .* was active", UserWarning)
        yield


def _check_shapes(transformer: Any, factors: Mapping[str, Any]) -> None:
    """Raise ValueError if LoRA factors do not match their layer. diffusers would resize the layer, for all shots."""
    layers = dict(transformer.named_modules())
    for key, factor in factors.items():
        name, dot, rest = key.removeprefix("transformer.").rpartition(".lora_")
        layer = layers.get(name)
        layer = getattr(layer, "base_layer", layer)
        if not dot or layer is None or rest not in ("A.weight", "B.weight"):
            continue
        side = 1 if rest == "A.weight" else 0
        if factor.shape[side] != layer.weight.shape[side]:
            raise ValueError(f"{key} has shape {tuple(factor.shape)}, its layer {tuple(layer.weight.shape)}")


def _has_effect(module: Any, adapter: str) -> bool:
    """Return whether the second factor of any layer is nonzero. Training starts with zeros."""
    return any(
        bool(layer.lora_B[adapter].weight.any())
        for layer in module.modules()
        if hasattr(layer, "lora_B") and adapter in layer.lora_B
    )
