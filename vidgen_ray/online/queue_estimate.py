"""Estimates: progress of a shot in percent, place of a job in the queue, and when it ends."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.status import Progress
from vidgen_ray.online.serving_profile import expected_seconds
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Priority, Shot

MAX_UNFINISHED_PERCENT = 99
"""Maximum percentage of a shot that is not finished."""


class ProgressEstimator:
    """Progress estimate of one shot. The percentage never decreases, even if a retry starts a stage again."""

    def __init__(self, plan: ShotPlan, profile: Profile) -> None:
        self._plan, self._profile = plan, profile
        self._percent = 0

    @cached_property
    def _seconds(self) -> dict[str, float]:
        return expected_seconds(self._plan.shot, self._profile)

    def percent(self, progress: Progress) -> int:
        """Return 0 to 99 for the progress of a stage. All earlier stages count as done."""
        done = 0.0
        for stage, seconds in self._seconds.items():
            if stage == progress.stage:
                done += seconds * (progress.step / progress.steps if progress.steps else 0)
                break
            done += seconds
        self._percent = max(self._percent, min(MAX_UNFINISHED_PERCENT, int(100 * done / (sum(self._seconds.values()) or 1.0))))
        return self._percent


SNAPSHOT_VALID_S = 1.0
"""Seconds for which a snapshot of the queue is used."""
RECENT_JOBS = 50
"""Changed jobs from which the speed of the server is taken."""
_POLL_SHARE = 0.1
"""Time until the next poll, as a fraction of the time that the job still takes."""
MIN_POLL_AFTER_S = 1.0
MAX_POLL_AFTER_S = 15.0


class JobEstimate(NamedTuple):
    """Estimate for one job."""

    queue_position: int | None
    """Queued jobs that start before this one. `None` if the job is not queued."""
    eta_s: float | None
    """Seconds until the job ends. `None` if it has ended."""
    poll_after_s: float
    """Seconds until a client should poll again."""


class NewJobEstimate(NamedTuple):
    """Estimate for a job that would be created now."""

    queue_position: int
    """Queued jobs that would start before it."""
    wait_s: float
    """Seconds in the queue."""
    stage_seconds: dict[str, float]
    """Stage -> seconds, in order. The last stage writes the files."""


@dataclass(frozen=True)
class _Snapshot:
    """Queue of the server at one time."""

    positions: dict[str, int]
    """Id of each queued job -> queued jobs before it."""
    in_progress: int
    slowness: float
    """Duration of recent jobs, as a multiple of what the profile expects."""
    seconds_per_job: float | None
    """Mean duration of recent jobs. `None` if there were none."""

    def wait_s(self, position: int, seconds: float) -> float:
        """Return the seconds that a job waits behind `position` queued jobs. `seconds`: its duration, used if none is known."""
        jobs_before = position + 1 if self.in_progress else position
        return jobs_before * (self.seconds_per_job or seconds) / max(1, self.in_progress)


class QueueEstimator:
    """Estimates of one API process. Use it inside an event loop."""

    def __init__(self, store: JobStore, profile: Profile, now: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._profile = profile
        self._now = now
        self._snapshot: _Snapshot | None = None
        self._valid_until = 0.0
        self._reading = asyncio.Lock()

    async def estimate(self, job: Job) -> JobEstimate:
        """Return the estimate for a job."""
        if job.state.is_final:
            return JobEstimate(None, None, MIN_POLL_AFTER_S)
        snapshot = await self._current_snapshot()
        seconds = snapshot.slowness * self._expected_s(job.shot)
        if job.state == JobState.IN_PROGRESS:
            return self._estimate(None, seconds * (1 - job.progress / 100))
        position = snapshot.positions.get(job.id)
        if position is None:
            position = await self._new_position(snapshot, job.tenant, job.priority)
        return self._estimate(position, snapshot.wait_s(position, seconds) + seconds)

    async def estimate_new(self, job: Job) -> NewJobEstimate:
        """Return the estimate for a job, if it were created now."""
        snapshot = await self._current_snapshot()
        expected = {stage: snapshot.slowness * seconds for stage, seconds in expected_seconds(job.shot, self._profile).items()}
        position = await self._new_position(snapshot, job.tenant, job.priority)
        return NewJobEstimate(position, snapshot.wait_s(position, sum(expected.values())), expected)

    async def _new_position(self, snapshot: _Snapshot, tenant: str, priority: Priority) -> int:
        """Return the position of a job that was created after the snapshot: of the first one that it overtakes, or the last."""
        overtaken = await asyncio.to_thread(self._store.first_overtaken, tenant, priority)
        return snapshot.positions.get(overtaken or "", len(snapshot.positions))

    async def queue_s(self) -> float:
        """Return the seconds until the last queued job starts. 0 without queued jobs, and while no job has ended."""
        snapshot = await self._current_snapshot()
        return snapshot.wait_s(len(snapshot.positions) - 1, 0.0) if snapshot.positions else 0.0

    def _estimate(self, position: int | None, eta_s: float) -> JobEstimate:
        poll_after_s = max(MIN_POLL_AFTER_S, min(MAX_POLL_AFTER_S, _POLL_SHARE * eta_s))
        return JobEstimate(position, round(eta_s, 1), poll_after_s)

    def _expected_s(self, shot: Shot) -> float:
        return sum(expected_seconds(shot, self._profile).values())

    async def _current_snapshot(self) -> _Snapshot:
        async with self._reading:
            if self._snapshot is None or self._now() >= self._valid_until:
                self._snapshot = await asyncio.to_thread(self._read_snapshot)
                self._valid_until = self._now() + SNAPSHOT_VALID_S
            return self._snapshot

    def _read_snapshot(self) -> _Snapshot:
        order = self._store.queue_order()
        ended = [(shot, seconds) for shot, seconds in self._store.recent_durations(RECENT_JOBS) if seconds > 0]
        ratios = [seconds / expected for shot, seconds in ended if (expected := self._expected_s(shot)) > 0]
        return _Snapshot(
            positions={job_id: position for position, job_id in enumerate(order)},
            in_progress=self._store.open_counts()[JobState.IN_PROGRESS],
            slowness=statistics.median(ratios) if ratios else 1.0,
            seconds_per_job=statistics.fmean(seconds for _, seconds in ended) if ended else None,
        )
