"""How many workers of what a person who knows the stages' seconds and memory would start, by hand."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.simulated import MODEL_GB, SECONDS_PER_SHOT, STAGES, DoesNotFit


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers of one kind, each with its share of a GPU."""

    stages: tuple[str, ...]
    workers: int
    share: float


FACE, FLUX, SVD, UPSCALE = ("instantid",), ("flux", "lora"), ("svd",), ("realesrgan",)
"""FLUX and its LoRA refinement share weights, so whoever sizes by hand gives them one worker."""
ALL_GB = sum(MODEL_GB.values())
BESIDE_FLUX_GB = MODEL_GB["instantid"] + MODEL_GB["flux"] + MODEL_GB["realesrgan"]


def by_hand(gpus: int, memory_gb: float) -> tuple[Pool, ...]:
    """Pools in the order of the chain, for executors that let Ray, or themselves, place workers by their shares.

    The shares are such that any order of placement gives a packing that the memory holds.
    Three GPUs and more: SVD has cards of its own, FLUX shares the others with what is small, in the proportion of the
    seconds. One or two: FLUX and SVD on each, what is small on any; where that is too much memory, SVD on one card alone.
    """
    if gpus >= 3 or (gpus == 2 and memory_gb < ALL_GB):
        if memory_gb < BESIDE_FLUX_GB:
            raise DoesNotFit(f"FLUX and what is small need {BESIDE_FLUX_GB:g} GB together")
        without_svd = (SECONDS_PER_SHOT - STAGES["svd"].seconds) / SECONDS_PER_SHOT
        flux_cards = max(1, round(gpus * without_svd))
        return (
            Pool(FACE, 1, 0.1),
            Pool(FLUX, flux_cards, 0.7),
            Pool(SVD, gpus - flux_cards, 1.0),
            Pool(UPSCALE, flux_cards, 0.2),
        )
    if memory_gb < ALL_GB:
        raise DoesNotFit(f"the models need {ALL_GB:g} GB, one GPU has {memory_gb:g}")
    return (Pool(FACE, 1, 0.05), Pool(FLUX, gpus, 0.51), Pool(SVD, gpus, 0.39), Pool(UPSCALE, 1, 0.05))


def untuned(gpus: int, memory_gb: float) -> dict[str, float]:
    """Stage -> share of a GPU of each worker, as the documentation's examples have it: a whole one for a large model.

    Where there are not enough cards for one worker of each, the share of the memory that it needs.
    """
    whole = {"instantid": 0.1, "flux": 1.0, "lora": 1.0, "svd": 1.0, "realesrgan": 0.25}
    if gpus >= sum(whole.values()):
        return whole
    return {stage: round(MODEL_GB[cost.model] / memory_gb + 0.0005, 3) for stage, cost in STAGES.items()}
