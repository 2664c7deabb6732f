"""The one replica that leads jobs: it takes them from the store in order, and each through the graph to its end.

No picture passes it. What it knows of a job that is not in the store can be found again: a director that starts goes on with
the jobs of one that is gone, and the stages' cache has what was done.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.likeness_check import LIKENESS, LikenessTooLow, best_attempt, check_likeness
from vidgen_ray.engine.retries import InputsLost, ShotFailed
from vidgen_ray.engine.step_groups import OUTPUT, group_steps
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.graph import STAGE_BY_NAME, chunked_stages_of
from vidgen_ray.online.api_error import without_paths
from vidgen_ray.online.inference_thread import Progress
from vidgen_ray.online.maintenance import run_maintenance
from vidgen_ray.online.metrics import ServerMetrics
from vidgen_ray.online.progress_estimate import ProgressEstimator
from vidgen_ray.online.replica_config import ReplicaConfig
from vidgen_ray.online.serving_profile import serving_profile
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.stage_handles import RetryingCaller, StageHandles
from vidgen_ray.online.store.jobs import Job, JobError, JobState
from vidgen_ray.online.store.leases import JobProgress
from vidgen_ray.online.store.store import open_store
from vidgen_ray.outputs.records import DoneShot, Failure, ShotRecord, StepRecord
from vidgen_ray.planner.layout import WorkerSpec

LEASE_S = 10.0
"""After so long without a beat a job is anybody's."""
BEAT_S = 2.0
POLL_S = 1.0
"""Between looks into the store where nobody says that something is new there."""
TELL_S = 0.25
"""Between two notes of a job's progress."""
GAUGE_S = 5.0
"""Between two counts of all jobs, for the metrics."""
ENCODE_TIMEOUT_S = 1800.0
STARTS_OVER = 10
"""How often a shot begins again because its pictures went with the process that held them."""
MOST_CLAIMS = 10
"""How often a job is begun, whatever ended the directors that led it."""
STALLED_S = 60.0
"""Without a look into the store, after which a director is of no use."""

DIRECTOR_ITSELF = "director"
"""Stage of a failure that is none of the stages'."""
CODES = {
    "LikenessTooLow": "too_unlike",
    "TimedOut": "timed_out",
    "ReplicaDied": "replica_died",
    "InputsLost": "replica_died",
    "Interrupted": "interrupted",
    "ProfileError": "not_served",
    "MissingWeights": "not_served",
    "SetupError": "not_served",
    "StageError": "invalid_shot",
    "MediaError": "invalid_shot",
}
"""Class of the error -> what a client can tell it by. Any other is `stage_failed`."""
CLIENT_ERRORS = frozenset({"LikenessTooLow", "StageError", "MediaError"})
"""Those that the shot is the reason of."""

log = logging.getLogger("ray.serve")


