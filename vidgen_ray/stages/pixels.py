"""Convert decoded pixels to 8 bits on the device that has them, and copy the result to host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.errors import StageError
from vidgen_ray.nets.finite import NOT_FINITE

if TYPE_CHECKING:
    import torch


def pixels_to_uint8(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """Convert (..., 3, H, W), 0 to 1, to RGB levels (..., H, W, 3), 0 to 255, with the bytes that `to_uint8` gives on the host.

    The levels are a quarter of the bytes of float32 pixels. Pinned host memory makes copying them several times faster.
    Raises StageError for NaN and infinity.
    """
    import torch

    # The sum is finite only if all pixels are. It needs no tensor of its own.
    if not pixels.sum(dtype=torch.float64).isfinite():
        raise StageError(NOT_FINITE)
    return to_host((pixels.float() * 255).round_().to(torch.uint8).movedim(-3, -1).contiguous())


def to_host(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return a uint8 tensor as an array in host memory. A tensor on the CPU shares its memory with the array."""
    import torch

    if tensor.device.type != "cuda":
        array: NDArray[np.uint8] = tensor.numpy()
        return array
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    copied: NDArray[np.uint8] = pinned.numpy()
    return copied  # numpy() has no type
