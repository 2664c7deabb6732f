"""Print the planned GPU memory of each model in docs/models.md: with the options of gpu-80gb, or of gpu-24gb for the small Wan.

python -m benchmarks.memory_report
"""

from __future__ import annotations

import sys
from typing import Any

from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.planner.cluster import GB
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot

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
    sys.stdout.write("".join(f"| {weights} | {cell} |\n" for weights, cell in model_cells().items()))
