"""Print the memory of each GPU profile for docs/planning.md, with and without the margin.

The first table has the actors of the chain with FLUX and SVD, and the whole process; the second one the other models.

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
    sys.stdout.write("\n".join([*rows(), "", *other_rows()]) + "\n")
