"""Latents of the small Wan: those of FLUX's autoencoder, two frames packed in one."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.latents import cached_latents
from training.tracks import Track, drawn_tracks

FRAMES = 9
"""Frames per clip."""
PACKED = 2
"""Frames per latent, after the first."""
TRACK_FRAMES = 17
"""Frames per track: enough for clips of every second frame."""


def packed(frames: Tensor) -> Tensor:
    """Pack latents of single frames (B, F, C, H, W) as (B, 2C, 1 + (F - 1) / 2, H, W): the first frame twice, then pairs."""
    pairs = torch.cat([frames[:, :1], frames], dim=1).unflatten(1, (-1, PACKED))
    return pairs.flatten(2, 3).transpose(1, 2)


def unpacked(latents: Tensor) -> Tensor:
    """Undo `packed`. The first frame is the mean of its copies."""
    pairs = latents.transpose(1, 2).unflatten(2, (PACKED, -1))
    return torch.cat([pairs[:, :1].mean(dim=2), pairs[:, 1:].flatten(1, 2)], dim=1)


def track_latents(of: list[Track], vae: AutoencoderKL, folder: Path) -> Tensor:
    """Return latents (N, TRACK_FRAMES, 16, 16, 16), scaled, from the cache file if it exists."""
    frames = drawn_tracks(of, folder / "wan-tracks.npy")
    latents = cached_latents(folder / "wan-tracks.pt", frames.reshape(-1, *frames.shape[2:]), vae)
    return latents.unflatten(0, frames.shape[:2])
