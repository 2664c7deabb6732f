"""Pictures encoded once, and laid out as FLUX sees them. Knows the autoencoder; does not know what is drawn."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.dataset import to_tensor

ENCODED_AT_ONCE = 16


@torch.no_grad()
def encoded(pictures: NDArray[np.uint8], vae: AutoencoderKL) -> Tensor:
    """Latents (N, 16, 16, 16) of pictures (N, 128, 128, 3), scaled as the transformer sees them, float16."""
    parts = []
    for first in range(0, len(pictures), ENCODED_AT_ONCE):
        some = to_tensor(np.ascontiguousarray(pictures[first : first + ENCODED_AT_ONCE]))
        latents = vae.encode(some.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        parts.append(((latents - vae.config.shift_factor) * vae.config.scaling_factor).half())
    return torch.cat(parts)


def cached_latents(file: Path, pictures: NDArray[np.uint8], vae: AutoencoderKL) -> Tensor:
    """As `encoded` gives them, from the file where it is there already."""
    if not file.exists():
        fresh = file.with_suffix(".new")
        torch.save(encoded(pictures, vae), fresh)
        os.replace(fresh, file)
    return torch.load(file, weights_only=True)


def pack(latents: Tensor) -> Tensor:
    """(B, 16, H, W) -> (B, H/2 * W/2, 64), the patches of 2x2 that FLUX sees."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), c * 4)


def places(rows: int, columns: int) -> Tensor:
    """Ids of the patches of a picture for FLUX's rotary embedding: (rows * columns, 3) of (0, row, column)."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids.view(-1, 3)
