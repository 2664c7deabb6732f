"""Encode images to latents, cache them and pack them for FLUX."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.dataset import SIZE_PX, to_tensor

ENCODED_AT_ONCE = 16
LATENTS = SIZE_PX // 8
"""Latents per side of an image."""


@torch.no_grad()
def encoded(pictures: NDArray[np.uint8], vae: AutoencoderKL) -> Tensor:
    """Return latents (N, 16, 16, 16) of images (N, 128, 128, 3), scaled for the transformer, float16."""
    parts = []
    for first in range(0, len(pictures), ENCODED_AT_ONCE):
        some = to_tensor(np.ascontiguousarray(pictures[first : first + ENCODED_AT_ONCE]))
        latents = vae.encode(some.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        parts.append(((latents - vae.config.shift_factor) * vae.config.scaling_factor).half())
    return torch.cat(parts)


def cached_latents(file: Path, pictures: NDArray[np.uint8], vae: AutoencoderKL) -> Tensor:
    """Return the result of `encoded`, from the cache file if it exists."""
    if not file.exists():
        fresh = file.with_suffix(".new")
        torch.save(encoded(pictures, vae), fresh)
        os.replace(fresh, file)
    return torch.load(file, weights_only=True)


def covered(box: tuple[float, float, float, float], cells: int = LATENTS) -> NDArray[np.bool_]:
    """Return the cells of an image (cells, cells) that overlap the box: left, top, right and bottom, from -1 to 1."""
    left, top, right, bottom = box
    edge = np.linspace(-1, 1, cells + 1)
    across, down = (edge[1:] > left) & (edge[:-1] < right), (edge[1:] > top) & (edge[:-1] < bottom)
    return down[:, None] & across


def pack(latents: Tensor) -> Tensor:
    """Pack latents (B, 16, H, W) into 2x2 patches for FLUX: (B, H/2 * W/2, 64)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), c * 4)


def places(rows: int, columns: int) -> Tensor:
    """Return the patch ids for FLUX's rotary embedding: (rows * columns, 3) of (0, row, column)."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids.view(-1, 3)
