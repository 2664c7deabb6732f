"""Numbers of workers per stage: sized by hand from known seconds and memory, and untuned."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.simulated import MODEL_GB, SECONDS_PER_SHOT, STAGES, DoesNotFit


@dataclass(frozen=True, slots=True)
class Pool:
    """Identical workers, each with a share of a GPU."""

    stages: tuple[str, ...]
    workers: int
    share: float


FACE, FLUX, SVD, UPSCALE = ("instantid",), ("flux", "lora"), ("svd",), ("realesrgan",)
"""FLUX and its LoRA refinement share weights, so they share a worker."""
ALL_GB = sum(MODEL_GB.values())
FLUX_AND_SMALL_GB = MODEL_GB["instantid"] + MODEL_GB["flux"] + MODEL_GB["realesrgan"]


def by_hand(gpus: int, memory_gb: float) -> tuple[Pool, ...]:
    """Return pools in the order of the stages, for executors that place workers by GPU shares.

    With these shares, any order of placement fits in memory. With three or more GPUs, SVD has GPUs of its own and FLUX
    shares the others with the small models, in proportion to the seconds. With one or two GPUs, FLUX and SVD are on each,
    and the small models on any. If two GPUs have too little memory for this, SVD has one of them alone.
    """
    if gpus >= 3 or (gpus == 2 and memory_gb < ALL_GB):
        if memory_gb < FLUX_AND_SMALL_GB:
            raise DoesNotFit(f"FLUX and the small models need {FLUX_AND_SMALL_GB:g} GB together")
        without_svd = (SECONDS_PER_SHOT - STAGES["svd"].seconds) / SECONDS_PER_SHOT
        flux_gpus = max(1, round(gpus * without_svd))
        return (
            Pool(FACE, 1, 0.1),
            Pool(FLUX, flux_gpus, 0.7),
            Pool(SVD, gpus - flux_gpus, 1.0),
            Pool(UPSCALE, flux_gpus, 0.2),
        )
    if memory_gb < ALL_GB:
        raise DoesNotFit(f"the models need {ALL_GB:g} GB, one GPU has {memory_gb:g}")
    return (Pool(FACE, 1, 0.05), Pool(FLUX, gpus, 0.51), Pool(SVD, gpus, 0.39), Pool(UPSCALE, 1, 0.05))


def untuned(gpus: int, memory_gb: float) -> dict[str, float]:
    """Return stage -> GPU share per worker, as in the examples of Ray's documentation: a whole GPU for a large model.

    If there are not enough GPUs for one worker of each stage, the shares are in proportion to memory.
    """
    whole = {"instantid": 0.1, "flux": 1.0, "lora": 1.0, "svd": 1.0, "realesrgan": 0.25}
    if gpus >= sum(whole.values()):
        return whole
    return {stage: round(MODEL_GB[cost.model] / memory_gb + 0.0005, 3) for stage, cost in STAGES.items()}
