"""Demand: sums over the shots of a script, from which the planner works, with the seconds per stage that earlier runs
measured (calibration).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, TypeAdapter

from vidgen_ray.errors import FrozenModel, ProfileError
from vidgen_ray.graph import (
    STAGE_BY_NAME,
    STAGES,
    RelativeCost,
    clip_growth,
    file_sizes,
    growth_before,
    relative_costs,
    stages_of,
)
from vidgen_ray.planner.cluster import H100, GpuCard
from vidgen_ray.planner.gpu_memory import ShotSizes
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import REFERENCE_FRAMES, REFERENCE_PIXELS, Stage, StageParams
from vidgen_ray.stages.memory_table import ShotWork
from vidgen_ray.system.cache_dir import CacheFile

MIN_SHOTS = 3
"""Minimum shots of a run that replaces an existing calibration. The first shot is slower because of warm-up."""
MIN_STEP_RATIO = 1.5
"""Ratio of the most to the fewest steps of a stage's shots with which the fixed part can be told from the steps."""
ASSUMED_SPREAD = 0.3
"""Relative spread of seconds that runs have not measured on this machine. Some cards have a larger one."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation divided by median absolute deviation, for a normal distribution."""


_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Measurement(FrozenModel):
    """One result of `vidgen bench`: a stage at one size, with one upscaler."""

    size: Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*x[1-9]\d*$")]
    """Width, height and frames: `1024x576x25`."""
    variant: str = ""
    """Anything else that the seconds depend on, see `Stage.variant`: the upscaler."""
    seconds_of_reference: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Seconds for the reference shot, from those of the measured one."""
    fixed_share: Share = 0.0
    """Fraction of them that does not depend on the number of steps."""
    fixed_s: _Seconds = 0.0
    """Seconds at this size that do not depend on the steps, such as text encoding and decoding."""
    step_s: _Seconds | None = None
    """Seconds per denoising step at this size. `None` for stages without steps."""
    warmup_s: _Seconds = 0.0
    """Seconds of the first call beyond those of the next ones."""
    peak_gb: float | None = None
    """Peak GPU memory allocated by torch, weights included, in GB (2^30 bytes). `None` on CPUs."""
    random_weights: bool = False
    """The networks had random weights. Seconds and memory do not depend on their values."""

    def distance(self, pixels: float, frames: float) -> float:
        """Return how much the size differs from this one: the sum of the logarithms of both ratios."""
        width, height, own_frames = map(int, self.size.split("x"))
        return abs(math.log(width * height / pixels)) + abs(math.log(own_frames / frames))


class Calibration(FrozenModel):
    """Measured seconds of one stage with one profile on one GPU type."""

    seconds_of_reference: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Median seconds for the reference shot."""
    fixed_share: Share = 0.0
    """Fraction of them that does not depend on the number of steps. Measured if the shots had different numbers of steps."""
    variants: dict[str, float] = Field(default_factory=dict)
    """Variant of the stage, such as an upscaler -> seconds for the reference shot, where `vidgen bench` has measured it."""
    measurements: tuple[Measurement, ...] = ()
    """Results of `vidgen bench`, one per size and variant."""
    from_bench: bool = False
    """The seconds are those of `vidgen bench`: no run with enough shots has measured the stage since."""
    shots: Annotated[int, Field(ge=1)]
    """Number of shots measured."""
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Relative standard deviation of the seconds of a shot, estimated robustly from the median absolute deviation."""

    def nearest(self, pixels: float, frames: float) -> Calibration:
        """Return a copy with the seconds of the bench at the nearest size, for each variant. Seconds of runs stay."""
        # The nearest size comes last, and of several at the same distance the last one.
        ordered = sorted(self.measurements, key=lambda measurement: measurement.distance(pixels, frames), reverse=True)
        changes: dict[str, Any] = {"variants": {m.variant: m.seconds_of_reference for m in ordered if m.variant}}
        if self.from_bench and ordered:
            changes |= {"seconds_of_reference": ordered[-1].seconds_of_reference, "fixed_share": ordered[-1].fixed_share}
        return self.model_copy(update=changes)


_calibrations = CacheFile("measured.json", TypeAdapter(dict[str, dict[str, dict[str, Calibration]]]))
"""Profile -> card -> stage -> calibration."""


def load_calibration(profile: str, card: str) -> dict[str, Calibration]:
    """Return stage -> calibration for a profile and a card (see `Cluster.card`). Empty if nothing was measured."""
    return _calibrations.read().get(profile, {}).get(card, {})


def save_calibration(profile: str, card: str, seconds: Mapping[str, Sequence[tuple[float, RelativeCost]]]) -> None:
    """Store the measurements of a run.

    `seconds`: stage, or ENCODING -> (seconds, relative cost) of each shot that was not taken from the stage cache.
    """
    new = calibrations(seconds)
    # If the file cannot be written, the stages are measured again in the next run.
    with suppress(OSError), _calibrations.update() as stored:
        stages = stored.setdefault(profile, {}).setdefault(card, {})
        for stage, calibration in new.items():
            if (known := stages.get(stage)) is None:
                stages[stage] = calibration
            elif calibration.shots >= MIN_SHOTS:
                kept = {"variants": known.variants, "measurements": known.measurements}
                stages[stage] = calibration.model_copy(update=kept)


def calibrations(seconds: Mapping[str, Sequence[tuple[float, RelativeCost]]]) -> dict[str, Calibration]:
    """Return stage -> calibration of the measurements of a run, see `save_calibration`."""
    assumed = {stage: 1.0 if stage == ENCODING else STAGE_BY_NAME[stage].fixed_share() for stage in seconds}
    summaries = {stage: _summary(samples, assumed[stage]) for stage, samples in seconds.items()}
    return {stage: calibration for stage, calibration in summaries.items() if calibration}


def save_measurements(profile: str, card: str, measured: Mapping[str, Sequence[Measurement]]) -> None:
    """Store the results of `vidgen bench`: stage -> measurements. They replace those of the same size and variant.

    Plans use the one of the nearest size, until a run with enough shots has measured the stage, and those of each variant.
    Raises OSError if the file cannot be written.
    """
    with _calibrations.update() as stored:
        stages = stored.setdefault(profile, {}).setdefault(card, {})
        for stage, measurements in measured.items():
            if measurements:
                stages[stage] = _with_measurements(stages.get(stage), measurements)


def _with_measurements(known: Calibration | None, new: Sequence[Measurement]) -> Calibration:
    replaced = {(measurement.size, measurement.variant) for measurement in new}
    kept = [m for m in known.measurements if (m.size, m.variant) not in replaced] if known else []
    return Calibration(
        seconds_of_reference=new[-1].seconds_of_reference,
        fixed_share=new[-1].fixed_share,
        variants={m.variant: m.seconds_of_reference for m in (*kept, *new) if m.variant},
        measurements=(*kept, *new),
        from_bench=True,
        shots=len(new),
        spread=known.spread if known else ASSUMED_SPREAD,
    )


def _summary(samples: Sequence[tuple[float, RelativeCost]], assumed_share: float) -> Calibration | None:
    samples = [(seconds, cost) for seconds, cost in samples if seconds > 0 and cost.steps > 0 and cost.fixed > 0]
    if not samples:
        return None
    share = _fixed_share(samples)
    share = assumed_share if share is None else share
    reference_seconds = [seconds / cost.mixed(share) for seconds, cost in samples]
    center = median(reference_seconds)
    deviation = median(abs(value - center) for value in reference_seconds)
    spread = MAD_TO_SIGMA * deviation / center
    return Calibration(seconds_of_reference=center, fixed_share=share, shots=len(samples), spread=spread)


def _fixed_share(samples: Sequence[tuple[float, RelativeCost]]) -> float | None:
    """Return the fraction of the fixed part by least squares of relative errors. `None` if all shots had similar steps."""
    ratios = [cost.steps / cost.fixed for _, cost in samples]
    if max(ratios) < MIN_STEP_RATIO * min(ratios):
        return None
    rows = np.array([(cost.fixed / seconds, cost.steps / seconds) for seconds, cost in samples])
    fixed_s, step_s = np.linalg.lstsq(rows, np.ones(len(rows)))[0]
    if min(fixed_s, step_s) < 0:
        # Only the part that explains more of the seconds alone.
        fixed_alone, steps_alone = rows.sum(0) ** 2 / (rows**2).sum(0)
        return float(fixed_alone > steps_alone)
    return float(fixed_s / (fixed_s + step_s))


ENCODE_SECONDS: Mapping[str, tuple[float, float]] = {
    "ultrafast": (0.015, 0.02),
    "superfast": (0.03, 0.067),
    "veryfast": (0.024, 0.073),
    "faster": (0.037, 0.12),
    "fast": (0.033, 0.16),
    "medium": (0.053, 0.2),
    "slow": (0.065, 0.47),
    "slower": (0.072, 0.82),
    "veryslow": (0.085, 1.0),
}
"""x264 preset -> CPU seconds per megapixel, with colour conversion: of a smooth clip that moves, and of the same clip with
grain (noise with a standard deviation of 3 levels). Measured at 4096x2304 and crf 18 with one thread on an AMD EPYC whose other
hyperthread was busy, the best of one to three runs. With an idle one, `medium` took 0.041 and 0.136."""
ENCODING = "encoding"
"""Calibration of encoders, beside those of stages: CPU seconds per megapixel."""


def encode_seconds_per_mpx(profile: Profile, measured: Mapping[str, Calibration]) -> float:
    """Return the CPU seconds of encoding per megapixel: measured, or those of clips with grain."""
    if known := measured.get(ENCODING):
        return known.seconds_of_reference
    _, with_grain = ENCODE_SECONDS[profile.encode.preset]
    return with_grain


CLIP_BYTES_PER_PIXEL = 0.035
"""H.264 at crf 18, moving content with some grain. Noise takes ten times as much."""
PNG_BYTES_PER_PIXEL = 1.5
FFV1_BYTES_PER_PIXEL = 1.3
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
    billed: Mapping[str, float] = field(default_factory=dict)
    """Stage that servers compute -> units that they charge; see `Stage.billed`."""
    kinds: tuple[tuple[Shot, float], ...] = ()
    """Shots of different work, each with the number of shots that it stands for. Empty: the relative costs count."""

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
            {name: units * factor for name, units in self.billed.items()},
            tuple((shot, count * factor) for shot, count in self.kinds),
        )


def encoded_mpx(shot: Shot) -> float:
    """Return the megapixels of all frames that are encoded for a shot."""
    if not shot.generate_video:
        return 0.0
    sizes = file_sizes(shot)
    pixels = sum(math.prod(sizes[name]) * float(factor) for name, (_, factor) in clip_growth(shot).items())
    return pixels * shot.clip_frames / 1e6


def demand_of(shots: Iterable[Shot]) -> Demand:
    """Sum up the shots in one pass. Memory does not grow with their number."""
    relative_cost: dict[str, RelativeCost] = {}
    variant_cost: defaultdict[str, dict[str, RelativeCost]] = defaultdict(dict)
    billed: dict[str, float] = {}
    loras: set[str] = set()
    sizes, kinds = ShotSizes(), _ShotKinds()
    count = upscaled = all_pixels = all_frames = 0
    encoded = output = images = clips = 0.0
    for shot in shots:
        count += 1
        sizes.add(shot)
        kinds.add(shot)
        for name, cost in relative_costs(shot).items():
            # A shot without cost, such as a refinement of strength 0, still passes the stage.
            relative_cost[name] = relative_cost.get(name, NO_COST).plus(cost)
            if units := STAGE_BY_NAME[name].billed(shot):
                billed[name] = billed.get(name, 0.0) + units
            if variant := STAGE_BY_NAME[name].variant(shot):
                variant_cost[name][variant] = variant_cost[name].get(variant, NO_COST).plus(cost)
            images += PNG_BYTES_PER_PIXEL * shot.width * shot.height * ("image" in STAGE_BY_NAME[name].writes)
        loras.update(lora.path for lora in shot.all_loras)
        pixels = shot.width * shot.height
        all_pixels += pixels
        all_frames += shot.num_frames
        output += SHOT_BYTES + PNG_BYTES_PER_PIXEL * math.prod(file_sizes(shot)["image"])
        if shot.generate_video:
            mpx = encoded_mpx(shot)
            upscaled += any(scale > 1 for scale, _ in clip_growth(shot).values())
            encoded += mpx
            output += CLIP_BYTES_PER_PIXEL * mpx * 1e6
            clips += FFV1_BYTES_PER_PIXEL * pixels * shot.clip_frames
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
        billed,
        kinds.counts,
    )


MAX_KINDS = 200
"""Kinds of shots that are kept. Further ones count as the mean of these, unless they pass other stages."""


class _ShotKinds:
    """Counts shots whose work differs."""

    def __init__(self) -> None:
        self._counts: dict[tuple[object, ...], list[Any]] = {}
        self._stages: set[object] = set()
        self._others = 0

    def add(self, shot: Shot) -> None:
        stages = stages_of(shot)
        key = (
            *(stages, shot.width, shot.height, shot.num_frames, shot.extend, shot.fps, shot.interpolation, shot.fps_out),
            *(shot.scale, shot.upscaler, shot.steps, shot.guidance, shot.negative_prompt is None, len(shot.face_image)),
            *(shot.flux_identity, shot.identity_start, shot.identity_end, shot.uses_reference_photos),
            *(shot.lora_strength, shot.refine_strength, shot.style_strength),
        )
        if (known := self._counts.get(key)) is not None:
            known[1] += 1
        elif len(self._counts) < MAX_KINDS or stages not in self._stages:
            self._counts[key] = [shot, 1]
            self._stages.add(stages)
        else:
            self._others += 1

    @property
    def counts(self) -> tuple[tuple[Shot, float], ...]:
        known = sum(count for _, count in self._counts.values())
        return tuple((shot, count * (known + self._others) / known) for shot, count in self._counts.values())


class StageSeconds(NamedTuple):
    """Expected seconds of a stage."""

    reference_s: float
    """Seconds of the reference shot."""
    fixed_share: float
    """Fraction of them that does not depend on the number of steps."""
    spread: float
    """Relative spread of the seconds of a shot."""
    is_known: bool
    """The seconds were stated or measured, or follow from the work."""
    is_computed: bool = False
    """They follow from the work, which is known for each shot."""

    def of(self, cost: RelativeCost) -> float:
        """Return the seconds of shots with this cost."""
        return self.reference_s * cost.mixed(self.fixed_share)


def _total_seconds(expected: StageSeconds, stage: str, demand: Demand, measured: Calibration | None) -> float:
    """Return the seconds of a demand by its relative costs. `measured`: also has the seconds of the stage's variants."""
    costs = demand.variant_cost.get(stage, {})
    variants = {name: seconds for name, seconds in (measured.variants if measured else {}).items() if name in costs}
    rest = demand.relative_cost[stage]
    for name in variants:
        rest = rest.plus(costs[name].times(-1))
    own = sum(seconds * costs[name].mixed(expected.fixed_share) for name, seconds in variants.items())
    return max(0.0, expected.of(rest)) + own


