"""Demand: sums over the shots of a script, from which the planner works. The shots themselves are not kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vidgen_ray.errors import ProfileError
from vidgen_ray.graph import STAGE_BY_NAME, STAGES, RelativeCost, clip_growth, relative_costs, stages_of
from vidgen_ray.planner.calibration import ASSUMED_SPREAD, Calibration
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import REFERENCE_FRAMES, REFERENCE_PIXELS, Stage

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
"""x264 preset -> CPU seconds per megapixel of a frame, with colour conversion. Measured at 4096x2304 on one core."""
CLIP_BYTES_PER_PIXEL = 0.035
"""H.264 at crf 18, moving content with some grain. Noise takes ten times as much."""
PNG_BYTES_PER_PIXEL = 1.5
FFV1_BYTES_PER_PIXEL = 1.3
MAX_SIZES = 50
"""Sizes of shots of one kind that are kept."""
SHOT_BYTES = 8192
"""Size of shot.json and the manifest row."""


NO_COST = RelativeCost(0, 0)


@dataclass(frozen=True, slots=True)
class Demand:
    """Sums over the pending shots."""

    shots: int
    relative_cost: Mapping[str, RelativeCost]
    """Stage -> sum of relative costs. Stages that no shot passes are missing."""
    upscaled: int
    """Number of shots with an upscaled clip."""
    encoded_mpx: float
    """Megapixels of all encoded frames."""
    output_bytes: float
    """Estimated size of all outputs, without the stage cache."""
    image_cache_bytes: float
    """Estimated size of the stage cache at the end with `--cache images`."""
    clip_cache_bytes: float
    """Estimated size of the clips that `--cache all` adds."""
    loras: int
    """Number of distinct LoRA files."""
    variant_cost: Mapping[str, Mapping[str, RelativeCost]] = field(default_factory=dict)
    """Stage -> variant, such as an upscaler -> its part of the sum of relative costs. Only for stages with variants."""
    sizes: tuple[Shot, ...] = ()
    """One shot of each size, from which the planner computes memory; see `ShotSizes`. Empty: reference shots."""
    pixels: float = REFERENCE_PIXELS
    """Mean number of pixels of a frame."""
    frames: float = REFERENCE_FRAMES
    """Mean number of frames of a pass of the video model."""

    @property
    def stages(self) -> tuple[type[Stage[Any]], ...]:
        """Stages that at least one shot passes, in order."""
        return tuple(stage for stage in STAGES if stage.name in self.relative_cost)

    def scaled(self, factor: int) -> Demand:
        """Return the demand of `factor` times as many shots of the same kinds, with the same LoRAs."""
        return Demand(
            self.shots * factor,
            {name: cost.times(factor) for name, cost in self.relative_cost.items()},
            self.upscaled * factor,
            self.encoded_mpx * factor,
            self.output_bytes * factor,
            self.image_cache_bytes * factor,
            self.clip_cache_bytes * factor,
            self.loras,
            {name: {key: cost.times(factor) for key, cost in costs.items()} for name, costs in self.variant_cost.items()},
            self.sizes,
            self.pixels,
            self.frames,
        )


def demand_of(shots: Iterable[Shot]) -> Demand:
    """Sum up the shots in one pass. Memory does not grow with their number."""
    relative_cost: dict[str, RelativeCost] = {}
    variant_cost: defaultdict[str, dict[str, RelativeCost]] = defaultdict(dict)
    loras: set[str] = set()
    sizes = ShotSizes()
    count = upscaled = all_pixels = all_frames = 0
    encoded = output = images = clips = 0.0
    for shot in shots:
        count += 1
        sizes.add(shot)
        for name, cost in relative_costs(shot).items():
            # A shot without cost, such as a refinement of strength 0, still passes the stage.
            relative_cost[name] = relative_cost.get(name, NO_COST).plus(cost)
            if variant := STAGE_BY_NAME[name].variant(shot):
                variant_cost[name][variant] = variant_cost[name].get(variant, NO_COST).plus(cost)
            images += PNG_BYTES_PER_PIXEL * shot.width * shot.height * ("image" in STAGE_BY_NAME[name].writes)
        loras.update(lora.path for lora in shot.all_loras)
        pixels = shot.width * shot.height
        all_pixels += pixels
        all_frames += shot.num_frames
        output += SHOT_BYTES + PNG_BYTES_PER_PIXEL * pixels
        if shot.generate_video:
            clip = pixels * shot.clip_frames
            encoded_pixels = clip * sum(scale**2 * float(factor) for scale, factor in clip_growth(shot).values())
            upscaled += any(scale > 1 for scale, _ in clip_growth(shot).values())
            encoded += encoded_pixels / 1e6
            output += CLIP_BYTES_PER_PIXEL * encoded_pixels
            clips += FFV1_BYTES_PER_PIXEL * clip
    mean_pixels, mean_frames = (total / max(count, 1) for total in (all_pixels, all_frames))
    return Demand(
        count,
        relative_cost,
        upscaled,
        encoded,
        output,
        images,
        clips,
        len(loras),
        dict(variant_cost),
        sizes.shots,
        mean_pixels,
        mean_frames,
    )


class ShotSizes:
    """Keeps one shot of each kind and size: stages and networks, pixels, frames, scale and reference photos.

    Of a kind with more than `MAX_SIZES`, only shots that no other one exceeds in every respect.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[object, ...], dict[tuple[int, ...], Shot]] = {}

    def add(self, shot: Shot) -> None:
        kind = (stages_of(shot), shot.upscaler, shot.flux_identity, bool(shot.fast_lora))
        photos = len(shot.face_image) if shot.uses_reference_photos else 0
        size = (shot.width * shot.height, shot.num_frames, shot.clip_frames, shot.scale, photos)
        kept = self._kinds.setdefault(kind, {})
        if size in kept:
            return
        kept[size] = shot
        if len(kept) > MAX_SIZES:
            for other in [a for a in kept if any(a != b and _is_at_least(b, a) for b in kept)]:
                del kept[other]

    @property
    def shots(self) -> tuple[Shot, ...]:
        return tuple(shot for kept in self._kinds.values() for shot in kept.values())


