"""The jobs that directors have in hand: who leads which, how far it is, and how it ends.

Part of the store. Each change says what it expects (the state, the owner), so a job that has ended stays as it ended, and of
two directors that think they own a job only one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Row, and_, bindparam, case, func, select, update

from vidgen_ray.online.store.database import Database
from vidgen_ray.online.store.job_rows import SECONDS, JobRows, job_of
from vidgen_ray.online.store.jobs import Job, JobError, JobState
from vidgen_ray.online.store.schema import JOBS


class JobProgress(NamedTuple):
    """News of a job in progress."""

    job_id: str
    stage: str
    step: int
    steps: int
    percent: int


class JobLeases:
    """Calls block; in an event loop use `asyncio.to_thread`."""

    def __init__(self, database: Database, rows: JobRows, now: Callable[[], float]) -> None:
        self._database = database
        self._rows = rows
        self._now = now

    def claim(self, owner: str, lease_s: float, limit: int) -> Sequence[Job]:
        """Take jobs in hand: those whose owner let the lease run out, then queued ones, the oldest first and tenants in turn.

        `attempts` counts this one already.
        """
        with self._database.transaction() as change:
            now = self._now()
            lost = and_(JOBS.c.state == JobState.IN_PROGRESS, JOBS.c.lease_until < now)
            ids = [*change.connection.scalars(select(JOBS.c.id).where(lost).order_by(JOBS.c.seq))]
            if ids:
                ended = self._rows.end(change, [lost, JOBS.c.cancel_requested], JobState.CANCELLED)
                gone = {row.id for row in ended}
                ids = [job_id for job_id in ids if job_id not in gone][:limit]
            ids += change.connection.scalars(IN_TURN, {"most": limit - len(ids)})
            taken: list[Row[Any]] = []
            for job_id in ids:
                taken += self._rows.update(
                    change,
                    [JOBS.c.id == job_id],
                    state=JobState.IN_PROGRESS,
                    owner=owner,
                    lease_until=now + lease_s,
                    attempts=JOBS.c.attempts + 1,
                    started_at=func.coalesce(JOBS.c.started_at, now),
                    # What it had reached is in the cache; how far that is, its first stages will say again.
                    stage=None,
                    step=0,
                    steps=0,
                )
            return [job_of(row) for row in taken]

    def heartbeat(self, owner: str, ids: Collection[str], lease_s: float) -> set[str]:
        """Hold on to these jobs. Gives those to end: somebody asked for it, or they are not the owner's any more."""
        with self._database.transaction() as change:
            held = and_(JOBS.c.id.in_(ids), JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS)
            kept = (
                update(JOBS).where(held).values(lease_until=self._now() + lease_s).returning(JOBS.c.id, JOBS.c.cancel_requested)
            )
            wanted = {row.id for row in change.connection.execute(kept) if not row.cancel_requested}
        return set(ids) - wanted

    def release(self, owner: str, ids: Collection[str]) -> None:
        """Put jobs back into the queue, at their old place; being stopped on purpose counts as no attempt."""
        with self._database.transaction() as change:
            held = [JOBS.c.id.in_(ids), JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
            self._rows.end(change, [*held, JOBS.c.cancel_requested], JobState.CANCELLED)
            back = {"state": JobState.QUEUED, "owner": None, "lease_until": None, "attempts": JOBS.c.attempts - 1}
            self._rows.update(change, held, **back)

    def progress(self, owner: str, each: Sequence[JobProgress]) -> set[str]:
        """Say how far jobs are; a percentage never goes back. Gives those that are still the owner's."""
        with self._database.transaction() as change:
            held = set()
            for job_id, stage, step, steps, percent in each:
                # Written out: SQLite calls the larger of two max, PostgreSQL greatest.
                reached = case((JOBS.c.progress > percent, JOBS.c.progress), else_=percent)
                own = [JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
                if self._rows.update(change, own, stage=stage, step=step, steps=steps, progress=reached):
                    held.add(job_id)
            return held

    def completed(self, job_id: str, owner: str, *, shot_id: str, stage_seconds: Mapping[str, float]) -> bool:
        """End a job whose files are there. False where it is not the owner's any more, as in the two below."""
        seconds = SECONDS.dump_json(dict(stage_seconds)).decode()
        return self._end_own(job_id, owner, JobState.COMPLETED, shot_id=shot_id, stage_seconds=seconds, progress=100)

    def failed(self, job_id: str, owner: str, error: JobError) -> bool:
        return self._end_own(job_id, owner, JobState.FAILED, error=error.model_dump_json())

    def cancelled(self, job_id: str, owner: str) -> bool:
        return self._end_own(job_id, owner, JobState.CANCELLED)

    def _end_own(self, job_id: str, owner: str, state: JobState, **values: Any) -> bool:
        with self._database.transaction() as change:
            held = [JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
            return bool(self._rows.end(change, held, state, **values))


def _in_turn() -> Any:
    """Ids of `most` queued jobs: of every tenant its oldest, then of every one its next. Who has jobs in progress waits as if
    they stood before his others."""
    busy = (
        select(JOBS.c.tenant, func.count().label("jobs"))
        .where(JOBS.c.state == JobState.IN_PROGRESS)
        .group_by(JOBS.c.tenant)
        .subquery()
    )
    place = func.row_number().over(partition_by=JOBS.c.tenant, order_by=JOBS.c.seq) + func.coalesce(busy.c.jobs, 0)
    queued = (
        select(JOBS.c.id, JOBS.c.seq, place.label("place"))
        .select_from(JOBS.outerjoin(busy, JOBS.c.tenant == busy.c.tenant))
        .where(JOBS.c.state == JobState.QUEUED)
        .subquery()
    )
    return select(queued.c.id).order_by(queued.c.place, queued.c.seq).limit(bindparam("most"))


IN_TURN = _in_turn()
"""Put together once: a director asks for it after every job."""
