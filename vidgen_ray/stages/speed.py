"""Options that make diffusion networks faster: memory format, attention backend, compilation and weights in 8 bits.

Each option is a separate field of a stage's parameters, so its effect can be measured alone.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from vidgen_ray.errors import SetupError, install_command
from vidgen_ray.nets.torch_private import call_replaced, compile_forward
from vidgen_ray.stages.base import IN_KEY_IF_CHANGED, StageParams

if TYPE_CHECKING:
    import torch


COMPILE_BACKEND: Any = "inductor"
"""Backend of torch.compile. Tests replace it by a counter."""
SDPA_BACKENDS = {
    "native": None,
    "_native_cudnn": "CUDNN_ATTENTION",
    "_native_efficient": "EFFICIENT_ATTENTION",
    "_native_flash": "FLASH_ATTENTION",
    "_native_math": "MATH",
}
"""diffusers' name of a backend that torch has itself -> torch's name. `None`: torch chooses."""

SAGE = "sage"
"""Part of diffusers' names of backends that compute attention in 8 bits, by SageAttention."""
KEPT_IN_16_BITS = (
    "pos_embed", "norm_q", "norm_k", "norm_added_q", "norm_added_k", "^x_embedder$", "^context_embedder$", "^proj_out$",
)  # fmt: skip
"""Parts of FLUX's transformer that `store_in_fp8` leaves: small ones, and its ends, not its modulation layers."""
BLOCKS = ("transformer_blocks", "single_transformer_blocks", "blocks")
"""Lists of the repeated blocks of transformers: FLUX's and InfuseNet's, Qwen's, and Wan's."""


class ChannelsLastParams(StageParams):
    """Parameters of a stage with convolutional networks."""

    channels_last: bool = False
    """Store the weights of convolutions in the order that tensor cores read."""


class CompileParams(StageParams):
    """Parameters of a stage with a denoising network that can be made faster."""

    attention_backend: str = "native"
    """Implementation of attention, by diffusers' name. `native`: torch chooses. `sage`: in 8 bits by SageAttention, lossy."""
    compile: bool = False
    """Compile the denoising network with torch.compile: SVD's as a whole, all others block by block. The first shot takes
    minutes longer, and the first one of another size once more. Further sizes share the second compilation."""


class Fp8Params(StageParams):
    """Parameters of a stage with a transformer that can compute in 8 bits."""

    quantize: Literal["none", "fp8"] = "none"
    """fp8: weights and activations of the transformer's blocks, computed in 8 bits by torchao, on GPUs since Ada and Hopper."""


def _rising_fractions(interval: tuple[float, float]) -> tuple[float, float]:
    start, stop = interval
    if not 0 <= start < stop <= 1:
        raise ValueError("must be two rising fractions of the steps, such as [0, 0.6]")
    return interval


WHOLE = (0.0, 1.0)
"""Interval of all steps."""


class GuidanceIntervalParams(StageParams):
    """Parameters of a stage with classifier-free guidance, whose two passes are one batch."""

    guidance_interval: Annotated[tuple[float, float], AfterValidator(_rising_fractions), IN_KEY_IF_CHANGED] = WHOLE
    """Fractions of the denoising steps between which guidance is applied. All other steps have one pass, the conditional one.
    Lossy. Source: Kynkäänniemi et al. 2024, arXiv:2404.07724, whose interval is one of noise levels; `start` and `stop` of
    diffusers' guiders."""

    def guided_steps(self, steps: int) -> range:
        """Return the numbers of the guided ones of so many steps."""
        start, stop = (round(fraction * steps) for fraction in self.guidance_interval)
        return range(start, stop)


def has_unguided_steps(params: StageParams) -> bool:
    """Return whether guidance is applied in a part of the steps only."""
    return getattr(params, "guidance_interval", WHOLE) != WHOLE


