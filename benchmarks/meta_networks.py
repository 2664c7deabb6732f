"""Networks of the published models on the meta device, where tensors have no memory, and the peak memory of a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidgen_ray.bench.published_models import build_network
from vidgen_ray.nets.rife_network import Rife425, RifeHDv3
from vidgen_ray.stages.memory_table import FP8
from vidgen_ray.stages.speed import store_in_fp8

HALF = torch.bfloat16
"""Precision of the table. float16 takes as much, float32 twice as much."""
RIFE_NETWORKS = {"rife/hdv3": RifeHDv3, "rife/4.25": Rife425}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live meta tensors inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0

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
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                self.track(leaf)
        return output


def peak_bytes(call: Callable[[], Any], *models: torch.nn.Module) -> int:
    """Return the most bytes that the call holds at once beside the weights of the models."""
    live = LiveBytes()
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            live.track(tensor)
    weights = live.now
    with torch.no_grad(), _fused_attention(), live:
        # The result counts until the block ends.
        result = call()
    del result
    return live.peak - weights


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Replace scaled dot product attention by its output. On the meta device it would build the attention matrix."""

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)

    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
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
