"""FLUX.1 weights, held once a process: text to image and image to image over the same modules, and the LoRAs laid on them."""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from pydantic import Field

from vidgen_ray.errors import StageError
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import StageParams
from vidgen_ray.stages.loading import load_pipeline

SCHNELL_TEXT_TOKENS = 256
"""FLUX.1-schnell was trained with this many T5 tokens; diffusers would silently accept more."""


CACHED_PROMPTS = 64
"""A prompt's embedding takes 4 MB at 512 tokens in bfloat16."""
DEFAULT_STEPS = 28
"""Of FLUX.1-dev."""


class FluxParams(StageParams):
    text_tokens: int = Field(512, ge=1, le=512)
    """T5 tokens of the prompt; schnell never gets more than 256."""
    true_cfg_scale: float = Field(4.0, ge=1)
    """Classifier-free guidance against the negative prompt, for shots that have one; costs a second pass a step."""
    adapters_kept: int = Field(4, ge=1)
    """LoRAs kept on the weights, and the most that one shot may have; the one longest unused goes first."""

    def for_key(self) -> dict[str, Any]:
        return {name: value for name, value in super().for_key().items() if name != "adapters_kept"}


class FluxModel:
    """Use `FluxModel.shared(params)`: stages of one process that name the same weights get the same object."""

    _in_this_process: ClassVar[WeakValueDictionary[tuple[Path, str, str], FluxModel]] = WeakValueDictionary()

    @classmethod
    def shared(cls, params: FluxParams) -> FluxModel:
        key = (params.weights, params.dtype, params.device)
        model = cls._in_this_process.get(key)
        if model is None:
            model = cls._in_this_process[key] = cls(params)
        return model

    def __init__(self, params: FluxParams) -> None:
        from diffusers import FluxImg2ImgPipeline, FluxPipeline

        self.text_to_image = load_pipeline(FluxPipeline, params)
        # Not `from_pipe`: it casts the shared weights to float32 in place.
        parts = {k: v for k, v in self.text_to_image.components.items() if k not in ("image_encoder", "feature_extractor")}
        scheduler = parts.pop("scheduler")
        self.image_to_image = FluxImg2ImgPipeline(scheduler=type(scheduler).from_config(scheduler.config), **parts)
        self.image_to_image.set_progress_bar_config(disable=True)
        self.device = params.device
        self._adapters_kept = params.adapters_kept
        self._active_loras: tuple[tuple[str, float], ...] = ()
        self._adapters: OrderedDict[str, None] = OrderedDict()
        self.adapter_loads = 0
        self._embeddings: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()

    @property
    def is_schnell(self) -> bool:
        """Whether these weights were distilled to a few steps without guidance."""
        return not self.text_to_image.transformer.config.guidance_embeds

    @property
    def default_steps(self) -> int:
        return 4 if self.is_schnell else DEFAULT_STEPS

    def call_arguments(self, shot: Shot, params: FluxParams) -> dict[str, Any]:
        """What text to image and image to image are both told."""
        tokens = min(params.text_tokens, SCHNELL_TEXT_TOKENS) if self.is_schnell else params.text_tokens
        embeds, pooled = self._embedded(shot.prompt, tokens)
        arguments: dict[str, Any] = {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "width": shot.width,
            "height": shot.height,
            "max_sequence_length": tokens,
            "output_type": "np",
        }
        if shot.negative_prompt:
            embeds, pooled = self._embedded(shot.negative_prompt, tokens)
            arguments |= {
                "negative_prompt_embeds": embeds,
                "negative_pooled_prompt_embeds": pooled,
                "true_cfg_scale": params.true_cfg_scale,
            }
        return arguments

    def _embedded(self, prompt: str, tokens: int) -> tuple[Any, Any]:
        """T5's and CLIP's embeddings of a prompt, computed once while it is among the last `CACHED_PROMPTS`."""
        key = (prompt, tokens, self._active_loras if self._text_is_adapted else ())
        if key not in self._embeddings:
            embeds, pooled, _ = self.text_to_image.encode_prompt(
                prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=tokens
            )
            self._embeddings[key] = embeds, pooled
            if len(self._embeddings) > CACHED_PROMPTS:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        return self._embeddings[key]

    @property
    def _text_is_adapted(self) -> bool:
        """Whether a LoRA that acts now changes what prompts mean, too."""
        wearers = self.text_to_image.get_list_adapters()
        active_loras = {name for name, _ in self._active_loras}
        return any(active_loras & set(names) for part, names in wearers.items() if part.startswith("text_encoder"))

    def move(self, device: str) -> None:
        """Take the weights, and the embeddings made by them, to another memory."""
        if device == self.device:
            return
        self.device = device
        self.text_to_image.to(device)
        self._embeddings = OrderedDict(
            (key, (embeds.to(device), pooled.to(device))) for key, (embeds, pooled) in self._embeddings.items()
        )

    @contextmanager
    def loras_active(self, loras: Sequence[LoraRef]) -> Iterator[None]:
        """Run a block with exactly these LoRAs acting; outside of it the weights are the plain ones, bitwise."""
        if not loras:
            yield
            return
        if len(loras) > self._adapters_kept:
            raise StageError(f"lora: got {len(loras)} of them, the profile's adapters_kept allows {self._adapters_kept}")
        names = [self._adapter(Path(lora.path)) for lora in loras]
        try:
            self.text_to_image.enable_lora()
            self.text_to_image.set_adapters(names, [lora.weight for lora in loras])
            self._active_loras = tuple((name, lora.weight) for name, lora in zip(names, loras, strict=True))
            yield
        finally:
            self._active_loras = ()
            self.text_to_image.disable_lora()

    def _adapter(self, file: Path) -> str:
        """The name of the file's adapter, loaded if it is not there."""
        if file.suffix != ".safetensors" or not file.is_file():
            raise StageError(f"lora: got {str(file)!r}, must be an existing .safetensors file (other formats may run code)")
        stat = file.stat()
        identity = f"{file.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
        name = f"lora_{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        if name in self._adapters:
            self._adapters.move_to_end(name)
            return name
        while len(self._adapters) >= self._adapters_kept:
            oldest, _ = self._adapters.popitem(last=False)
            with _without_peft_warnings():
                self.text_to_image.delete_adapters(oldest)
        self._load_adapter(file, name)
        self.adapter_loads += 1
        self._adapters[name] = None
        return name

    def _load_adapter(self, file: Path, name: str) -> None:
        pipe = self.text_to_image
        source = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
        try:
            factors = pipe.lora_state_dict(str(file.parent), **source)
            _check_shapes(pipe.transformer, factors)
            with _without_peft_warnings():
                pipe.load_lora_weights(str(file.parent), adapter_name=name, **source)
        # The converters of LoRA formats raise whatever they stumble over.
        except Exception as error:
            raise StageError(f"lora {file.name}: cannot be laid on these FLUX weights: {error}") from error
        if self._adapters:
            pipe.disable_lora()
        wearers = [part for part, names in pipe.get_list_adapters().items() if name in names]
        if not any(_acts(getattr(pipe, part), name) for part in wearers):
            if wearers:
                with _without_peft_warnings():
                    pipe.delete_adapters(name)
            raise StageError(
                f"lora {file.name}: acts on nothing in these FLUX weights; it was trained for another model, or not trained"
            )


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """peft asks whether several adapters, and the end of an active one, are meant. They are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`|Adapter .* was active", UserWarning)
        yield


def _check_shapes(transformer: Any, factors: Mapping[str, Any]) -> None:
    """Refuse factors of another size than their layer's: diffusers would enlarge the layer, for every shot, to fit them."""
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


def _acts(module: Any, adapter: str) -> bool:
    """Whether any layer's second factor, which training starts at zero, is not zero."""
    return any(
        bool(layer.lora_B[adapter].weight.any())
        for layer in module.modules()
        if hasattr(layer, "lora_B") and adapter in layer.lora_B
    )
