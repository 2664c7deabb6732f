"""Jobs as rows: how they are written, changed and ended in somebody's transaction, and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import JsonValue, TypeAdapter
from sqlalchemy import ColumnElement, Row, insert, update

from vidgen_ray.online.store.database import Transaction
from vidgen_ray.online.store.jobs import Job, JobError, JobState
from vidgen_ray.online.store.outbox import Outbox
from vidgen_ray.online.store.schema import JOBS
from vidgen_ray.shot import Shot

SECONDS = TypeAdapter(dict[str, float])
REQUEST = TypeAdapter(dict[str, JsonValue])

OPEN = (JobState.QUEUED, JobState.IN_PROGRESS)


class JobRows:
    """Part of the store."""

    def __init__(
        self,
        outbox: Outbox,
        targets: Callable[[str], Sequence[str]],
        retention_s: float | None,
        now: Callable[[], float],
    ) -> None:
        """`targets` gives the names of the webhooks that hear of a tenant's jobs."""
        self._outbox = outbox
        self._targets = targets
        self._retention_s = retention_s
        self._now = now

    def insert(self, change: Transaction, job: Job) -> Job:
        """A new job, as it is stored."""
        if job.state.is_final:
            job = job.model_copy(update={"expires_at": self._expiry(job.completed_at)})
        number = change.next_number()
        job = job.model_copy(update={"version": number})
        change.connection.execute(insert(JOBS), _values(job) | {"seq": number})
        if job.state.is_final:
            self._announce(change, [job])
        return job

    def update(self, change: Transaction, where: Sequence[ColumnElement[bool]], **values: Any) -> Sequence[Row[Any]]:
        """Change the jobs that are as `where` expects, and give them as they are then."""
        changed = update(JOBS).where(*where).values(**values, version=change.version).returning(JOBS)
        return change.connection.execute(changed).all()

    def end(
        self, change: Transaction, where: Sequence[ColumnElement[bool]], state: JobState, **values: Any
    ) -> Sequence[Row[Any]]:
        """End jobs, of those that have not ended, and tell the webhooks."""
        now = self._now()
        ended = self.update(
            change,
            [*where, JOBS.c.state.in_(OPEN)],
            state=state,
            owner=None,
            lease_until=None,
            completed_at=now,
            expires_at=self._expiry(now),
            **values,
        )
        self._announce(change, [job_of(row) for row in ended if row.deleted_at is None])
        return ended

    def _announce(self, change: Transaction, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for target in self._targets(job.tenant):
                self._outbox.add(change, target, job)

    def _expiry(self, ended_at: float | None) -> float | None:
        return None if self._retention_s is None or ended_at is None else ended_at + self._retention_s


def job_of(row: Row[Any]) -> Job:
    """The job of a row."""
    fields = {name: getattr(row, name) for name in Job.model_fields}
    return Job.model_validate(
        {
            **fields,
            "shot": Shot.model_validate_json(row.shot),
            "error": None if row.error is None else JobError.model_validate_json(row.error),
            "stage_seconds": SECONDS.validate_json(row.stage_seconds),
            "request": REQUEST.validate_json(row.request),
        }
    )


def _values(job: Job) -> dict[str, Any]:
    """A job as a row."""
    return {
        **job.model_dump(exclude={"shot", "error", "stage_seconds", "request"}),
        "shot": job.shot.model_dump_json(),
        "error": None if job.error is None else job.error.model_dump_json(),
        "stage_seconds": SECONDS.dump_json(job.stage_seconds).decode(),
        "request": REQUEST.dump_json(job.request).decode(),
    }
