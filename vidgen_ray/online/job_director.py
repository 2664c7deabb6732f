"""Director of a server: claims jobs from the store in order and renders them with an engine. There is one replica."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.calls import CallResult, ShotFailed
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.engine import Engine, Renderer
from vidgen_ray.engine.engine_metrics import ENGINE_METRICS, EngineMetrics, MetricSpec
from vidgen_ray.engine.messages import Kind
from vidgen_ray.engine.status import Progress
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.errors import VidgenError
from vidgen_ray.online import unreachable
from vidgen_ray.online.api_error import without_internals
from vidgen_ray.online.auth import ApiKeys
from vidgen_ray.online.job_service import plan_job, storage_problem
from vidgen_ray.online.queue_estimate import ProgressEstimator, QueueEstimator
from vidgen_ray.online.server_settings import Budget, OnlineSettings
from vidgen_ray.online.serving_profile import serving_profile
from vidgen_ray.online.store.jobs import CLAIM_S, Job, JobError, JobProgress, JobState, director_text, new_owner
from vidgen_ray.online.store.store import open_store
from vidgen_ray.online.webhooks import run_maintenance
from vidgen_ray.online.workers import Actors
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord
from vidgen_ray.planner.layout import Layout
from vidgen_ray.render.step_runner import StepFailed

log = logging.getLogger("ray.serve")

_THREADS = 16
"""Threads for calls that block. Ray would allow as many as the replica has CPUs."""
_POLL_S = 1.0
"""Seconds between two polls of the store, unless woken earlier. Each claims jobs, renews the claims of running ones and stores
their progress."""
CHANGED_S = 1.0
"""Seconds that a call which waits for changes takes at most. Ray Serve ends a replica after its calls."""
ATTACH_INTERVAL_S = 2.0
"""Seconds between two requests for changes of the workers."""
STORAGE_CHECK_INTERVAL_S = 5.0
"""Seconds between two checks that the outputs and the store can be written."""
SCALE_INTERVAL_S = 10.0
"""Seconds between two looks at the length of the queue."""
UNNEEDED_S = 600.0
"""Seconds in which fewer workers would have done before the newest copy of the layout is given back."""
MAX_CLAIMS = 10
"""Claims of a job before it fails, if its directors crash."""
MAX_STORE_SILENCE_S = 60.0
"""Seconds without a successful poll of the store before the director is unhealthy."""

DIRECTOR_STAGE = "director"
"""Stage of a failure outside the stages."""
_CODES = {
    "BudgetExceeded": "budget_exceeded",
    "LikenessTooLow": "too_unlike",
    "UnsafeContent": "content_refused",
    "TimedOut": "timed_out",
    "WorkerDied": "worker_died",
    "InputsLost": "worker_died",
    "Interrupted": "interrupted",
    "ProfileError": "not_served",
    "MissingWeights": "not_served",
    "SetupError": "not_served",
    "StageError": "invalid_shot",
    "OutOfMemory": "invalid_shot",
    "MediaError": "invalid_shot",
}
"""Error class -> error code of the API. Other classes: `invalid_shot` if the shot is the cause, otherwise `stage_failed`."""
CLIENT_ERRORS = frozenset({"budget_exceeded", "too_unlike", "content_refused", "invalid_shot"})
"""Error codes of failures that are caused by the request."""

_R = TypeVar("_R")
End = tuple[Callable[[], Any], asyncio.Future[Any]]
"""Function that stores the end of a job, and its result."""


class JobDirector:
    """Director of a server. Create it inside an event loop."""

    def __init__(self, config: EngineConfig, settings: OnlineSettings, layout: Layout, keys: ApiKeys, workers: Any) -> None:
        """`layout`: the planned one; `workers`, the handle of `Workers`, tells which one it has by now."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "director"))
        self._config = config
        self._settings = settings
        self._outputs = config.outputs
        self._serving_profile = serving_profile(config.profile, settings.require_licence)
        # A job whose claim or end is lost in a power failure is claimed again, and its files are found.
        self._store = open_store(settings, durable=False)
        self._keys = keys
        self._metrics = ServerMetrics(config.profile.name, keys.public_name)
        self._storage = StoragePause(partial(storage_problem, self._store, self._outputs), math.inf, _log_storage)
        self._renderer = Renderer(self._metrics.snapshot)
        self._actors = Actors("", 0, {}, layout)
        self._workers = workers
        self.owner = new_owner()
        self._other: str | None = None
        """Another director, which claims the jobs of the store."""
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._over_budget: set[str] = set()
        """Jobs that are stopped because their key has spent a budget."""
        self._updates: dict[str, Callable[[], JobProgress]] = {}
        """Running job -> estimates its progress. Most short jobs end before it is stored."""
        self._spent: dict[str, float] = {}
        """GPU-seconds of running jobs, of all claims."""
        self._ends: dict[str, End] = {}
        # The same thread each time: what it uses stays in the caches of a core.
        self._writer = ThreadPoolExecutor(1, "write")
        self._rendering: dict[str, asyncio.Future[None]] = {}
        """Content key -> future that completes when its rendering ends."""
        self._draining = False
        self._woken = asyncio.Event()
        self._may_be_queued = self._may_be_cancelled = True
        """There may be queued jobs, or cancel requests, that the last poll has not found."""
        self._has_new_usage = True
        """The metrics do not count the GPU-seconds of all jobs that have ended, such as those of earlier directors."""
        self._last_poll = time.monotonic()
        # Another number than that of a director that has crashed.
        self._changes = time.time_ns()
        self._change = asyncio.Event()
        self._background = [
            asyncio.ensure_future(work)
            for work in (
                self._attach_workers(),
                self._poll(),
                self._check_storage(),
                run_maintenance(self._store, settings, self._outputs),
                *([] if settings.max_queue_s is None else [self._scale(settings.max_queue_s)]),
            )
        ]

    # Remote methods

    async def wake(self, has_cancels: bool = True) -> None:
        """Poll the store now: there are new jobs, and cancel requests if `has_cancels`."""
        self._may_be_queued = True
        self._may_be_cancelled |= has_cancels
        self._woken.set()

    async def changed(self, seen: int) -> int:
        """Wait until jobs have ended or progressed after the change `seen`, at most `CHANGED_S`. Return the number of the last
        such change."""
        if seen == self._changes:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._change.wait(), CHANGED_S)
        return self._changes

    async def wake_until_changed(self, has_cancels: bool, seen: int) -> int:
        """`wake`, then `changed`: one call instead of two."""
        await self.wake(has_cancels)
        return await self.changed(seen)

    async def drain(self, grace_s: float) -> int:
        """Start no more jobs, and give running ones `grace_s` seconds. Return how many were queued again."""
        self._draining = True
        if self._running and grace_s:
            await asyncio.wait(list(self._running.values()), timeout=grace_s)
        jobs = dict(self._running)
        for task in jobs.values():
            task.cancel()
        if jobs:
            await asyncio.wait(list(jobs.values()))
            await asyncio.to_thread(self._store.queue.release, self.owner, list(jobs))
        # Another director need not wait for the end of this process.
        await asyncio.to_thread(self._store.queue.step_down, self.owner)
        return len(jobs)

    async def missing(self) -> str | None:
        """Return the stages that no worker can run now, and what the server waits for. `None` if nothing is missing."""
        engine, layout = self._renderer.engine, self._actors.layout
        assert layout is not None
        if self._other:
            return "another server works with the same database; the log of this one names it"
        if not (stages := list(layout.stages) if engine is None else engine.missing_stages):
            return None
        return f"no worker for {', '.join(stages)}: {self._actors.waiting or 'the weights are loading'}"

    async def check_health(self) -> None:
        """Raise RuntimeError if this process must be replaced.

        That is if every worker of a stage has failed, the store has not responded for too long, or a background task has
        stopped. If the last worker of a stage is lost with its node, the jobs wait for another layout.
        """
        if (failure := self._fatal_failure) is not None:
            raise RuntimeError(f"{failure.stage}: {failure.message}")
        if (silent_s := time.monotonic() - self._last_poll) > MAX_STORE_SILENCE_S:
            raise RuntimeError(f"the job store has not responded for {silent_s:.0f} s")
        for task in self._background:
            if task.done():
                raise RuntimeError("a background task of the director has stopped") from task.exception()

    # Workers

    async def _attach_workers(self) -> None:
        """Use the workers and encoders that `Workers` has."""
        while True:
            # While it starts, the call waits.
            with suppress(*unreachable()):
                known = self._actors
                changed: Actors | None = await self._workers.actors.remote(known.owner, known.version)
                if changed is not None:
                    await self._use(changed, known)
            await asyncio.sleep(ATTACH_INTERVAL_S)

    async def _use(self, actors: Actors, before: Actors) -> None:
        self._actors = actors
        assert actors.layout is not None
        if (before.owner, before.generation) != (actors.owner, actors.generation):
            before = Actors("", 0, {})
            # Running jobs wait for it: their workers are gone.
            await self._renderer.use(Engine(self._config, actors.layout, self._metrics, self._storage))
            await self.wake()
        engine = self._renderer.engine
        assert engine is not None
        for name, (spec, actor) in actors.workers.items():
            if name not in before.workers:
                engine.worker_started(name, spec, actor)
        for name in before.workers.keys() - actors.workers.keys():
            engine.worker_lost(name)

    async def _scale(self, max_queue_s: float) -> None:
        """Request a copy of the layout while the queue is too long, and give the newest one back when it is not needed."""
        estimator = QueueEstimator(self._store, self._config.profile)
        needed = time.monotonic()
        while True:
            await asyncio.sleep(SCALE_INTERVAL_S)
            # The store and the owner of the workers may restart.
            with suppress(*unreachable(), SQLAlchemyError):
                engine, layout, queue_s = self._renderer.engine, self._actors.layout, await estimator.queue_s()
                if engine is None or layout is None or queue_s or len(self._running) > engine.window.shots - layout.window:
                    needed = time.monotonic()
                    if queue_s > max_queue_s:
                        await self._workers.add_copy.remote()
                elif time.monotonic() - needed >= UNNEEDED_S and (copy := await self._workers.newest_copy.remote()):
                    await engine.drain(copy)
                    await self._workers.release.remote(copy)
                    needed = time.monotonic()

    @property
    def _fatal_failure(self) -> Failure | None:
        """Failure after which no job can be rendered. `None` if there is none, or if the jobs wait for another layout."""
        engine = self._renderer.engine
        return None if engine is None or engine.needs_other_layout else engine.fatal_failure

    # The store

    async def _poll(self) -> None:
        next_full = 0.0
        while True:
            self._woken.clear()
            is_full = time.monotonic() >= next_full
            if is_full:
                next_full = time.monotonic() + _POLL_S
            try:
                await self._exchange(is_full)
                self._last_poll = time.monotonic()
            # The database may come back. The health check limits how long it may be away.
            except Exception as error:
                log.warning("the job store does not respond: %s", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(next_full - time.monotonic()):
                    await self._woken.wait()

    async def _exchange(self, is_full: bool) -> None:
        """Store the ends of jobs, claim new ones and stop cancelled ones, as far as there is something to do.

        `is_full`: also renew all claims, store the progress, and claim jobs of directors that have crashed.
        """
        ends, self._ends = self._ends, {}
        running = self._running.keys() - ends.keys()
        held = running if is_full or self._may_be_cancelled else set[str]()
        limit = self._free_slots(len(running)) if is_full or self._may_be_queued else 0
        if not (ends or is_full or held or limit):
            return
        updates: list[JobProgress] = []
        if is_full:
            updates, self._updates = [estimate() for job_id, estimate in self._updates.items() if job_id in running], {}
        self._may_be_cancelled = False
        self._may_be_queued &= not limit
        try:
            written = asyncio.get_running_loop().run_in_executor(self._writer, self._write, ends, held, updates, is_full, limit)
            results, stopped, jobs, over = await written
        except Exception as error:
            self._may_be_queued = self._may_be_cancelled = True
            for _, stored in ends.values():
                if not stored.done():
                    stored.set_exception(error)
            raise
        if ends or updates:
            self._changes += 1
            self._change.set()
            self._change = asyncio.Event()
        for (_, stored), result in zip(ends.values(), results, strict=True):
            if not stored.done():
                stored.set_result(result)
        for job_id in ((stopped | over) & self._running.keys()) - self._ends.keys():
            (self._cancelled if job_id in stopped else self._over_budget).add(job_id)
            self._running[job_id].cancel()
        if self._draining and jobs:
            await asyncio.to_thread(self._store.queue.release, self.owner, [job.id for job in jobs])
            return
        self._may_be_queued |= len(jobs) >= limit - self._reserved_slots and limit > 0
        for job in jobs:
            # A running job is claimed again if its claim expired while this process was stalled.
            if job.id not in self._running:
                self._running[job.id] = asyncio.ensure_future(self._run_job(job, is_over_budget=job.id in over))

    def _write(
        self, ends: Mapping[str, End], held: Collection[str], updates: Sequence[JobProgress], is_full: bool, limit: int
    ) -> tuple[list[Any], set[str], Sequence[Job], set[str]]:
        """Store the ends, fail late jobs, renew claims, store progress and claim jobs in one transaction. Blocks.

        Return the results of the ends, the jobs to stop, the claimed ones, and those of all whose key has spent a budget.
        """
        if is_full:
            counts = self._store.open_counts()
            self._metrics.jobs(counts[JobState.QUEUED], counts[JobState.IN_PROGRESS])
        queue = self._store.queue
        with queue.together():
            results = [store() for store, _ in ends.values()]
            if is_full and not self._draining:
                self._hold()
            if is_full:
                queue.fail_late()
            stopped = queue.heartbeat(self.owner, held) if held else set()
            if updates:
                queue.progress(self.owner, updates)
            jobs = queue.claim(self.owner, CLAIM_S if is_full else None, limit, self._reserved_slots) if limit else ()
            started = [*held, *(job.id for job in jobs)]
            may_be_over = bool(started and (is_full or jobs) and self._keys.budgets)
            over = self._store.usage.over(started, self._budgets_of) if may_be_over else set[str]()
        self._has_new_usage |= bool(ends)
        if is_full and self._has_new_usage:
            self._metrics.spent(self._store.usage.totals())
            self._has_new_usage = False
        return results, stopped, jobs, over

    def _budgets_of(self, key_id: str) -> Sequence[Budget]:
        tenant = self._keys.by_id(key_id)
        return () if tenant is None else tenant.limits.budgets

    def _hold(self) -> None:
        """Become the director of the store, or renew that, unless there is another one. Blocks."""
        before, self._other = self._other, self._store.queue.hold(self.owner, CLAIM_S)
        if self._other and self._other != before:
            log.warning(
                "another server works with the same database, so this one starts no jobs. Its director is %s",
                director_text(self._other),
            )

    def _free_slots(self, running: int) -> int:
        """Return how many jobs can be started now."""
        engine = self._renderer.engine
        if engine is None or engine.fatal_failure is not None or self._storage.active or self._draining:
            return 0
        return max(0, engine.window.shots - running)

    @property
    def _reserved_slots(self) -> int:
        """Slots that jobs of the lowest priority leave to others, which then wait for none of them."""
        engine = self._renderer.engine
        return int(engine is not None and engine.window.shots > 1)

    async def _check_storage(self) -> None:
        """Stop claiming jobs while the outputs or the store cannot be written."""
        while True:
            await self._storage.over()
            await self._storage.writable_again()
            await asyncio.sleep(STORAGE_CHECK_INTERVAL_S)

    # Jobs

    async def _run_job(self, job: Job, *, is_over_budget: bool = False) -> None:
        """Run a job and store its end. Stops early if the job is cancelled or the director shuts down."""
        if job.claims <= 1:
            self._metrics.job_started(job.tenant, time.time() - job.created_at)
        try:
            if job.claims > MAX_CLAIMS:
                raise ShotFailed(_interrupted(job))
            if is_over_budget:
                raise ShotFailed(OVER_BUDGET, Kind.INPUT)
            shot_id, seconds = await self._find_or_render(job)
            await self._finish(job, JobState.COMPLETED, shot_id=shot_id, stage_seconds=seconds)
        except asyncio.CancelledError:
            if job.id in self._over_budget:
                await self._failed(job, OVER_BUDGET, Kind.INPUT)
            elif job.id in self._cancelled:
                await self._finish(job, JobState.CANCELLED)
            else:
                raise
        except ShotFailed as failed:
            await self._failed(job, failed.failure, failed.kind)
        # An invalid shot or a bug in vidgen fails the job, not the server.
        except Exception as error:
            log.error("job %s failed outside its stages: %s", job.id, error, exc_info=not isinstance(error, VidgenError))
            result = CallResult.of_failure(StepFailed(DIRECTOR_STAGE, error))
            assert result.failure is not None
            await self._failed(job, result.failure, result.kind)
        finally:
            self._updates.pop(job.id, None)
            self._running.pop(job.id, None)
            self._cancelled.discard(job.id)
            self._over_budget.discard(job.id)
            self._spent.pop(job.id, None)

    async def _failed(self, job: Job, failure: Failure, kind: Kind) -> None:
        """Store the failure of a job, or queue it again if the failure is not its own."""
        if self._fatal_failure is None:
            await self._finish(job, JobState.FAILED, error=error_of(failure, kind).model_dump(mode="json"))
            return
        await self._store_end(partial(self._store.queue.release, self.owner, [job.id]), job)

    async def _finish(self, job: Job, state: JobState, **values: Any) -> None:
        """Store the end of a job."""
        values["gpu_seconds"] = self._spent.get(job.id, job.gpu_seconds)
        if await self._store_end(partial(self._store.queue.end, job.id, self.owner, state, **values), job):
            self._metrics.job_ended(job.tenant, state.value, time.time() - job.created_at)

    async def _store_end(self, write: Callable[[], _R], job: Job) -> _R:
        """Write to the store with the next poll. Retries until it responds: without it, no other director can claim the job."""
        stored: asyncio.Future[_R] = asyncio.get_running_loop().create_future()
        self._ends[job.id] = write, stored
        self._woken.set()
        while True:
            try:
                return await stored
            except SQLAlchemyError as error:
                log.warning("cannot store the end of job %s yet: %s", job.id, error)
                await asyncio.sleep(_POLL_S)
                # Alone: it may be the one that the database refuses.
                stored = asyncio.ensure_future(asyncio.to_thread(write))

    async def _find_or_render(self, job: Job) -> tuple[str, dict[str, float]]:
        """Return the shot id and the seconds per stage. Renders the shot unless its files exist.

        Raises ShotFailed, VidgenError and OSError.
        """
        # Two jobs for the same shot: the second one waits for the first and renders only if that failed.
        while (other := self._rendering.get(job.key)) is not None:
            await asyncio.shield(other)
        rendering = self._rendering[job.key] = asyncio.get_running_loop().create_future()
        try:
            plan, done = await asyncio.to_thread(self._planned, job)
            if done is not None:
                return done.shot.id or "", {}
            record = await self._render(job, plan)
            return record.shot.id or "", {step.stage: 0.0 if step.cached else step.seconds for step in record.stages}
        finally:
            del self._rendering[job.key]
            rendering.set_result(None)

    def _planned(self, job: Job) -> tuple[ShotPlan, ShotRecord | None]:
        """Return the plan of a job, and its shot if that is finished. Blocks."""
        plan = plan_job(job, self._serving_profile, self._settings)
        return plan, self._outputs.find_by_key(plan.key)

    async def _render(self, job: Job, plan: ShotPlan) -> ShotRecord:
        estimator = ProgressEstimator(plan, self._config.profile)

        spent = self._spent[job.id] = job.gpu_seconds

        def on_progress(progress: Progress) -> None:
            self._spent[job.id] = self._spent.get(job.id, spent) + (progress.gpu_seconds or 0.0)
            self._updates[job.id] = lambda: JobProgress(job.id, *progress[:3], estimator.percent(progress), self._spent[job.id])

        record = await self._renderer.render(plan, on_progress)
        self._metrics.shot_rendered(job.tenant, record.stages)
        return record


def _log_storage(problem: str | None) -> None:
    log.warning("files can be written again" if problem is None else f"no jobs are claimed: {problem}")


def error_of(failure: Failure, kind: Kind) -> JobError:
    """Return the error of a failed job for its owner: the stage and the message, without process, host and paths."""
    stage = None if failure.stage == DIRECTOR_STAGE else failure.stage
    code = _CODES.get(failure.error) or ("invalid_shot" if kind is Kind.INPUT else "stage_failed")
    return JobError(
        code=code,
        message=without_internals(f"{stage}: {failure.message}" if stage else failure.message),
        stage=stage,
        type="invalid_request_error" if code in CLIENT_ERRORS else "server_error",
    )


OVER_BUDGET = Failure(
    stage=DIRECTOR_STAGE, error="BudgetExceeded", message="a budget of the key is spent", attempts=1, worker="online"
)


def _interrupted(job: Job) -> Failure:
    message = f"started {job.claims - 1} times, and interrupted each time because the server stopped or crashed"
    return Failure(stage=DIRECTOR_STAGE, error="Interrupted", message=message, attempts=job.claims - 1, worker="online")


# Metrics

JOB_METRICS = {
    "vidgen_online_jobs": MetricSpec("counter", ("tenant", "status"), "Finished jobs: completed, failed or cancelled."),
    "vidgen_online_job_seconds": MetricSpec("histogram", ("tenant",), "Seconds from the creation of a job to its completion."),
    "vidgen_online_wait_seconds": MetricSpec("histogram", ("tenant",), "Seconds from the creation of a job to its start."),
    "vidgen_online_stage_seconds": MetricSpec(
        "counter", ("stage", "tenant"), "Seconds of stage execution for completed jobs, without cache hits."
    ),
    "vidgen_online_gpu_seconds": MetricSpec("counter", ("key", "model"), "GPU-seconds of jobs that have ended."),
    "vidgen_online_queued": MetricSpec("gauge", (), "Queued jobs."),
    "vidgen_online_in_progress": MetricSpec("gauge", (), "Jobs that have started and not finished."),
}
_METRICS = {**JOB_METRICS, **ENGINE_METRICS}


class ServerMetrics(EngineMetrics):
    """Metrics of a server. Create it in the director replica only."""

    definitions = _METRICS

    def __init__(self, profile: str, public_name: Callable[[str], str]) -> None:
        """`public_name`: of a tenant. Every user of the machine can read it."""
        super().__init__(profile)
        self._public_name = public_name
        self._spent: Mapping[tuple[str, str], float] = {}

    def job_started(self, tenant: str, waited_s: float) -> None:
        self._observe("vidgen_online_wait_seconds", waited_s, tenant=self._public_name(tenant))

    def job_ended(self, tenant: str, status: str, seconds: float) -> None:
        self._count("vidgen_online_jobs", 1, tenant=self._public_name(tenant), status=status)
        if status == "completed":
            self._observe("vidgen_online_job_seconds", seconds, tenant=self._public_name(tenant))

    def shot_rendered(self, tenant: str, records: Iterable[StepRecord]) -> None:
        """Count the computing time of a finished shot for its tenant."""
        for record in records:
            if not record.cached:
                self._count("vidgen_online_stage_seconds", record.seconds, stage=record.stage, tenant=self._public_name(tenant))

    def spent(self, totals: Mapping[tuple[str, str], float]) -> None:
        """Count the GPU-seconds of each key and model up to these: a restarted director continues where another one ended."""
        for (key, model), seconds in totals.items():
            if (new := seconds - self._spent.get((key, model), 0.0)) > 0:
                self._count("vidgen_online_gpu_seconds", new, key=key, model=model)
        self._spent = totals

    def jobs(self, queued: int, in_progress: int) -> None:
        self._set("vidgen_online_queued", queued)
        self._set("vidgen_online_in_progress", in_progress)

    def quarantined(self, process: str, reason: str) -> None:
        super().quarantined(process, reason)
        log.warning("%s is quarantined: %s", process, reason)
