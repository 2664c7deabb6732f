"""Rates of single kernels at the shapes of the default chain, and where the time of a stage goes: by kernel and by network."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention

from vidgen_ray.stages.base import Stage

Table = list[dict[str, Any]]
REPEATS = 5
FLUX_TOKENS = 1024 * 576 // 16**2 + 512
ATTENTION = {
    "FLUX": (1, 24, FLUX_TOKENS, 128),
    # Two passes of 25 frames; the first of four levels, within frames and between frames.
    "SVD, within frames": (50, 5, 128 * 72, 64),
    "SVD, between frames": (2 * 128 * 72, 5, 25, 64),
    "Wan, 1280x704x81": (1, 40, 21 * 80 * 44, 128),
}
"""Network -> batch, heads, tokens, channels of a head."""
BACKENDS = {
    "native": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Name -> the only backend of torch that is allowed. `None`: torch chooses."""
CONVOLUTIONS = {f"dense block, {channels} to 32": (channels, 32, 4, 576, 1024) for channels in (64, 96, 128, 160)} | {
    "dense block, 192 to 64": (192, 64, 4, 576, 1024),
    "last, 64 to 64 at x4": (64, 64, 1, 2304, 4096),
}
"""Layer of x4plus -> input and output channels, frames, height, width."""
LINEAR = {"FLUX, to 12288": (FLUX_TOKENS, 3072, 12288), "FLUX, from 15360": (FLUX_TOKENS, 15360, 3072)}
"""Layer -> rows, input and output channels."""


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, until the GPU has finished."""
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def best_of(call: Callable[[], Any]) -> float:
    return min(seconds_of(call) for _ in range(REPEATS + 1))


def rated(name: str, variant: str, flop: float, call: Callable[[], Any]) -> dict[str, Any]:
    """Return a row of a table: the speed of a call, or why it has none."""
    try:
        seconds = best_of(call)
    except (RuntimeError, ValueError, TypeError) as error:
        return {"shape": name, "variant": variant, "ms": None, "tflop_per_s": None, "problem": _first_line(error)}
    return {"shape": name, "variant": variant, "ms": seconds * 1e3, "tflop_per_s": flop / seconds / 1e12, "problem": ""}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _smaller(shape: Sequence[int], on_gpu: bool) -> list[int]:
    """Return the shape, a small one on a CPU."""
    return list(shape) if on_gpu else [max(1, min(size, 16)) for size in shape]


def attention_rates(on_gpu: bool) -> Table:
    def attention(backend: SDPBackend | None, tensors: Sequence[torch.Tensor]) -> None:
        with nullcontext() if backend is None else sdpa_kernel([backend]):
            scaled_dot_product_attention(*tensors)

    rows: Table = []
    for name, shape in ATTENTION.items():
        batch, heads, tokens, channels = _smaller(shape, on_gpu)
        tensors = [_random(batch, heads, tokens, channels, on_gpu=on_gpu) for _ in range(3)]
        flop = 4 * batch * heads * tokens**2 * channels
        rows += [rated(name, variant, flop, partial(attention, backend, tensors)) for variant, backend in BACKENDS.items()]
    return rows


def convolution_rates(on_gpu: bool) -> Table:
    rows: Table = []
    for name, shape in CONVOLUTIONS.items():
        channels, results, frames, height, width = _smaller(shape, on_gpu)
        flop = 2 * 9 * channels * results * frames * height * width
        for memory in (torch.channels_last, torch.contiguous_format):
            images, weights = (
                _random(*size, on_gpu=on_gpu, dtype=torch.float16).contiguous(memory_format=memory)
                for size in ((frames, channels, height, width), (results, channels, 3, 3))
            )
            for benchmark in (False, True):
                with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, deterministic=False, allow_tf32=True):
                    variant = f"{str(memory).removeprefix('torch.')}{', benchmark' if benchmark else ''}"
                    rows.append(rated(name, variant, flop, partial(conv2d, images, weights, padding=1)))
    return rows


def linear_rates(on_gpu: bool) -> Table:
    """Return the speeds of bfloat16 and of fp8 with a scale per tensor and per row."""
    rows: Table = []
    for name, shape in LINEAR.items():
        n_rows, channels, results = _smaller(shape, on_gpu)
        flop = 2 * n_rows * channels * results
        values, weights = (_random(size, channels, on_gpu=on_gpu) for size in (n_rows, results))
        rows.append(rated(name, "bfloat16", flop, partial(linear, values, weights)))
        eighths = [tensor.to(torch.float8_e4m3fn) for tensor in (values, weights)]
        for variant, sizes in (("fp8", ((), ())), ("fp8 rows", ((n_rows, 1), (1, results)))):
            scales = [torch.ones(size, device=values.device) for size in sizes]
            multiply = partial(
                torch._scaled_mm, eighths[0], eighths[1].t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=on_gpu
            )
            rows.append(rated(name, variant, flop, multiply))
    return rows


def _random(*shape: int, on_gpu: bool, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda" if on_gpu else "cpu", dtype=dtype)


KINDS = {
    "attention": r"attention|flash|fmha|sdpa|softmax",
    "convolution": r"conv|implicit|xmma_fprop|winograd|cudnn.*(fprop|nhwc)",
    "matrix product": r"gemm|nvjet|cutlass|cublas|addmm|matmul|::mm|::bmm|scaled_mm",
    "normalisation": r"norm|moments|reduce",
    "copy": r"memcpy|memset|copy|cat|transpose|nchw|nhwc",
    "elementwise": r"elementwise|vectorized|triton|mul|add|gelu|silu|leaky",
}
"""Kind of kernel -> pattern of names, the first one that matches."""
LISTED_KERNELS = 25


def kernel_tables(call: Callable[[], Any]) -> dict[str, Any]:
    """Run the call twice, the second time with torch's profiler. Return its kernels and their kinds by time, and idle time."""
    call()
    plain_s = seconds_of(call)
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        seconds_of(call)
    kernels: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        # On a GPU, operators have the time of their kernels, too.
        if spent > 0 and (not on_gpu or event.device_type != torch.autograd.DeviceType.CPU):
            kernels[event.key][0] += event.count
            kernels[event.key][1] += spent / 1e3
    total_ms, kinds = sum(ms for _, ms in kernels.values()), defaultdict[str, float](float)
    for name, (_, ms) in kernels.items():
        kinds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")] += ms
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:LISTED_KERNELS]
    return {
        "seconds": plain_s,
        "busy_share": total_ms / 1e3 / plain_s if on_gpu else None,
        "kinds": [{"kind": kind, "ms": ms, "share": ms / total_ms} for kind, ms in sorted(kinds.items(), key=lambda k: -k[1])],
        "kernels": [{"kernel": name[:120], "calls": calls, "ms": ms} for name, (calls, ms) in longest],
    }


