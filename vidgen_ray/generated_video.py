"""Result of a call of the library: a mapping that shows image and clip in notebooks."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vidgen_ray.media import encode_png
from vidgen_ray.outputs.records import ShotRecord
from vidgen_ray.provenance.reading import mark_of

MAX_INLINE_BYTES = 20_000_000
"""Largest clip that a notebook gets inside of its page, in bytes. A larger one is shown as its path."""


@dataclass(frozen=True, eq=False)
class GeneratedVideo(Mapping[str, Any]):
    """Result of `generate_video`. `result["image"]` and `result.image` are the same."""

    image: PILImage.Image
    video: Path | str | None
    """Path, or URL if the output folder is in an object store. `None` if the shot has no clip."""
    hd_video: Path | str | None
    """The upscaled clip. `None` if the shot has none."""
    record: ShotRecord

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def __contains__(self, name: object) -> bool:
        return name in [*self]

    def _repr_html_(self) -> str:
        """Show the image and the largest clip in a notebook."""
        parts = [f'<img src="{_data_url("image/png", _png(self.image))}" alt="{html.escape(self.record.shot.prompt)}">']
        clip = self.hd_video or self.video
        if isinstance(clip, Path) and clip.stat().st_size <= MAX_INLINE_BYTES:
            url = _data_url("video/mp4", clip.read_bytes())
            parts.append(f'<video src="{url}" controls loop muted playsinline width="{self.image.width}"></video>')
        if clip is not None:
            parts.append(f"<div><code>{html.escape(str(clip))}</code></div>")
        return "".join(parts)


def _png(image: PILImage.Image) -> bytes:
    """Encode the image for a notebook, which keeps it when it is saved."""
    return encode_png(np.asarray(image.convert("RGB")), mark_of(image))


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
