"""Choose tiles: the overlap from the network's measured receptive field, the size from the memory that is free."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

from filelock import FileLock

from vidgen_ray.errors import SetupError
from vidgen_ray.stages.realesrgan import forward
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.files import write_atomically
from vidgen_ray.system.free_memory import free_bytes
from vidgen_ray.upscale.network import UpscaleModel

if TYPE_CHECKING:
    import torch
    from spandrel import ImageModelDescriptor

MAX_ERROR = 0.25 / 255
"""Difference from the untiled result that is allowed for a pixel beyond the overlap: a quarter of a level."""
OVERLAPS_PX = 64, 128, 256
"""Largest overlaps that are tried. Beyond them, a network sees the whole frame."""
STRIP_HEIGHT_PX = 64
MULTIPLE_PX = 4
MIN_TILE_PX = 64
MEMORY_SHARE = 0.5
"""Share of the free memory that the workers may take together."""
WORKSPACE = 1.6
"""Memory of a call relative to the tensors that are alive at once: convolutions take scratch memory beside them."""


def call_bytes(model: UpscaleModel, width: int, height: int, n_frames: int = 1) -> float:
    """Return the estimated bytes of a call of the network with frames of this size, in float32."""
    return n_frames * width * height * (_per_pixel(model) * WORKSPACE + _result_per_pixel(model))


def choose_tile(model: UpscaleModel, width: int, height: int, free_bytes: float) -> tuple[int, int]:
    """Return side and overlap in pixels of the largest tiles of a frame whose processing takes at most `free_bytes`.

    Raises SetupError if not even the smallest tiles fit, or if the network sees the whole frame, so that tiles would show.
    """
    overlap = receptive_field(model)
    needed = f"{model.name}: a frame of {width}x{height} pixels needs {call_bytes(model, width, height) / 1e9:.1f} GB"
    if overlap is None:
        raise SetupError(
            f"{needed}, {free_bytes / 1e9:.1f} GB are free, and the network sees whole frames, so tiles would show"
        )
    # The result of the whole frame is kept beside the tiles.
    result, per_pixel = width * height * _result_per_pixel(model), _per_pixel(model) * WORKSPACE
    side = int(max(0.0, (free_bytes - result) / per_pixel) ** 0.5)
    tile = (side - 2 * overlap) // MULTIPLE_PX * MULTIPLE_PX
    if tile < MIN_TILE_PX:
        smallest = (MIN_TILE_PX + 2 * overlap) ** 2 * per_pixel + result
        raise SetupError(f"{needed}, in the smallest tiles {smallest / 1e9:.1f} GB; {free_bytes / 1e9:.1f} GB are free")
    return tile, overlap


def _result_per_pixel(model: UpscaleModel) -> float:
    # The upscaled frame and its rounded copy, in float32.
    return 2 * 3 * 4 * _profile(model)[1] ** 2


def _per_pixel(model: UpscaleModel) -> float:
    return _profile(model)[0]


_profiles: dict[str, tuple[float, int]] = {}


def _profile(model: UpscaleModel) -> tuple[float, int]:
    """Return bytes per pixel and scale of a network. Kept for the next video of this process."""
    if model.key not in _profiles:
        network = model.load()
        _profiles[model.key] = bytes_per_pixel(network), int(network.scale)
    return _profiles[model.key]


def free_memory(device: str) -> float:
    """Return the bytes that a run may take on this device, of the memory that is free now."""
    return MEMORY_SHARE * free_bytes(device)


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


def receptive_field(model: UpscaleModel) -> int | None:
    """Return the pixels around a tile that it must see to have the pixels of the untiled result, within a quarter of a level.

    Measured: a strip is upscaled whole and cut in two, and the overlap is the distance from the cut at which both agree.
    The theoretical field of a deep network is several times larger, with an influence that does not change any level.
    Returns `None` if they agree nowhere, as with networks that average over the whole frame. Cached for the weights.
    """
    stored = _read()
    if model.key not in stored:
        network = model.load()
        found = next((overlap for half in OVERLAPS_PX if (overlap := _agreement(network, half)) is not None), None)
        stored[model.key] = found
        with suppress(OSError):
            cache_dir().mkdir(parents=True, exist_ok=True)
            with FileLock(f"{_file()}.lock"):
                write_atomically(_file(), json.dumps({**_read(), model.key: found}, indent=1, sort_keys=True) + "\n")
    return stored[model.key]


def _agreement(network: ImageModelDescriptor[Any], half_px: int) -> int | None:
    """Return the distance from a cut at `half_px` beyond which no pixel differs, or `None` if it is too far to be sure."""
    import torch

    strips = _strips(2 * half_px)
    with torch.inference_mode():
        whole = forward(network, strips)[..., : half_px * network.scale]
        part = forward(network, strips[..., :half_px].contiguous())
    difference = (whole - part).abs().amax((0, 1, 2)).reshape(half_px, network.scale).amax(1)
    differing = (difference > MAX_ERROR).nonzero()
    if not len(differing):
        return 0
    distance = half_px - int(differing[0])
    # The rest of the strip must be long enough to show that the difference has ended.
    return -(-distance // MULTIPLE_PX) * MULTIPLE_PX if distance <= half_px * 3 // 4 else None


def _strips(width_px: int) -> torch.Tensor:
    """Return noise, and random blocks with sharp edges, brighter to the right: (2, 3, STRIP_HEIGHT_PX, width_px), 0 to 1.

    The two halves have other means, so that a network that averages over the frame is found.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, STRIP_HEIGHT_PX, width_px, generator=generator)
    blocks = torch.rand(1, 3, STRIP_HEIGHT_PX // 8, width_px // 8, generator=generator)
    strips = torch.cat([noise, torch.nn.functional.interpolate(blocks, scale_factor=8, mode="nearest")])
    return strips * torch.linspace(0.4, 1, width_px)


def _file() -> Path:
    return cache_dir() / "receptive-fields.json"


def _read() -> dict[str, int | None]:
    try:
        content = json.loads(_file().read_bytes())
        return {key: None if value is None else int(value) for key, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
