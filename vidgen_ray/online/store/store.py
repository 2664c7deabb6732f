"""Job store of a server. Every change is one transaction, which is on the disk before the call returns unless `durable=False`.

Calls block; in an event loop use `asyncio.to_thread`, and `in_write_thread` for those that write.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    func,
    insert,
    not_,
    or_,
    select,
)

from vidgen_ray.errors import VidgenError
from vidgen_ray.online.server_settings import Budget, OnlineSettings
from vidgen_ray.online.store.batches import Batches
from vidgen_ray.online.store.budgets import Usage
from vidgen_ray.online.store.database import BATCHES, IDEMPOTENCY, JOBS, LAST_NUMBER, Database
from vidgen_ray.online.store.inputs import Characters, UploadRecords
from vidgen_ray.online.store.jobs import (
    ALL_QUEUED,
    IS_OPEN,
    LAST_QUEUED,
    OPEN_STATES,
    Job,
    JobClaims,
    JobKind,
    JobRows,
    JobState,
    Outbox,
    Targets,
    job_of,
    no_targets,
    overtaken_by,
    storable,
)
from vidgen_ray.shot import Priority, Shot

IDEMPOTENCY_TTL_S = 86_400
"""Seconds for which an idempotency key is valid."""
PURGE_DELAY_S = 300
"""Seconds between the deletion of a job and that of its files, so that downloads in progress can finish."""


class QueueFull(VidgenError):
    """The queue has no room for the new jobs."""

    def __init__(self, queued: int) -> None:
        super().__init__(f"the queue is full: {queued} jobs are waiting")


class LimitReached(VidgenError):
    """The new jobs would exceed the limit of open jobs of the tenant."""

    def __init__(self, allowed: int) -> None:
        super().__init__(f"at most {allowed} jobs may be queued or in progress for one key")


class IdempotencyConflict(VidgenError):
    """The idempotency key was used before with a different request."""


class UnknownJob(VidgenError):
    """`after` of a list is not the id of a job of the tenant."""


ListedLines = Literal["all", "not cancelled", "none"]
"""Jobs of batches that a list has."""
LINE_CONDITIONS: dict[ListedLines, list[ColumnElement[bool]]] = {
    "all": [],
    "not cancelled": [or_(JOBS.c.batch.is_(None), JOBS.c.state != JobState.CANCELLED)],
    "none": [JOBS.c.batch.is_(None)],
}


class Page(NamedTuple):
    """Page of a list of jobs."""

    jobs: list[Job]
    has_more: bool


class DeletedJob(NamedTuple):
    """A job that was deleted."""

    id: str
    tenant: str


class Changes(NamedTuple):
    """Changes of jobs after a cursor."""

    jobs: list[Job]
    """Current state of the changed jobs, in the order of their last change."""
    deleted: list[DeletedJob]
    cursor: int
    """Cursor for the next call."""


class JobStore:
    """Jobs as seen by tenants. `queue` has the same jobs as seen by directors. `usage`, `batches`, `characters`, `uploads`
    and `outbox` have the other records of tenants."""

    def __init__(
        self,
        url: str,
        *,
        retention_s: float | None = None,
        targets: Targets = no_targets,
        now: Callable[[], float] = time.time,
        steady: Callable[[], float] | None = None,
        durable: bool = True,
        gpu_hour_price: float | None = None,
    ) -> None:
        """Open the store and create its tables if there are none.

        `retention_s` is how long finished jobs are kept, in seconds; `None` keeps them. `targets`: see
        `Targets`. `steady` is a clock for claims, which is never set. `url`,
        `durable` and errors are those of `Database`.
        """
        self._database = Database(url, durable)
        self._now = now
        self._retention_s = retention_s
        # Seconds since 1970: those of an earlier process are compared with them.
        offset = time.time() - time.monotonic()
        steady = steady or (lambda: offset + time.monotonic())
        self.characters = Characters(self._database, now)
        self.uploads = UploadRecords(self._database, now)
        self.outbox = Outbox(self._database, steady)
        self.usage = Usage(self._database, now, gpu_hour_price)
        self._rows = JobRows(targets, retention_s, now, self.usage)
        self.batches = Batches(self._database, self._rows, now)
        self.queue = JobClaims(self._database, self._rows, now, steady)

    @property
    def engine(self) -> Engine:
        return self._database.engine

    @property
    def url(self) -> str:
        """URL of the database, without its password."""
        return self._database.url_without_password

    @property
    def folder(self) -> Path | None:
        """Folder of an SQLite database, else `None`."""
        return Path(str(self.engine.url.database)).parent if self.engine.dialect.name == "sqlite" else None

    def write_nothing(self) -> None:
        """Commit a write transaction that changes no job. Raises SQLAlchemyError if the database cannot be written."""
        with self._database.transaction():
            pass

    def close(self) -> None:
        self._database.close()

    def create(self, job: Job, **options: Any) -> tuple[Job, bool]:
        """Store a new job. `options`: see `create_all`."""
        (stored,), created = self.create_all([job], **options)
        return stored, created

    def create_all(
        self,
        jobs: Sequence[Job],
        *,
        idempotency_key: str | None = None,
        fingerprint: str = "",
        max_queued: int | None = None,
        max_open: int | None = None,
        budgets: Sequence[Budget] = (),
        files_exist: Callable[[Job], bool] = lambda job: True,
    ) -> tuple[list[Job], bool]:
        """Store new jobs of one tenant, all or none. They are queued, or completed if their files exist already.

        Return the stored jobs and True. If the tenant has used `idempotency_key` before, store nothing and return the
        earlier jobs and False.

        `files_exist`: see `storable`. It is called inside the transaction, while files cannot be removed. At most `max_queued`
        jobs of all tenants may be queued, and at most `max_open` jobs of this tenant queued or in progress. `budgets`: of
        their key.

        Raises IdempotencyConflict if the earlier request had another `fingerprint` (digest of the request), QueueFull,
        LimitReached, BudgetExceeded and InputMissing.
        """
        tenant = jobs[0].tenant
        with self._database.transaction() as transaction:
            if idempotency_key is not None:
                earlier = _jobs_of_key(transaction.connection, tenant, idempotency_key, fingerprint)
                if earlier:
                    return earlier, False
                if earlier is not None:
                    # A key whose jobs have been deleted can be used again.
                    used = [IDEMPOTENCY.c.tenant == tenant, IDEMPOTENCY.c.key == idempotency_key]
                    transaction.connection.execute(delete(IDEMPOTENCY).where(*used))
            new_jobs = [storable(job, files_exist) for job in jobs]
            new = sum(not job.state.is_final for job in new_jobs)
            if new:
                _check_limits(transaction.connection, tenant, new, max_queued, max_open)
            stored = [self._rows.insert(transaction, job, job is new_jobs[0], budgets) for job in new_jobs]
            if idempotency_key is not None:
                ids = [job.id for job in stored]
                row = {"tenant": tenant, "key": idempotency_key, "fingerprint": fingerprint, "jobs": ids}
                transaction.connection.execute(insert(IDEMPOTENCY), row | {"created_at": self._now()})
            return stored, True

    def find_created(self, tenant: str, idempotency_key: str, fingerprint: str) -> list[Job]:
        """Return the jobs created with an idempotency key; an empty list if there are none. Raises IdempotencyConflict."""
        with self._database.read_connection() as connection:
            return _jobs_of_key(connection, tenant, idempotency_key, fingerprint) or []

    def get(self, job_id: str, tenant: str | None) -> Job | None:
        """Return a job, or `None` if it does not exist or is deleted. With `tenant=None`, any tenant's."""
        found = self._database.rows(ONE_JOB, {"one": job_id})
        return job_of(found[0]) if found and tenant in (None, found[0].tenant) else None

    def list(
        self,
        tenant: str,
        *,
        kinds: Collection[JobKind] = tuple(JobKind),
        states: Collection[JobState] = tuple(JobState),
        words: Sequence[str] = (),
        lines: ListedLines = "all",
        batch: str | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Page:
        """List a tenant's jobs in the order of their creation; `desc` starts with the newest.

        Lists only jobs whose prompt, style, character, seed (`seed:7`), UTC day (`date:2026-11-30`) and id contain all `words`,
        in upper or lower case. `lines`: which jobs of batches it lists. `batch`: list only the jobs of this one.
        The page starts after the job with id `after`, which may have been deleted meanwhile. Raises UnknownJob if `after` is
        not a job of the tenant.
        """
        matching = [JOBS.c.tenant == tenant, JOBS.c.deleted_at.is_(None), JOBS.c.kind.in_(kinds), JOBS.c.state.in_(states)]
        # Digits and hex digits must begin a word: each id contains many of them.
        searched = (f" {word}" if HEX.fullmatch(word) else word for word in map(str.casefold, words))
        matching += [JOBS.c.search_text.contains(text, autoescape=True) for text in searched]
        matching += LINE_CONDITIONS[lines]
        if batch is not None:
            matching += [JOBS.c.batch.is_not(None), JOBS.c.batch == batch]
        sorted_by = JOBS.c.seq.asc() if order == "asc" else JOBS.c.seq.desc()
        with self._database.read_connection() as connection:
            if after is not None:
                own = JOBS.c.id == after, JOBS.c.tenant == tenant
                if (position := connection.scalar(select(JOBS.c.seq).where(*own))) is None:
                    raise UnknownJob(after)
                matching.append(JOBS.c.seq > position if order == "asc" else JOBS.c.seq < position)
            rows = connection.execute(select(JOBS).where(*matching).order_by(sorted_by).limit(limit + 1)).all()
        return Page([job_of(row) for row in rows[:limit]], len(rows) > limit)

    def with_files(self, tenant: str, files: Collection[str]) -> Sequence[Job]:
        """Return a tenant's jobs whose shot names one of these uploaded files, oldest first, also those just deleted.

        `files` are sha256, which cannot match other text by chance.
        """
        named = or_(*(cast(JOBS.c.shot, Text).contains(file) for file in files))
        query = select(JOBS).where(JOBS.c.tenant == tenant, named).order_by(JOBS.c.seq)
        return [job_of(row) for row in self._database.rows(query)]

    def erase(
        self,
        tenant: str,
        characters: Collection[str],
        photos: Collection[str],
        jobs: Collection[str],
        remove: Callable[[str], None],
    ) -> Sequence[str] | None:
        """Delete characters and the uploads of their photos. Return the ids of the deleted uploads.

        `remove`: see `UploadRecords.delete`. Return `None`, and delete nothing, if other jobs than `jobs` use a photo, one of
        them is open, or another character has a photo: all of these may have been created meanwhile.
        """
        return self._database.with_reserve(partial(self._erase, tenant, characters, photos, jobs, remove))

    def _erase(
        self,
        tenant: str,
        characters: Collection[str],
        photos: Collection[str],
        jobs: Collection[str],
        remove: Callable[[str], None],
    ) -> Sequence[str] | None:
        with self._database.transaction():
            used = self.with_files(tenant, [photo.removeprefix("file-") for photo in photos])
            others = [each for each in self.characters.list(tenant) if not set(each.photos).isdisjoint(photos)]
            is_known = {job.id for job in used} <= {*jobs} and {each.id for each in others} <= {*characters}
            if not is_known or any(not job.state.is_final for job in used):
                return None
            for character in characters:
                self.characters.delete(character, tenant)
            return [photo for photo in photos if self.uploads.delete(photo, tenant, remove)]

    def changed_since(self, cursor: int, *, tenant: str | None = None, limit: int = 500) -> Changes:
        """Return the jobs that changed after `cursor`; 0 means from the beginning. Return about `limit` jobs at most."""
        rows = self.changed_rows(cursor, tenant=tenant, limit=limit)
        return Changes(
            [job_of(row) for row in rows if row.deleted_at is None],
            [DeletedJob(row.id, row.tenant) for row in rows if row.deleted_at is not None],
            rows[-1].version if rows else cursor,
        )

    def changed_rows(self, cursor: int, *, tenant: str | None = None, limit: int = 500) -> Sequence[Row[Any]]:
        """Return the rows of these jobs, in the order of their last change. The last version is the cursor for the next call.

        All earlier changes are visible, too, because there is one writer at a time.
        """
        return self._database.rows(_changed(tenant is not None), {"cursor": cursor, "of_tenant": tenant, "limit": limit})

    def latest_version(self) -> int:
        """Return the version of the last change, a cursor for `changed_since`."""
        (row,) = self._database.rows(LAST_NUMBER)
        return int(row.value)

    def request_cancel(self, job_id: str, tenant: str | None) -> Job | None:
        """Cancel a queued job, or ask the director to cancel a job in progress. A job that has ended does not change.

        Return the job, or `None` if it does not exist.
        """
        with self._database.transaction() as transaction:
            self._rows.cancel(transaction, _visible(job_id, tenant))
            row = transaction.connection.execute(select(JOBS).where(*_visible(job_id, tenant))).one_or_none()
            return None if row is None else job_of(row)

    def delete(self, job_id: str, tenant: str | None) -> bool:
        """Hide a job and cancel it if it has not ended. Return False if it does not exist."""
        return self._database.with_reserve(partial(self._delete, job_id, tenant))

    def _delete(self, job_id: str, tenant: str | None) -> bool:
        with self._database.transaction() as transaction:
            cancel = {"cancel_requested": or_(JOBS.c.cancel_requested, JOBS.c.state == JobState.IN_PROGRESS)}
            deleted = bool(self._rows.update(transaction, _visible(job_id, tenant), deleted_at=self._now(), **cancel))
            if deleted:
                # Only after it is hidden, so that no webhook message is added for a deleted job.
                self._rows.end(transaction, [JOBS.c.id == job_id, JOBS.c.state == JobState.QUEUED], JobState.CANCELLED)
            return deleted

    def purge(self, delete_files: Callable[[str], None], limit: int) -> int:
        """Remove up to `limit` jobs that are deleted or expired. Return how many were removed.

        `delete_files` deletes the files under a content key that no job has any more. It runs inside the transaction, so that
        no job can be completed from files that are being deleted. If it raises OSError, no job is removed.
        """
        self._database.keep_reserve()
        return self._database.with_reserve(partial(self._purge, delete_files, limit))

    def _purge(self, delete_files: Callable[[str], None], limit: int) -> int:
        with self._database.transaction() as transaction:
            now = self._now()
            if self._retention_s is not None:
                self.batches.delete_ended(now - self._retention_s)
            running = select(BATCHES.c.id).where(BATCHES.c.ended_at.is_(None))
            in_batch = and_(JOBS.c.batch.is_not(None), JOBS.c.batch.in_(running))
            expired = [JOBS.c.deleted_at.is_(None), JOBS.c.expires_at.is_not(None), JOBS.c.expires_at < now, not_(in_batch)]
            self._rows.update(transaction, expired, deleted_at=now)
            transaction.connection.execute(delete(IDEMPOTENCY).where(IDEMPOTENCY.c.created_at < now - IDEMPOTENCY_TTL_S))
            deleted = [JOBS.c.deleted_at.is_not(None), JOBS.c.deleted_at < now - PURGE_DELAY_S, not_(IS_OPEN)]
            query = select(JOBS.c.id, JOBS.c.key).where(*deleted).order_by(JOBS.c.deleted_at).limit(limit)
            rows = transaction.connection.execute(query).all()
            transaction.connection.execute(delete(JOBS).where(JOBS.c.id.in_([row.id for row in rows])))
            keys = {row.key for row in rows}
            in_use = set(transaction.connection.scalars(select(JOBS.c.key).where(JOBS.c.key.in_(keys))))
            for key in sorted(keys - in_use):
                delete_files(key)
            return len(rows)

    def open_counts(self) -> dict[JobState, int]:
        """Return the number of queued jobs and of jobs in progress."""
        is_open = IS_OPEN, JOBS.c.state.in_(OPEN_STATES), JOBS.c.deleted_at.is_(None)
        query = select(JOBS.c.state, func.count().label("jobs")).where(*is_open).group_by(JOBS.c.state)
        counts = {JobState(row.state): row.jobs for row in self._database.rows(query)}
        return dict.fromkeys(OPEN_STATES, 0) | counts

    def queue_order(self) -> Sequence[str]:
        """Return the ids of the queued jobs in the order in which they start, without those whose deadline has passed."""
        return [row.id for row in self._database.rows(ALL_QUEUED, {"now": self._now()})]

    def first_overtaken(self, tenant: str, priority: Priority) -> str | None:
        """Return the id of the first job that a new job would overtake. `None` if it would be the last one of its tenant."""
        overtaken = overtaken_by(priority, self._database.rows(LAST_QUEUED, {"of_tenant": tenant}))
        return overtaken[-1].id if overtaken else None

    def recent_durations(self, limit: int) -> Sequence[tuple[Shot, float]]:
        """Return the shots of the completed jobs among the last `limit` changed ones, and their seconds from start to end."""
        columns = JOBS.c.state, JOBS.c.shot, JOBS.c.started_at, JOBS.c.completed_at
        query = select(*columns).order_by(JOBS.c.version.desc()).limit(limit)
        completed = [
            row for row in self._database.rows(query) if row.state == JobState.COMPLETED and row.started_at is not None
        ]
        return [(Shot.model_validate(row.shot), row.completed_at - row.started_at) for row in completed]


ONE_JOB = select(JOBS).where(JOBS.c.id == bindparam("one"), JOBS.c.deleted_at.is_(None))


@cache
def _changed(of_tenant: bool) -> Select[Any]:
    """Return the query of `changed_since`."""
    changed: list[ColumnElement[bool]] = [JOBS.c.version > bindparam("cursor")]
    changed += [JOBS.c.tenant == bindparam("of_tenant")] if of_tenant else []
    # Jobs changed by the same transaction have the same version and must be returned together.
    some = select(JOBS.c.version).where(*changed).order_by(JOBS.c.version).limit(bindparam("limit")).subquery()
    last = select(func.max(some.c.version)).scalar_subquery()
    return select(JOBS).where(*changed, JOBS.c.version <= last).order_by(JOBS.c.version)


def open_store(settings: OnlineSettings, durable: bool = True) -> JobStore:
    """Open the store of a server. Raises what `Database` raises."""
    return JobStore(
        settings.database_url,
        retention_s=settings.retention_s,
        targets=settings.webhooks.names_for,
        durable=durable,
        gpu_hour_price=settings.gpu_hour_price,
    )


OPEN_JOBS = select(
    func.count().filter(JOBS.c.state == JobState.QUEUED), func.count().filter(JOBS.c.tenant == bindparam("of_tenant"))
).where(IS_OPEN, JOBS.c.state.in_(OPEN_STATES), JOBS.c.batch.is_(None))
"""Queued jobs of all tenants, and open jobs of one, without those of batches: they must not use up the limits of requests."""


def _check_limits(connection: Connection, tenant: str, new: int, max_queued: int | None, max_open: int | None) -> None:
    """Raise QueueFull or LimitReached if `new` more jobs exceed a limit."""
    queued, opened = connection.execute(OPEN_JOBS, {"of_tenant": tenant}).one()
    if max_queued is not None and queued + new > max_queued:
        raise QueueFull(queued)
    if max_open is not None and opened + new > max_open:
        raise LimitReached(max_open)


def _jobs_of_key(connection: Connection, tenant: str, key: str, fingerprint: str) -> list[Job] | None:
    """Return the jobs that are left of those created with an idempotency key, without deleted ones. `None` if it is new.

    Raises IdempotencyConflict.
    """
    query = select(IDEMPOTENCY).where(IDEMPOTENCY.c.tenant == tenant, IDEMPOTENCY.c.key == key)
    earlier = connection.execute(query).one_or_none()
    if earlier is None:
        return None
    if earlier.fingerprint != fingerprint:
        raise IdempotencyConflict(key)
    left = JOBS.c.id.in_(earlier.jobs), JOBS.c.deleted_at.is_(None)
    rows = connection.execute(select(JOBS).where(*left).order_by(JOBS.c.seq)).all()
    return [job_of(row) for row in rows]


HEX = re.compile("[0-9a-f]+")


def _visible(job_id: str, tenant: str | None) -> list[ColumnElement[bool]]:
    """Return the conditions for a job that is not deleted and belongs to the tenant, or to any if `tenant` is `None`."""
    own = [] if tenant is None else [JOBS.c.tenant == tenant]
    return [JOBS.c.id == job_id, *own, JOBS.c.deleted_at.is_(None)]
