"""Options that make diffusion networks faster: memory format, fused projections, attention backend and compilation.

Each option is a separate field of `SpeedParams`, so its effect can be measured alone. None of them approximates the
computation. All of them may change the rounding, so they are part of the content key if they are set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from vidgen_ray.errors import SetupError
from vidgen_ray.stages.base import StageParams

if TYPE_CHECKING:
    import torch

CompileMode = Literal["none", "regional", "full"]

COMPILE_BACKEND: Any = "inductor"
"""Backend of torch.compile. Tests replace it by a counter."""
RECOMPILE_LIMIT = 64
"""Compiled variants of one function. torch's default of 8 is reached by two image sizes, LoRAs and InfuseNet together. Above
the limit torch runs the function without compilation."""
SDPA_BACKENDS = {
    "native": None,
    "_native_cudnn": "CUDNN_ATTENTION",
    "_native_efficient": "EFFICIENT_ATTENTION",
    "_native_flash": "FLASH_ATTENTION",
    "_native_math": "MATH",
}
"""diffusers' name of a backend that torch has itself -> torch's name. `None`: torch chooses."""


class SpeedParams(StageParams):
    """Parameters of a stage whose networks can be made faster."""

    channels_last: bool = False
    """Store the weights of convolutions in the order that tensor cores read."""
    attention_backend: str = "native"
    """Implementation of attention, by diffusers' name. `native`: torch chooses."""


class CompileParams(SpeedParams):
    """Parameters of a stage whose networks can also be compiled."""

    compile: CompileMode = "none"
    """Compile the network with torch.compile: `regional` its repeated blocks, `full` all of it. The first shot takes minutes
    longer, and the first one of another size once more. Further sizes share the second compilation."""


def use_channels_last(*networks: torch.nn.Module) -> None:
    """Store the weights of all convolutions in the memory format channels_last. Their outputs follow."""
    import torch

    # Not `network.to(memory_format=...)`, which fails for a network with both 2-D and 3-D convolutions.
    for network in networks:
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
            elif isinstance(module, torch.nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def fuse_attention_projections(network: Any) -> None:
    """Compute query, key and value of self-attention in one matrix product, key and value of cross-attention in another.

    `network` is a diffusers model. The separate weights stay in memory, as in diffusers' `fuse_qkv_projections`.
    """
    from diffusers.models.attention import AttentionMixin
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    # The inherited method leaves modules of the class `Attention` as they are.
    if type(network).fuse_qkv_projections is not AttentionMixin.fuse_qkv_projections:
        network.fuse_qkv_projections()
        return
    for module in network.modules():
        if isinstance(module, Attention):
            module.fuse_projections(fuse=True)
            module.set_processor(FusedAttnProcessor2_0())


def installed_attention_backends() -> list[str]:
    """Return diffusers' names of the attention backends that this machine can use.

    Backends of the Hugging Face hub are not among them, because a stage never downloads anything.
    """
    from diffusers.models import attention_dispatch

    names = []
    for backend in attention_dispatch.AttentionBackendName:
        if backend.value.endswith("_hub"):
            continue
        try:
            attention_dispatch._check_attention_backend_requirements(backend)
        except RuntimeError:
            continue
        names.append(backend.value)
    return names


def set_attention_backend(name: str, *networks: Any) -> None:
    """Use this attention backend in networks that call diffusers' `dispatch_attention_fn`, such as FLUX and Wan.

    Raises SetupError if it is not installed.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    _require_attention_backend(name, installed_attention_backends())
    for network in networks:
        network.set_attention_backend(name)
    # diffusers also makes it the default of all other networks in the process.
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def require_sdpa_backend(name: str) -> None:
    """Raise SetupError if torch has no attention backend of this name."""
    _require_attention_backend(name, SDPA_BACKENDS)


@contextmanager
def sdpa_backend(name: str) -> Iterator[None]:
    """Prefer this backend in networks that call torch's `scaled_dot_product_attention`, such as SVD's and SDXL's UNet.

    Calls that the backend does not support use another one.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    preferred = SDPA_BACKENDS[name]
    if preferred is None:
        yield
        return
    others = [backend for backend in SDPA_BACKENDS.values() if backend not in (None, preferred)]
    with sdpa_kernel([getattr(SDPBackend, str(backend)) for backend in (preferred, *others)], set_priority=True):
        yield


def _require_attention_backend(name: str, allowed: Collection[str]) -> None:
    if name not in allowed:
        raise SetupError(f"attention_backend: got {name!r}, must be one of {', '.join(sorted(allowed))} on this machine")


def compile_network(network: torch.nn.Module, mode: CompileMode, device: str, blocks: Collection[str] = ()) -> None:
    """Compile a network in place. Sizes that change between shots become dynamic.

    `blocks` names the classes that `regional` compiles, by default those that diffusers states. Apply all other options first.
    Raises SetupError if the machine has no compiler.
    """
    import torch

    if mode == "none":
        return
    _require_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    if mode == "full":
        network.compile(backend=COMPILE_BACKEND)
        return
    names = blocks or getattr(network, "_repeated_blocks", None) or ()
    found = [module for module in network.modules() if type(module).__name__ in names]
    if not found:
        raise SetupError(f"compile: got regional, but {type(network).__name__} has no repeated blocks; use full or none")
    for module in found:
        module.compile(backend=COMPILE_BACKEND)


def _require_compiler(device: str) -> None:
    """Raise SetupError if torch.compile cannot generate code for the device on this machine."""
    if COMPILE_BACKEND != "inductor":
        return
    if device.startswith("cuda"):
        if find_spec("triton") is None:
            raise SetupError("compile: needs Triton on a GPU; pip install triton, or set `compile: none`")
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        raise SetupError("compile: needs a C++ compiler on a CPU; install g++, or set `compile: none`")
