"""Where jobs are kept: every change is one transaction, and a durable one on the disk before anybody hears of it.

Calls block; in an event loop use `asyncio.to_thread`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

from pydantic import TypeAdapter
from sqlalchemy import ColumnElement, Connection, Engine, delete, func, insert, or_, select

from vidgen_ray.errors import VidgenError
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.characters import Characters
from vidgen_ray.online.store.database import Database
from vidgen_ray.online.store.job_rows import OPEN, JobRows, job_of
from vidgen_ray.online.store.jobs import FINAL, Job, JobKind, JobState
from vidgen_ray.online.store.leases import JobLeases
from vidgen_ray.online.store.outbox import Outbox
from vidgen_ray.online.store.schema import IDEMPOTENCY, JOBS
from vidgen_ray.online.store.upload_records import UploadRecords

IDEMPOTENCY_TTL_S = 86_400
"""How long a retried create finds the jobs of the first."""
PURGE_DELAY_S = 300
"""Between the deletion of a job and that of its files: whoever is sent one of them has it by then."""
IDS = TypeAdapter(list[str])


class QueueFull(VidgenError):
    """There is no room for another job. Later there may be."""

    def __init__(self, queued: int) -> None:
        self.queued = queued
        super().__init__(f"the queue is full: {queued} jobs wait already")


class LimitReached(VidgenError):
    """The tenant has as many open jobs as it may."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        super().__init__(f"at most {allowed} jobs may be queued or in progress for one key")


class IdempotencyConflict(VidgenError):
    """The idempotency key was used before, with another request."""


class UnknownJob(VidgenError):
    """A list was to go on after a job that the tenant does not have."""


class Page(NamedTuple):
    """Some of the jobs of a list."""

    jobs: list[Job]
    has_more: bool


class DeletedJob(NamedTuple):
    """A job that was deleted."""

    id: str
    tenant: str


class Changes(NamedTuple):
    """What happened since a place in the order of changes."""

    jobs: list[Job]
    """Their present state, in the order of their last change."""
    deleted: list[DeletedJob]
    cursor: int
    """The place to ask from next."""


