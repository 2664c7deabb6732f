"""Serving profile: which stages of a profile can be served on this machine, and why the others cannot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

from cachetools import TTLCache, cached

from vidgen_ray.content_keys import ShotPlan, ShotPlanner
from vidgen_ray.engine.messages import OUTPUT
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.graph import (
    BASE_IMAGE_STAGES,
    STAGE_BY_NAME,
    STAGES,
    WITHOUT_CHUNKED_STAGES,
    WITHOUT_CLIP,
    WITHOUT_UPSCALING,
    check_profile,
    relative_costs,
    stages_of,
)
from vidgen_ray.licences import Requirement, ShotLicences, UsedWeights, require_licence, stages_breaking
from vidgen_ray.planner.demand import Demand, demand_of, encode_seconds_per_mpx, seconds_of
from vidgen_ray.planner.gpu_memory import SizeCheck
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage, StageParams

MIX_SHOTS = 32
"""Shots of each kind in the demand that a server is laid out for, enough to keep a large cluster busy."""
PLANNER_S = 10.0
"""Seconds for which digests of files are cached. A LoRA file that is replaced is noticed after this time."""


@dataclass(frozen=True)
class ServingProfile:
    """A profile with concrete dtypes, and the parameters of the stages that it can serve."""

    profile: Profile
    params: Mapping[str, StageParams]
    """Stage -> parameters."""
    unavailable: Mapping[str, str]
    """Stage -> reason why it cannot be served."""
    required_licence: Requirement | None = None
    """Use that the licences of all weights behind a shot must allow. `None` allows all licences."""
    gpu_gb: float | None = None
    """Memory of the largest GPU of the server. `None` accepts shots of all sizes."""

    @property
    def stages(self) -> tuple[type[Stage[Any]], ...]:
        return tuple(stage for stage in STAGES if stage.name in self.params)

    @cached_property
    def revision(self) -> str:
        """Digest of what decides the bytes of clips beside a request: weights, options, defaults and compression."""
        stages = [
            (stage.name, stage.version, self.profile.actor_of(stage).weights, self.params[stage.name].for_key())
            for stage in self.stages
        ]
        parts = stages, self.profile.defaults, self.profile.encode.model_dump()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def check(self, shot: Shot, source_licences: Sequence[UsedWeights] = ()) -> None:
        """Raises ProfileError if the shot passes a stage that is not served, or weights without the required licence.

        `source_licences`: those of the shot that this one continues.
        """
        for stage in stages_of(shot):
            if stage.name in self.unavailable:
                raise ProfileError(f"{stage.name} is not served here, as checked at the start: {self.unavailable[stage.name]}")
        require_licence(self.required_licence, [*source_licences, *self.licences(shot)])

    def plan(self, shot: Shot, salt: str = "", source_licences: Sequence[UsedWeights] = ()) -> ShotPlan:
        """Return the shot's steps and content keys. `salt`: see `ShotPlanner`. `source_licences`: see `check`.

        Raises ProfileError for a stage that is not served, StageError or SetupError for a file that does not exist.
        """
        self.check(shot, source_licences)
        return self._planner()(shot, salt).with_source_licences(source_licences)

    def too_large(self, shot: Shot) -> str | None:
        """Return why the shot fits on no GPU of the server, with a size that would. `None` if it fits."""
        if self.gpu_gb is None:
            return None
        refused = SizeCheck(self.profile, self.gpu_gb).refused_by(shot)
        return None if refused is None else refused[1]

    @cached_property
    def licences(self) -> ShotLicences:
        """Finds the weights behind a shot, with their licences."""
        return ShotLicences(self.profile)

    @cached_property
    def _planner(self) -> Callable[[], ShotPlanner]:
        """Function that returns the current planner. Threads may call it."""
        cache: TTLCache[object, ShotPlanner] = TTLCache(1, PLANNER_S)
        return cached(cache, lock=Lock())(
            lambda: ShotPlanner(self.params, self.profile.encode, self.licences, self.profile.provenance)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_planner", "licences")}

    def gpu_seconds(self, stage_seconds: Mapping[str, float]) -> float:
        """Return the seconds of the stages that run on a GPU."""
        actors = self.profile.actors
        # An older video may have a stage without an actor in this profile.
        of_stages = {name: actors.get(STAGE_BY_NAME[name].actor) for name in stage_seconds if name in STAGE_BY_NAME}
        return sum(stage_seconds[name] for name, actor in of_stages.items() if actor is not None and actor.device != "cpu")

    def demand(self) -> Demand:
        """Return the demand that a server is laid out for: equally many shots of each kind that it can serve."""
        kinds = self.example_shots()
        return demand_of(shot for shot in kinds for _ in range(MIX_SHOTS))

    def example_shots(self) -> list[Shot]:
        """Return the example shots of all stages that can be served, with upscaling and video dropped if they cannot."""
        plain = {**self.profile.defaults, "id": "s", "prompt": "p", "seed": 0}
        shots: dict[str, Shot] = {}
        for example in (example for stage in self.stages for example in stage.examples):
            for shortened in ({}, WITHOUT_UPSCALING, WITHOUT_CHUNKED_STAGES, WITHOUT_CLIP):
                shot = Shot.model_validate({**plain, **example, **shortened})
                if all(stage.name in self.params for stage in stages_of(shot)):
                    shots[shot.model_dump_json()] = shot
                    break
        return list(shots.values())


def serving_profile(profile: Profile, required_licence: Requirement | None = None) -> ServingProfile:
    """Find out which stages have their weights on this machine, with licences that allow what is required.

    Raises ProfileError for an invalid profile, and SetupError if no stage that generates an image can be served.
    """
    check_profile(profile)
    params: dict[str, StageParams] = {}
    unavailable: dict[str, str] = {}
    refused = stages_breaking(required_licence, profile)
    for stage in STAGES:
        if stage.actor not in profile.actors and stage.has_weights:
            unavailable[stage.name] = f"profile {profile.name} has no entry actors.{stage.actor}"
            continue
        if stage.name in refused:
            unavailable[stage.name] = refused[stage.name]
            continue
        try:
            params[stage.name] = profile.params(stage)
        except SetupError as error:
            unavailable[stage.name] = str(error)
    if not any(name in params for name in BASE_IMAGE_STAGES):
        reasons = "; ".join(f"{name}: {unavailable[name]}" for name in BASE_IMAGE_STAGES)
        raise SetupError(f"nothing to serve, no stage can generate an image: {reasons}")
    pinned = profile.pinned(stage for stage in STAGES if stage.name in params)
    return ServingProfile(pinned, params, unavailable, required_licence)


def expected_seconds(shot: Shot, profile: Profile) -> dict[str, float]:
    """Return stage name -> seconds that the profile expects for a shot, in order. The last stage writes the files."""
    seconds = {name: seconds_of(profile, STAGE_BY_NAME[name], {}).of(cost) for name, cost in relative_costs(shot).items()}
    megapixels = shot.width * shot.height / 1e6 * (shot.clip_frames if shot.generate_video else 1)
    return seconds | {OUTPUT: megapixels * encode_seconds_per_mpx(profile, {}) / profile.encode.threads}
