"""Draw frames between the frames of a video with RIFE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vidgen_ray.stages.base import torch_threads
from vidgen_ray.stages.rife import RifeParams, similarity
from vidgen_ray.upscale.frames import Pixels
from vidgen_ray.upscale.timeline import Place
from vidgen_ray.weights import resolve

if TYPE_CHECKING:
    import torch

INTERPOLATOR = "builtin:rife"


def interpolator_weights() -> Path:
    """Return the weights of RIFE. Raises SetupError if they are not on this machine."""
    return resolve(INTERPOLATOR)


class FrameInterpolator:
    """RIFE in float32. Frames are uint8 or uint16 (H, W, 3). One thread may use it at a time."""

    def __init__(self, weights: Path, device: str, threads: int) -> None:
        """Load the weights. Raises SetupError."""
        from vidgen_ray.nets.rife import load_rife

        self._network = load_rife(weights).to(device)
        self._device, self._threads = device, threads
        self._min_similarity = RifeParams(weights=weights).min_similarity

    def between(self, first: Pixels, second: Pixels) -> Callable[[Fraction], Pixels]:
        """Return a function that draws the frame at a time between 0 (the first one) and 1. At a cut, it is the first one."""
        import torch

        from vidgen_ray.nets.rife import FramePair

        kind = first.dtype
        levels = np.iinfo(kind).max

        def tensor(frame: Pixels) -> torch.Tensor:
            pixels = torch.from_numpy(frame.astype(np.float32) / np.float32(levels)).to(self._device)
            return pixels.permute(2, 0, 1)[None]

        def image(pixels: torch.Tensor, maximum: int, dtype: np.dtype[np.generic]) -> Pixels:
            rounded: Pixels = (pixels[0].permute(1, 2, 0).clamp(0, 1) * maximum).round().cpu().numpy().astype(dtype)
            return rounded

        def drawn(time: Fraction) -> Pixels:
            with torch.inference_mode(), torch_threads(self._threads):
                return image(pair.at(time), levels, kind)

        with torch.inference_mode(), torch_threads(self._threads):
            pair = FramePair(self._network, tensor(first), tensor(second))
            aligned = [image(pixels, 255, np.dtype(np.uint8)) for pixels in pair.aligned()]
        if similarity(*aligned) < self._min_similarity:
            return lambda time: first
        return drawn


def interpolated(frames: Iterator[Pixels], wanted: Sequence[Place], network: FrameInterpolator) -> Iterator[Pixels]:
    """Yield the frame at each place, in order. `frames` starts with the frame of the first place."""
    number, current = wanted[0].frame, next(frames)
    following: Pixels | None = None
    between: Callable[[Fraction], Pixels] | None = None
    for place in wanted:
        while number < place.frame:
            current = next(frames) if following is None else following
            following = between = None
            number += 1
        if not place.share:
            yield current
            continue
        if following is None or between is None:
            following = next(frames)
            between = network.between(current, following)
        yield between(place.share)