class JobStore:
    """Jobs as their tenants see them; `queue`, the same jobs as directors do; and what belongs to tenants beside them:
    `characters`, `uploads`, and `outbox`, the messages to webhooks."""

    def __init__(
        self,
        url: str,
        *,
        retention_s: float | None = None,
        targets: Callable[[str], Sequence[str]] = lambda tenant: (),
        now: Callable[[], float] = time.time,
        durable: bool = True,
    ) -> None:
        """`targets` gives the names of the webhooks that hear of a tenant's jobs. Raises SetupError; see Database."""
        self._database = Database(url, durable=durable)
        self._now = now
        self.characters = Characters(self._database, now)
        self.uploads = UploadRecords(self._database, now)
        self.outbox = Outbox(self._database, now)
        self._rows = JobRows(self.outbox, targets, retention_s, now)
        self.queue = JobLeases(self._database, self._rows, now)

    @property
    def engine(self) -> Engine:
        return self._database.engine

    def ping(self) -> None:
        """Raises SQLAlchemyError where the database does not answer."""
        self._database.ping()

    def close(self) -> None:
        self._database.close()

    def create(
        self,
        job: Job,
        *,
        idempotency_key: str | None = None,
        fingerprint: str = "",
        max_queued: int | None = None,
        max_open: int | None = None,
    ) -> tuple[Job, bool]:
        """Store a new job; see `create_all`."""
        (stored,), created = self.create_all(
            [job], idempotency_key=idempotency_key, fingerprint=fingerprint, max_queued=max_queued, max_open=max_open
        )
        return stored, created

    def create_all(
        self,
        jobs: Sequence[Job],
        *,
        idempotency_key: str | None = None,
        fingerprint: str = "",
        max_queued: int | None = None,
        max_open: int | None = None,
        files_exist: Callable[[Job], bool] = lambda job: True,
    ) -> tuple[list[Job], bool]:
        """Store new jobs of one tenant, all or none: queued ones, or ones whose files are there already.

        `files_exist` is called for completed jobs inside the transaction, while `purge` cannot remove files. A job whose
        files are missing is queued. `max_queued` jobs of all tenants may wait; `max_open` of this one's may be queued or in
        progress.
        With an idempotency key that the tenant has used, nothing is stored and the jobs of then are given, and False.
        Raises IdempotencyConflict where `fingerprint`, a digest of the request, was another one then; QueueFull; LimitReached.
        """
        tenant = jobs[0].tenant
        with self._database.transaction() as change:
            if idempotency_key is not None:
                before = _created_before(change.connection, tenant, idempotency_key, fingerprint)
                if before:
                    return before, False
                # Its jobs are long forgotten, if it was used.
                used = [IDEMPOTENCY.c.tenant == tenant, IDEMPOTENCY.c.key == idempotency_key]
                change.connection.execute(delete(IDEMPOTENCY).where(*used))
            jobs = [job if not job.state.is_final or files_exist(job) else job.queued() for job in jobs]
            fresh = sum(not job.state.is_final for job in jobs)
            if fresh:
                _check_room(change.connection, tenant, fresh, max_queued, max_open)
            stored = [self._rows.insert(change, job) for job in jobs]
            if idempotency_key is not None:
                ids = IDS.dump_json([job.id for job in stored]).decode()
                row = {"tenant": tenant, "key": idempotency_key, "fingerprint": fingerprint, "jobs": ids}
                change.connection.execute(insert(IDEMPOTENCY), row | {"created_at": self._now()})
            return stored, True

    def find_created(self, tenant: str, idempotency_key: str, fingerprint: str) -> list[Job]:
        """The jobs that this key has created, or none. Raises IdempotencyConflict."""
        with self._database.read_connection() as connection:
            return _created_before(connection, tenant, idempotency_key, fingerprint)

    def get(self, job_id: str, tenant: str | None) -> Job | None:
        """None where there is no such job, it was deleted, or it is another tenant's. Without a tenant, anybody's."""
        with self._database.read_connection() as connection:
            row = connection.execute(select(JOBS).where(*_visible(job_id, tenant))).one_or_none()
        return None if row is None else job_of(row)

    def list(
        self,
        tenant: str,
        *,
        kinds: Collection[JobKind] = tuple(JobKind),
        states: Collection[JobState] = tuple(JobState),
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Page:
        """A tenant's jobs by age, `desc` from the newest. Raises UnknownJob for an `after` that is not the tenant's.

        `after` may be a job that has been deleted meanwhile.
        """
        query = select(JOBS).where(
            JOBS.c.tenant == tenant, JOBS.c.kind.in_(kinds), JOBS.c.state.in_(states), JOBS.c.deleted_at.is_(None)
        )
        with self._database.read_connection() as connection:
            if after is not None:
                place = select(JOBS.c.seq).where(JOBS.c.id == after, JOBS.c.tenant == tenant)
                seq = connection.execute(place).scalar()
                if seq is None:
                    raise UnknownJob(after)
                query = query.where(JOBS.c.seq > seq if order == "asc" else JOBS.c.seq < seq)
            sorted_by = JOBS.c.seq.asc() if order == "asc" else JOBS.c.seq.desc()
            rows = connection.execute(query.order_by(sorted_by).limit(limit + 1)).all()
        return Page([job_of(row) for row in rows[:limit]], len(rows) > limit)

    def changed_since(self, cursor: int, *, tenant: str | None = None, limit: int = 500) -> Changes:
        """What changed after a place in the order of changes, about `limit` jobs at most; 0 is the beginning."""
        new = [JOBS.c.version > cursor, *([] if tenant is None else [JOBS.c.tenant == tenant])]
        # One change may be of several jobs, which must not be torn apart.
        some = select(JOBS.c.version).where(*new).order_by(JOBS.c.version).limit(limit).subquery()
        last = select(func.max(some.c.version)).scalar_subquery()
        with self._database.read_connection() as connection:
            rows = connection.execute(select(JOBS).where(*new, JOBS.c.version <= last).order_by(JOBS.c.version)).all()
        return Changes(
            [job_of(row) for row in rows if row.deleted_at is None],
            [DeletedJob(row.id, row.tenant) for row in rows if row.deleted_at is not None],
            rows[-1].version if rows else cursor,
        )

    def latest_version(self) -> int:
        """The place of the last change so far."""
        with self._database.read_connection() as connection:
            return int(connection.execute(select(func.max(JOBS.c.version))).scalar() or 0)

    def request_cancel(self, job_id: str, tenant: str | None) -> Job | None:
        """Cancel a queued job at once, ask for the end of one in progress; one that has ended stays as it is.

        None where there is no such job.
        """
        with self._database.transaction() as change:
            self._rows.end(change, [*_visible(job_id, tenant), JOBS.c.state == JobState.QUEUED], JobState.CANCELLED)
            self._rows.update(
                change,
                [*_visible(job_id, tenant), JOBS.c.state == JobState.IN_PROGRESS],
                cancel_requested=True,
            )
            row = change.connection.execute(select(JOBS).where(*_visible(job_id, tenant))).one_or_none()
            return None if row is None else job_of(row)

    def delete(self, job_id: str, tenant: str | None) -> bool:
        """Make a job unseen, and end it where it has not ended. False where there is no such job."""
        with self._database.transaction() as change:
            asked = {"cancel_requested": or_(JOBS.c.cancel_requested, JOBS.c.state == JobState.IN_PROGRESS)}
            deleted = bool(self._rows.update(change, _visible(job_id, tenant), deleted_at=self._now(), **asked))
            if deleted:
                # After it is unseen: nobody hears of the end of a job that he has deleted.
                self._rows.end(change, [JOBS.c.id == job_id, JOBS.c.state == JobState.QUEUED], JobState.CANCELLED)
            return deleted

    def purge(self, forget: Callable[[str], None], most: int) -> int:
        """Forget jobs that were deleted or have expired, `most` at a time; gives how many.

        `forget` removes what there is under the content key of a shot that no job has any more. Nothing else changes the store
        meanwhile, so that no job is created by what is being removed; where it raises OSError all stays for the next time.
        """
        with self._database.transaction() as change:
            now = self._now()
            old = [JOBS.c.deleted_at.is_(None), JOBS.c.expires_at < now]
            self._rows.update(change, old, deleted_at=now)
            change.connection.execute(delete(IDEMPOTENCY).where(IDEMPOTENCY.c.created_at < now - IDEMPOTENCY_TTL_S))
            gone = [JOBS.c.deleted_at < now - PURGE_DELAY_S, JOBS.c.state.in_(FINAL)]
            some = select(JOBS.c.id, JOBS.c.key).where(*gone).order_by(JOBS.c.seq).limit(most)
            rows = change.connection.execute(some).all()
            change.connection.execute(delete(JOBS).where(JOBS.c.id.in_([row.id for row in rows])))
            keys = {row.key for row in rows}
            still = set(change.connection.scalars(select(JOBS.c.key).where(JOBS.c.key.in_(keys))))
            for key in sorted(keys - still):
                forget(key)
            return len(rows)

    def counts(self) -> dict[tuple[str, JobKind, JobState], int]:
        """How many jobs of each tenant, kind and state there are."""
        query = (
            select(JOBS.c.tenant, JOBS.c.kind, JOBS.c.state, func.count())
            .where(JOBS.c.deleted_at.is_(None))
            .group_by(JOBS.c.tenant, JOBS.c.kind, JOBS.c.state)
        )
        with self._database.read_connection() as connection:
            return {(tenant, JobKind(kind), JobState(state)): n for tenant, kind, state, n in connection.execute(query)}


def open_store(settings: OnlineSettings, *, durable: bool = True) -> JobStore:
    """The store of a server; `durable` as Database has it. Raises SetupError."""
    targets = settings.webhooks.names_for
    return JobStore(settings.database_url, retention_s=settings.retention_s, targets=targets, durable=durable)


def _check_room(connection: Connection, tenant: str, fresh: int, max_queued: int | None, max_open: int | None) -> None:
    """Raises QueueFull or LimitReached where so many new jobs are too many."""
    if max_queued is not None:
        queued = connection.execute(select(func.count()).where(JOBS.c.state == JobState.QUEUED)).scalar_one()
        if queued + fresh > max_queued:
            raise QueueFull(queued)
    if max_open is not None:
        own = select(func.count()).where(JOBS.c.tenant == tenant, JOBS.c.state.in_(OPEN))
        if connection.execute(own).scalar_one() + fresh > max_open:
            raise LimitReached(max_open)


def _created_before(connection: Connection, tenant: str, key: str, fingerprint: str) -> list[Job]:
    known = select(IDEMPOTENCY).where(IDEMPOTENCY.c.tenant == tenant, IDEMPOTENCY.c.key == key)
    before = connection.execute(known).one_or_none()
    if before is None:
        return []
    if before.fingerprint != fingerprint:
        raise IdempotencyConflict(key)
    ids = IDS.validate_json(before.jobs)
    rows = connection.execute(select(JOBS).where(JOBS.c.id.in_(ids)).order_by(JOBS.c.seq)).all()
    return [job_of(row) for row in rows]


def _visible(job_id: str, tenant: str | None) -> list[ColumnElement[bool]]:
    mine = [] if tenant is None else [JOBS.c.tenant == tenant]
    return [JOBS.c.id == job_id, *mine, JOBS.c.deleted_at.is_(None)]
