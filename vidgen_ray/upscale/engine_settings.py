"""Choose how a network runs on this machine: precision, threads, and tiles for frames that do not fit into memory."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

from vidgen_ray.errors import SetupError
from vidgen_ray.stages.realesrgan import forward
from vidgen_ray.system.free_memory import free_bytes
from vidgen_ray.upscale.network import (
    BUILTIN_MODELS,
    EngineSettings,
    UpscaleModel,
    usable_cpus,
)
from vidgen_ray.upscale.source import VideoSource

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

CPUS_PER_WORKER = 8
"""A worker has one encoder, which keeps up with a network on this many CPUs."""
PARALLEL_CALLS = 2
"""Calls at the same time in one worker on CPUs: one computes while threads of the other wait for each other."""
OVERLAP_PX = {"Compact": 20, "ESRGAN": 64}
"""Architecture -> pixels around a tile that it must see to have the untiled result, within a quarter of a level."""
OTHER_OVERLAP_PX = 128
MULTIPLE_PX = 4
MIN_TILE_PX = 64
MEMORY_SHARE = 0.5
"""Share of the free memory that the workers may take together."""
WORKSPACE = 1.6
"""Memory of a call relative to the tensors that are alive at once: convolutions take scratch memory beside them."""
CPUINFO = Path("/proc/cpuinfo")


def default_workers(device: str) -> int:
    """Return how many segments this machine makes at the same time."""
    return 1 if device.startswith("cuda") else max(1, usable_cpus() // CPUS_PER_WORKER)


def choose_settings(model: UpscaleModel | None, device: str, workers: int) -> EngineSettings:
    """Return the settings with which each of so many workers of this machine runs a network, or only draws frames between.

    Half precision is chosen only where its difference from float32 is known (`benchmarks/upscale_quality.py`): float16 on GPUs,
    bfloat16 for the builtin networks on CPUs.
    """
    threads = max(1, usable_cpus() // workers)
    if model is None:
        return EngineSettings(device=device, threads=threads)
    supports_half = model.load().supports_half  # raises for weights that do not hold a network
    if device.startswith("cuda"):
        return EngineSettings(device=device, dtype="float16" if supports_half else "float32")
    return EngineSettings(
        device=device,
        dtype="bfloat16" if model.name in BUILTIN_MODELS and cpu_has_bfloat16() else "float32",
        threads=threads,
        parallel_calls=min(PARALLEL_CALLS, threads),
    )


def settings_for(source: VideoSource, model: UpscaleModel | None, settings: EngineSettings, workers: int) -> EngineSettings:
    """Return the settings with fewer calls at the same time, or with tiles, if a video does not fit into free memory."""
    if model is None:
        return settings
    free = MEMORY_SHARE * free_bytes(settings.device) / workers
    one_call = settings.model_copy(update={"parallel_calls": 1})
    for fewer in (settings, one_call):
        if fewer.parallel_calls * call_bytes(model, source.width, source.height) <= free:
            return fewer
    tile_px, overlap_px = choose_tile(model, source.width, source.height, free)
    return one_call.model_copy(update={"tile_px": tile_px, "overlap_px": overlap_px})


def call_bytes(model: UpscaleModel, width: int, height: int) -> float:
    """Return the estimated bytes of a call of the network with a frame of this size, in float32."""
    return width * height * sum(_bytes_per_pixel(model))


def choose_tile(model: UpscaleModel, width: int, height: int, free_bytes: float) -> tuple[int, int]:
    """Return side and overlap in pixels of the largest tiles of a frame whose processing takes at most `free_bytes`.

    Raises SetupError if not even the smallest tiles fit, or if the network sees the whole frame, so that tiles would show.
    """
    overlap = tile_overlap_px(model)
    needed = f"{model.name}: a frame of {width}x{height} pixels needs {call_bytes(model, width, height) / 1e9:.1f} GB"
    if overlap is None:
        raise SetupError(
            f"{needed}, {free_bytes / 1e9:.1f} GB are free, and the network sees whole frames, so tiles would show"
        )
    # The result of the whole frame is kept beside the tiles.
    per_pixel, of_result = _bytes_per_pixel(model)
    result = width * height * of_result
    side = int(max(0.0, (free_bytes - result) / per_pixel) ** 0.5)
    tile = (side - 2 * overlap) // MULTIPLE_PX * MULTIPLE_PX
    if tile < MIN_TILE_PX:
        smallest = (MIN_TILE_PX + 2 * overlap) ** 2 * per_pixel + result
        raise SetupError(f"{needed}, in the smallest tiles {smallest / 1e9:.1f} GB; {free_bytes / 1e9:.1f} GB are free")
    return tile, overlap


@lru_cache(maxsize=1)
def _bytes_per_pixel(model: UpscaleModel) -> tuple[float, float]:
    """Return the bytes that a call takes per pixel of its input: for the network, and for the result."""
    network = model.load()
    # The upscaled frame and its rounded copy, in float32.
    return bytes_per_pixel(network) * WORKSPACE, 2 * 3 * 4 * int(network.scale) ** 2


def bytes_per_pixel(network: ImageModelDescriptor[Any], size_px: int = 48) -> float:
    """Return the bytes of float32 tensors that are alive at once in a call, per pixel of the input.

    Counts the tensors of a call with a small frame on the CPU.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    live = peak = 0

    def remove(size: int) -> None:
        nonlocal live
        live -= size

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # a base class without types
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal live, peak
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple | list) else (result,)
            # Views and results of operations in place have no memory of their own.
            for tensor, declared in zip(results, func._schema.returns, strict=False):
                if isinstance(tensor, torch.Tensor) and declared.alias_info is None:
                    live += tensor.nbytes
                    finalize(tensor, remove, tensor.nbytes)
            peak = max(peak, live)
            return result

    counter = Counter()  # type: ignore[no-untyped-call]
    with torch.inference_mode(), counter:
        forward(network, torch.zeros(1, 3, size_px, size_px))
    return peak / size_px**2


def tile_overlap_px(model: UpscaleModel) -> int | None:
    """Return the pixels that a tile must see of its neighbours. `None`: the network sees the whole frame."""
    from spandrel import ModelTiling

    network = model.load()
    if network.tiling is not ModelTiling.SUPPORTED:
        return None
    return OVERLAP_PX.get(network.architecture.id, OTHER_OVERLAP_PX)


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has AVX512-BF16 or AMX. Detected on Linux only."""
    try:
        found = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(found[1].split())
