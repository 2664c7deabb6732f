"""Visible label: a line of text in the lower right corner of images and clips, on a dark box."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from vidgen_ray.errors import MediaError
from vidgen_ray.media.fonts import load_font, missing_letter
from vidgen_ray.provenance.settings import ProvenanceSettings
from vidgen_ray.stages.base import Frames

LETTER_HEIGHT = 1 / 28
"""Size of the letters as a share of the shorter side."""
MIN_LETTER_PX = 8
MAX_WIDTH = 0.9
"""Widest label as a share of the image."""
INK, BOX = (255, 255, 255, 255), (0, 0, 0, 160)


def with_label(frames: Frames, settings: ProvenanceSettings) -> Frames:
    """Return frames (T, H, W, 3) with the label of the settings, or as they are if there is none. Raises MediaError."""
    return frames if settings.label is None else labelled(frames, settings.label)


def labelled(frames: Frames, text: str) -> Frames:
    """Return a copy of frames (T, H, W, 3) with the label. Raises MediaError if they are too small for it."""
    rgba = _label(text, frames.shape[2], frames.shape[1])
    height, width, _ = rgba.shape
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    result = frames.copy()
    corner = result[:, -height:, -width:]
    # Rounded, in integers: the same on every machine.
    corner[...] = ((corner * (255 - alpha) + colour * alpha + 127) // 255).astype(np.uint8)
    return result


@lru_cache(maxsize=16)
def _label(text: str, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Draw the label (H, W, 4) in the largest letters that fit, at most LETTER_HEIGHT."""
    from PIL import ImageDraw

    letter_px = max(MIN_LETTER_PX, round(min(width_px, height_px) * LETTER_HEIGHT))
    while letter_px >= MIN_LETTER_PX:
        font = load_font(None, letter_px)
        if (letter := missing_letter(text, font)) is not None:
            raise MediaError(f"label {text!r}: the font has no letter {letter!r}; use another text")
        left, top, right, bottom = (round(side) for side in font.getbbox(text))
        margin = max(2, letter_px // 3)
        width, height = right - left + 2 * margin, bottom - top + 2 * margin
        if width <= width_px * MAX_WIDTH and height <= height_px:
            image = PILImage.new("RGBA", (width, height), BOX)
            ImageDraw.Draw(image).text((margin - left, margin - top), text, INK, font)
            return np.asarray(image)
        letter_px -= 1
    raise MediaError(f"label {text!r}: too long for {width_px}×{height_px} pixels; shorten it or render a larger size")