def demand_seconds(
    profile: Profile,
    stage: type[Stage[Any]],
    demand: Demand,
    measured: Mapping[str, Calibration],
    card: GpuCard | None,
    gpus: int = 1,
) -> float:
    """Return the seconds that all shots of the demand take in a stage.

    `gpus`: GPUs that divide the work of each shot. They start its kernels no faster.
    """
    params = profile.options_of(stage)
    works = _works(profile, stage, params if gpus == 1 else stage.divided(params) or params, demand)
    expected = seconds_of(profile, stage, measured, card)
    if expected.is_computed and works:
        return sum(count * computed_seconds(stage, work, card or H100, stage.gain(params, gpus), gpus) for work, count in works)
    total = _total_seconds(expected, stage.name, demand, measured.get(stage.name))
    fixed = min(total, expected.of(RelativeCost(0, demand.relative_cost[stage.name].fixed)))
    launch_s = sum(count * work.steps.launch_s for work, count in works)
    of_fixed, shared = (sum(count * getattr(work, part).operations for work, count in works) for part in ("fixed", "shared"))
    fixed_on_each = fixed * (1 - (1 - 1 / gpus) * (shared / of_fixed if of_fixed else 0.0))
    return min(total, fixed_on_each + max((total - fixed) / stage.gain(params, gpus), launch_s))


