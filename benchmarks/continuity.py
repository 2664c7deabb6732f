"""Drift along a chain of continued shots, and over the passes of one clip, on the demo models.

    python benchmarks/continuity.py [--picture FILE]

Prints the tables that docs/continuity.md summarises: the first frame of each shot of a chain, and the image from which each
pass starts, compared with the first one; and how much changes from frame to frame where passes meet.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table
from skimage.color import deltaE_ciede2000, rgb2gray, rgb2lab
from skimage.filters import gaussian, laplace
from skimage.metrics import structural_similarity

from tests.meaning.chain import Chain
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import load_profile
from vidgen_ray.stages.base import Frames, Image

SCENES = (
    "a red boat by the sea at sunset",
    "a yellow balloon in the snow at night",
    "a green car in the desert on a sunny day",
    "a blue house in a meadow on a cloudy day",
    "a purple tree in the city at sunset",
    "a person in a blue shirt in a meadow on a sunny day",
)
SHOTS = 4
BLUR_PX = 8
"""Sigma of the blur before colours are compared, so that the figure says little about shapes and motion."""


def chain_of_shots(pipeline: VideoGenerationPipeline, number: int, prompt: str) -> list[Image]:
    """Return the first frames of the shots of a chain, and the last frame of the last one."""
    frames = []
    for shot in range(SHOTS + 1):
        source = {"continue_from": f"{number}-{shot - 1}"} if shot else {}
        is_clip = shot < SHOTS
        result = pipeline.generate_video(
            prompt, id=f"{number}-{shot}", seed=number, generate_video=is_clip, upscale_video=False, **source
        )
        frames.append(np.asarray(result.image))
    return frames


def clip_of_passes(chain: Chain, number: int, prompt: str) -> tuple[list[Image], float]:
    """Return the images from which the passes of a clip start, and its last frame; and `change_at_joins` of the clip."""
    made = chain.make(prompt=prompt, seed=number, generate_video=True, extend=SHOTS - 1)
    clip = made["frames"]
    step = (len(clip) - 1) // SHOTS
    return [made["image"], *clip[step::step]], change_at_joins(clip, step)


def change_at_joins(clip: Frames, step: int) -> float:
    """Return the mean change from the start frame of a further pass to the next frame, relative to that of all frames.

    Further passes start from frames `step`, 2 * `step` and so on.
    """
    changes = np.abs(np.diff(clip.astype(np.float64), axis=0)).mean((1, 2, 3))
    return float(changes[step::step].mean() / changes.mean())


def compared(first: Image, frame: Image) -> tuple[float, float, float]:
    """Return SSIM, CIEDE2000 of the blurred frames, and sharpness as a share of that of `first`."""
    ssim = structural_similarity(first, frame, channel_axis=2)
    lab = [rgb2lab(gaussian(image, BLUR_PX, channel_axis=2)) for image in (first, frame)]
    before, after = (float(laplace(rgb2gray(image)).var()) for image in (first, frame))
    return float(ssim), float(deltaE_ciede2000(*lab).mean()), after / before


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="write the frames, two rows for each scene: shots, passes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, VideoGenerationPipeline(load_profile("demo"), Path(folder)) as pipeline:
        shots = [chain_of_shots(pipeline, number, prompt) for number, prompt in enumerate(SCENES)]
        chain = Chain(Path(folder))
        passes, changes = zip(*(clip_of_passes(chain, number, prompt) for number, prompt in enumerate(SCENES)), strict=True)
    if options.picture:
        rows = [np.hstack(frames) for pair in zip(shots, passes, strict=True) for frames in pair]
        PILImage.fromarray(np.vstack(rows)).save(options.picture)
    console = Console()
    console.print(drift_table("shot", shots))
    console.print(drift_table("pass", passes))
    console.print(
        f"change where passes meet, relative to that from frame to frame: {np.mean(changes):.2f} ({max(changes):.2f})"
    )
    console.print(f"{len(SCENES)} scenes, {time.monotonic() - started:.0f} s")


def drift_table(part: str, scenes: Sequence[Sequence[Image]]) -> Table:
    """Return mean and worst drift per shot or pass. `scenes`: the frames from which these start, then the last frame."""
    table = Table(f"start of {part}", "SSIM", "worst SSIM", "CIEDE2000", "worst CIEDE2000", "sharpness")
    for number in range(1, SHOTS + 1):
        rows = [compared(frames[0], frames[number]) for frames in scenes]
        ssim, colour, sharpness = zip(*rows, strict=True)
        name = str(number + 1) if number < SHOTS else f"(end of {SHOTS})"
        values = (np.mean(ssim), min(ssim), np.mean(colour), max(colour), np.mean(sharpness))
        table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


if __name__ == "__main__":
    main()
