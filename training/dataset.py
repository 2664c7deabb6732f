"""Training images of the image models, drawn once and cached."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.drawing import draw
from training.world import Scene, some_scene

SIZE_PX = 128
SCENES, SCENES_SEED = 12000, 11


def scenes() -> list[Scene]:
    random = Random(SCENES_SEED)
    return [some_scene(random, people=0.55) for _ in range(SCENES)]


def drawn(of: Sequence[Scene], file: Path) -> NDArray[np.uint8]:
    """Return the images (N, 128, 128, 3) of the scenes, from the cache file if it exists."""
    return cached(file, lambda: np.stack([draw(scene, SIZE_PX) for scene in of]))


def cached(file: Path, make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return the array of the cache file, made first if it does not exist. It is read from the disk as it is used."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new.npy")
        np.save(fresh, make())
        os.replace(fresh, file)
    return np.load(file, mmap_mode="r")


def to_tensor(batch: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 (B, H, W, 3) to (B, 3, H, W) from -1 to 1."""
    return torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(batch: Tensor) -> NDArray[np.uint8]:
    return ((batch.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