def network_table(stage: Stage[Any], call: Callable[[], Any]) -> Table:
    """Run the call and return the calls and seconds of each network of the stage, the autoencoder's halves apart."""
    pipe = getattr(stage, "pipe", None) or stage.model.text_to_image
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    methods: dict[str, tuple[Any, str]] = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            halves = ("encode", "decode") if name == "vae" else ("forward",)
            methods |= {(f"{name} {half}" if half != "forward" else name): (part, half) for half in halves}
    for name, injector in getattr(stage, "injectors", {}).items():
        methods[name] = (injector.infusenet.net, "forward")
    with _timed(methods, spent):
        whole_s = seconds_of(call)
    rows = [{"network": name, "calls": calls, "seconds": seconds} for name, (calls, seconds) in spent.items()]
    return [*rows, {"network": "whole stage", "calls": 1, "seconds": whole_s}]


@contextmanager
def _timed(methods: Mapping[str, tuple[Any, str]], spent: Mapping[str, list[float]]) -> Iterator[None]:
    """Add the calls and seconds of these methods of objects to `spent`, in the block."""

    def timed(name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[name][1] += seconds_of(lambda: results.append(method(*args, **kwargs)))
        spent[name][0] += 1
        return results[0]

    for name, (part, method) in methods.items():
        setattr(part, method, partial(timed, name, getattr(part, method)))
    try:
        yield
    finally:
        for part, method in methods.values():
            delattr(part, method)
