"""Benchmark of speed options: seconds per shot of one stage, and how much its results differ from those without options.

Each option is measured alone, and each quality tier. The first call of a stage is not measured: it compiles.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from rich.console import Console
from rich.table import Table
from skimage.metrics import structural_similarity

from benchmarks.machine import machine, write_json
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.media import read_image
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.script.reader import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Frames, Item, Stage
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.likeness import ImageLikenessStage
from vidgen_ray.stages.svd import SVDStage

FACE = Path(__file__).parent.parent / "examples" / "faces" / "ada.png"
PROMPTS = (
    "a portrait of a person in a blue shirt in a meadow on a sunny day",
    "a person in a white sweater in the city at night",
    "a person in a yellow shirt by the sea at sunset",
    "a person in a red shirt in the snow",
)
STAGES: dict[str, type[Stage[Any]]] = {"flux": FluxStage, "lora": FluxLoRAStage, "hunyuan": HunyuanDiTStage, "svd": SVDStage}
STEP_CACHES = (
    {"step_cache": "first_block", "step_cache_threshold": 0.05},
    {"step_cache": "first_block", "step_cache_threshold": 0.1},
    {"step_cache": "first_block", "step_cache_threshold": 0.2},
    {"step_cache": "magcache"},
    {"step_cache": "taylorseer"},
)
FLUX_OPTIONS = (
    {"channels_last": True},
    {"compile": "regional"},
    {"lora_hotswap": True},
    *STEP_CACHES,
    {"quantize": "fp8_storage"},
    {"quantize": "int8_weights"},
    {"quantize": "nf4"},
)
OPTIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "flux": FLUX_OPTIONS,
    "lora": FLUX_OPTIONS,
    "hunyuan": ({"channels_last": True}, {"fuse_qkv": True}, {"compile": "regional"}),
    "svd": (
        {"channels_last": True},
        {"fuse_qkv": True},
        {"compile": "regional"},
        {"compile": "full"},
        {"step_cache": "pyramid_attention", "step_cache_interval": 2},
        {"step_cache": "pyramid_attention", "step_cache_interval": 3},
    ),
}
TIERS = ("lossless", "high", "medium", "draft")


def shots_of(profile: Profile, stage: type[Stage[Any]], with_face: bool, lora: str | None) -> list[Shot]:
    """Return one shot per prompt that passes the stage."""
    fields: dict[str, Any] = {}
    if with_face:
        fields["face_image"] = str(FACE)
    if stage is FluxLoRAStage:
        fields["lora"] = lora
    if stage is HunyuanDiTStage:
        fields |= {"use_hunyuan_style": True, "style_prompt": "a pencil sketch"}
    shots = [
        check_shot({"prompt": prompt, "seed": seed, **fields}, "benchmark", profile.defaults)
        for seed, prompt in enumerate(PROMPTS)
    ]
    return [with_local_loras(shot) for shot in shots]


def run(stage: Stage[Any], items: Sequence[Item]) -> tuple[list[Frames], float]:
    """Return the result of each item as frames (T, H, W, 3), and seconds per item without the first call."""
    stage(items[:1])
    begun = time.monotonic()
    results = [stage([item])[0][stage.writes[0]] for item in items]  # type: ignore[literal-required]
    seconds = (time.monotonic() - begun) / len(items)
    return [result if result.ndim == 4 else result[None] for result in results], seconds


def compare(results: Sequence[Frames], references: Sequence[Frames]) -> dict[str, float]:
    """Return the mean PSNR in dB (100 for equal ones) and SSIM of all frames, and the largest difference in levels of 255."""
    psnr, ssim, largest = [], [], 0
    for result, reference in zip(results, references, strict=True):
        for a, b in zip(result, reference, strict=True):
            error = np.mean((a.astype(float) - b) ** 2)
            psnr.append(min(100.0, 10 * np.log10(255**2 / error)) if error else 100.0)
            ssim.append(structural_similarity(a, b, channel_axis=-1))
            largest = max(largest, int(np.abs(a.astype(int) - b).max()))
    return {"psnr_db": float(np.mean(psnr)), "ssim": float(np.mean(ssim)), "largest": largest}


def measure(
    profile: Profile, stage_class: type[Stage[Any]], shots: Sequence[Shot], with_face: bool, choices: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row per option and tier: seconds per shot, difference from the plain stage, and the likeness to the face."""
    with InstantIDStage(profile.params(InstantIDStage)) as faces:
        face = faces.features([read_image(FACE)])
    with FluxStage(profile.params(FluxStage)) as flux:
        images = [
            flux([Item(shot.model_copy(update={"lora": ()}), {"face": face})])[0]["image"]
            if stage_class is not FluxStage
            else None
            for shot in shots
        ]
    items = [
        Item(shot, {"face": face} if image is None else {"face": face, "image": image})
        for shot, image in zip(shots, images, strict=True)
    ]
    variants = [("reference", profile.params(stage_class))]
    for options in OPTIONS[stage_class.name]:
        name = ", ".join(f"{option}: {value}" for option, value in options.items())
        params = profile.params(stage_class)
        variants.append((name, type(params).model_validate({**dict(params), **options})))
    variants += [(f"quality_tier: {tier}", profile.with_quality_tier(tier).params(stage_class)) for tier in TIERS]
    if choices:
        variants = [(name, params) for name, params in variants if name == "reference" or any(c in name for c in choices)]
    rows: list[dict[str, Any]] = []
    references: list[Frames] = []
    errors = Console(stderr=True)
    with ImageLikenessStage(profile.params(ImageLikenessStage)) as likeness:
        for number, (name, params) in enumerate(variants, 1):
            errors.print(f"{number} of {len(variants)}: {name}", markup=False)
            try:
                with stage_class(params) as stage:
                    results, seconds = run(stage, items)
            # An option may need a package or a GPU that this machine does not have.
            except Exception as error:
                errors.print(f"{name}: {error}", markup=False)
                continue
            references = references or results
            row = {"stage": stage_class.name, "option": name, "seconds": seconds, **compare(results, references)}
            if with_face:
                found = [
                    likeness([Item(shot, {"face": face, "image": frames[-1]})])[0]["image_likeness"].mean
                    for shot, frames in zip(shots, results, strict=True)
                ]
                row["likeness"] = float(np.mean([value for value in found if value is not None] or [np.nan]))
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--stage", choices=STAGES, default="flux")
    parser.add_argument("--face", action="store_true", help="shots with a face; default: without")
    parser.add_argument("--lora", default="builtin:demo/ada.safetensors", help="LoRA for --stage lora")
    parser.add_argument("--shots", type=int, choices=range(1, len(PROMPTS) + 1), default=len(PROMPTS), help="default: all")
    parser.add_argument("--only", nargs="*", default=[], help="options whose name contains one of these; default: all")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    profile, stage = load_profile(args.profile), STAGES[args.stage]
    shots = shots_of(profile, stage, args.face, args.lora)[: args.shots]
    rows = measure(profile, stage, shots, args.face, args.only)
    about = machine(("torch", "diffusers"))
    title = f"{args.profile}, {args.stage}{', faces' if args.face else ''}; {about['cpu']}, load {about['load_1_min']}"
    table = Table("option", "s/shot", "PSNR dB", "SSIM", "largest", "likeness", title=title)
    for row in rows:
        similarity = f"{row['likeness']:.3f}" if "likeness" in row else ""
        values = f"{row['seconds']:.3f}", f"{row['psnr_db']:.1f}", f"{row['ssim']:.4f}", str(row["largest"])
        table.add_row(row["option"], *values, similarity)
    Console(width=140).print(table)
    if args.json:
        write_json(args.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
