"""Print the memory of each GPU profile for docs/planning.md: per actor and for the whole process, with and without the margin.

python -m benchmarks.memory_report
"""

from __future__ import annotations

import sys
from typing import Any

from vidgen_ray.graph import stages_of
from vidgen_ray.planner.gpu_assignment import CONTEXT_GB
from vidgen_ray.planner.memory import actors_of
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.memory import MARGIN

PROFILES = ("gpu-80gb", "gpu-48gb", "gpu-24gb", "gpu-24gb-schnell")


def reference_shot(profile: Profile) -> Shot:
    """Return a shot of 1024x576 and 25 frames that uses all stages of the profile except SDXL."""
    fields: dict[str, Any] = {"prompt": "a", **profile.defaults, "lora": "l.safetensors", "use_hunyuan_style": True}
    if profile.actors["flux"].extra_weights:
        fields["face_image"] = "face.png"
    return Shot.model_validate(fields)


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
    sys.stdout.write("\n".join(rows()) + "\n")
