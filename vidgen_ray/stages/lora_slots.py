"""LoRA hot swap: adapters with fixed names and shapes, into which the factors of LoRAs are copied.

torch.compile bakes names, shapes and scales of adapters into the code, so each new adapter would compile the network again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LoraFactors = Mapping[str, "tuple[torch.Tensor, torch.Tensor, float]"]
"""Layer -> the two factors (rank, inputs) and (outputs, rank), and the scale: alpha / rank, or what the file states."""


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Suppress peft's warnings about several adapters and about deleting an active adapter. Both are intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`|Adapter .* was active", UserWarning)
        yield


def take_factors(network: Any, adapter: str) -> LoraFactors:
    """Return the factors of a loaded adapter of a network, in host memory. Raises ValueError for other kinds of LoRA."""
    factors = {}
    for name, layer in network.named_modules():
        if adapter not in getattr(layer, "lora_A", ()):
            continue
        if layer.lora_B[adapter].bias is not None or adapter in layer.lora_variant:
            raise ValueError("has a bias or is a DoRA, which lora_hotswap does not support; set `lora_hotswap: false`")
        first, second = (half[adapter].weight.detach().cpu() for half in (layer.lora_A, layer.lora_B))
        factors[name] = (first, second, float(layer.scaling[adapter]))
    return factors


def set_adapter_dtype(network: Any, adapter: str, dtype: torch.dtype) -> None:
    """Convert the factors of an adapter."""
    for layer in network.modules():
        if adapter in getattr(layer, "lora_A", ()):
            layer.lora_A[adapter].to(dtype)
            layer.lora_B[adapter].to(dtype)


class LoraSlots:
    """Adapters `slot_0`, `slot_1`, ... of all linear layers of a network, with room for factors up to `max_rank`.

    The first active LoRA is always in the first slot, so a compiled network has one variant per number of active LoRAs. Unused
    ranks and layers are zero. They change the order of summation at most.
    """

    def __init__(self, network: Any, dtype: torch.dtype, count: int, max_rank: int) -> None:
        """Add the slots. Call it before the network is compiled. `dtype` is that of the computation."""
        from peft import LoraConfig
        from torch.nn import Linear

        self.count = count
        self.max_rank = max_rank
        self._network = network
        self._content: list[tuple[str, float] | None] = [None] * count
        names = [name for name, module in network.named_modules() if isinstance(module, Linear)]
        for slot in self._names(count):
            with without_peft_warnings():
                network.add_adapter(LoraConfig(r=max_rank, lora_alpha=max_rank, target_modules=names), slot)
            set_adapter_dtype(network, slot, dtype)
        self._layers = {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}

    @staticmethod
    def _names(count: int) -> list[str]:
        return [f"slot_{index}" for index in range(count)]

    def require_fits(self, factors: LoraFactors) -> None:
        """Raise ValueError if a LoRA does not fit into a slot."""
        if unknown := sorted(set(factors) - set(self._layers)):
            raise ValueError(f"changes {unknown[0]}, which is not a linear layer; set `lora_hotswap: false`")
        rank = max(len(first) for first, _, _ in factors.values())
        if rank > self.max_rank:
            raise ValueError(f"has rank {rank}, must be at most {self.max_rank}, the profile's lora_max_rank")

    def fill(self, loras: Sequence[tuple[str, LoraFactors, float]]) -> None:
        """Copy these LoRAs, (name, factors, weight), into the first slots and activate these slots."""
        slots = self._names(len(loras))
        for index, (slot, (name, factors, weight)) in enumerate(zip(slots, loras, strict=True)):
            if self._content[index] != (name, weight):
                self._content[index] = None
                self._copy(slot, factors, weight)
                self._content[index] = name, weight
        self._network.set_adapter(slots)

    def _copy(self, slot: str, factors: LoraFactors, weight: float) -> None:
        for name, layer in self._layers.items():
            first_slot, second_slot = layer.lora_A[slot].weight.data, layer.lora_B[slot].weight.data
            first_slot.zero_()
            second_slot.zero_()
            if name in factors:
                first, second, scale = factors[name]
                rank = len(first)
                first_slot[:rank] = first
                # The scale is part of the factor: as a number it would be compiled in, and as a tensor it is rounded to the
                # network's dtype, which changes the strength of the whole LoRA.
                second_slot[:, :rank] = second.float() * (scale * weight)
