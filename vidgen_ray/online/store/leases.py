"""Job leases: directors claim jobs, renew their leases, report progress and end the jobs.

Each update checks the state and the owner of the job. A job that has ended never changes, and if two directors believe that
they own a job, only one of them can write.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import and_, case, func, select, update

from vidgen_ray.online.store.database import Database, Transaction
from vidgen_ray.online.store.job_queue import ALL_QUEUED
from vidgen_ray.online.store.job_rows import IS_OPEN, SECONDS, JobRows, job_of
from vidgen_ray.online.store.jobs import Job, JobError, JobState
from vidgen_ray.online.store.schema import JOBS


class JobProgress(NamedTuple):
    """Progress of a job. `step` and `steps` count denoising steps or frames of the stage."""

    job_id: str
    stage: str
    step: int
    steps: int
    percent: int


class JobLeases:
    """Job queue as seen by directors. Calls block; in an event loop use `asyncio.to_thread`."""

    def __init__(self, database: Database, rows: JobRows, now: Callable[[], float]) -> None:
        self._database = database
        self._rows = rows
        self._now = now

    def claim(self, owner: str, lease_s: float, limit: int) -> Sequence[Job]:
        """Claim up to `limit` jobs: first those with an expired lease, then queued ones, oldest first and tenants in turn.

        `attempts` of the returned jobs includes this attempt.
        """
        with self._database.transaction() as transaction:
            return self._claim(transaction, owner, lease_s, limit)

    def _claim(self, transaction: Transaction, owner: str, lease_s: float, limit: int) -> list[Job]:
        now = self._now()
        expired = and_(IS_OPEN, JOBS.c.state == JobState.IN_PROGRESS, JOBS.c.lease_until < now)
        ids = [*transaction.connection.scalars(select(JOBS.c.id).where(expired).order_by(JOBS.c.seq))]
        if ids:
            ended = self._rows.end(transaction, [expired, JOBS.c.cancel_requested], JobState.CANCELLED)
            cancelled = {row.id for row in ended}
            ids = [job_id for job_id in ids if job_id not in cancelled][:limit]
        ids += transaction.connection.scalars(ALL_QUEUED.limit(limit - len(ids)))
        if not ids:
            return []
        claimed = self._rows.update(
            transaction,
            [JOBS.c.id.in_(ids)],
            state=JobState.IN_PROGRESS,
            owner=owner,
            lease_until=now + lease_s,
            attempts=JOBS.c.attempts + 1,
            started_at=func.coalesce(JOBS.c.started_at, now),
            # Finished stages are in the cache; the new owner reports the progress again.
            stage=None,
            step=0,
            steps=0,
        )
        jobs = {row.id: job_of(row) for row in claimed}
        return [jobs[job_id] for job_id in ids]

    def heartbeat(self, owner: str, ids: Collection[str], lease_s: float) -> set[str]:
        """Renew leases. Return the ids of jobs to stop: a cancel was requested, or `owner` has lost the lease."""
        with self._database.transaction() as transaction:
            held = and_(JOBS.c.id.in_(ids), JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS)
            renew = (
                update(JOBS).where(held).values(lease_until=self._now() + lease_s).returning(JOBS.c.id, JOBS.c.cancel_requested)
            )
            renewed = {row.id for row in transaction.connection.execute(renew) if not row.cancel_requested}
        return set(ids) - renewed

    def release(self, owner: str, ids: Collection[str]) -> None:
        """Return jobs to their old position in the queue. The attempt is not counted. Jobs to be cancelled are cancelled."""
        with self._database.transaction() as transaction:
            held = [JOBS.c.id.in_(ids), JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
            self._rows.end(transaction, [*held, JOBS.c.cancel_requested], JobState.CANCELLED)
            requeued = {"state": JobState.QUEUED, "owner": None, "lease_until": None, "attempts": JOBS.c.attempts - 1}
            self._rows.update(transaction, held, **requeued)

    def progress(self, owner: str, updates: Sequence[JobProgress]) -> set[str]:
        """Store the progress of jobs. The percentage never decreases. Return the ids of jobs that `owner` still holds."""
        with self._database.transaction() as transaction:
            held = set()
            for job_id, stage, step, steps, percent in updates:
                # Not a function: the maximum of two values is `max` in SQLite and `greatest` in PostgreSQL.
                reached = case((JOBS.c.progress > percent, JOBS.c.progress), else_=percent)
                own = [JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
                if self._rows.update(transaction, own, stage=stage, step=step, steps=steps, progress=reached):
                    held.add(job_id)
            return held

    def completed(self, job_id: str, owner: str, *, shot_id: str, stage_seconds: Mapping[str, float]) -> bool:
        """End a job whose files are stored. Return False if `owner` has lost the lease."""
        seconds = SECONDS.dump_json(dict(stage_seconds)).decode()
        return self._end_own(job_id, owner, JobState.COMPLETED, shot_id=shot_id, stage_seconds=seconds, progress=100)

    def failed(self, job_id: str, owner: str, error: JobError) -> bool:
        """End a job with an error. Return False if `owner` has lost the lease."""
        return self._end_own(job_id, owner, JobState.FAILED, error=error.model_dump_json())

    def cancelled(self, job_id: str, owner: str) -> bool:
        """End a job after its cancellation. Return False if `owner` has lost the lease."""
        return self._end_own(job_id, owner, JobState.CANCELLED)

    def _end_own(self, job_id: str, owner: str, state: JobState, **values: Any) -> bool:
        held = [JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
        with self._database.transaction() as transaction:
            return bool(self._rows.end(transaction, held, state, **values))