@contextmanager
def guided_in(network: Any, numbers: range) -> Iterator[None]:
    """Have calls of a diffusers UNet in this block compute both halves of their batch, one per pass, in steps of these numbers.

    In the others, both halves are the output of the second, conditional one: guidance between equal passes changes nothing.
    The pipeline calls the network once per step. Compile the network before.
    """
    step = partial(next, count())

    def replacement(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(sample: torch.Tensor, timestep: torch.Tensor, **inputs: Any) -> Any:
            if step() in numbers or len(sample) != 2:
                return whole(sample, timestep, **inputs)
            own = {name: each[1:] if hasattr(each, "shape") else each for name, each in inputs.items()}
            (output,) = whole(sample[1:], timestep, **own)
            return (output.expand(2, *output.shape[1:]),)

        return call

    with call_replaced(network, replacement):
        yield


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


def set_attention_backend(name: str, network: Any) -> None:
    """Use this attention backend in a network that calls diffusers' `dispatch_attention_fn`, such as FLUX.

    Raises SetupError if it cannot be used on this machine.
    """
    from diffusers.models.attention_dispatch import attention_backend

    if missing := missing_package(name):
        raise SetupError(missing)
    if name.endswith("_hub"):
        raise SetupError(f"attention_backend: got {name!r}, which downloads code; use a backend that is installed")
    try:
        # The block restores the default of all other networks of the process, which diffusers would also change.
        with attention_backend("native"):
            network.set_attention_backend(name)
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"attention_backend: {name!r} cannot be used on this machine: {error}") from None


def is_eight_bit_attention(value: Any) -> bool:
    """Return whether a value of an option names an attention backend that computes in 8 bits."""
    return isinstance(value, str) and SAGE in value


def missing_package(value: Any) -> str:
    """Return which package an attention backend needs and this machine lacks, in a sentence. Empty if none."""
    # A download is refused with another reason.
    needs_package = is_eight_bit_attention(value) and not value.endswith("_hub")
    if not needs_package or find_spec("sageattention") is not None:
        return ""
    return f"attention_backend: {value} needs the package sageattention 2.1.1 or later, built from its repository; PyPI has 1.0"


def require_sdpa_backend(name: str) -> None:
    """Raise SetupError if torch has no attention backend of this name."""
    if name not in SDPA_BACKENDS:
        raise SetupError(f"attention_backend: got {name!r}, must be one of {', '.join(sorted(SDPA_BACKENDS))}")


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


def speed_up(network: Any, params: CompileParams, blocks: Collection[str] | None = None) -> None:
    """Apply the attention backend and the compilation to one of diffusers' transformers, in place. `blocks` as below."""
    if params.attention_backend != "native":
        set_attention_backend(params.attention_backend, network)
    if params.compile:
        compile_blocks(network, params.device, blocks)


def compile_blocks(network: Any, device: str, blocks: Collection[str] | None = None) -> None:
    """Compile the blocks of a network in place, each on its own. Sizes that change between shots become dynamic.

    `blocks`: names of their classes; that of the network itself compiles it as a whole. `None`: those that diffusers states for
    the network. Apply all other options first. Raises SetupError if the machine has no compiler.
    """
    if (missing := missing_compiler(device)) is not None:
        raise SetupError(f"compile: needs {missing}, or set `compile: false`")
    if blocks is None:
        network.compile_repeated_blocks(backend=COMPILE_BACKEND)
        return
    for module in network.modules():
        if type(module).__name__ in blocks:
            module.compile(backend=COMPILE_BACKEND)


def compile_without_hooks(blocks: Iterable[torch.nn.Module]) -> None:
    """Compile blocks that `compile_blocks` has compiled with their hooks without them. Add the hooks later."""
    for block in blocks:
        compile_forward(block, COMPILE_BACKEND)


