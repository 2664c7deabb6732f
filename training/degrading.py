"""Degrade clean images to resemble those of a small generator: blur, colour shifts, blotches and damaged patches.

Nothing moves, so points and boxes in an image stay valid.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
COARSEST = 4.0
"""Maximum downscaling factor, before the image is scaled back."""
SHARE = 0.85
"""Share of images that are changed."""


def degraded(picture: NDArray[np.uint8], random: np.random.Generator, strength: float = 1.0) -> NDArray[np.uint8]:
    """Return a degraded copy of a uint8 RGB image (H, W, 3). `strength` from 0 to 1 limits the random degradation."""
    if random.random() > SHARE:
        return picture
    height, width = picture.shape[:2]
    pixels = picture.astype(np.float32) / 255
    if random.random() < 0.6:
        by = 1 + random.random() * (COARSEST - 1) * strength
        small = (max(8, round(width / by)), max(8, round(height / by)))
        pixels = cv2.resize(
            cv2.resize(pixels, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_LINEAR
        )
    if random.random() < 0.3:
        pixels = cv2.GaussianBlur(pixels, (0, 0), 0.2 + random.random() * strength * width / 110)
    for _ in range(random.integers(0, 3)):
        _spoil(pixels, random, strength)
    pixels = _coloured(pixels, random, strength)
    if random.random() < 0.5:
        cells = int(random.integers(6, 24))
        blotches = random.normal(0, random.random() * 0.09 * strength, (cells, cells, 3)).astype(np.float32)
        pixels = pixels + cv2.resize(blotches, (width, height), interpolation=cv2.INTER_CUBIC)
    if random.random() < 0.5:
        pixels = pixels + random.standard_normal(pixels.shape, np.float32) * np.float32(random.random() * 0.08 * strength)
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _spoil(pixels: Field, random: np.random.Generator, strength: float) -> None:
    """Fill a random patch with one colour or blur it, in place."""
    height, width = pixels.shape[:2]
    h, w = (max(2, int(side * random.uniform(0.03, 0.03 + 0.15 * strength))) for side in (height, width))
    top, left = random.integers(0, height - h + 1), random.integers(0, width - w + 1)
    patch = pixels[top : top + h, left : left + w]
    if random.random() < 0.4:
        patch[:] = random.random(3)
    else:
        patch[:] = cv2.blur(patch, (max(1, w // 2), max(1, h // 2)))


def _coloured(pixels: Field, random: np.random.Generator, strength: float) -> Field:
    gain = 1 + random.uniform(-0.14, 0.14, 3) * strength
    shift = random.uniform(-0.06, 0.06, 3) * strength
    contrast = 1 + random.uniform(-0.25, 0.2) * strength
    saturation = np.float32(1 + random.uniform(-0.35, 0.25) * strength)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * saturation
    return np.asarray((pixels - 0.5) * (contrast * gain).astype(np.float32) + (0.5 + shift).astype(np.float32), np.float32)
