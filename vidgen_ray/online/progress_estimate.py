"""Progress of a shot in percent, estimated from the expected durations of its stages."""

from __future__ import annotations

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.calls import OUTPUT
from vidgen_ray.engine.status import Progress
from vidgen_ray.graph import STAGE_BY_NAME, relative_costs
from vidgen_ray.planner.demand import ENCODE_SECONDS, seconds_of
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot

MAX_UNFINISHED_PERCENT = 99
"""Maximum percentage of a shot that is not finished."""


def expected_seconds(shot: Shot, profile: Profile) -> dict[str, float]:
    """Return stage name -> seconds that the profile expects for a shot, in order. The last stage writes the files."""
    seconds = {name: seconds_of(profile, STAGE_BY_NAME[name], {}).of(cost) for name, cost in relative_costs(shot).items()}
    megapixels = shot.width * shot.height / 1e6 * (shot.clip_frames if shot.generate_video else 1)
    return seconds | {OUTPUT: megapixels * ENCODE_SECONDS[profile.encode.preset]}


class ProgressEstimator:
    """Progress estimate of one shot. The percentage never decreases, even if a retry starts a stage again."""

    def __init__(self, plan: ShotPlan, profile: Profile) -> None:
        self._seconds = expected_seconds(plan.shot, profile)
        self._total = sum(self._seconds.values()) or 1.0
        self._percent = 0

    def percent(self, progress: Progress) -> int:
        """Return 0 to 99 for the progress of a stage. All earlier stages count as done."""
        done = 0.0
        for stage, seconds in self._seconds.items():
            if stage == progress.stage:
                done += seconds * (progress.step / progress.steps if progress.steps else 0)
                break
            done += seconds
        self._percent = max(self._percent, min(MAX_UNFINISHED_PERCENT, int(100 * done / self._total)))
        return self._percent
