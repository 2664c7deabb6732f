"""Seconds that runs on this machine's cards took, remembered for the next plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vidgen_ray.atomic_files import write_atomically
from vidgen_ray.cache_dir import cache_dir

FEWEST_SHOTS = 3
"""A run of fewer shots, of which the first warms up, does not replace what more shots have shown."""
MAD_TO_SIGMA = 1.4826
"""Standard deviations in a median absolute deviation, of a normal distribution."""


class Calibration(BaseModel):
    """What one stage took."""

    model_config = ConfigDict(frozen=True)

    seconds_of_reference: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    shots: Annotated[int, Field(ge=1)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Relative standard deviation of a shot's seconds, as the middle half of the shots has it."""


_Remembered = TypeAdapter(dict[str, dict[str, dict[str, Calibration]]])
"""Profile -> card -> stage."""


def load_calibration(profile: str, card: str) -> dict[str, Calibration]:
    """Stage -> what it took with this profile on this card. Empty where nothing was measured."""
    return _read().get(profile, {}).get(card, {})


def save_calibration(profile: str, card: str, seconds: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Stage -> (seconds, work) of each shot that was computed, not taken from the cache. Work is `Stage.work(shot)`."""
    new = {stage: found for stage, samples in seconds.items() if (found := _summary(samples))}
    # What cannot be remembered is measured again.
    with suppress(OSError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(f"{_file()}.lock"):
            remembered = _read()
            of_card = remembered.setdefault(profile, {}).setdefault(card, {})
            for stage, found in new.items():
                if found.shots >= FEWEST_SHOTS or stage not in of_card:
                    of_card[stage] = found
            content = _Remembered.dump_python(remembered, mode="json")
            write_atomically(_file(), json.dumps(content, indent=1, sort_keys=True) + "\n")


def _summary(samples: Sequence[tuple[float, float]]) -> Calibration | None:
    of_reference = [seconds / relative_cost for seconds, relative_cost in samples if seconds > 0 and relative_cost > 0]
    if not of_reference:
        return None
    middle = median(of_reference)
    off = median(abs(value - middle) for value in of_reference)
    return Calibration(seconds_of_reference=middle, shots=len(of_reference), spread=MAD_TO_SIGMA * off / middle)


def _file() -> Path:
    return cache_dir() / "measured.json"


def _read() -> dict[str, dict[str, dict[str, Calibration]]]:
    try:
        return _Remembered.validate_json(_file().read_bytes())
    except (OSError, ValidationError):
        return {}
