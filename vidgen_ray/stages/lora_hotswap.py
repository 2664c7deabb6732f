"""LoRAs of a pipeline whose transformer is compiled: they are copied into slots instead of added as adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.errors import StageError
from vidgen_ray.stages.lora_adapters import LoraAdapters
from vidgen_ray.stages.lora_slots import LoraFactors, LoraSlots, take_factors, without_peft_warnings

if TYPE_CHECKING:
    import torch


class HotswapLoras(LoraAdapters):
    """LoRAs in fixed slots of the transformer of one pipeline, so that a compiled transformer stays compiled.

    A LoRA's layers in the text encoder, which is not compiled, are adapters as in `LoraAdapters`.
    """

    def __init__(self, pipe: Any, kept: int, model: str, *, slots: int, max_rank: int, dtype: torch.dtype) -> None:
        """`slots`: maximum of LoRAs per shot. `max_rank`: largest rank of a LoRA. `dtype`: that of the computation."""
        super().__init__(pipe, max(kept, slots), model, dtype=dtype)
        self._slots = LoraSlots(pipe.transformer, dtype, slots, max_rank)
        self._factors: dict[str, LoraFactors] = {}
        pipe.disable_lora()

    def _require_room(self, loras: int) -> None:
        if loras > self._slots.count:
            raise StageError(f"lora: got {loras}, must be at most {self._slots.count}, the profile's lora_slots")

    def _activate(self, names: list[str], weights: list[float]) -> None:
        from diffusers.loaders.lora_base import set_adapters_for_text_encoder

        self._slots.fill([(name, self._factors[name], weight) for name, weight in zip(names, weights, strict=True)])
        self._pipe.transformer.enable_lora()
        in_text = [name for name in names if name in self._pipe.get_list_adapters().get("text_encoder", ())]
        if in_text:
            set_adapters_for_text_encoder(in_text, self._pipe.text_encoder, [weights[names.index(name)] for name in in_text])

    def _load(self, file: Path, name: str, transformers: Sequence[str]) -> None:
        transformer = self._pipe.transformer
        try:
            super()._load(file, name, transformers)
            self._factors[name] = {}
            if name in transformer.peft_config:
                self._factors[name] = take_factors(transformer, name)
                self._slots.require_fits(self._factors[name])
        except ValueError as error:
            self._unload(name)
            raise StageError(f"lora {file.name}: {error}") from None
        finally:
            if name in transformer.peft_config:
                with without_peft_warnings():
                    transformer.delete_adapters(name)

    def _unload(self, name: str) -> None:
        self._factors.pop(name, None)
        super()._unload(name)
