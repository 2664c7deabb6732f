"""Print the planned GPU memory for the docs.

docs/planning.md: the actors of the chain with FLUX and SVD, and the whole process; then the other models, both with and without
the margin. docs/models.md: each model with the options of gpu-80gb, or of gpu-24gb for the small Wan.

python -m benchmarks.memory_report
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.planner.cluster import GB
from vidgen_ray.planner.gpu_assignment import CONTEXT_GB
from vidgen_ray.planner.memory import actors_of
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages import memory
from vidgen_ray.stages.memory import MARGIN

PROFILES = ("gpu-80gb", "gpu-48gb", "gpu-24gb", "gpu-24gb-schnell")
PHOTO: dict[str, Any] = {"width": 1024, "height": 576, "face_image": ("face.png",), "identity": "reference"}
OTHER_SHOTS: dict[str, tuple[str, dict[str, Any]]] = {
    "klein": ("1024x576, one photo", PHOTO),
    "qwen_edit": ("1024x576, one photo", {**PHOTO, "use_hunyuan_style": True, "style_model": "qwen-edit"}),
    "wan": ("1280x704, 81 frames", {"width": 1280, "height": 704, "num_frames": 81, "video_model": "wan"}),
    "ltx": ("1216x704, 121 frames", {"width": 1216, "height": 704, "num_frames": 121, "video_model": "ltx"}),
    "rife": ("1024x576", {"width": 1024, "height": 576, "interpolation": 4}),
}
"""Stage -> text for the table, and fields of a shot."""
FACE: dict[str, Any] = {"face_image": ("face.png",)}
SDXL: dict[str, Any] = {**FACE, "identity": "instantid-sdxl"}
WAN, LTX, QWEN = (OTHER_SHOTS[stage][1] for stage in ("wan", "ltx", "qwen_edit"))
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
    "RIFE": (("", "gpu-80gb", "rife", OTHER_SHOTS["rife"][1], {}),),
    "RealESRGAN": (("", "gpu-80gb", "realesrgan", {}, {}),),
}
"""Weights in docs/models.md -> condition, profile, stage, fields of a shot and changed options."""


def reference_shot(profile: Profile) -> Shot:
    """Return a shot of 1024x576 and 25 frames that uses all stages of the profile except SDXL."""
    fields: dict[str, Any] = {"prompt": "a", **profile.defaults, "lora": "l.safetensors", "use_hunyuan_style": True}
    if profile.actors["flux"].extra_weights:
        fields["face_image"] = "face.png"
    return Shot.model_validate(fields)


def other_rows() -> list[str]:
    head = "profile", "actor", "shot", "weights of all parts", "GPU, traced", "GPU, planned", "host"
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name in (*PROFILES, "open"):
        profile = load_profile(name)
        for actor, (about, fields) in OTHER_SHOTS.items():
            if actor not in profile.actors:
                continue
            stage, shot = STAGE_BY_NAME[actor], Shot.model_validate({"prompt": "a", **fields})
            params = profile.options_of(stage)
            planned = stage.memory(params, shot)
            with patch.object(memory, "MARGIN", 1.0):
                traced = stage.memory(params, shot)
            in_part = stage.memory(params.model_copy(update={"cpu_offload": False}), shot)
            assert planned is not None
            assert traced is not None
            assert in_part is not None
            sizes = sum(in_part.weights.values()), traced.total, planned.total, planned.host
            label = f"`{name}`", f"{actor}{', `cpu_offload`' if getattr(params, 'cpu_offload', False) else ''}", about
            lines.append(f"| {' | '.join((*label, *(f'{size / GB:.1f}' for size in sizes)))} |")
    return lines


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


def rows() -> list[str]:
    lines = ["| profile | actor | weights | activations, traced | planned | host |", "| --- | --- | --- | --- | --- | --- |"]
    for name in PROFILES:
        profile = load_profile(name)
        shot = reference_shot(profile)
        actors, _ = actors_of(profile, stages_of(shot), [shot], float(name[4:6]))
        for actor in actors:
            if actor.gpu_gb:
                planned = actor.gpu_gb + actor.peak_gb
                cells = (f"{actor.gpu_gb:.1f}", f"{actor.peak_gb / MARGIN:.1f}", f"{planned:.1f}", f"{actor.host_gb:.1f}")
                lines.append(f"| `{name}` | {actor.name} | {' | '.join(cells)} |")
        weights = sum(actor.gpu_gb for actor in actors)
        peak = max(actor.peak_gb for actor in actors)
        lines.append(f"| `{name}` | all together | {weights:.1f} | {peak / MARGIN:.1f} | {CONTEXT_GB + weights + peak:.1f} | |")
    return lines


if __name__ == "__main__":
    models = [f"| {weights} | {cell} |" for weights, cell in model_cells().items()]
    sys.stdout.write("\n".join([*rows(), "", *other_rows(), "", *models]) + "\n")