def computed_seconds(stage: type[Stage[Any]], work: ShotWork, card: GpuCard, gain: float = 1.0, gpus: int = 1) -> float:
    """Return the seconds of work on a kind of GPU. `gain` and `gpus`: see `Stage.gain` and `demand_seconds`."""
    factor, fixed = stage.card_factors.get(card.name, 1.0), work.fixed + work.shared.times(1 / gpus - 1)
    steps_s = card.seconds(work.steps, stage.compute_share, factor / gain)
    return steps_s + card.seconds(fixed, stage.compute_share, factor)


def seconds_of(
    profile: Profile, stage: type[Stage[Any]], measured: Mapping[str, Calibration], card: GpuCard | None = None
) -> StageSeconds:
    """Return the expected seconds of a stage on a kind of GPU: measured, of the profile, or from the work of its networks.

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
        return StageSeconds(actor.seconds[stage.name], stage.fixed_share(), ASSUMED_SPREAD, True)
    if (work := _work_of(profile, stage)) is not None:
        spread = max(ASSUMED_SPREAD, card.spread if card else 0.0)
        return StageSeconds(computed_seconds(stage, work, card or H100), stage.fixed_share(), spread, True, True)
    return StageSeconds(stage.reference_s, stage.fixed_share(), ASSUMED_SPREAD, False)


def peak_shares(profile: Profile, reference_s: Mapping[str, float], card: GpuCard | None) -> dict[str, float]:
    """Return the fraction of the GPU's peak that stages reach if the reference shot takes these seconds.

    Only for stages on the GPU whose work is known. Empty without a card.
    """
    shares = {}
    for name, seconds in reference_s.items():
        stage = STAGE_BY_NAME[name]
        if card is not None and (work := _work_of(profile, stage)) is not None:
            shares[name] = round(card.share_of_peak(work.total.flop, seconds), 4)
    return shares


def planned_share(profile: Profile, stage: type[Stage[Any]], demand: Demand, seconds: float, card: GpuCard) -> float | None:
    """Return the fraction of the GPU's peak that the demand reaches in these seconds. `None` if its work is unknown."""
    works = _works(profile, stage, profile.options_of(stage), demand)
    flop = sum(count * work.total.flop for work, count in works)
    return round(card.share_of_peak(flop, seconds), 4) if flop else None


def _works(profile: Profile, stage: type[Stage[Any]], params: StageParams, demand: Demand) -> list[tuple[ShotWork, float]]:
    """Return the work of the kinds of shots that pass a stage, and their number. Empty if it is unknown."""
    if profile.actor_of(stage).device != "cuda":
        return []
    kinds = [(shot, count) for shot, count in demand.kinds if stage.applies(shot)]
    works = [(stage.work(params, shot), growth_before(stage, shot), count) for shot, count in kinds]
    return [(work.times(growth), count) for work, growth, count in works if work is not None]


def _work_of(profile: Profile, stage: type[Stage[Any]]) -> ShotWork | None:
    """Return the work of the reference shot. `None` if it is unknown, or if the stage runs on a CPU."""
    if profile.actor_of(stage).device != "cuda":
        return None
    return stage.work(profile.options_of(stage), Shot(prompt="reference", **stage.reference))
