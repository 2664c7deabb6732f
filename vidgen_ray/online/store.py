"""Where jobs are kept: every change is one transaction, on the disk before anybody hears of it.

Each change says what it expects (the state, the owner), so a job that has ended stays as it ended, and of two directors that
think they own a job only one writes. Calls block; in an event loop use `asyncio.to_thread`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import JsonValue, TypeAdapter
from sqlalchemy import ColumnElement, Connection, Engine, Row, and_, bindparam, case, delete, func, insert, or_, select, update

from vidgen_ray.errors import VidgenError
from vidgen_ray.online.characters import Characters
from vidgen_ray.online.database import Change, Database
from vidgen_ray.online.jobs import FINAL, Job, JobError, JobKind, JobState
from vidgen_ray.online.outbox import Outbox
from vidgen_ray.online.schema import IDEMPOTENCY, JOBS
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.uploaded import Uploaded
from vidgen_ray.shot import Shot

REMEMBERED_S = 86_400
"""How long a retried create finds the jobs of the first."""
FORGOTTEN_AFTER_S = 300
"""Between the deletion of a job and that of its files: a create that found them done has long been stored by then."""
IDS = TypeAdapter(list[str])
SECONDS = TypeAdapter(dict[str, float])
REQUEST = TypeAdapter(dict[str, JsonValue])

OPEN = (JobState.QUEUED, JobState.IN_PROGRESS)


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


class Changes(NamedTuple):
    """What happened since a place in the order of changes."""

    jobs: list[Job]
    """Their present state, in the order of their last change."""
    deleted: list[str]
    cursor: int
    """The place to ask from next."""


class HowFar(NamedTuple):
    """News of a job in progress."""

    job_id: str
    stage: str
    step: int
    steps: int
    percent: int


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may have in the store."""

    open_jobs: int | None = None
    """Queued or in progress."""


