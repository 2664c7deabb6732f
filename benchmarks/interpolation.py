"""Frame interpolation against frames that were held out, beside blending and repetition.

    python benchmarks/interpolation.py [--weights flownet.pkl] [--out docs/images/interpolation.jpg]

Prints the table that docs/continuity.md summarises. Clips are made from photographs that packages ship, moved by known amounts,
so the frames between two frames are known. Every second or fourth frame is given to the stage; the others are held out.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Frames, Image, Item
from vidgen_ray.stages.rife import RifeParams, RifeStage
from vidgen_ray.weights import resolve

SIDE_PX = 256
FRAMES = 9
FACTORS = (2, 4)
FPS = 6
SHOWN = 3
"""Held-out frame in the picture: between frames 0 and 4 of a clip."""
ROW_PX, GAP_PX, CAPTION_PX = 192, 6, 24
Matrix = NDArray[np.float64]


def moved(photo: Image, path: Callable[[float], Matrix]) -> Frames:
    """Return a clip of a photo seen through a moving window. `path`: time 0 to 1 -> window to photo, (2, 3)."""
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    times = np.linspace(0, 1, FRAMES)
    frames = [cv2.warpAffine(photo, path(t), (SIDE_PX, SIDE_PX), flags=flags, borderMode=cv2.BORDER_REFLECT) for t in times]
    return np.stack(frames).astype(np.uint8)


def window(x: float, y: float, zoom: float = 1.0, turn_deg: float = 0.0) -> Matrix:
    """Return the matrix of a window centred at (x, y) of a photo, `zoom` photo pixels per pixel, turned by `turn_deg`."""
    turn, half = np.radians(turn_deg), SIDE_PX / 2
    linear = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.column_stack([linear, np.array([x, y]) - linear @ [half, half]])


def layered() -> Frames:
    """Return a clip of a cat's head that moves over a panned cup of coffee: motion with borders and hidden background."""
    background = moved(data.coffee(), lambda t: window(250 + 40 * t, 200))
    cat = data.chelsea()[20:276, 90:346]
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    head = (((x - 125) / 85) ** 2 + ((y - 120) / 95) ** 2 < 1).astype(np.float32)
    frames = []
    for number, back in enumerate(background):
        shift = np.float64([[0.6, 0, 90 - 56 * number / (FRAMES - 1)], [0, 0.6, 60 + 24 * number / (FRAMES - 1)]])
        front, mask = (cv2.warpAffine(layer, shift, (SIDE_PX, SIDE_PX)) for layer in (cat, head))
        share = cv2.GaussianBlur(mask, (5, 5), 0)[..., None]
        frames.append((front * share + back * (1 - share)).round())
    return np.stack(frames).astype(np.uint8)


def clips() -> dict[str, Frames]:
    """Return the clips: name -> (9, 256, 256, 3)."""
    return {
        "astronaut, pan": moved(data.astronaut(), lambda t: window(180 + 80 * t, 160 + 16 * t)),
        "rocket, slow zoom": moved(data.rocket(), lambda t: window(320, 220, 1.5 - 0.4 * t)),
        "coffee, rotation": moved(data.coffee(), lambda t: window(300, 200, 1.2, 20 * t)),
        "cat over coffee": layered(),
    }


def repeated(given: Frames, factor: int) -> Frames:
    return given.repeat(factor, axis=0)


def blended(given: Frames, factor: int) -> Frames:
    """Return the frames with weighted means between them. The last frame is held."""
    following = np.concatenate([given[1:], given[-1:]]).astype(float)
    between = [given + (following - given) * n / factor for n in range(factor)]
    return np.stack(between, 1).reshape(-1, *given.shape[1:]).round().astype(np.uint8)


def by_stage(stage: RifeStage) -> Callable[[Frames, int], Frames]:
    def interpolate(given: Frames, factor: int) -> Frames:
        shot = Shot(prompt="-", seed=0, fps=FPS, fps_out=FPS * factor, width=SIDE_PX, height=SIDE_PX)
        frames: Frames = stage(Item(shot, {"frames": given}))["frames"]
        return frames

    return interpolate


def measure(truth: Frames, made: Frames, factor: int) -> tuple[float, float]:
    """Return PSNR in dB and SSIM, means over the held-out frames."""
    held_out = [number for number in range(len(truth)) if number % factor]
    psnr = [peak_signal_noise_ratio(truth[n], made[n], data_range=255) for n in held_out]
    ssim = [structural_similarity(truth[n], made[n], channel_axis=-1, data_range=255) for n in held_out]
    return float(np.mean(psnr)), float(np.mean(ssim))


def picture(methods: Mapping[str, Callable[[Frames, int], Frames]], pictured: Mapping[str, Frames]) -> PILImage.Image:
    """Return a sheet: a clip per row; the held-out frame, then what each method makes of it from every fourth frame."""
    columns = ["held-out frame", *methods]
    width, height = (ROW_PX + GAP_PX) * len(columns) + GAP_PX, CAPTION_PX + (ROW_PX + GAP_PX) * len(pictured) + GAP_PX
    sheet = PILImage.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(columns):
        draw.text((GAP_PX + column * (ROW_PX + GAP_PX), 5), title, "black", font)
    for row, truth in enumerate(pictured.values()):
        shown = [truth[SHOWN], *(method(truth[::4], 4)[SHOWN] for method in methods.values())]
        for column, frame in enumerate(shown):
            cell = PILImage.fromarray(frame).resize((ROW_PX, ROW_PX), PILImage.Resampling.LANCZOS)
            sheet.paste(cell, (GAP_PX + column * (ROW_PX + GAP_PX), CAPTION_PX + row * (ROW_PX + GAP_PX)))
    return sheet


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--weights", type=Path, help="flownet.pkl of RIFE 4.25, as one more column.")
    parser.add_argument("--out", type=Path, help="Where to write the picture.")
    options = parser.parse_args()
    weights = {"RIFE HDv3": resolve("builtin:rife")} | ({"RIFE 4.25": options.weights} if options.weights else {})
    methods: dict[str, Callable[[Frames, int], Frames]] = {"repetition": repeated, "blending": blended}
    for name, path in weights.items():
        stage = RifeStage(RifeParams(weights=path))
        stage.load()
        methods[name] = by_stage(stage)
    made_from = clips()
    table = Table("clip", "given", *methods)
    for name, truth in made_from.items():
        for factor in FACTORS:
            measured = (measure(truth, method(truth[::factor], factor), factor) for method in methods.values())
            table.add_row(name, f"every {factor}.", *(f"{psnr:.1f} dB, {ssim:.3f}" for psnr, ssim in measured))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.out:
        picture(methods, made_from).save(options.out, quality=88)


if __name__ == "__main__":
    main()