def _is_at_least(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(size, other, strict=True))


class StageSeconds(NamedTuple):
    """Expected seconds of a stage."""

    reference_s: float
    """Seconds of the reference shot."""
    fixed_share: float
    """Fraction of them that does not depend on the number of steps."""
    spread: float
    """Relative spread of the seconds of a shot."""
    is_known: bool
    """The seconds were stated or measured."""

    def of(self, cost: RelativeCost) -> float:
        """Return the seconds of shots with this cost."""
        return self.reference_s * cost.mixed(self.fixed_share)


def total_seconds(expected: StageSeconds, stage: str, demand: Demand, measured: Calibration | None) -> float:
    """Return the seconds that all shots of the demand take in a stage. `measured`: also has the seconds of its variants."""
    costs = demand.variant_cost.get(stage, {})
    variants = {name: seconds for name, seconds in (measured.variants if measured else {}).items() if name in costs}
    rest = demand.relative_cost[stage]
    for name in variants:
        rest = rest.plus(costs[name].times(-1))
    own = sum(seconds * costs[name].mixed(expected.fixed_share) for name, seconds in variants.items())
    return max(0.0, expected.of(rest)) + own


def seconds_of(profile: Profile, stage: type[Stage[Any]], measured: Mapping[str, Calibration]) -> StageSeconds:
    """Return the expected seconds of a stage.

    Raises ProfileError for a missing actor, and for an actor with seconds of a stage that it does not hold.
    """
    actor = profile.actor_of(stage)
    known = [other.name for other in STAGES if other.actor == stage.actor]
    for name in actor.seconds:
        if name not in known:
            raise ProfileError(
                f"profile {profile.name}, actors.{stage.actor}.seconds: got {name!r}, must be one of {', '.join(known)}"
            )
    if calibrated := measured.get(stage.name):
        return StageSeconds(calibrated.seconds_of_reference, calibrated.fixed_share, calibrated.spread, True)
    if stage.name in actor.seconds:
        return StageSeconds(actor.seconds[stage.name], stage.fixed_share, ASSUMED_SPREAD, True)
    return StageSeconds(stage.reference_s, stage.fixed_share, ASSUMED_SPREAD, False)
