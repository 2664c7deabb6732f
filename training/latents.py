"""Scenes, drawn and encoded once: what FLUX and its companions learn from. Knows the autoencoder; does not know captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.autoencoder import SIZE_PX, to_tensor
from training.drawing import draw
from training.world import Scene, some_scene

ENCODED_AT_ONCE = 16
SCENES, SCENES_SEED = 12000, 11
"""What FLUX learns from, and InfuseNet the people of."""


def scenes() -> list[Scene]:
    random = Random(SCENES_SEED)
    return [some_scene(random, people=0.55) for _ in range(SCENES)]


def drawn(of: Sequence[Scene], file: Path) -> NDArray[np.uint8]:
    """Pictures (N, 128, 128, 3) of the scenes, from the file where it is there already."""
    if file.exists():
        return np.load(file, mmap_mode="r")
    pictures = np.stack([draw(scene, SIZE_PX) for scene in of])
    fresh = file.with_suffix(".new.npy")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(fresh, pictures)
    os.replace(fresh, file)
    return pictures


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
