"""Makes a clean picture look like one that a small generator drew: blurred, off in colour, blotched, with places gone wrong.

Knows no scenes; nothing moves, so points and boxes in a picture stay where they are.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
COARSEST = 4.0
"""How many times smaller a picture is made, at most, before it is brought back to its size."""
SHARE = 0.85
"""Of the pictures that are changed at all."""


def degraded(picture: NDArray[np.uint8], random: np.random.Generator, strength: float = 1.0) -> NDArray[np.uint8]:
    """uint8 RGB (H, W, 3) -> the same size. `strength` 0 to 1 scales what may happen; how much does is chance's."""
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
    """One patch becomes a flat colour or is smeared, in place."""
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
