"""What every replica of a server is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen_ray.engine.retries import ATTEMPTS
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.layout import Layout
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.realesrgan import RealESRGANParams, RealESRGANStage


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

    @property
    def frames_per_call(self) -> int:
        """Frames in one chunk of a clip that is upscaled."""
        params = self.profile.params(RealESRGANStage)
        assert isinstance(params, RealESRGANParams)
        return params.frames_per_call
