"""Configuration passed to every replica of a server."""

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
    """Configuration of a server. Keep it small: each replica gets a copy when it starts."""

    profile: Profile
    outputs: OutputFolder
    layout: Layout
    stages: Mapping[str, type[Stage[Any]]]
    """Served stage name -> class that implements it."""
    attempts: int = ATTEMPTS
    """Attempts per call before the shot has failed. The first one counts."""

    def timeout_s(self, *stages: str) -> float:
        """Return the timeout of a call of these stages in seconds. It starts when execution starts."""
        return sum(self.profile.actor_of(STAGE_BY_NAME[name]).timeout_s for name in stages)

    @cached_property
    def chunk_frames(self) -> dict[str, int]:
        """Chunked stage -> frames per call."""
        return chunk_frames_of(self.profile, self.stages.values())