def separate_from_others(network: Any, blocks: Collection[str]) -> None:
    """Give these blocks of a network code of their own, so that torch compiles them as if no other network had such blocks.

    torch keeps what it has compiled with the code. It would take another number of text tokens for a number that changes, and
    compile the blocks of both networks for any.
    """
    for block in {type(module) for module in network.modules() if type(module).__name__ in blocks}:
        forward = block.forward
        code = forward.__code__.replace(co_name=f"{forward.__name__}_of_{type(network).__name__}")
        own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
        separate = type(block.__name__, (block,), {"forward": own})
        for module in network.modules():
            if type(module) is block:
                module.__class__ = separate


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Let cuDNN choose its convolutions by timing them in this block, or by its rules."""
    import torch

    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous


def missing_compiler(device: str) -> str | None:
    """Return what this machine lacks to generate code for the device with torch.compile. `None`: nothing."""
    if COMPILE_BACKEND != "inductor":
        return None
    if not device.startswith("cuda"):
        return None if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler on a CPU; install g++"
    if find_spec("triton") is None:
        return "Triton on a GPU; pip install triton"
    # Triton compiles a launcher per kernel with this compiler, against Python's headers.
    if not any(map(shutil.which, (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang"))):
        return "a C compiler on a GPU; apt-get install gcc libc6-dev, or set CC"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python on a GPU; apt-get install python3-dev"
    return None


def store_in_fp8(transformer: Any, dtype: torch.dtype) -> None:
    """Store the linear layers of FLUX's transformer as float8_e4m3fn. Each is converted to `dtype` while it runs.

    Half of the memory of 16 bits, at the price of the conversions. Source: diffusers, layerwise casting.
    """
    import torch
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(transformer, torch.float8_e4m3fn, dtype, skip_modules_pattern=KEPT_IN_16_BITS)


def is_in_fp8(params: StageParams) -> bool:
    """Return whether a stage's transformer computes in 8 bits."""
    return getattr(params, "quantize", "none") == "fp8"


def require_fp8(params: StageParams) -> None:
    """Raise SetupError if torchao is missing, or a GPU that can compute in 8 bits."""
    import torch

    if find_spec("torchao") is None:
        raise SetupError(f"quantize: fp8 needs the package torchao; {install_command('quantization')}")
    if not params.device.startswith("cuda") or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise SetupError("quantize: fp8 needs an NVIDIA GPU of compute capability 8.9 (Ada, Hopper) or later; use fp8_storage")
    if params.dtype != "bfloat16":
        raise SetupError(f"quantize: fp8 needs dtype: bfloat16, got {params.dtype}")


def compute_in_fp8(network: Any, device: str) -> None:
    """Replace the weights of the linear layers in a transformer's blocks by ones in float8_e4m3fn. They multiply in fp8.

    Each layer is quantised on `device` and stays there, with a scale per row, or one per tensor on cards whose cuBLAS knows no
    others (pytorch #192707). Layers in float32, embeddings and the last layers keep their precision.
    """
    import torch
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quantize_

    def is_quantized(module: torch.nn.Module, name: str) -> bool:
        in_block = name.partition(".")[0] in BLOCKS
        return in_block and isinstance(module, torch.nn.Linear) and module.weight.dtype == torch.bfloat16

    # torchao's settings of the compiler would also let float32 products of other networks round to 10 bits.
    scales = PerTensor() if _capability(device)[0] == CONSUMER_BLACKWELL else PerRow()
    config = Float8DynamicActivationFloat8WeightConfig(granularity=scales, set_inductor_config=False)
    quantize_(network, config, is_quantized, device=device)


CONSUMER_BLACKWELL = 12
"""Major compute capability of the cards RTX 50 and RTX PRO 6000."""


def _capability(device: str) -> tuple[int, int]:
    """Return the compute capability of a GPU, (0, 0) of a CPU."""
    import torch

    return torch.cuda.get_device_capability(device) if device.startswith("cuda") else (0, 0)


@cache
def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has AVX512-BF16 or AMX. Detected on Linux only."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(found[1].split())
