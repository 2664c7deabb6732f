"""Networks of the published models on the meta device, where tensors have no memory; peak memory and work of a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vidgen_ray.bench.published_models import build_network
from vidgen_ray.nets.rife_network import Rife425, RifeHDv3
from vidgen_ray.stages.memory_table import FP8
from vidgen_ray.stages.speed import store_in_fp8

HALF = torch.bfloat16
"""Precision of the table. float16 takes as much, float32 twice as much."""
RIFE_NETWORKS = {"rife/hdv3": RifeHDv3, "rife/4.25": Rife425}


class Traced(NamedTuple):
    """Peak memory and work of one call."""

    peak_bytes: int
    """Most bytes that it holds at once beside the weights of the models."""
    flop: int
    """Floating-point operations of matrix products, convolutions and attention: a multiplication and an addition are two."""
    moved_bytes: int
    """Bytes that all other operations, such as normalisation and activation functions, read and write."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live meta tensors inside the block, and those that operations without a FLOP count read and write."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._counted = FlopCounterMode(display=False).flop_registry
        self.now = 0
        self.peak = 0
        self.moved = 0

    def track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        outputs = _meta_tensors(output)
        for tensor in outputs:
            self.track(tensor)
        if not function.is_view and function.overloadpacket not in self._counted:
            self.moved += sum(tensor.nbytes for tensor in (*_meta_tensors((args, kwargs)), *outputs))
        return output


def _meta_tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta"]


def trace(call: Callable[[], Any], *models: torch.nn.Module) -> Traced:
    """Run the call and return what it takes."""
    live = LiveBytes()
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            live.track(tensor)
    weights = live.now
    with torch.no_grad(), _fused_attention() as attention_flop, FlopCounterMode(display=False) as flop, live:
        # The result counts until the block ends.
        result = call()
    del result
    return Traced(live.peak - weights, flop.get_total_flops() + sum(attention_flop), live.moved)


@contextmanager
def _fused_attention() -> Iterator[list[int]]:
    """Replace scaled dot product attention by its output. On the meta device it would build the attention matrix.

    Yields the list of the floating-point operations of each.
    """
    flop: list[int] = []

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        flop.append(2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
        return torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)

    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield flop
    finally:
        functional.scaled_dot_product_attention = original


def tensor_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def realesrgan_network(upscaler: str) -> Any:
    """Build the network of an upscaler of `builtin:realesrgan` without weights."""
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    if upscaler == "animevideov3":
        return SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=64, num_conv=16, upscale=4, act_type="prelu")
    blocks = {"x4plus-anime": 6, "x4plus": 23}[upscaler]
    return RRDBNet(in_nc=3, out_nc=3, num_filters=64, num_blocks=blocks, scale=4)


@cache
def network(name: str, variant: str = "") -> Any:
    """Return a network on the meta device: as published, in `fp8` storage, or `chunked`."""
    if name in RIFE_NETWORKS:
        with torch.device("meta"):
            return RIFE_NETWORKS[name]().eval().requires_grad_(False).to(torch.float16)
    if name.startswith("realesrgan/"):
        with torch.device("meta"):
            return realesrgan_network(name.partition("/")[2]).eval().requires_grad_(False).to(torch.float16)
    model = build_network(name, torch.float32 if variant == "float32" else HALF)
    if variant == FP8:
        store_in_fp8(model, HALF)
    if variant == "chunked":
        model.enable_forward_chunking()
    return model
