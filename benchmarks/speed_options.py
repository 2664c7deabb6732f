"""Benchmark of speed options: how much the results of a stage differ from those without options, and seconds per shot.

Each option is measured alone, on shots with and without a face. The first call of a stage is not timed.
Stages that the profile has no models for are measured with random weights, which draw noise; their rows say so.

ColorVideoVDP (Mantiuk et al. 2024, `pip install 'vidgen-ray[bench]'`) is a model of human vision: 10 JOD means no visible
difference. It stands in for LPIPS, whose package downloads the weights of its network. Likeness is the cosine of the face in
the result to that in the photo.

On a CPU, nothing is compiled: torch.compile only changes the rounding, and compiling for a CPU takes minutes and says nothing
about a GPU. float16 is measured if `--only float16` names it: a clip takes minutes.

    python -m benchmarks.speed_options                                  # all groups with the demo models, half an hour
    python -m benchmarks.speed_options --profile gpu-80gb --group svd   # on a GPU, with the published weights
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from rich.console import Console
from rich.table import Table
from skimage.metrics import structural_similarity

from benchmarks.machine import machine, write_json
from benchmarks.upscale_quality import colour_video_vdp
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.media.images import read_image
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.script.check import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Frames, Item, Stage, StageParams
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.flux2_klein import Flux2KleinStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid import ClipLikenessStage, InstantIDStage
from vidgen_ray.stages.instantid_sdxl import InstantIDSDXLStage
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.qwen_edit import QwenEditStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage

FACES = Path(__file__).parent.parent / "examples" / "faces"
PHOTO = FACES / "astronaut.jpg"
PHOTO_FRAMES = 2
"""Frames of a clip that is cut from the photo, for the upscaler."""
PEOPLE = (
    ("ada", "a portrait of a person in a blue shirt in a meadow on a sunny day"),
    ("bo", "a person in a white sweater in the city at night"),
    ("cleo", "a person in a yellow shirt by the sea at sunset"),
    ("dan", "a person in a red shirt in the snow"),
)
"""Person of the photo, and prompt."""
THINGS = (
    "a red boat by the sea at sunset",
    "a yellow balloon in the snow at night",
    "a blue car in the city on a cloudy day",
    "a white house in a meadow on a sunny day",
)

Options = Mapping[str, Any]
HALF_PRECISION: tuple[Options, ...] = ({"dtype": "bfloat16"}, {"dtype": "float16"})
GPU_OPTIONS = {"compile", "attention_backend"}
QUANTIZED: tuple[Options, ...] = ({"quantize": "fp8_storage"}, {"quantize": "fp8"})


@dataclass(frozen=True)
class Group:
    """Options of a stage that are measured on the same shots."""

    stage: type[Stage[Any]]
    options: tuple[Options, ...]
    fields: Options = field(default_factory=dict)
    """Fields of the shots."""
    has_face: bool = False
    max_shots: int = len(THINGS)


FLUX_OPTIONS: tuple[Options, ...] = (
    {"compile": True},
    {"attention_backend": "_native_cudnn"},
    *HALF_PRECISION,
    *QUANTIZED,
)
SVD_OPTIONS: tuple[Options, ...] = (
    {"channels_last": True},
    {"compile": True},
    {"forward_chunking": True},
    {"decode_chunk_frames": 1},
    {"guidance_interval": (0.0, 0.6)},
    *HALF_PRECISION,
)
HUNYUAN_OPTIONS: tuple[Options, ...] = ({"compile": True}, *HALF_PRECISION)
EDIT_OPTIONS: tuple[Options, ...] = ({"vae_tile_px": 256}, {"dtype": "bfloat16"})
VIDEO_OPTIONS: tuple[Options, ...] = ({"vae_tiling": True}, {"dtype": "bfloat16"})
# Tiles have 256 pixels at least.
TILED = {"width": 512, "height": 320}

GROUPS: Mapping[str, Group] = {
    "flux": Group(FluxStage, FLUX_OPTIONS),
    "flux-face": Group(FluxStage, FLUX_OPTIONS, has_face=True),
    "flux-tiles": Group(FluxStage, ({"vae_tile_px": 256},), TILED),
    "lora": Group(FluxLoRAStage, HALF_PRECISION, {"lora": "builtin:demo/sketch.safetensors"}),
    "hunyuan": Group(HunyuanDiTStage, HUNYUAN_OPTIONS, {"use_hunyuan_style": True, "style_prompt": "a pencil sketch"}),
    "hunyuan-face": Group(
        HunyuanDiTStage, HUNYUAN_OPTIONS, {"use_hunyuan_style": True, "style_prompt": "pastel colours"}, has_face=True
    ),
    "svd": Group(SVDStage, SVD_OPTIONS),
    "svd-face": Group(SVDStage, SVD_OPTIONS, has_face=True),
    "sdxl": Group(
        InstantIDSDXLStage,
        ({"channels_last": True}, *HALF_PRECISION),
        {"identity": "instantid-sdxl"},
        has_face=True,
    ),
    "klein": Group(Flux2KleinStage, EDIT_OPTIONS, {"image_model": "klein", **TILED}),
    "qwen_edit": Group(
        QwenEditStage,
        EDIT_OPTIONS,
        {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "watercolour", **TILED},
    ),
    "wan": Group(WanStage, VIDEO_OPTIONS, {"video_model": "wan", "num_frames": 5, **TILED}),
    "ltx": Group(LTXStage, VIDEO_OPTIONS, {"video_model": "ltx", "num_frames": 9, **TILED}),
    "realesrgan": Group(
        RealESRGANStage,
        (*HALF_PRECISION, {"frames_per_call": 1}, {"tile_px": 64}),
        {"upscaler": "animevideov3"},
        max_shots=1,
    ),
}


def profile_for(name: str, group: Group) -> Profile:
    """Return the profile, or the one with random weights if it has no model for the group."""
    profile = load_profile(name)
    return profile if group.stage.actor in profile.actors else load_profile("tiny")


def shots_of(profile: Profile, group: Group) -> list[Shot]:
    """Return shots that pass the stage."""
    fields: list[dict[str, Any]] = [{"prompt": prompt} for prompt in THINGS]
    if group.has_face:
        fields = [
            {"prompt": prompt, "face_image": str(FACES / f"{name}.png"), "consent": {"subject": name, "basis": "synthetic"}}
            for name, prompt in PEOPLE
        ]
    shots = [
        check_shot({"seed": seed, **own, **group.fields}, "benchmark", profile.defaults) for seed, own in enumerate(fields)
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
    given: list[Artefacts] = [{} for _ in shots]
    if group.has_face:
        with InstantIDStage(profile.params(InstantIDStage)) as faces:
            given = [{"face": faces.features([read_image(Path(shot.face_image[0]))])} for shot in shots]
    if "image" not in group.stage.takes:
        return [Item(shot, artefacts) for shot, artefacts in zip(shots, given, strict=True)]
    items = []
    with FluxStage(profile.params(FluxStage)) as flux:
        for shot, artefacts in zip(shots, given, strict=True):
            image = flux(Item(shot.model_copy(update={"lora": ()}), artefacts))["image"]
            items.append(Item(shot, {**artefacts, "image": image}))
    return items


def variants_of(profile: Profile, group: Group, choices: Sequence[str]) -> list[tuple[str, StageParams]]:
    """Return the name and the parameters of the stage for the reference and each option.

    `choices`: only those whose name contains one of these, if there are any.
    """
    reference = profile.params(group.stage)
    on_cpu = reference.device == "cpu"
    variants = [("reference", reference)]
    for options in group.options:
        name = ", ".join(f"{option}: {value}" for option, value in options.items())
        if not (on_cpu and (options.keys() & GPU_OPTIONS or ("float16" in options.values() and "float16" not in choices))):
            variants.append((name, type(reference).model_validate({**dict(reference), **options})))
    return [
        (name, params) for name, params in variants if not choices or name == "reference" or any(c in name for c in choices)
    ]


def run(stage: Stage[Any], items: Sequence[Item]) -> tuple[list[Frames], float]:
    """Return the result of each item as frames (T, H, W, 3), and seconds per item without the first call."""
    stage(items[0])
    begun = time.monotonic()
    results = [stage(item)[stage.writes[0]] for item in items]  # type: ignore[literal-required]
    seconds = (time.monotonic() - begun) / len(items)
    return [result if result.ndim == 4 else result[None] for result in results], seconds


def compare(results: Sequence[Frames], references: Sequence[Frames], jod: Callable[..., float] | None) -> dict[str, Any]:
    """Return PSNR of all frames and of the worst shot in dB, mean SSIM, the largest difference in levels of 255 and mean JOD.

    The PSNR of equal images is `None`. `jod`: ColorVideoVDP of two clips, if there is one.
    """
    errors = [float(np.mean((a.astype(float) - b) ** 2)) for a, b in zip(results, references, strict=True)]
    frames = [(a, b) for clips in zip(results, references, strict=True) for a, b in zip(*clips, strict=True)]
    return {
        "psnr_db": psnr_db(float(np.mean(errors))),
        "lowest_db": psnr_db(max(errors)),
        "ssim": float(np.mean([structural_similarity(a, b, channel_axis=-1) for a, b in frames])),
        "largest": max(int(np.abs(a.astype(int) - b).max()) for a, b in frames),
        "jod": None if jod is None else float(np.mean([jod(a, b) for a, b in zip(results, references, strict=True)])),
    }


def psnr_db(mean_squared_error: float) -> float | None:
    return float(10 * np.log10(255**2 / mean_squared_error)) if mean_squared_error else None


def likenesses(stage: ClipLikenessStage, items: Sequence[Item], results: Sequence[Frames]) -> list[float | None]:
    """Return the likeness of each result to the face of its shot. `None` if no face is found in it."""
    clips = [
        Item(item.shot, {"face": item.artefacts["face"], "frames": frames}) for item, frames in zip(items, results, strict=True)
    ]
    return [result["clip_likeness"].mean for result in stage(clips)]


def measure(profile: Profile, name: str, shots: int, choices: Sequence[str], errors: Console) -> list[dict[str, Any]]:
    """Return one row per option of a group: difference from the stage without options, likeness and seconds."""
    group = GROUPS[name]
    items = items_of(profile, group, shots_of(profile, group)[: min(shots, group.max_shots)])
    variants = variants_of(profile, group, choices)
    label = f"{name}, random weights" if profile.actor_of(group.stage).weights.startswith("builtin:tiny/") else name
    jod = colour_video_vdp(Fraction(items[0].shot.fps))
    rows: list[dict[str, Any]] = []
    references: list[Frames] = []
    with ClipLikenessStage(profile.params(ClipLikenessStage)) as likeness:
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
            row = {"group": label, "option": variant, **compare(results, references, jod), "seconds": seconds}
            if group.has_face:
                row["likenesses"] = likenesses(likeness, items, results)
            rows.append(row)
            # The table comes at the end, and the last options may take long.
            errors.print(" | ".join(cells(row, rows[0])), markup=False)
    return rows


def cells(row: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of the table. The change of the likeness is that of the shots with a face in both results."""
    psnr, lowest = ("equal" if row[name] is None else f"{row[name]:.1f}" for name in ("psnr_db", "lowest_db"))
    likeness = ""
    found = [
        (a, b) for a, b in zip(row.get("likenesses", ()), reference.get("likenesses", ()), strict=True) if None not in (a, b)
    ]
    if found:
        mean, change = np.mean([a for a, _ in found]), np.mean([a - b for a, b in found])
        likeness = f"{mean:.3f} ({change:+.3f})" + f", {len(found)} of {len(row['likenesses'])} faces" * (
            len(found) < len(row["likenesses"])
        )
    jod = "" if row["jod"] is None else f"{row['jod']:.2f}"
    numbers = psnr, lowest, f"{row['ssim']:.4f}", str(row["largest"]), jod, likeness, f"{row['seconds']:.2f}"
    return row["group"], row["option"], *numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--group", nargs="*", choices=GROUPS, default=[*GROUPS], help="default: all")
    parser.add_argument("--shots", type=int, choices=range(1, len(THINGS) + 1), default=len(THINGS), help="default: 4")
    parser.add_argument("--only", nargs="*", default=[], help="options whose name contains one of these; default: all")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    errors = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    table: list[tuple[str, ...]] = []
    for name in args.group:
        group_rows = measure(profile_for(args.profile, GROUPS[name]), name, args.shots, args.only, errors)
        rows += group_rows
        table += [cells(row, group_rows[0]) for row in group_rows]
    about = machine(("torch", "diffusers", "torchao", "cvvdp"))
    columns = ("group", "option", "PSNR dB", "lowest", "SSIM", "largest", "JOD", "likeness", "s/shot")
    if args.markdown:
        lines = [columns, ("---",) * len(columns), *((row[0], f"`{row[1]}`", *row[2:]) for row in table)]
        sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines))
    else:
        shown = Table(*columns, title=f"{args.profile}, {args.shots} shots; {about['cpu']}, load {about['load_1_min']}")
        for row in table:
            shown.add_row(*row)
        Console(width=160).print(shown)
    if args.json:
        write_json(args.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
