"""Drift along a chain of continued shots, on the demo models.

    python benchmarks/continuity.py [--picture FILE]

Prints the table of docs/continuity.md: the first frame of each shot of a chain compared with the first frame of the chain.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table
from skimage.color import deltaE_ciede2000, rgb2gray, rgb2lab
from skimage.filters import gaussian, laplace
from skimage.metrics import structural_similarity

from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import load_profile
from vidgen_ray.stages.base import Image

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


def chain(pipeline: VideoGenerationPipeline, number: int, prompt: str) -> list[Image]:
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


def compared(first: Image, frame: Image) -> tuple[float, float, float]:
    """Return SSIM, CIEDE2000 of the blurred frames, and sharpness as a share of that of `first`."""
    ssim = structural_similarity(first, frame, channel_axis=2)
    lab = [rgb2lab(gaussian(image, BLUR_PX, channel_axis=2)) for image in (first, frame)]
    before, after = (float(laplace(rgb2gray(image)).var()) for image in (first, frame))
    return float(ssim), float(deltaE_ciede2000(*lab).mean()), after / before


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="write the frames, one row for each scene")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, VideoGenerationPipeline(load_profile("demo"), Path(folder)) as pipeline:
        chains = [chain(pipeline, number, prompt) for number, prompt in enumerate(SCENES)]
    if options.picture:
        PILImage.fromarray(np.vstack([np.hstack(frames) for frames in chains])).save(options.picture)
    table = Table("first frame of", "SSIM", "worst SSIM", "CIEDE2000", "worst CIEDE2000", "sharpness")
    for shot in range(1, SHOTS + 1):
        rows = [compared(frames[0], frames[shot]) for frames in chains]
        ssim, colour, sharpness = zip(*rows, strict=True)
        name = f"shot {shot + 1}" if shot < SHOTS else f"(end of shot {SHOTS})"
        values = (np.mean(ssim), min(ssim), np.mean(colour), max(colour), np.mean(sharpness))
        table.add_row(name, *(f"{value:.2f}" for value in values))
    console = Console()
    console.print(table)
    console.print(f"{len(SCENES)} scenes, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
