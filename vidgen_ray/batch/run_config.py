"""What every process of a run is told, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.layout import Layout
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Stage


@dataclass(frozen=True)
class RunConfig:
    """Small: it is kept for the restart of actors."""

    run: str
    profile: Profile
    outputs: OutputFolder
    layout: Layout
    stages: Mapping[str, type[Stage[Any]]]
    """Name -> what runs under it."""
    chunk_frames: Mapping[str, int]
    """Chunked stage -> frames in one of its calls."""
    use_cache: bool
    keep_stages: bool
    fresh: bool
    """Whether shots that are done are rendered all the same."""
    attempts: int
    """How often a line may break a stage or kill its process before it has failed."""

    def worker_name(self, slot: int, number: int) -> str:
        return f"{self.run}/worker/{slot}/{number}"

    def encoder_name(self, number: int) -> str:
        return f"{self.run}/encoder/{number}"

    @property
    def worker_names(self) -> list[str]:
        return [self.worker_name(n, k) for n, slot in enumerate(self.layout.slots) for k in range(len(slot.workers))]

    @property
    def encoder_names(self) -> list[str]:
        return [self.encoder_name(n) for n in range(self.layout.encoders)]
