"""Benchmark of speed options: how much the results of a stage differ from those without options, and seconds per shot.

Each option is measured alone, and each quality tier. The first call of a stage is not timed.

On a CPU, nothing is compiled: torch.compile only changes the rounding, and compiling for a CPU takes minutes and says nothing
about a GPU. float16 is left out as well: a clip takes minutes.

    python -m benchmarks.speed_options                                  # all groups with the demo models, some minutes
    python -m benchmarks.speed_options --profile gpu-80gb --group svd   # on a GPU, with the published weights
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

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
from vidgen_ray.stages.base import Artefacts, Frames, Item, QualityTier, Stage, StageParams
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.likeness import ImageLikenessStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage

FACE = Path(__file__).parent.parent / "examples" / "faces" / "ada.png"
PHOTO = FACE.with_name("astronaut.jpg")
PHOTO_FRAMES = 2
"""Frames of a clip that is cut from the photo, for the upscaler."""
PROMPTS = (
    "a portrait of a person in a blue shirt in a meadow on a sunny day",
    "a person in a white sweater in the city at night",
    "a person in a yellow shirt by the sea at sunset",
    "a person in a red shirt in the snow",
)
EQUAL_DB = 100.0
"""PSNR that stands for equal images."""

Options = Mapping[str, Any]
HALF_PRECISION: tuple[Options, ...] = ({"dtype": "bfloat16"}, {"dtype": "float16"})
FIRST_BLOCK: tuple[Options, ...] = tuple({"step_cache": "first_block", "step_cache_threshold": t} for t in (0.05, 0.1, 0.2))
QUANTIZED: tuple[Options, ...] = tuple(
    {"quantize": name} for name in ("fp8_storage", "fp8_weights", "int8_weights", "nf4", "fp8")
)


@dataclass(frozen=True)
class Group:
    """Options of a stage that are measured on the same shots."""

    stage: type[Stage[Any]]
    options: tuple[Options, ...]
    fields: Options = field(default_factory=dict)
    """Fields of the shots."""
    has_face: bool = False
    tiers: bool = True
    max_shots: int = len(PROMPTS)


GROUPS: Mapping[str, Group] = {
    "flux": Group(
        FluxStage,
        (
            {"channels_last": True},
            {"lora_hotswap": True},
            {"compile": "regional"},
            *HALF_PRECISION,
            *FIRST_BLOCK,
            {"step_cache": "magcache"},
            {"step_cache": "taylorseer"},
            *QUANTIZED,
        ),
    ),
    "flux-face": Group(FluxStage, (*HALF_PRECISION, {"step_cache": "taylorseer"}, *QUANTIZED), has_face=True, tiers=False),
    # Tiles have 256 pixels at least.
    "flux-tiles": Group(FluxStage, ({"vae_tile_px": 256},), {"width": 512, "height": 512}, tiers=False, max_shots=1),
    "lora": Group(FluxLoRAStage, FIRST_BLOCK, {"lora": "builtin:demo/ada.safetensors"}, tiers=False),
    "hunyuan": Group(
        HunyuanDiTStage,
        ({"channels_last": True}, {"fuse_qkv": True}, {"compile": "regional"}, *HALF_PRECISION),
        {"use_hunyuan_style": True, "style_prompt": "a pencil sketch"},
    ),
    "svd": Group(
        SVDStage,
        (
            {"channels_last": True},
            {"fuse_qkv": True},
            {"compile": "full"},
            {"forward_chunking": True},
            {"decode_chunk_frames": 1},
            {"decode_chunk_frames": 2},
            *HALF_PRECISION,
            {"step_cache": "pyramid_attention", "step_cache_interval": 2},
            {"step_cache": "pyramid_attention", "step_cache_interval": 3},
        ),
        has_face=True,
    ),
    "realesrgan": Group(
        RealESRGANStage,
        (*HALF_PRECISION, {"frames_per_call": 1}, {"tile_px": 64}),
        {"upscaler": "animevideov3"},
        tiers=False,
        max_shots=1,
    ),
}


def shots_of(profile: Profile, group: Group) -> list[Shot]:
    """Return one shot per prompt that passes the stage."""
    face = {"face_image": str(FACE), "consent": {"subject": "Ada", "basis": "synthetic"}} if group.has_face else {}
    shots = [
        check_shot({"prompt": prompt, "seed": seed, **face, **group.fields}, "benchmark", profile.defaults)
        for seed, prompt in enumerate(PROMPTS)
    ]
    return [with_local_loras(shot) for shot in shots]


def items_of(profile: Profile, group: Group, shots: Sequence[Shot]) -> list[Item]:
    """Return the shots with what the stage takes: a face, an image that FLUX has drawn without options, or a clip."""
    if group.stage is RealESRGANStage:
        height, width = shots[0].height, shots[0].width
        photo = read_image(PHOTO)
        # The second frame is the first one, moved by a few pixels.
        frames = np.stack([photo[n * 4 : n * 4 + height, n * 4 : n * 4 + width] for n in range(PHOTO_FRAMES)])
        return [Item(shot, {"frames": frames}) for shot in shots]
    given: Artefacts = {}
    if group.has_face:
        with InstantIDStage(profile.params(InstantIDStage)) as faces:
            given["face"] = faces.features([read_image(FACE)])
    if "image" not in group.stage.takes:
        return [Item(shot, given) for shot in shots]
    with FluxStage(profile.params(FluxStage)) as flux:
        images = [flux([Item(shot.model_copy(update={"lora": ()}), given)])[0]["image"] for shot in shots]
    return [Item(shot, {**given, "image": image}) for shot, image in zip(shots, images, strict=True)]


def variants_of(profile: Profile, group: Group) -> list[tuple[str, StageParams]]:
    """Return the name and the parameters of the stage for the reference, each option and each tier."""
    reference = profile.params(group.stage)
    if isinstance(reference.dtype, str) and reference.dtype == "auto":
        reference = reference.model_copy(update={"dtype": "float32"})
    on_cpu = reference.device == "cpu"
    variants = [("reference", reference)]
    for options in group.options:
        name = ", ".join(f"{option}: {value}" for option, value in options.items())
        if not (on_cpu and ("compile" in options or options.get("dtype") == "float16")):
            variants.append((name, type(reference).model_validate({**dict(reference), **options})))
    for tier in get_args(QualityTier) if group.tiers else ():
        params = profile.with_quality_tier(tier).params(group.stage)
        uncompiled = {"compile": "none"} if on_cpu and "compile" in type(params).model_fields else {}
        variants.append((f"quality_tier: {tier}", params.model_copy(update=uncompiled)))
    return variants


def run(stage: Stage[Any], items: Sequence[Item]) -> tuple[list[Frames], float]:
    """Return the result of each item as frames (T, H, W, 3), and seconds per item without the first call."""
    stage(items[:1])
    begun = time.monotonic()
    results = [stage([item])[0][stage.writes[0]] for item in items]  # type: ignore[literal-required]
    seconds = (time.monotonic() - begun) / len(items)
    return [result if result.ndim == 4 else result[None] for result in results], seconds


def compare(results: Sequence[Frames], references: Sequence[Frames]) -> dict[str, float]:
    """Return the mean PSNR in dB and SSIM of all frames, and the largest difference in levels of 255. See `EQUAL_DB`."""
    psnr, ssim, largest = [], [], 0
    for result, reference in zip(results, references, strict=True):
        for a, b in zip(result, reference, strict=True):
            error = np.mean((a.astype(float) - b) ** 2)
            psnr.append(min(EQUAL_DB, 10 * np.log10(255**2 / error)) if error else EQUAL_DB)
            ssim.append(structural_similarity(a, b, channel_axis=-1))
            largest = max(largest, int(np.abs(a.astype(int) - b).max()))
    return {"psnr_db": float(np.mean(psnr)), "ssim": float(np.mean(ssim)), "largest": largest}


def mean_likeness(stage: ImageLikenessStage, items: Sequence[Item], results: Sequence[Frames]) -> float:
    """Return the mean likeness of the last frames to the face. NaN if no face is found in any."""
    found = [
        stage([Item(item.shot, {"face": item.artefacts["face"], "image": frames[-1]})])[0]["image_likeness"].mean
        for item, frames in zip(items, results, strict=True)
    ]
    return float(np.mean([value for value in found if value is not None] or [np.nan]))


def measure(profile: Profile, name: str, shots: int, choices: Sequence[str], errors: Console) -> list[dict[str, Any]]:
    """Return one row per option and tier of a group: difference from the stage without options, likeness and seconds."""
    group = GROUPS[name]
    items = items_of(profile, group, shots_of(profile, group)[: min(shots, group.max_shots)])
    variants = variants_of(profile, group)
    if choices:
        variants = [
            (variant, params) for variant, params in variants if variant == "reference" or any(c in variant for c in choices)
        ]
    rows: list[dict[str, Any]] = []
    references: list[Frames] = []
    with ImageLikenessStage(profile.params(ImageLikenessStage)) as likeness:
        for number, (variant, params) in enumerate(variants, 1):
            errors.print(f"{name}, {number} of {len(variants)}: {variant}", markup=False)
            try:
                with group.stage(params) as stage:
                    results, seconds = run(stage, items)
            # An option may need a package or a GPU that this machine does not have.
            except Exception as error:
                errors.print(f"{variant}: {error}", markup=False)
                continue
            references = references or results
            row = {"group": name, "option": variant, **compare(results, references), "seconds": seconds}
            if group.has_face:
                row["likeness"] = mean_likeness(likeness, items, results)
            rows.append(row)
            # The table comes at the end, and the last options may take long.
            errors.print(" | ".join(cells(row)), markup=False)
    return rows


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    equal = row["psnr_db"] >= EQUAL_DB
    likeness = f"{row['likeness']:.3f}" if "likeness" in row else ""
    psnr = "equal" if equal else f"{row['psnr_db']:.1f}"
    return row["group"], row["option"], psnr, f"{row['ssim']:.4f}", str(row["largest"]), likeness, f"{row['seconds']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--group", nargs="*", choices=GROUPS, default=[*GROUPS], help="default: all")
    parser.add_argument("--shots", type=int, choices=range(1, len(PROMPTS) + 1), default=2, help="default: 2")
    parser.add_argument("--only", nargs="*", default=[], help="options whose name contains one of these; default: all")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    profile, errors = load_profile(args.profile), Console(stderr=True)
    rows = [row for name in args.group for row in measure(profile, name, args.shots, args.only, errors)]
    about = machine(("torch", "diffusers", "torchao", "bitsandbytes"))
    columns = ("group", "option", "PSNR dB", "SSIM", "largest", "likeness", "s/shot")
    if args.markdown:
        lines = [columns, ("---",) * len(columns), *((row[0], f"`{row[1]}`", *row[2:]) for row in map(cells, rows))]
        sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines))
    else:
        table = Table(*columns, title=f"{args.profile}, {args.shots} shots; {about['cpu']}, load {about['load_1_min']}")
        for row in rows:
            table.add_row(*cells(row))
        Console(width=140).print(table)
    if args.json:
        write_json(args.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
