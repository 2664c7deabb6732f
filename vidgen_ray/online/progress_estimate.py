"""How much of a shot is done, in percent, by the seconds that its stages are expected to take."""

from __future__ import annotations

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.step_groups import OUTPUT
from vidgen_ray.graph import STAGE_BY_NAME, relative_costs
from vidgen_ray.online.inference_thread import Progress
from vidgen_ray.planner.demand import ENCODE_SECONDS, seconds_of
from vidgen_ray.profile import Profile

BEFORE_THE_END = 99
"""The most that is said of a shot that is not done."""


class ProgressEstimator:
    """Of one shot. Percent never fall, whatever is told: a call that is tried again begins anew."""

    def __init__(self, plan: ShotPlan, profile: Profile) -> None:
        shot = plan.shot
        self._seconds = {
            name: seconds_of(profile, STAGE_BY_NAME[name], {})[0] * cost for name, cost in relative_costs(shot).items()
        }
        megapixels = shot.width * shot.height / 1e6 * (shot.num_frames if shot.generate_video else 1)
        self._seconds[OUTPUT] = megapixels * ENCODE_SECONDS[profile.encode.preset]
        self._total = sum(self._seconds.values()) or 1.0
        self._percent = 0

    def percent(self, progress: Progress) -> int:
        """0 to 99, at this progress, with all stages before it done."""
        done = 0.0
        for stage, seconds in self._seconds.items():
            if stage == progress.stage:
                done += seconds * (progress.step / progress.steps if progress.steps else 0)
                break
            done += seconds
        self._percent = max(self._percent, min(BEFORE_THE_END, int(100 * done / self._total)))
        return self._percent
