"""Compare the frames of each fast path of `vidgen upscale` with those of float32, and write a comparison image.

    python benchmarks/upscale_quality.py    # PSNR, SSIM, flicker, ColorVideoVDP
    python benchmarks/upscale_quality.py --video clip.mp4 --frames 24

Flicker is the mean change of the error from one frame to the next, in levels of 255: an error that stays where it is does not
flicker. ColorVideoVDP (Mantiuk et al. 2024) is a model of human vision for videos, here on its display `standard_fhd`: 10 JOD
means no visible difference, and of two videos that differ by 1 JOD three of four people prefer the better one. LPIPS is not
measured: its package downloads the weights of its network.

The image shows input (nearest), bicubic, float32 and the fastest path, and the difference of the last two, 32 times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import typer
from PIL import Image

from benchmarks.machine import machine, write_json
from benchmarks.upscale import PACKAGES, photo_video
from vidgen_ray.stages.speed import cpu_has_bfloat16
from vidgen_ray.upscale.frames import FrameReader
from vidgen_ray.upscale.network import (
    DEFAULT_NETWORK,
    EngineSettings,
    UpscaleModel,
    UpscaleNetwork,
    choose_settings,
    find_model,
    tile_overlap_px,
    usable_cpus,
)
from vidgen_ray.upscale.source import read_source

Clip = list[np.ndarray]
CROP_PX = 96
"""Side of the part of the input that the comparison image shows."""
GAIN = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="video to upscale (default: a camera over a photo, 256x144)")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--model", default=DEFAULT_NETWORK)
    parser.add_argument("--out", type=Path, default=Path("out/upscale-quality"), help="folder for comparison.png")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    model = find_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        video = args.video or photo_video(Path(folder) / "photo.mp4", args.frames, (256, 144))
        source = read_source(video)
        frames = list(FrameReader(source).read(0, min(args.frames, source.frame_count)))
    base = EngineSettings(threads=usable_cpus())
    expected = upscaled(model, base, frames)
    jod = colour_video_vdp(source.fps)
    rows, best = [], expected
    for name, settings in fast_paths(model, base).items():
        got = upscaled(model, settings, frames)
        rows.append({"path": name, **compare(got, expected, jod)})
        best = got if name == "chosen" else best
    large = expected[0].shape[1], expected[0].shape[0]
    bicubic = [cv2.resize(frame, large, interpolation=cv2.INTER_CUBIC) for frame in frames]
    rows.append({"path": "bicubic, for scale", **compare(bicubic, expected, jod)})
    print_table(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    comparison(frames[0], bicubic[0], expected[0], best[0]).save(args.out / "comparison.png")
    typer.echo(args.out / "comparison.png")
    if args.json:
        write_json(args.json, {"machine": machine(PACKAGES), "model": model.name, "results": rows})


def fast_paths(model: UpscaleModel, base: EngineSettings) -> dict[str, EngineSettings]:
    """Return name -> settings of everything that may be chosen, and tiles."""
    paths = {"torch float32, 1 thread": base.model_copy(update={"threads": 1})}
    overlap = tile_overlap_px(model)
    if overlap is not None:
        paths[f"tiles of 64 px, overlap {overlap}"] = base.model_copy(update={"tile_px": 64, "overlap_px": overlap})
    if cpu_has_bfloat16():
        paths["torch bfloat16"] = base.model_copy(update={"dtype": "bfloat16"})
    paths["chosen"] = choose_settings(model, "cpu", 1)
    return paths


def upscaled(model: UpscaleModel, settings: EngineSettings, frames: Clip) -> Clip:
    network = UpscaleNetwork(model, settings)
    return [network(frame) for frame in frames]


def compare(got: Clip, expected: Clip, jod: Callable[[Clip, Clip], float] | None) -> dict[str, Any]:
    from skimage.metrics import structural_similarity

    errors = [a.astype(np.int16) - b for a, b in zip(got, expected, strict=True)]
    mse = np.mean([np.mean(error.astype(float) ** 2) for error in errors])
    ssim = np.mean([structural_similarity(a, b, channel_axis=2) for a, b in zip(got, expected, strict=True)])
    return {
        "psnr_db": round(float(10 * np.log10(255**2 / mse)), 2) if mse else None,
        "max_levels": int(max(np.abs(error).max() for error in errors)),
        "ssim": round(float(ssim), 5),
        "flicker_levels": round(float(np.mean([np.abs(b - a).mean() for a, b in pairwise(errors)])), 4)
        if len(errors) > 1
        else None,
        "jod": None if jod is None else round(jod(got, expected), 3),
    }


def colour_video_vdp(fps: Fraction) -> Callable[[Clip, Clip], float] | None:
    """Return ColorVideoVDP for two clips of uint8 frames, or `None` if its package is not on this machine."""
    try:
        import pycvvdp
    except ImportError as error:
        typer.echo(f"ColorVideoVDP: not measured ({error})", err=True)
        return None
    metric = pycvvdp.cvvdp(display_name="standard_fhd", quiet=True)

    def quality(got: Clip, expected: Clip) -> float:
        result, _ = metric.predict(np.stack(got), np.stack(expected), dim_order="FHWC", frames_per_second=float(fps))
        return float(result)

    return quality


def print_table(rows: list[dict[str, Any]]) -> None:
    typer.echo(f"{'path':36} {'dB to fp32':>10} {'max levels':>10} {'SSIM':>8} {'flicker':>8} {'JOD':>8}")
    for row in rows:
        similarity = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.2f}"
        jod = "-" if row["jod"] is None else f"{row['jod']:.3f}"
        flicker = "-" if row["flicker_levels"] is None else f"{row['flicker_levels']:.4f}"
        typer.echo(f"{row['path']:36} {similarity:>10} {row['max_levels']:10} {row['ssim']:8.5f} {flicker:>8} {jod:>8}")


def comparison(small: np.ndarray, bicubic: np.ndarray, fp32: np.ndarray, fast: np.ndarray) -> Image.Image:
    """Return the parts side by side: input, bicubic, float32, fast path, difference of the last two."""
    scale = fp32.shape[0] // small.shape[0]
    top, left = (small.shape[0] - CROP_PX) // 2, (small.shape[1] - CROP_PX) // 2
    nearest = small[top : top + CROP_PX, left : left + CROP_PX].repeat(scale, 0).repeat(scale, 1)
    part = slice(top * scale, (top + CROP_PX) * scale), slice(left * scale, (left + CROP_PX) * scale)
    difference = np.abs(fp32.astype(int) - fast) * GAIN
    panels = [nearest, bicubic[part], fp32[part], fast[part], difference.clip(0, 255).astype(np.uint8)[part]]
    return Image.fromarray(np.concatenate(panels, axis=1))


if __name__ == "__main__":
    main()
