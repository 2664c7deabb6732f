"""What every replica of a server is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vidgen_ray.engine.chunks import chunk_frames_of
from vidgen_ray.engine.retries import ATTEMPTS
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.layout import Layout
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Stage


@dataclass(frozen=True)
class ReplicaConfig:
    """Small: it travels to each replica whenever one starts."""

    profile: Profile
    outputs: OutputFolder
    layout: Layout
    stages: Mapping[str, type[Stage[Any]]]
    """Name -> what runs under it, of those that are served."""
    attempts: int = ATTEMPTS

    def timeout_s(self, *stages: str) -> float:
        """Seconds that a call of these stages may take once it has begun."""
        return sum(self.profile.actor_of(STAGE_BY_NAME[name]).timeout_s for name in stages)

    @cached_property
    def chunk_frames(self) -> dict[str, int]:
        """Chunked stage -> frames in one of its calls."""
        return chunk_frames_of(self.profile, self.stages.values())
