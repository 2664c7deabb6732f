"""Print the planned GPU memory for the docs.

docs/planning.md: each actor of the default chain with the options of each profile. docs/models.md: each model with the options
of gpu-80gb, or of gpu-24gb for the small Wan.

python -m benchmarks.memory_report
"""

from __future__ import annotations

import sys
from typing import Any

from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.planner.cluster import GB
from vidgen_ray.planner.gpu_memory import actors_of
from vidgen_ray.planner.layout import CONTEXT_GB
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.shot import Shot

PROFILES = ("gpu-80gb", "gpu-48gb", "gpu-24gb", "gpu-24gb-schnell")
PHOTO: dict[str, Any] = {"width": 1024, "height": 576, "face_image": ("face.png",), "identity": "reference"}
QWEN: dict[str, Any] = {**PHOTO, "use_hunyuan_style": True, "style_model": "qwen-edit"}
WAN: dict[str, Any] = {"width": 1280, "height": 704, "num_frames": 81, "video_model": "wan"}
LTX: dict[str, Any] = {"width": 1216, "height": 704, "num_frames": 121, "video_model": "ltx"}
RIFE: dict[str, Any] = {"width": 1024, "height": 576, "interpolation": 4}
FACE: dict[str, Any] = {"face_image": ("face.png",)}
SDXL: dict[str, Any] = {**FACE, "identity": "instantid-sdxl"}
MODELS: dict[str, tuple[tuple[str, str, str, dict[str, Any], dict[str, Any]], ...]] = {
    "FLUX.1-dev": (("", "gpu-80gb", "flux", {}, {}), ("with InfuseNet", "gpu-80gb", "flux", FACE, {})),
    "FLUX.2 klein 4B": (("", "gpu-80gb", "klein", PHOTO, {}),),
    "SDXL and InstantID": (("", "gpu-80gb", "instantid_sdxl", SDXL, {}),),
    "HunyuanDiT v1.2": (("", "gpu-80gb", "hunyuan", {"use_hunyuan_style": True}, {}),),
    "Qwen-Image-Edit-2509": (
        ("", "gpu-80gb", "qwen_edit", QWEN, {}),
        ("with `cpu_offload`", "gpu-80gb", "qwen_edit", QWEN, {"cpu_offload": True}),
    ),
    "SVD-XT": (("", "gpu-80gb", "svd", {}, {}), ("two frames at once", "gpu-80gb", "svd", {}, {"decode_chunk_frames": 2})),
    "Wan 2.2 I2V-A14B": (
        ("", "gpu-80gb", "wan", WAN, {}),
        ("with `vae_tiling`", "gpu-80gb", "wan", WAN, {"vae_tiling": True}),
        ("with `cpu_offload`", "gpu-80gb", "wan", WAN, {"cpu_offload": True}),
    ),
    "Wan 2.2 TI2V-5B": (
        ("", "gpu-24gb", "wan", WAN, {"cpu_offload": False}),
        ("with `cpu_offload`", "gpu-24gb", "wan", WAN, {"cpu_offload": True}),
        ("and with `vae_tiling`", "gpu-24gb", "wan", WAN, {"cpu_offload": True, "vae_tiling": True}),
    ),
    "LTX-Video": (("", "gpu-80gb", "ltx", LTX, {}), ("with `vae_tiling`", "gpu-80gb", "ltx", LTX, {"vae_tiling": True})),
    "RIFE": (("", "gpu-80gb", "rife", RIFE, {}),),
    "RealESRGAN": (("", "gpu-80gb", "realesrgan", {}, {}),),
}
"""Weights in docs/models.md -> condition, profile, stage, fields of a shot and changed options."""


def reference_shot(profile: Profile) -> Shot:
    """Return a shot of 1024x576 and 25 frames that uses all stages of the profile except SDXL."""
    fields: dict[str, Any] = {"prompt": "a", **profile.defaults, "lora": "l.safetensors", "use_hunyuan_style": True}
    if profile.actors["flux"].extra_weights:
        fields["face_image"] = "face.png"
    return Shot.model_validate(fields)


def cell(gpu_gb: float, host_gb: float) -> str:
    """Return GB of GPU memory, with those of host memory if there are at least 10, such as "30.7, host 31"."""
    return f"{gpu_gb:.1f}" + (f", host {host_gb:.0f}" if host_gb >= 10 else "")


def chain_cells(profile: Profile) -> dict[str, str]:
    """Return actor -> cell for the chain with FLUX and SVD, and for one process with all of it."""
    shot = reference_shot(profile)
    actors, _ = actors_of(profile, stages_of(shot), [shot], float(profile.name[4:6]))
    on_gpu = [actor for actor in actors if actor.gpu_gb]
    cells = {actor.name: cell(actor.gpu_gb + actor.peak_gb, actor.host_gb) for actor in on_gpu}
    together = CONTEXT_GB + sum(actor.gpu_gb for actor in actors) + max(actor.peak_gb for actor in actors)
    return cells | {"these in one process": cell(together, 0)}


def rows() -> list[str]:
    """Return the table of docs/planning.md."""
    lines = [f"| actor | {' | '.join(f'`{name}`' for name in PROFILES)} |", f"|{' --- |' * (1 + len(PROFILES))}"]
    columns = [chain_cells(profile) for profile in map(load_profile, PROFILES)]
    return lines + [f"| {actor} | {' | '.join(column[actor] for column in columns)} |" for actor in columns[0]]


def model_cells() -> dict[str, str]:
    """Return weights -> cell of the column "GB on the GPU" in docs/models.md, such as "33, with InfuseNet 38"."""
    cells = {}
    for weights, cases in MODELS.items():
        parts = []
        for condition, name, stage_name, fields, options in cases:
            profile, stage = load_profile(name), STAGE_BY_NAME[stage_name]
            params = profile.options_of(stage).model_copy(update=options)
            planned = stage.memory(params, Shot.model_validate({"prompt": "a", **profile.defaults, **fields}))
            assert planned is not None
            size = planned.total / GB
            parts.append(f"{condition} {size:.{0 if size >= 1 else 1}f}".strip())
        cells[weights] = ", ".join(parts)
    return cells


if __name__ == "__main__":
    models = [f"| {weights} | {cell} |" for weights, cell in model_cells().items()]
    sys.stdout.write("\n".join([*rows(), "", *models]) + "\n")
