"""Read and write job rows inside a transaction of the caller."""

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

OPEN_STATES = (JobState.QUEUED, JobState.IN_PROGRESS)
IS_OPEN = JOBS.c.completed_at.is_(None)
"""Condition of jobs that have not ended. The index of open jobs is used only by queries that include it."""


class JobRows:
    """Writer of job rows and of the webhook messages for jobs that have ended."""

    def __init__(
        self,
        outbox: Outbox,
        targets: Callable[[str], Sequence[str]],
        retention_s: float | None,
        now: Callable[[], float],
    ) -> None:
        """`targets` returns the names of the webhooks that receive messages about a tenant's jobs."""
        self._outbox = outbox
        self._targets = targets
        self._retention_s = retention_s
        self._now = now

    def insert(self, transaction: Transaction, job: Job) -> Job:
        """Insert a new job. Return it as it is stored."""
        if job.state.is_final:
            ended_at = self._now() if job.completed_at is None else job.completed_at
            job = job.model_copy(update={"completed_at": ended_at, "expires_at": self._expiry(ended_at)})
        number = transaction.next_number()
        job = job.model_copy(update={"version": number})
        transaction.connection.execute(insert(JOBS), row_of(job) | {"seq": number})
        if job.state.is_final:
            self._add_messages(transaction, [job])
        return job

    def update(self, transaction: Transaction, where: Sequence[ColumnElement[bool]], **values: Any) -> Sequence[Row[Any]]:
        """Update the jobs that match `where`. Return their new rows."""
        statement = update(JOBS).where(*where).values(**values, version=transaction.version).returning(JOBS)
        return transaction.connection.execute(statement).all()

    def end(
        self, transaction: Transaction, where: Sequence[ColumnElement[bool]], state: JobState, **values: Any
    ) -> Sequence[Row[Any]]:
        """Set the final state of the open jobs that match `where`, and add their webhook messages. Return their new rows."""
        now = self._now()
        ended = self.update(
            transaction,
            [*where, IS_OPEN],
            state=state,
            owner=None,
            lease_until=None,
            completed_at=now,
            expires_at=self._expiry(now),
            **values,
        )
        self._add_messages(transaction, [job_of(row) for row in ended if row.deleted_at is None])
        return ended

    def _add_messages(self, transaction: Transaction, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for target in self._targets(job.tenant):
                self._outbox.add(transaction, target, job)

    def _expiry(self, ended_at: float) -> float | None:
        return None if self._retention_s is None else ended_at + self._retention_s


def job_of(row: Row[Any]) -> Job:
    """Return the job of a row."""
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


def row_of(job: Job) -> dict[str, Any]:
    """Return the column values of a job, except `seq` and those of its lease."""
    return {
        **job.model_dump(exclude={"shot", "error", "stage_seconds", "request"}),
        "search_text": _search_text(job),
        "shot": job.shot.model_dump_json(),
        "error": None if job.error is None else job.error.model_dump_json(),
        "stage_seconds": SECONDS.dump_json(job.stage_seconds).decode(),
        "request": REQUEST.dump_json(job.request).decode(),
    }


def _search_text(job: Job) -> str:
    """Return the text of a job that a search looks for."""
    texts = (job.shot.prompt, job.shot.style_prompt, job.request.get("character"), f"seed:{job.shot.seed}", job.id)
    return " ".join(str(text) for text in texts if text).casefold()
