"""Draw captions and title cards with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vidgen_ray.errors import UsageError
from vidgen_ray.film.settings import Size
from vidgen_ray.media.files import load_font, missing_letter
from vidgen_ray.stages.base import Image

CAPTION_HEIGHT, TITLE_HEIGHT = 1 / 18, 1 / 10
"""Height of the letters as a share of the shorter side of the picture."""
MIN_LETTER_PX = 9
MAX_TEXT_WIDTH, MAX_CAPTION_HEIGHT, MAX_TITLE_HEIGHT = 0.9, 0.5, 0.9
"""Largest text as a share of the picture."""
MARGIN = 0.05
"""Space below a caption as a share of the height of the picture."""
INK, OUTLINE, BACKGROUND = (255, 255, 255), (0, 0, 0), (0, 0, 0)


class Overlay(NamedTuple):
    """Image with transparency and its position in the picture, in pixels."""

    rgba: NDArray[np.uint8]
    """(H, W, 4)."""
    left: int
    top: int


def draw_caption(text: str, size: Size, font: Path | None) -> Overlay:
    """Draw a caption for the lower edge of a picture. Raises UsageError if the text does not fit or the font lacks a letter."""
    drawn, letter_px = _fitting(text, size, font, CAPTION_HEIGHT, MAX_CAPTION_HEIGHT)
    outline_px = max(1, round(letter_px / 10))
    left, top, right, bottom = _box(drawn, outline_px)
    width, height = _even(right - left), _even(bottom - top)
    image = PILImage.new("RGBA", (width, height), (0, 0, 0, 0))
    ImageDraw.Draw(image).multiline_text(
        (-left, -top), drawn.text, INK, drawn.font, align="center", stroke_width=outline_px, stroke_fill=OUTLINE
    )
    # Even positions, since the chroma of two pixels is shared.
    x = (size.width - width) // 4 * 2
    y = (size.height - height - round(size.height * MARGIN)) // 2 * 2
    return Overlay(np.asarray(image), max(0, x), max(0, y))


def draw_title(text: str, size: Size, font: Path | None) -> Image:
    """Draw a title card (H, W, 3), text in the middle. Raises UsageError if it does not fit or the font lacks a letter."""
    drawn, _ = _fitting(text, size, font, TITLE_HEIGHT, MAX_TITLE_HEIGHT)
    card = PILImage.new("RGB", size, BACKGROUND)
    left, top, right, bottom = _box(drawn, 0)
    position = (size.width - right + left) / 2 - left, (size.height - bottom + top) / 2 - top
    ImageDraw.Draw(card).multiline_text(position, drawn.text, INK, drawn.font, align="center")
    return np.asarray(card)


class _DrawnText(NamedTuple):
    text: str
    """With line breaks."""
    font: ImageFont.FreeTypeFont


def _fitting(text: str, size: Size, font: Path | None, height: float, max_height: float) -> tuple[_DrawnText, int]:
    """Return the text in the largest letters that fit, and their size in pixels."""
    letter_px = max(MIN_LETTER_PX, round(min(size) * height))
    while letter_px >= MIN_LETTER_PX:
        loaded = _font(font, letter_px)
        _check_letters(text, loaded)
        drawn = _DrawnText("\n".join(_balanced(text, loaded, size.width * MAX_TEXT_WIDTH)), loaded)
        left, top, right, bottom = _box(drawn, round(letter_px / 10))
        if right - left <= size.width and bottom - top <= size.height * max_height:
            return drawn, letter_px
        letter_px = min(letter_px - 1, round(letter_px * 0.9))
    shown = text if len(text) <= 60 else f"{text[:59]}…"
    raise UsageError(f"text {shown!r}: too long for a picture of {size}; shorten it or use a larger size")


def _font(path: Path | None, letter_px: int) -> ImageFont.FreeTypeFont:
    try:
        return load_font(path, letter_px)
    except OSError:
        raise UsageError(f"font {path}: not a font; must be a .ttf, .otf or .ttc file") from None


def _check_letters(text: str, font: ImageFont.FreeTypeFont) -> None:
    if (letter := missing_letter(text, font)) is not None:
        raise UsageError(f"text {text[:60]!r}: the font has no letter {letter!r}; set a font that has it")


def _balanced(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> Sequence[str]:
    """Break lines so that they are about equally long, without more lines than needed."""
    lines = _wrapped(text, font, width_px)
    while width_px > font.size and len(narrower := _wrapped(text, font, width_px - font.size / 2)) == len(lines):
        lines, width_px = narrower, width_px - font.size / 2
    return lines


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> Sequence[str]:
    """Break lines at blanks, and inside words that are wider than the picture."""
    lines = []
    for paragraph in text.strip().splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if line and font.getlength(joined) > width_px:
                lines.append(line)
                joined = word
            while font.getlength(joined) > width_px and len(joined) > 1:
                count = max(1, sum(font.getlength(joined[:end]) <= width_px for end in range(1, len(joined))))
                lines.append(joined[:count])
                joined = joined[count:]
            line = joined
        lines.append(line)
    return lines


def _box(drawn: _DrawnText, outline_px: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the text drawn at (0, 0), in whole pixels."""
    canvas = ImageDraw.Draw(PILImage.new("L", (1, 1)))
    box = canvas.multiline_textbbox((0, 0), drawn.text, drawn.font, align="center", stroke_width=outline_px)
    left, top, right, bottom = box
    return int(left) - 1, int(top) - 1, int(right) + 2, int(bottom) + 2


def _even(value: int) -> int:
    return value + value % 2
