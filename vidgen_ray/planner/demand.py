"""What a script asks of the stages, in sums: the shots themselves are not kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vidgen_ray.errors import ProfileError
from vidgen_ray.graph import STAGES, chunked_stages_of, clip_growth, stages_of
from vidgen_ray.planner.calibration import Calibration
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage

ENCODE_SECONDS: Mapping[str, float] = {
    "ultrafast": 0.01,
    "superfast": 0.01,
    "veryfast": 0.011,
    "faster": 0.016,
    "fast": 0.02,
    "medium": 0.02,
    "slow": 0.04,
    "slower": 0.05,
    "veryslow": 0.07,
}
"""x264's preset -> seconds of one CPU core for a frame of a megapixel, colour conversion included. Measured at 4096x2304."""
CLIP_BYTES_PER_PIXEL = 0.035
"""Of H.264 at crf 18, a moving picture with some grain. Noise takes ten times as much."""
PNG_BYTES_PER_PIXEL = 1.5
FFV1_BYTES_PER_PIXEL = 1.3
SHOT_BYTES = 8192
"""shot.json and the row of the manifest."""

ASSUMED_SPREAD = 0.3
"""Relative spread of seconds that were not measured on this machine."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Sums over the shots that are to be rendered."""

    shots: int
    relative_cost: Mapping[str, float]
    """Stage -> work in reference shots. A stage that no shot passes is not there."""
    upscaled: int
    """Shots with a large clip."""
    encoded_mpx: float
    """Frames that are encoded, in megapixels."""
    output_bytes: float
    """Estimate of what the shots leave behind, without the stages' cache."""
    cache_bytes: float
    """Estimate of what the stages' cache holds at the end."""
    loras: int
    """Distinct LoRA files."""

    @property
    def stages(self) -> tuple[type[Stage[Any]], ...]:
        """Those that at least one shot passes, in order."""
        return tuple(stage for stage in STAGES if stage.name in self.relative_cost)


def demand_of(shots: Iterable[Shot]) -> Demand:
    """One pass, in memory that does not grow with the number of shots."""
    relative_cost: Counter[str] = Counter()
    loras: set[str] = set()
    count = upscaled = 0
    encoded = output = cached = 0.0
    for shot in shots:
        count += 1
        for stage in stages_of(shot):
            # A shot of no work, such as a refinement of strength 0, still passes the stage.
            relative_cost[stage.name] += stage.relative_cost(shot)  # type: ignore[assignment]  # typeshed counts in whole numbers
            cached += PNG_BYTES_PER_PIXEL * shot.width * shot.height * ("image" in stage.writes)
        loras.update(lora.path for lora in shot.lora)
        pixels = shot.width * shot.height
        output += SHOT_BYTES + PNG_BYTES_PER_PIXEL * pixels
        if shot.generate_video:
            clip = pixels * shot.num_frames
            encoded_pixels = clip * sum(scale**2 * factor for scale, factor in clip_growth(shot).values())
            upscaled += bool(chunked_stages_of(shot))
            encoded += encoded_pixels / 1e6
            output += CLIP_BYTES_PER_PIXEL * encoded_pixels
            cached += FFV1_BYTES_PER_PIXEL * clip
    return Demand(count, dict(relative_cost), upscaled, encoded, output, cached, len(loras))


def seconds_of(profile: Profile, stage: type[Stage[Any]], measured: Mapping[str, Calibration]) -> tuple[float, float, bool]:
    """Seconds of the reference shot, their relative spread, and whether anybody told or measured them.

    Raises ProfileError for an actor that is not there, and one with seconds of a stage that does not live on it.
    """
    actor = profile.actor_of(stage)
    known = [other.name for other in STAGES if other.actor == stage.actor]
    for name in actor.seconds:
        if name not in known:
            raise ProfileError(
                f"profile {profile.name}, actors.{stage.actor}.seconds: got {name!r}, must be one of {', '.join(known)}"
            )
    if found := measured.get(stage.name):
        return found.seconds_of_reference, found.spread, True
    if stage.name in actor.seconds:
        return actor.seconds[stage.name], ASSUMED_SPREAD, True
    return stage.reference_s, ASSUMED_SPREAD, False