class JobStore:
    """Jobs, and what belongs to tenants beside them: `characters`, `uploads`, and `outbox`, the messages to webhooks."""

    def __init__(
        self,
        url: str,
        *,
        retention_s: float | None = None,
        targets: Callable[[str], Sequence[str]] = lambda tenant: (),
        now: Callable[[], float] = time.time,
        lasting: bool = True,
    ) -> None:
        """`targets` gives the names of the webhooks that hear of a tenant's jobs. Raises SetupError; see Database."""
        self._database = Database(url, lasting=lasting)
        self._retention_s = retention_s
        self._targets = targets
        self._now = now
        self.characters = Characters(self._database, now)
        self.uploads = Uploaded(self._database, now)
        self.outbox = Outbox(self._database, now)

    @property
    def engine(self) -> Engine:
        return self._database.engine

    def ping(self) -> None:
        """Raises SQLAlchemyError where the database does not answer."""
        self._database.ping()

    def close(self) -> None:
        self._database.close()

    # What the API does.

    def create(
        self,
        job: Job,
        *,
        idempotency_key: str | None = None,
        fingerprint: str = "",
        max_queued: int | None = None,
        limits: TenantLimits | None = None,
    ) -> tuple[Job, bool]:
        """Store a new job; see `create_all`."""
        (stored,), created = self.create_all(
            [job], idempotency_key=idempotency_key, fingerprint=fingerprint, max_queued=max_queued, limits=limits
        )
        return stored, created

    def create_all(
        self,
        jobs: Sequence[Job],
        *,
        idempotency_key: str | None = None,
        fingerprint: str = "",
        max_queued: int | None = None,
        limits: TenantLimits | None = None,
    ) -> tuple[list[Job], bool]:
        """Store new jobs of one tenant, all or none: queued ones, or ones whose files are there already.

        With an idempotency key that the tenant has used, nothing is stored and the jobs of then are given, and False.
        Raises IdempotencyConflict where `fingerprint`, a digest of the request, was another one then; QueueFull; LimitReached.
        """
        tenant = jobs[0].tenant
        limits = limits or TenantLimits()
        with self._database.changing() as change:
            if idempotency_key is not None:
                before = _created_before(change.connection, tenant, idempotency_key, fingerprint)
                if before:
                    return before, False
                # Its jobs are long forgotten, if it was used.
                used = [IDEMPOTENCY.c.tenant == tenant, IDEMPOTENCY.c.key == idempotency_key]
                change.connection.execute(delete(IDEMPOTENCY).where(*used))
            fresh = sum(not job.state.is_final for job in jobs)
            if fresh:
                _check_room(change.connection, tenant, fresh, max_queued, limits)
            stored = [self._insert(change, job) for job in jobs]
            if idempotency_key is not None:
                ids = IDS.dump_json([job.id for job in stored]).decode()
                row = {"tenant": tenant, "key": idempotency_key, "fingerprint": fingerprint, "jobs": ids}
                change.connection.execute(insert(IDEMPOTENCY), row | {"created_at": self._now()})
            return stored, True

    def find_created(self, tenant: str, idempotency_key: str, fingerprint: str) -> list[Job]:
        """The jobs that this key has created, or none. Raises IdempotencyConflict."""
        with self._database.reading() as connection:
            return _created_before(connection, tenant, idempotency_key, fingerprint)

    def get(self, job_id: str, tenant: str | None) -> Job | None:
        """None where there is no such job, it was deleted, or it is another tenant's. Without a tenant, anybody's."""
        with self._database.reading() as connection:
            row = connection.execute(select(JOBS).where(*_visible(job_id, tenant))).one_or_none()
        return None if row is None else _job(row)

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
        with self._database.reading() as connection:
            if after is not None:
                place = select(JOBS.c.seq).where(JOBS.c.id == after, JOBS.c.tenant == tenant)
                seq = connection.execute(place).scalar()
                if seq is None:
                    raise UnknownJob(after)
                query = query.where(JOBS.c.seq > seq if order == "asc" else JOBS.c.seq < seq)
            sorted_by = JOBS.c.seq.asc() if order == "asc" else JOBS.c.seq.desc()
            rows = connection.execute(query.order_by(sorted_by).limit(limit + 1)).all()
        return Page([_job(row) for row in rows[:limit]], len(rows) > limit)

    def changed_since(self, cursor: int, *, tenant: str | None = None, limit: int = 500) -> Changes:
        """What changed after a place in the order of changes, about `limit` jobs at most; 0 is the beginning."""
        new = [JOBS.c.version > cursor, *([] if tenant is None else [JOBS.c.tenant == tenant])]
        # One change may be of several jobs, which must not be torn apart.
        some = select(JOBS.c.version).where(*new).order_by(JOBS.c.version).limit(limit).subquery()
        last = select(func.max(some.c.version)).scalar_subquery()
        with self._database.reading() as connection:
            rows = connection.execute(select(JOBS).where(*new, JOBS.c.version <= last).order_by(JOBS.c.version)).all()
        return Changes(
            [_job(row) for row in rows if row.deleted_at is None],
            [row.id for row in rows if row.deleted_at is not None],
            rows[-1].version if rows else cursor,
        )

    def latest(self) -> int:
        """The place of the last change so far."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.max(JOBS.c.version))).scalar() or 0)

    def request_cancel(self, job_id: str, tenant: str | None) -> Job | None:
        """Cancel a queued job at once, ask for the end of one in progress; one that has ended stays as it is.

        None where there is no such job.
        """
        with self._database.changing() as change:
            self._end(change, [*_visible(job_id, tenant), JOBS.c.state == JobState.QUEUED], JobState.CANCELLED)
            self._update(
                change,
                [*_visible(job_id, tenant), JOBS.c.state == JobState.IN_PROGRESS],
                cancel_requested=True,
            )
            row = change.connection.execute(select(JOBS).where(*_visible(job_id, tenant))).one_or_none()
            return None if row is None else _job(row)

    def delete(self, job_id: str, tenant: str | None) -> bool:
        """Make a job unseen, and end it where it has not ended. False where there is no such job."""
        with self._database.changing() as change:
            visible = _visible(job_id, tenant)
            self._end(change, [*visible, JOBS.c.state == JobState.QUEUED], JobState.CANCELLED)
            asked = {"cancel_requested": or_(JOBS.c.cancel_requested, JOBS.c.state == JobState.IN_PROGRESS)}
            return bool(self._update(change, visible, deleted_at=self._now(), **asked))

    # What the director does.

    def claim(self, owner: str, lease_s: float, limit: int) -> Sequence[Job]:
        """Take jobs in hand: those whose owner let the lease run out, then queued ones, the oldest first and tenants in turn.

        `attempts` counts this one already.
        """
        with self._database.changing() as change:
            now = self._now()
            lost = and_(JOBS.c.state == JobState.IN_PROGRESS, JOBS.c.lease_until < now)
            ids = [*change.connection.scalars(select(JOBS.c.id).where(lost).order_by(JOBS.c.seq))]
            if ids:
                ended = self._end(change, [lost, JOBS.c.cancel_requested], JobState.CANCELLED)
                gone = {row.id for row in ended}
                ids = [job_id for job_id in ids if job_id not in gone][:limit]
            ids += change.connection.scalars(IN_TURN, {"most": limit - len(ids)})
            taken: Sequence[Row[Any]] = ()
            for job_id in ids:
                taken = (
                    *taken,
                    *self._update(
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
                    ),
                )
            return [_job(row) for row in taken]

    def heartbeat(self, owner: str, ids: Collection[str], lease_s: float) -> set[str]:
        """Hold on to these jobs. Gives those to end: somebody asked for it, or they are not the owner's any more."""
        with self._database.changing() as change:
            held = and_(JOBS.c.id.in_(ids), JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS)
            kept = (
                update(JOBS).where(held).values(lease_until=self._now() + lease_s).returning(JOBS.c.id, JOBS.c.cancel_requested)
            )
            wanted = {row.id for row in change.connection.execute(kept) if not row.cancel_requested}
        return set(ids) - wanted

    def release(self, owner: str, ids: Collection[str]) -> None:
        """Put jobs back into the queue, at their old place; being stopped on purpose counts as no attempt."""
        with self._database.changing() as change:
            held = [JOBS.c.id.in_(ids), JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
            self._end(change, [*held, JOBS.c.cancel_requested], JobState.CANCELLED)
            self._requeue(change, held, attempts=JOBS.c.attempts - 1)

    def release_others(self, owner: str) -> int:
        """Put into the queue what any other owner holds. For the one director of a server, when it starts: the one before it
        is gone. Gives how many these were."""
        with self._database.changing() as change:
            others = [JOBS.c.owner != owner, JOBS.c.state == JobState.IN_PROGRESS]
            self._end(change, [*others, JOBS.c.cancel_requested], JobState.CANCELLED)
            return self._requeue(change, others)

    def progress(self, job_id: str, owner: str, *, stage: str, step: int, steps: int, percent: int) -> bool:
        """Say how far a job is; its percentage never goes back. False where it is not the owner's any more."""
        return bool(self.progress_many(owner, [HowFar(job_id, stage, step, steps, percent)]))

    def progress_many(self, owner: str, each: Sequence[HowFar]) -> set[str]:
        """The same of several jobs at the price of one. Gives those that are still the owner's."""
        with self._database.changing() as change:
            held = set()
            for job_id, stage, step, steps, percent in each:
                # Written out: SQLite calls the larger of two max, PostgreSQL greatest.
                reached = case((JOBS.c.progress > percent, JOBS.c.progress), else_=percent)
                own = [JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
                if self._update(change, own, stage=stage, step=step, steps=steps, progress=reached):
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

    # What is done now and then, and seen from outside.

    def purge(self) -> Sequence[str]:
        """Forget jobs that were deleted or have expired. Gives the folders of shots that no job of the store has any more."""
        with self._database.changing() as change:
            now = self._now()
            old = [JOBS.c.deleted_at.is_(None), JOBS.c.expires_at < now]
            self._update(change, old, deleted_at=now)
            gone = [JOBS.c.deleted_at < now - FORGOTTEN_AFTER_S, JOBS.c.state.in_(FINAL)]
            left = {id_ for id_ in change.connection.scalars(delete(JOBS).where(*gone).returning(JOBS.c.shot_id)) if id_}
            change.connection.execute(delete(IDEMPOTENCY).where(IDEMPOTENCY.c.created_at < now - REMEMBERED_S))
            still = change.connection.scalars(select(JOBS.c.shot_id).where(JOBS.c.shot_id.in_(left)))
            return sorted(left - set(still))

    def counts(self) -> dict[tuple[str, JobKind, JobState], int]:
        """How many jobs of each tenant, kind and state there are."""
        query = (
            select(JOBS.c.tenant, JOBS.c.kind, JOBS.c.state, func.count())
            .where(JOBS.c.deleted_at.is_(None))
            .group_by(JOBS.c.tenant, JOBS.c.kind, JOBS.c.state)
        )
        with self._database.reading() as connection:
            return {(tenant, JobKind(kind), JobState(state)): n for tenant, kind, state, n in connection.execute(query)}

    def _insert(self, change: Change, job: Job) -> Job:
        if job.state.is_final:
            job = job.model_copy(update={"expires_at": self._expiry(job.completed_at)})
        number = change.next_number()
        job = job.model_copy(update={"version": number})
        change.connection.execute(insert(JOBS), _values(job) | {"seq": number})
        if job.state.is_final:
            self._announce(change, [job])
        return job

    def _requeue(self, change: Change, where: Sequence[ColumnElement[bool]], **values: Any) -> int:
        return len(self._update(change, where, state=JobState.QUEUED, owner=None, lease_until=None, **values))

    def _end_own(self, job_id: str, owner: str, state: JobState, **values: Any) -> bool:
        with self._database.changing() as change:
            held = [JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
            return bool(self._end(change, held, state, **values))

    def _end(self, change: Change, where: Sequence[ColumnElement[bool]], state: JobState, **values: Any) -> Sequence[Row[Any]]:
        """End jobs, of those that have not ended, and tell the webhooks."""
        now = self._now()
        ended = self._update(
            change,
            [*where, JOBS.c.state.in_(OPEN)],
            state=state,
            owner=None,
            lease_until=None,
            completed_at=now,
            expires_at=self._expiry(now),
            **values,
        )
        self._announce(change, [_job(row) for row in ended if row.deleted_at is None])
        return ended

    def _announce(self, change: Change, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for target in self._targets(job.tenant):
                self.outbox.add(change, target, job)

    def _expiry(self, ended_at: float | None) -> float | None:
        return None if self._retention_s is None or ended_at is None else ended_at + self._retention_s

    def _update(self, change: Change, where: Sequence[ColumnElement[bool]], **values: Any) -> Sequence[Row[Any]]:
        changed = update(JOBS).where(*where).values(**values, version=change.version).returning(JOBS)
        return change.connection.execute(changed).all()


def open_store(settings: OnlineSettings, *, lasting: bool = True) -> JobStore:
    """The store of a server; `lasting` as Database has it. Raises SetupError."""
    targets = settings.webhooks.names_for
    return JobStore(settings.database_url, retention_s=settings.retention_s, targets=targets, lasting=lasting)


def _check_room(connection: Connection, tenant: str, fresh: int, max_queued: int | None, limits: TenantLimits) -> None:
    """Raises QueueFull or LimitReached where so many new jobs are too many."""
    if max_queued is not None:
        queued = connection.execute(select(func.count()).where(JOBS.c.state == JobState.QUEUED)).scalar_one()
        if queued + fresh > max_queued:
            raise QueueFull(queued)
    if limits.open_jobs is not None:
        own = select(func.count()).where(JOBS.c.tenant == tenant, JOBS.c.state.in_(OPEN))
        if connection.execute(own).scalar_one() + fresh > limits.open_jobs:
            raise LimitReached(limits.open_jobs)


def _created_before(connection: Connection, tenant: str, key: str, fingerprint: str) -> list[Job]:
    known = select(IDEMPOTENCY).where(IDEMPOTENCY.c.tenant == tenant, IDEMPOTENCY.c.key == key)
    before = connection.execute(known).one_or_none()
    if before is None:
        return []
    if before.fingerprint != fingerprint:
        raise IdempotencyConflict(key)
    ids = IDS.validate_json(before.jobs)
    rows = connection.execute(select(JOBS).where(JOBS.c.id.in_(ids)).order_by(JOBS.c.seq)).all()
    return [_job(row) for row in rows]


def _visible(job_id: str, tenant: str | None) -> list[ColumnElement[bool]]:
    mine = [] if tenant is None else [JOBS.c.tenant == tenant]
    return [JOBS.c.id == job_id, *mine, JOBS.c.deleted_at.is_(None)]


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


def _values(job: Job) -> dict[str, Any]:
    """A job as a row."""
    return {
        **job.model_dump(exclude={"shot", "error", "stage_seconds", "request"}),
        "shot": job.shot.model_dump_json(),
        "error": None if job.error is None else job.error.model_dump_json(),
        "stage_seconds": SECONDS.dump_json(job.stage_seconds).decode(),
        "request": REQUEST.dump_json(job.request).decode(),
    }


def _job(row: Row[Any]) -> Job:
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
