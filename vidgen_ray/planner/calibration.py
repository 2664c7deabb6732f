"""Calibration: seconds per stage measured in earlier runs and by `vidgen bench`, stored in the cache folder for later plans."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vidgen_ray.atomic_files import write_atomically
from vidgen_ray.cache_dir import cache_dir
from vidgen_ray.graph import STAGE_BY_NAME, RelativeCost

MIN_SHOTS = 3
"""Minimum shots of a run that replaces an existing calibration. The first shot is slower because of warm-up."""
MIN_STEP_RATIO = 1.5
"""Ratio of the most to the fewest steps of a stage's shots with which the fixed part can be told from the steps."""
ASSUMED_SPREAD = 0.3
"""Relative spread of seconds that runs have not measured on this machine."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation divided by median absolute deviation, for a normal distribution."""


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Measurement(BaseModel):
    """One result of `vidgen bench`: a stage at one size, with one upscaler."""

    model_config = ConfigDict(frozen=True)

    size: Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*x[1-9]\d*$")]
    """Width, height and frames: `1024x576x25`."""
    variant: str = ""
    """Anything else that the seconds depend on, see `Stage.variant`: the upscaler."""
    seconds_of_reference: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Seconds for the reference shot, from those of the measured one."""
    fixed_share: Share = 0.0
    """Fraction of them that does not depend on the number of steps."""
    fixed_s: Seconds = 0.0
    """Seconds at this size that do not depend on the steps, such as text encoding and decoding."""
    step_s: Seconds | None = None
    """Seconds per denoising step at this size. `None` for stages without steps."""
    warmup_s: Seconds = 0.0
    """Seconds of the first call beyond those of the next ones."""
    peak_gb: float | None = None
    """Peak GPU memory allocated by torch, weights included, in GB (2^30 bytes). `None` on CPUs."""
    random_weights: bool = False
    """The networks had random weights. Seconds and memory do not depend on their values."""

    def distance(self, pixels: float, frames: float) -> float:
        """Return how much the size differs from this one: the sum of the logarithms of both ratios."""
        width, height, own_frames = map(int, self.size.split("x"))
        return abs(math.log(width * height / pixels)) + abs(math.log(own_frames / frames))


class Calibration(BaseModel):
    """Measured seconds of one stage with one profile on one GPU type."""

    model_config = ConfigDict(frozen=True)

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


_CalibrationFile = TypeAdapter(dict[str, dict[str, dict[str, Calibration]]])
"""Profile -> card -> stage -> calibration."""


def load_calibration(profile: str, card: str) -> dict[str, Calibration]:
    """Return stage -> calibration for a profile and a card (see `Cluster.card`). Empty if nothing was measured."""
    return _read().get(profile, {}).get(card, {})


def save_calibration(profile: str, card: str, seconds: Mapping[str, Sequence[tuple[float, RelativeCost]]]) -> None:
    """Store the measurements of a run.

    `seconds`: stage -> (seconds, relative cost) of each shot that was not taken from the stage cache.
    """
    new = {
        stage: calibration
        for stage, samples in seconds.items()
        if (calibration := _summary(samples, STAGE_BY_NAME[stage].fixed_share))
    }
    # If the file cannot be written, the stages are measured again in the next run.
    with suppress(OSError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(f"{_file()}.lock"):
            stored = _read()
            stages = stored.setdefault(profile, {}).setdefault(card, {})
            for stage, calibration in new.items():
                if (known := stages.get(stage)) is None:
                    stages[stage] = calibration
                elif calibration.shots >= MIN_SHOTS:
                    kept = {"variants": known.variants, "measurements": known.measurements}
                    stages[stage] = calibration.model_copy(update=kept)
            _write(stored)


def save_measurements(profile: str, card: str, measured: Mapping[str, Sequence[Measurement]]) -> None:
    """Store the results of `vidgen bench`: stage -> measurements. They replace those of the same size and variant.

    Plans use the one of the nearest size, until a run with enough shots has measured the stage, and those of each variant.
    Raises OSError if the file cannot be written.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(f"{_file()}.lock"):
        stored = _read()
        stages = stored.setdefault(profile, {}).setdefault(card, {})
        for stage, measurements in measured.items():
            if measurements:
                stages[stage] = _with_measurements(stages.get(stage), measurements)
        _write(stored)


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
    from scipy.optimize import nnls

    rows = np.array([(cost.fixed / seconds, cost.steps / seconds) for seconds, cost in samples])
    (fixed_s, step_s), _ = nnls(rows, np.ones(len(rows)))
    return float(fixed_s / (fixed_s + step_s))


def _write(stored: dict[str, dict[str, dict[str, Calibration]]]) -> None:
    content = _CalibrationFile.dump_python(stored, mode="json")
    write_atomically(_file(), json.dumps(content, indent=1, sort_keys=True) + "\n")


def _file() -> Path:
    return cache_dir() / "measured.json"


def _read() -> dict[str, dict[str, dict[str, Calibration]]]:
    try:
        return _CalibrationFile.validate_json(_file().read_bytes())
    except (OSError, ValidationError):
        return {}
