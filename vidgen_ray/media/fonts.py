"""The font of captions, titles and labels."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageFont


@lru_cache(maxsize=64)
def load_font(path: Path | None, letter_px: int) -> ImageFont.FreeTypeFont:
    """Load a font file, by default the bundled DejaVu Sans. Raises OSError if it is not a font."""
    from PIL import ImageFont

    if path is not None:
        return ImageFont.truetype(str(path), letter_px)
    with resources.as_file(resources.files("vidgen_ray") / "film" / "fonts" / "DejaVuSans.ttf") as bundled:
        return ImageFont.truetype(str(bundled), letter_px)


def missing_letter(text: str, font: ImageFont.FreeTypeFont) -> str | None:
    """Return a letter of the text that the font does not have, or `None`."""
    # Pillow does not tell which letters a font has. It draws the same box for all that are missing.
    missing = bytes(font.getmask("\U0010ffff"))
    for letter in sorted(set(text)):
        if letter.isprintable() and not letter.isspace() and bytes(font.getmask(letter)) == missing:
            return letter
    return None
