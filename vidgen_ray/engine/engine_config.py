"""Configuration of one run, passed to every actor, and the names of its actors."""

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
    """Configuration of one run. Keep it small: Ray keeps a copy per actor for restarts."""

    run: str
    profile: Profile
    outputs: OutputFolder
    layout: Layout
    stages: Mapping[str, type[Stage[Any]]]
    """Stage name -> class that implements it."""
    chunk_frames: Mapping[str, int]
    """Chunked stage -> frames per call."""
    use_cache: bool
    """Read and write the stage cache."""
    keep_stages: bool
    """Also write the intermediate images."""
    fresh: bool
    """Render finished shots again."""
    attempts: int
    """Attempts per call before the shot has failed. The first one counts."""

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
