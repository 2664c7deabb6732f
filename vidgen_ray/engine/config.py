"""Configuration of one engine, passed to every actor, and the names of its actors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vidgen_ray.engine.calls import ENCODER
from vidgen_ray.engine.processes import ATTEMPTS, CoreLimits
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.demand import encode_seconds_per_mpx, encoded_mpx
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.profile import Profile
from vidgen_ray.render.cache_writer import CacheSettings
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage

STORE_COMMITS = 4
"""Calls that an encoder runs at once if the outputs are in an object store."""
TIMEOUT_FACTOR = 3.0
"""A call of a stage times out after the `timeout_s` of its actor, or this many times its planned seconds if these are more."""
COMMIT_FLOOR_S = 300.0
COMMIT_FACTOR = 4.0
"""A call that writes files times out after COMMIT_FLOOR_S and COMMIT_FACTOR times the CPU seconds of a shot with grain."""


@dataclass(frozen=True)
class EngineConfig:
    """Configuration of one engine. Keep it small: Ray keeps a copy per actor for restarts."""

    name: str
    """Prefix of the names of all actors, unique in the cluster: the run, or the server."""
    profile: Profile
    outputs: OutputFolder
    stages: Mapping[str, type[Stage[Any]]]
    """Stage name -> class that implements it."""
    cache: CacheSettings = field(default_factory=CacheSettings)
    keep_stages: bool = False
    """Also write the intermediate images."""
    attempts: int = ATTEMPTS
    """Attempts per call before the shot has failed. The first one counts."""
    planned_s: Mapping[str, float] = field(default_factory=dict)
    """Stage -> planned seconds of the reference shot, on the slowest GPUs."""
    limits: CoreLimits = field(default_factory=CoreLimits)
    circuit_breaker: bool = False
    """Keep workers that fail alone: the caller stops the run when most shots fail."""

    def worker_name(self, slot: int, number: int) -> str:
        return f"{self.name}/worker/{slot}/{number}"

    def encoder_name(self, number: int) -> str:
        return f"{self.name}/encoder/{number}"

    @property
    def encoder(self) -> WorkerSpec:
        """An encoder of this engine. On a disk it waits for its CPU, in an object store for responses."""
        return ENCODER if self.outputs.storage.local is not None else replace(ENCODER, parallel=STORE_COMMITS)

    def timeout_s(self, shot: Shot, costs: Mapping[str, float]) -> float:
        """Return the timeout in seconds of a call, from when execution starts. `costs`: `durations` of its stages."""
        return sum(
            max(
                self.profile.actor_of(STAGE_BY_NAME[name]).timeout_s * STAGE_BY_NAME[name].passes(shot),
                TIMEOUT_FACTOR * self.planned_s.get(name, 0.0) * duration,
            )
            for name, duration in costs.items()
        )

    def commit_timeout_s(self, shot: Shot) -> float:
        """Return the timeout of one call of an encoder for a shot in seconds."""
        return COMMIT_FLOOR_S + COMMIT_FACTOR * encoded_mpx(shot) * encode_seconds_per_mpx(self.profile, {})
