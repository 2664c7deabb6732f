"""What a profile can serve on this machine: the stages whose weights are here, and why the others are left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from vidgen_ray.content_keys import ShotPlan, ShotPlanner
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.graph import BASE_IMAGE_STAGES, STAGES, check_profile, stages_of
from vidgen_ray.planner import Demand, demand_of
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage, StageParams

MIX_SHOTS = 32
"""Of each kind of shot in the demand that a server is laid out for: enough that no worker of a large cluster waits."""
PLANNER_S = 10.0
"""So long a planner lives, which looks at a file once: a LoRA that is replaced under its name is seen no later than that."""


@dataclass(frozen=True)
class ServingProfile:
    """The profile with its precisions made concrete, and the parameters of the stages that it can serve."""

    profile: Profile
    params: Mapping[str, StageParams]
    """Stage -> its parameters."""
    unavailable: Mapping[str, str]
    """Stage -> a sentence that says why it cannot be had."""

    @property
    def stages(self) -> tuple[type[Stage[Any]], ...]:
        return tuple(stage for stage in STAGES if stage.name in self.params)

    def check(self, shot: Shot) -> None:
        """Raises ProfileError where the shot passes a stage that is left out."""
        for stage in stages_of(shot):
            if stage.name in self.unavailable:
                raise ProfileError(f"{stage.name} is not served here: {self.unavailable[stage.name]}")

    def plan(self, shot: Shot) -> ShotPlan:
        """The shot's steps and keys. Raises ProfileError for a stage that is left out, StageError or SetupError where the shot
        names something that is not there."""
        self.check(shot)
        return self._planner(int(time.monotonic() / PLANNER_S))(shot)

    @cached_property
    def _planner(self) -> Callable[[int], ShotPlanner]:
        """The planner of a stretch of time."""
        return lru_cache(1)(lambda _: ShotPlanner(self.params, self.profile.encode))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_planner"}

    def demand(self) -> Demand:
        """Return the demand that a server is laid out for: equally many shots of each kind that it can serve."""
        kinds = self._example_shots()
        return demand_of(shot for shot in kinds for _ in range(MIX_SHOTS))

    def _example_shots(self) -> list[Shot]:
        """Return the example shots of all stages that can be served, with upscaling and video dropped if they cannot."""
        plain = {**self.profile.defaults, "id": "s", "prompt": "p", "seed": 0}
        shots: dict[str, Shot] = {}
        for example in (example for stage in self.stages for example in stage.examples):
            for shortened in ({}, {"upscale_video": False}, {"generate_video": False}):
                shot = Shot.model_validate({**plain, **example, **shortened})
                if all(stage.name in self.params for stage in stages_of(shot)):
                    shots[shot.model_dump_json()] = shot
                    break
        return list(shots.values())


def serving_profile(profile: Profile) -> ServingProfile:
    """Look which stages' weights are on this machine.

    Raises ProfileError for a profile that describes no runnable stages, SetupError where nothing that draws a picture is here.
    """
    check_profile(profile)
    params: dict[str, StageParams] = {}
    unavailable: dict[str, str] = {}
    for stage in STAGES:
        if stage.actor not in profile.actors:
            unavailable[stage.name] = f"profile {profile.name} has no entry actors.{stage.actor}"
            continue
        try:
            params[stage.name] = profile.params(stage)
        except SetupError as error:
            unavailable[stage.name] = str(error)
    if not any(name in params for name in BASE_IMAGE_STAGES):
        reasons = "; ".join(f"{name}: {unavailable[name]}" for name in BASE_IMAGE_STAGES)
        raise SetupError(f"nothing to serve, no stage can generate an image: {reasons}")
    return ServingProfile(profile.pinned(stage for stage in STAGES if stage.name in params), params, unavailable)
