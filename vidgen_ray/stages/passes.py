"""Clips that are longer than one pass of the video model: each further pass starts from the last frame of the one before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Frames, Item
from vidgen_ray.stages.memory import CLIP_HOST_BYTES
from vidgen_ray.stages.progress import part_of_progress


def passes_of(shot: Shot) -> int:
    """Return the number of passes of the video model."""
    return shot.extend + 1


def clip_host_bytes(shot: Shot) -> int:
    """Return the host memory of a clip: an upper bound for one pass, and two copies of the clip that several make."""
    joined = 2 * shot.clip_frames if shot.extend else 0
    return shot.width * shot.height * 3 * (shot.num_frames * CLIP_HOST_BYTES + joined)


def shots_of_passes(shot: Shot) -> list[Shot]:
    """Return one shot for each pass, in order. The first pass is that of the shot without `extend`.

    Further passes have seeds of their own, because the same noise would repeat the same motion. The clip ends with
    `last_image`, so only the last pass has one.
    """
    if not shot.extend:
        return [shot]
    last_images = [*[None] * shot.extend, shot.last_image]
    return [
        shot.model_copy(
            update={
                "extend": 0,
                "last_image": last_image,
                "seed": shot.derived_seed(f"pass {number}") if number else shot.required_seed(),
            }
        )
        for number, last_image in enumerate(last_images)
    ]


def run_passes(item: Item, generate: Callable[[Item], Frames]) -> Frames:
    """Return the clip of all passes (clip_frames, H, W, 3). `generate` returns that of one (num_frames, H, W, 3).

    The first frame of a further pass stands for the last frame of the pass before, so it is left out.
    """
    shots = shots_of_passes(item.shot)
    if len(shots) == 1:
        return generate(item)
    artefacts = item.artefacts.copy()
    parts = []
    for number, shot in enumerate(shots):
        with part_of_progress(number, len(shots)):
            frames = generate(Item(shot, artefacts))
        artefacts["image"] = frames[-1]
        parts.append(frames[1:] if number else frames)
    return np.concatenate(parts)