class JobDirector:
    """Make it inside of an event loop."""

    def __init__(
        self,
        service: ReplicaConfig,
        settings: OnlineSettings,
        in_progress: int,
        handles: Mapping[str, Any],
        specs: Mapping[str, tuple[WorkerSpec, int]],
        encoder: Any,
    ) -> None:
        """`in_progress`: jobs that are led at once, at most. `handles` and `specs` as StageHandles takes them."""
        self._service = service
        self._outputs = service.outputs
        self._served = serving_profile(service.profile)
        # What becomes of a job is found again by its content key, so only acceptance must outlive the power.
        self._store = open_store(settings, durable=False)
        self._in_progress = in_progress
        self._stages = StageHandles(handles, specs)
        self._encoder = encoder.options(stream=True)
        self._metrics = ServerMetrics()
        self._caller = RetryingCaller(service.attempts, self._metrics.attempt_failed)
        self.owner = f"{os.uname().nodename}:{os.getpid()}:{time.time_ns()}"
        self._leading: dict[str, asyncio.Task[None]] = {}
        self._unwanted: set[str] = set()
        self._news: dict[str, tuple[Progress, int]] = {}
        self._at_work: dict[str, asyncio.Future[None]] = {}
        """Content key -> done when nobody works on it any more."""
        self._draining = False
        self._more_wait = False
        """Whether there may be more in the store than the last look took."""
        self._woken = asyncio.Event()
        self._last_beat = 0.0
        self._last_look = time.monotonic()
        self._background = [
            asyncio.ensure_future(work)
            for work in (self._look(), self._tell(), run_maintenance(self._store, settings, self._outputs))
        ]

    # What others ask of it

    async def wake(self) -> None:
        """There is something new in the store: a job, or one that is to be cancelled."""
        self._last_beat = 0.0
        self._woken.set()

    async def drain(self, grace_s: float) -> int:
        """Begin no more jobs; those in progress have so many seconds. What is not done then is queued again: how many."""
        self._draining = True
        if self._leading and grace_s:
            await asyncio.wait(list(self._leading.values()), timeout=grace_s)
        left = dict(self._leading)
        for task in left.values():
            task.cancel()
        if left:
            await asyncio.wait(list(left.values()))
            await asyncio.to_thread(self._store.queue.release, self.owner, list(left))
        return len(left)

    async def check_health(self) -> None:
        """Raises RuntimeError where the store has not answered for too long, or a part of this has ended."""
        if (silent_s := time.monotonic() - self._last_look) > STALLED_S:
            raise RuntimeError(f"the job store has not answered for {silent_s:.0f} s")
        for task in self._background:
            if task.done():
                raise RuntimeError("a part of the director has ended") from task.exception()

    def _gauge(self) -> None:
        counts = self._store.counts()
        in_state = {state: sum(n for (_, _, s), n in counts.items() if s == state) for state in JobState}
        self._metrics.jobs(in_state[JobState.QUEUED], in_state[JobState.IN_PROGRESS])

    # The store

    async def _look(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self._beat()
                await self._claim()
                self._last_look = time.monotonic()
            # A database that is away for a while comes back; the health check knows how long that may take.
            except Exception as error:
                log.warning("the job store does not answer: %s", error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), POLL_S)

    async def _beat(self) -> None:
        if self._leading and time.monotonic() - self._last_beat > BEAT_S:
            self._last_beat = time.monotonic()
            unwanted = await asyncio.to_thread(self._store.queue.heartbeat, self.owner, list(self._leading), LEASE_S)
            for job_id in unwanted & self._leading.keys():
                self._unwanted.add(job_id)
                self._leading[job_id].cancel()

    async def _claim(self) -> None:
        room = self._in_progress - len(self._leading)
        if room <= 0 or self._draining:
            return
        jobs = await asyncio.to_thread(self._store.queue.claim, self.owner, LEASE_S, room)
        if self._draining:
            await asyncio.to_thread(self._store.queue.release, self.owner, [job.id for job in jobs])
            return
        self._more_wait = len(jobs) == room
        for job in jobs:
            # One of ours whose lease ran out, while this process was held up.
            if job.id not in self._leading:
                self._leading[job.id] = asyncio.ensure_future(self._lead(job))

    async def _tell(self) -> None:
        """Note the progress of all jobs, together and not more often than need be."""
        gauged, led = 0.0, set[str]()
        while True:
            await asyncio.sleep(TELL_S)
            # A job that is new since the last look may have ended by the next one, and costs no change of the store then.
            news = {job_id: self._news.pop(job_id) for job_id in led & self._news.keys()}
            led = set(self._leading)
            try:
                await asyncio.to_thread(self._note, news)
                if time.monotonic() - gauged > GAUGE_S:
                    gauged = time.monotonic()
                    await asyncio.to_thread(self._gauge)
            except Exception as error:
                log.warning("progress is not noted: %s", error)

    def _note(self, news: Mapping[str, tuple[Progress, int]]) -> None:
        if news:
            self._store.queue.progress(
                self.owner,
                [JobProgress(job_id, p.stage, p.step, p.steps, percent) for job_id, (p, percent) in news.items()],
            )

    # A job

    async def _lead(self, job: Job) -> None:
        """To its end, which is in the store then; or until nobody wants it, or this director is to end."""
        if job.attempts <= 1:
            self._metrics.job_begun(job.tenant, time.time() - job.created_at)
        own = job.id, self.owner
        try:
            if job.attempts > MOST_CLAIMS:
                raise ShotFailed(_interrupted(job))
            shot_id, seconds = await self._done(job)
            end = partial(self._store.queue.completed, *own, shot_id=shot_id, stage_seconds=seconds)
            await self._ended(job, JobState.COMPLETED, end)
        except asyncio.CancelledError:
            if job.id not in self._unwanted:
                raise
            await self._ended(job, JobState.CANCELLED, partial(self._store.queue.cancelled, *own))
        except ShotFailed as gave_up:
            await self._ended(job, JobState.FAILED, partial(self._store.queue.failed, *own, error_of(gave_up.failure)))
        # What is wrong with the shot, or a mistake of ours: it costs the job, not the server.
        except Exception as error:
            log.exception("job %s has failed outside of its stages", job.id)
            failure = StepFailed(DIRECTOR_ITSELF, error).failure()
            await self._ended(job, JobState.FAILED, partial(self._store.queue.failed, *own, error_of(failure)))
        finally:
            self._news.pop(job.id, None)
            self._leading.pop(job.id, None)
            self._unwanted.discard(job.id)
            # There is room again. Where nobody waited, who comes next will say so.
            if self._more_wait:
                self._woken.set()

    async def _ended(self, job: Job, state: JobState, write: Callable[[], bool]) -> None:
        """Have the end of the job written down, until it is: only then it has ended."""
        self._news.pop(job.id, None)
        while True:
            try:
                is_ours = await asyncio.to_thread(write)
                break
            # It stays ours meanwhile, for as long as the store cannot give it to anybody else.
            except SQLAlchemyError as error:
                log.warning("the end of %s is not stored yet: %s", job.id, error)
                await asyncio.sleep(POLL_S)
        if is_ours:
            self._metrics.job_ended(job.tenant, state.value, time.time() - job.created_at)

    async def _done(self, job: Job) -> tuple[str, dict[str, float]]:
        """Where the files of the job's shot are, and what each stage took; rendered unless they are there already.

        Raises ShotFailed, VidgenError, OSError.
        """
        # Two jobs for the same shot: the second has what the first leaves, or does it where that one fails.
        while (other := self._at_work.get(job.key)) is not None:
            await asyncio.shield(other)
        ours = self._at_work[job.key] = asyncio.get_running_loop().create_future()
        try:
            plan, done = await asyncio.to_thread(self._looked_up, job)
            if done is not None:
                return done.record().shot.id or "", {}
            record = await self._rendered(job, plan)
            return record.shot.id or "", {step.stage: 0.0 if step.cached else step.seconds for step in record.stages}
        finally:
            del self._at_work[job.key]
            ours.set_result(None)

    def _looked_up(self, job: Job) -> tuple[ShotPlan, DoneShot | None]:
        """The job's plan, and what is there already. Blocks."""
        plan = self._served.plan(job.shot)
        return plan, self._outputs.find_by_key(plan.key)

    async def _rendered(self, job: Job, plan: ShotPlan) -> ShotRecord:
        course = ProgressEstimator(plan, self._service.profile)

        def told(progress: Progress) -> None:
            self._news[job.id] = progress, course.percent(progress)

        unlike = []
        for attempt in (plan, *plan.again):
            try:
                return await self._tried(job, attempt, told)
            except LikenessTooLow as reason:
                self._metrics.attempt_failed(LIKENESS, type(reason).__name__)
                unlike.append(reason)
        failure = StepFailed(LIKENESS, best_attempt(unlike)).failure()
        raise ShotFailed(failure.model_copy(update={"attempts": len(unlike)}))

    async def _tried(self, job: Job, plan: ShotPlan, told: Any) -> ShotRecord:
        """One try, with one seed. Raises LikenessTooLow as soon as it is known to be."""
        reason: InputsLost | None = None
        for _ in range(STARTS_OVER):
            try:
                return await self._once_through(job, plan, told)
            except InputsLost as lost:
                self._metrics.attempt_failed(OUTPUT, type(lost).__name__)
                reason = lost
        assert reason is not None
        raise ShotFailed(StepFailed(OUTPUT, reason).failure().model_copy(update={"attempts": STARTS_OVER}))

    async def _once_through(self, job: Job, plan: ShotPlan, told: Any) -> ShotRecord:
        records: tuple[StepRecord, ...] = ()
        inputs: tuple[Any, ...] = ()
        for steps in group_steps(plan, self._stages.can_fuse, share_features=False):
            names = tuple(step.stage for step in steps)
            result = await self._stages.call(
                self._caller,
                "run",
                plan,
                names,
                inputs,
                adapters_of(plan, steps),
                stages=names,
                timeout_s=self._service.timeout_s(*names),
                told=told,
                adapters=adapters_of(plan, steps),
            )
            assert isinstance(result.given, tuple)
            inputs, records = result.given, records + result.answer.records
            self._metrics.steps_ended(job.tenant, result.answer.records)
            check_likeness(plan.shot, result.answer.likeness)
        return await self._written(job, plan, inputs, records, told)

    async def _written(
        self, job: Job, plan: ShotPlan, inputs: tuple[Any, ...], records: tuple[StepRecord, ...], told: Any
    ) -> ShotRecord:
        chunked = chunked_stages_of(plan.shot)
        result = await self._caller.call(
            self._encoder.write,
            plan,
            inputs,
            records,
            stage=OUTPUT,
            # Chunks have timeouts of their own, and wait in queues before.
            timeout_s=None if chunked else ENCODE_TIMEOUT_S,
            told=told,
        )
        record = result.given
        assert isinstance(record, ShotRecord)
        self._metrics.steps_ended(job.tenant, record.stages[len(records) :])
        return record


def error_of(failure: Failure) -> JobError:
    """Why a job failed, as its owner may know it: the stage and what it said, no process and no machine."""
    stage = None if failure.stage == DIRECTOR_ITSELF else failure.stage
    return JobError(
        code=CODES.get(failure.error, "stage_failed"),
        message=without_paths(f"{stage}: {failure.message}" if stage else failure.message),
        stage=stage,
        type="invalid_request_error" if failure.error in CLIENT_ERRORS else "server_error",
    )


def _interrupted(job: Job) -> Failure:
    message = f"begun {job.attempts - 1} times, and each time the server ended before it was done"
    return Failure(stage=DIRECTOR_ITSELF, error="Interrupted", message=message, attempts=job.attempts - 1, worker="online")


def adapters_of(plan: ShotPlan, steps: tuple[Step, ...]) -> str:
    """Return the id of the set of active LoRAs for Serve's router, or "" if these steps have none."""
    active = {lora.path for step in steps for lora in STAGE_BY_NAME[step.stage].active_loras(plan.shot)}
    return hashlib.sha256("\n".join(sorted(active)).encode()).hexdigest()[:16] if active else ""
