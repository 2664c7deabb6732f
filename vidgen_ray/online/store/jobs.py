"""Jobs: the record of one, its row, the order of the queue, the claims of directors, and webhook messages about ended jobs."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from enum import StrEnum
from itertools import takewhile
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, JsonValue
from sqlalchemy import ColumnElement, Connection, Row, Subquery, bindparam, case, delete, func, insert, or_, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from vidgen_ray.errors import FrozenModel, StrictModel, VidgenError
from vidgen_ray.online.server_settings import Budget
from vidgen_ray.online.store.budgets import Usage, usage_model
from vidgen_ray.online.store.database import DIRECTOR_TABLE, JOBS, OUTBOX, Database, Transaction
from vidgen_ray.shot import PRIORITIES, PRIORITY_STEP, Priority, Shot
from vidgen_ray.system.files import ProcessId, this_process

JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Form of ids of jobs. PostgreSQL refuses texts with a NUL."""


Timestamp = Annotated[int, BeforeValidator(int)]
"""Seconds since 1970."""


class JobState(StrEnum):
    """State of a job. The values appear in the API."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in FINAL


FINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})
"""States in which a job has ended."""


class JobKind(StrEnum):
    """Part of the API that a job belongs to. Also the prefix of its id."""

    VIDEO = "video"
    IMAGE = "image"
    SHOT = "shot"


class JobError(StrictModel):
    """Reason why a job failed, shown to the client. Contains no internals of the server."""

    code: str
    message: str
    stage: str | None = None
    type: str = "server_error"
    param: str | None = None


class Job(StrictModel):
    """One shot of one tenant. Times are seconds since 1970."""

    id: str
    tenant: str
    kind: JobKind
    state: JobState = JobState.QUEUED
    priority: Priority = "normal"
    shot: Shot
    """Checked shot with its seed. Its id is the name of its folder in the output folder."""
    key: str
    """Content key of the shot. Shots with the same key have the same bytes."""
    claims: int = 0
    """Number of times that a director has claimed the job."""
    progress: int = Field(0, ge=0, le=100)
    """Percent."""
    stage: str | None = None
    step: int = 0
    """Finished denoising steps or frames of the current stage."""
    steps: int = 0
    """All steps of the current stage. 0 if not known yet."""
    created_at: float
    start_by: float | None = None
    """Time after which the job fails if it has not started. `None`: it waits for any time."""
    started_at: float | None = None
    completed_at: float | None = None
    """Time at which the job ended, in any final state."""
    expires_at: float | None = None
    """Time after which the job and its files are deleted. `None` keeps them."""
    error: JobError | None = None
    shot_id: str | None = None
    """Folder of the files of a completed job, in the output folder."""
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> seconds that it took. Stages with a cached result took none."""
    request: dict[str, JsonValue] = Field(default_factory=dict)
    """Request fields returned to the client: model, seconds, size, prompt, remixed_from, ..."""
    cancel_requested: bool = False
    """A cancel was requested while the job was in progress. Its director carries it out."""
    batch: str | None = None
    """Batch of which the job is a line."""
    key_id: str = ""
    """Key that created the job, which pays for it."""
    estimate: float = 0.0
    """GPU-seconds by the planner."""
    reserved: float = 0.0
    """GPU-seconds that the job keeps of the budgets of its key: the estimate, corrected by earlier jobs."""
    gpu_seconds: float = 0.0
    """Measured GPU-seconds, of all claims."""
    version: int = 0
    """Number of the last change of the job. Later changes of any job have larger numbers."""

    def queued(self) -> Job:
        """Return a queued copy without progress or result."""
        reset = {"state": JobState.QUEUED, "progress": 0, "started_at": None, "completed_at": None, "shot_id": None}
        return self.model_copy(update=reset)


class InputMissing(VidgenError):
    """A file that a new job needs was deleted while the request was checked."""


def storable(job: Job, files_exist: Callable[[Job], bool]) -> Job:
    """Return a new job as it can be stored, in the transaction that does so: queued if it was completed and its files are gone.

    `files_exist` returns whether the results of a completed job, or the inputs of a queued one, are stored.
    Raises InputMissing.
    """
    if job.state.is_final and not files_exist(job):
        job = job.queued()
    if not job.state.is_final and not files_exist(job):
        raise InputMissing("A file that the request names was deleted meanwhile. Upload it again.")
    return job


def shot_id_of(key: str) -> str:
    """Return the name of the folder in which a server stores the shot with this content key."""
    return f"online-{key[:32]}"


def new_id(prefix: str) -> str:
    """Return a random id: the prefix, an underscore and 32 hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(16)}"


OPEN_STATES = (JobState.QUEUED, JobState.IN_PROGRESS)
IS_OPEN = JOBS.c.completed_at.is_(None)
"""Condition of jobs that have not ended. The index of open jobs is used only by queries that include it."""
INSERT = insert(JOBS)
HELD = JOBS.c.owner == bindparam("held_by"), IS_OPEN, JOBS.c.state == JobState.IN_PROGRESS
"""Conditions of the jobs that a director holds."""
# Statements of each job. SQLAlchemy takes a millisecond to build one, and finds a constant one in its cache.
CLAIM = (
    update(JOBS)
    .where(JOBS.c.id == bindparam("claimed"))
    .values(
        state=JobState.IN_PROGRESS,
        claims=JOBS.c.claims + 1,
        started_at=func.coalesce(JOBS.c.started_at, bindparam("now")),
        # Finished stages are in the cache; the new owner reports the progress again.
        stage=None,
        step=0,
        steps=0,
    )
    .returning(JOBS)
)
RENEW = update(JOBS).where(JOBS.c.id.in_(bindparam("ids", expanding=True)), *HELD).returning(JOBS.c.id, JOBS.c.cancel_requested)
_PROGRESS = (
    update(JOBS)
    .where(JOBS.c.id == bindparam("job_id"), *HELD)
    # Not a function: the maximum of two values is `max` in SQLite and `greatest` in PostgreSQL.
    .values(
        progress=case((JOBS.c.progress > bindparam("percent"), JOBS.c.progress), else_=bindparam("percent")),
        gpu_seconds=bindparam("spent"),
    )
)
END_OWN = (
    update(JOBS)
    .where(JOBS.c.id == bindparam("ended"), *HELD)
    .returning(
        *(ENDED := JOBS.c["id", "tenant", "kind", "deleted_at", "request", "key_id", "estimate", "gpu_seconds", "batch"])
    )
)
_IN_TIME = or_(JOBS.c.start_by.is_(None), JOBS.c.started_at.is_not(None), JOBS.c.start_by >= bindparam("now"))
END_LATE = update(JOBS).where(IS_OPEN, JOBS.c.state == JobState.QUEUED, ~_IN_TIME).returning(*ENDED)
LATE = JobError(code="deadline_exceeded", message="The job has not started within its deadline.", param="deadline_s")
_DIRECTOR = select(DIRECTOR_TABLE)
HELD_BY_ALL = (
    select(JOBS.c.id, JOBS.c.heartbeat)
    .where(IS_OPEN, JOBS.c.state == JobState.IN_PROGRESS, JOBS.c.heartbeat.is_not(None))
    .order_by(JOBS.c.seq)
)


Targets = Callable[[str, str, bool], Sequence[str]]
"""Returns the names of the webhooks that receive a message: of the tenant, the event, and whether it is about a line of a
batch."""


def no_targets(tenant: str, event: str, is_line: bool) -> Sequence[str]:
    """Send no messages."""
    return ()


class JobRows:
    """Writer of job rows and of the webhook messages for jobs that have ended."""

    def __init__(
        self,
        targets: Targets,
        retention_s: float | None,
        now: Callable[[], float],
        usage: Usage,
    ) -> None:
        self._targets = targets
        self._retention_s = retention_s
        self._now = now
        self._usage = usage

    def insert(self, transaction: Transaction, job: Job, is_first: bool = False, budgets: Sequence[Budget] = ()) -> Job:
        """Insert a new job. Return it as it is stored. `is_first`: of those that the transaction inserts.

        Raises BudgetExceeded if its estimate does not fit into the budgets of its key.
        """
        if not job.state.is_final and job.estimate:
            model = usage_model(job.request)
            correction = self._usage.correction(transaction.connection, model, is_capped=bool(budgets))
            job = job.model_copy(update={"reserved": job.estimate * correction})
            self._usage.check(transaction.connection, job.key_id, budgets, job.reserved)
        if job.state.is_final:
            ended_at = self._now() if job.completed_at is None else job.completed_at
            job = job.model_copy(update={"completed_at": ended_at, "expires_at": self._expiry(ended_at)})
        number = transaction.version if is_first else transaction.next_number()
        job = job.model_copy(update={"version": number})
        place = number if job.state.is_final else _make_place(transaction.connection, job, number)
        transaction.connection.execute(INSERT, row_of(job) | {"seq": number, "place": place})
        if job.state.is_final:
            self._ended(transaction, [job], job.state)
        return job

    def update(self, transaction: Transaction, where: Sequence[ColumnElement[bool]], **values: Any) -> int:
        """Update the jobs that match `where`. Return their number."""
        statement = update(JOBS).where(*where).values(**values, version=transaction.version)
        return transaction.connection.execute(statement).rowcount

    def end(self, transaction: Transaction, where: Sequence[ColumnElement[bool]], state: JobState) -> set[str]:
        """Set the final state of the open jobs that match `where`, and add their webhook messages. Return their ids."""
        return self.end_by(transaction, update(JOBS).where(*where, IS_OPEN).returning(*ENDED), {}, state)

    def end_by(
        self, transaction: Transaction, statement: ReturningUpdate[Any], parameters: Mapping[str, Any], state: JobState
    ) -> set[str]:
        """End jobs, as `end`. `statement`: update of the jobs, `parameters`: for its conditions, and further columns."""
        now = self._now()
        columns = {
            "state": state,
            **({"progress": 100} if state == JobState.COMPLETED else {}),
            "owner": None,
            "heartbeat": None,
            "completed_at": now,
            "expires_at": self._expiry(now),
        }
        ended = transaction.connection.execute(statement, {**parameters, **columns, "version": transaction.version}).all()
        self._ended(transaction, ended, state)
        return {row.id for row in ended}

    def cancel(self, transaction: Transaction, where: Sequence[ColumnElement[bool]]) -> None:
        """Cancel the queued jobs that match `where`, and ask the director to cancel those in progress."""
        self.end(transaction, [*where, JOBS.c.state == JobState.QUEUED], JobState.CANCELLED)
        self.update(transaction, [*where, JOBS.c.state == JobState.IN_PROGRESS], cancel_requested=True)

    def _ended(self, transaction: Transaction, ended: Sequence[Job | Row[Any]], state: JobState) -> None:
        """Settle jobs and add their messages in the transaction that ends them, so that all are stored or none."""
        self._usage.settle(transaction.connection, ended, state == JobState.COMPLETED)
        for job in ended:
            if isinstance(job, Job) or job.deleted_at is None:
                usage = {"gpu_seconds": job.gpu_seconds, "cost": job.gpu_seconds * self._usage.price}
                own = job.request.get("webhook")
                event, is_line = f"{job.kind}.{state}", job.batch is not None
                self.add_messages(transaction, job.tenant, event, job.id, own, usage, is_line=is_line)

    def add_messages(
        self,
        transaction: Transaction,
        tenant: str,
        event: str,
        named: str,
        own: Any = None,
        usage: Any = None,
        is_line: bool = False,
    ) -> None:
        """Add messages about a job or a batch to the webhooks of the settings and to the URL `own`."""
        for target in (*self._targets(tenant, event, is_line), *([own] if own else [])):
            message = Message(
                id=new_id("evt"),
                tenant=tenant,
                target=target,
                event=event,
                job=named,
                created_at=self._now(),
                tries=0,
                usage=usage,
            )
            row = {**message.model_dump(), "seq": transaction.version, "next_try_at": 0.0}
            transaction.connection.execute(insert(OUTBOX), row)

    def keep(self, transaction: Transaction, where: ColumnElement[bool]) -> None:
        """Let the jobs that match `where` expire as if they had just ended."""
        expires = update(JOBS).where(where, JOBS.c.expires_at.is_not(None)).values(expires_at=self._expiry(self._now()))
        transaction.connection.execute(expires)

    def _expiry(self, ended_at: float) -> float | None:
        return None if self._retention_s is None else ended_at + self._retention_s


def job_of(row: Row[Any]) -> Job:
    """Return the job of a row."""
    return Job.model_validate(row, from_attributes=True)


def row_of(job: Job) -> dict[str, Any]:
    """Return the column values of a job, except `seq`, `place` and those of its claim."""
    shot, day = job.shot, datetime.fromtimestamp(job.created_at, UTC)
    texts = (shot.prompt, shot.style_prompt, job.request.get("character"), f"seed:{shot.seed}", f"date:{day:%Y-%m-%d}", job.id)
    search_text = " ".join(["", *(str(text) for text in texts if text)]).casefold()
    return {**job.model_dump(mode="json"), "overtaken": 0, "search_text": search_text}


LAST_QUEUED = (
    select(*JOBS.c["id", "place", "priority", "overtaken"])
    .where(IS_OPEN, JOBS.c.state == JobState.QUEUED, JOBS.c.tenant == bindparam("of_tenant"))
    .order_by(JOBS.c.place.desc())
)
MOVE_BACK = update(JOBS).where(JOBS.c.id == bindparam("moved")).values(place=bindparam("to"), overtaken=JOBS.c.overtaken + 1)


def overtaken_by(priority: Priority, queued: Iterable[Row[Any]]) -> list[Row[Any]]:
    """Return the jobs that a new one would overtake: all at the end of the queue of its tenant that count as a lower priority.

    `queued`: the queued jobs of the tenant, the last one first, like the result.
    """
    level = PRIORITIES.index(priority)
    return list(takewhile(lambda job: PRIORITIES.index(job.priority) + job.overtaken // PRIORITY_STEP < level, queued))


def _make_place(connection: Connection, job: Job, last: int) -> int:
    """Return the place of a new job in the queue. The jobs that it overtakes move one place of their tenant back.

    So the tenant holds the same places as without priorities, and other tenants are not affected. `last`: place after all jobs.
    """
    # Reads no further than the first job that is not overtaken.
    with connection.execute(LAST_QUEUED, {"of_tenant": job.tenant}) as queued:
        overtaken = overtaken_by(job.priority, queued)
    for row in overtaken:
        connection.execute(MOVE_BACK, {"moved": row.id, "to": last})
        last = row.place
    return last


def _queue() -> Subquery:
    """Return the queued jobs that can start with their turn: their number among those of their tenant, after running ones."""
    busy = (
        select(JOBS.c.tenant, func.count().label("jobs"))
        .where(IS_OPEN, JOBS.c.state == JobState.IN_PROGRESS)
        .group_by(JOBS.c.tenant)
        .subquery()
    )
    turn = func.row_number().over(partition_by=JOBS.c.tenant, order_by=JOBS.c.place) + func.coalesce(busy.c.jobs, 0)
    return (
        select(*JOBS.c["id", "priority", "place"], turn.label("turn"))
        .select_from(JOBS.outerjoin(busy, JOBS.c.tenant == busy.c.tenant))
        .where(IS_OPEN, JOBS.c.state == JobState.QUEUED, _IN_TIME)
        .subquery()
    )


QUEUE = _queue()
ALL_QUEUED = select(QUEUE.c.id).order_by(QUEUE.c.turn, QUEUE.c.place)
"""Ids of these jobs, in order."""
FIRST_QUEUED = ALL_QUEUED.limit(bindparam("limit"))
FIRST_OTHERS = FIRST_QUEUED.where(QUEUE.c.priority != PRIORITIES[0], QUEUE.c.id.not_in(bindparam("claimed", expanding=True)))
"""The first jobs above the lowest priority that are not claimed yet."""


class JobProgress(NamedTuple):
    """Progress of a job. `step` and `steps` count denoising steps or frames of the stage."""

    job_id: str
    stage: str
    step: int
    steps: int
    percent: int
    spent: float
    """GPU-seconds that are measured until now, of all claims."""


CLAIM_S = 10.0
"""Seconds without a heartbeat after which another director may claim a job, or the jobs of the store."""


def new_owner() -> str:
    """Return the name of a new director: its machine, its process, and random digits."""
    return f"{os.uname().nodename}:{this_process()}:{secrets.token_hex(8)}"


def director_text(owner: str) -> str:
    """Return the process and the machine of a director, for messages."""
    host, process, _ = owner.split(":")
    return f"process {process.split('-')[1]} on {host}"


def _has_ended(owner: str) -> bool:
    """Return whether the process of a director is known to have ended."""
    process = ProcessId.parse(owner.split(":")[1])
    return process is not None and process.is_running() is False


class JobClaims:
    """Job queue as seen by directors. Calls block; in an event loop use `asyncio.to_thread`. Calls inside a block of
    `together` are one transaction.

    A claim of a job expires if the director that wants to claim it has seen no new heartbeat for some seconds. No times are
    stored, so clocks may differ and may be set. A change by a director that has lost a job has no effect: `owner` is its fence.
    """

    def __init__(self, database: Database, rows: JobRows, now: Callable[[], float], steady: Callable[[], float]) -> None:
        self._database = database
        self._rows = rows
        self._now = now
        self._steady = steady
        self._seen: dict[str, tuple[int, float]] = {}
        """Id of each job in progress -> its last heartbeat, and when this process has first seen that."""
        self._seen_director: tuple[str, int, float] | None = None
        """The director, its last heartbeat, and when this process has first seen that."""

    def hold(self, owner: str, claim_s: float) -> str | None:
        """Make `owner` the director of the store, or renew that. Return `None`, or the other director if there is one.

        See `director`.
        """
        with self._database.transaction() as transaction:
            if (other := self._director(transaction.connection, claim_s, owner)) is None:
                transaction.connection.execute(delete(DIRECTOR_TABLE))
                transaction.connection.execute(insert(DIRECTOR_TABLE), {"owner": owner, "heartbeat": transaction.version})
        return other

    def step_down(self, owner: str) -> None:
        """Let another director claim jobs at once."""
        with self._database.transaction() as transaction:
            transaction.connection.execute(delete(DIRECTOR_TABLE).where(DIRECTOR_TABLE.c.owner == owner))

    def director(self, claim_s: float) -> str | None:
        """Return the director of the store, `None` if there is none.

        It is replaced when its process has ended, or `claim_s` seconds after this process has first seen its last heartbeat.
        """
        with self._database.read_connection() as connection:
            return self._director(connection, claim_s)

    def _director(self, connection: Connection, claim_s: float, owner: str | None = None) -> str | None:
        """Return the director of the store, `None` also if it is `owner`."""
        row, now = connection.execute(_DIRECTOR).one_or_none(), self._steady()
        if row is None or row.owner == owner or _has_ended(row.owner):
            return None
        owner, heartbeat = row
        if self._seen_director is None or self._seen_director[:2] != (owner, heartbeat):
            self._seen_director = owner, heartbeat, now
        return None if now - self._seen_director[2] > claim_s else str(owner)

    def together(self) -> AbstractContextManager[Transaction]:
        """Make the calls of this thread inside the block one transaction."""
        return self._database.transaction()

    def claim(self, owner: str, claim_s: float | None, limit: int, reserved: int = 0) -> Sequence[Job]:
        """Claim up to `limit` jobs: first those with an expired claim, then queued ones, by place and tenants in turn.

        The last `reserved` ones are not of the lowest priority. A claim expires `claim_s` seconds after this process has first
        seen its last heartbeat. `None`: claim only queued jobs.
        `claims` of the returned jobs includes this one. Claims none while the store has another director, and none whose
        deadline has passed.
        """
        with self._database.transaction() as transaction:
            if self._director(transaction.connection, claim_s or CLAIM_S, owner) is not None:
                return []
            now = {"now": self._now()}
            ids: list[str] = []
            if claim_s is not None and (ids := self._expired(transaction, claim_s)):
                cancelled = self._rows.end(transaction, [JOBS.c.id.in_(ids), JOBS.c.cancel_requested], JobState.CANCELLED)
                ids = [job_id for job_id in ids if job_id not in cancelled][:limit]
            if (first := limit - reserved - len(ids)) > 0:
                ids += transaction.connection.scalars(FIRST_QUEUED, {"limit": first, **now})
            if reserved and len(ids) >= limit - reserved:
                ids += transaction.connection.scalars(FIRST_OTHERS, {"claimed": ids, "limit": limit - len(ids), **now})
            if not ids:
                return []
            values = {"owner": owner, "heartbeat": transaction.version, "version": transaction.version}
            claims = (transaction.connection.execute(CLAIM, {"claimed": job_id, **now, **values}) for job_id in ids)
            return [job_of(claim.one()) for claim in claims]

    def _expired(self, transaction: Transaction, claim_s: float) -> list[str]:
        """Return the jobs in progress that have had the same heartbeat for `claim_s` seconds."""
        now, before = self._steady(), self._seen
        self._seen = {
            job_id: before[job_id] if before.get(job_id, (None,))[0] == heartbeat else (heartbeat, now)
            for job_id, heartbeat in transaction.connection.execute(HELD_BY_ALL)
        }
        return [job_id for job_id, (_, since) in self._seen.items() if now - since > claim_s]

    def fail_late(self) -> None:
        """Fail the queued jobs whose deadline has passed before they have ever started."""
        with self._database.transaction() as transaction:
            values = {"now": self._now(), "error": LATE.model_dump(mode="json")}
            self._rows.end_by(transaction, END_LATE, values, JobState.FAILED)

    def heartbeat(self, owner: str, ids: Collection[str]) -> set[str]:
        """Renew claims. Return the ids of jobs to stop: a cancel was requested, or `owner` has lost the claim."""
        with self._database.transaction() as transaction:
            parameters = {"ids": list(ids), "held_by": owner, "heartbeat": transaction.version}
            renewed = {row.id for row in transaction.connection.execute(RENEW, parameters) if not row.cancel_requested}
        return set(ids) - renewed

    def release(self, owner: str, ids: Collection[str]) -> None:
        """Return jobs to their old position in the queue. The claim is not counted. Jobs to be cancelled are cancelled."""
        with self._database.transaction() as transaction:
            held = [JOBS.c.id.in_(ids), JOBS.c.owner == owner, JOBS.c.state == JobState.IN_PROGRESS]
            self._rows.end(transaction, [*held, JOBS.c.cancel_requested], JobState.CANCELLED)
            requeued = {"state": JobState.QUEUED, "owner": None, "heartbeat": None, "claims": JOBS.c.claims - 1}
            self._rows.update(transaction, held, **requeued)

    def progress(self, owner: str, updates: Sequence[JobProgress]) -> None:
        """Store the progress of those jobs that `owner` still holds. The percentage never decreases."""
        with self._database.transaction() as transaction:
            held = {"held_by": owner, "version": transaction.version}
            transaction.connection.execute(_PROGRESS, [{**update._asdict(), **held} for update in updates])

    def end(self, job_id: str, owner: str, state: JobState, **values: Any) -> bool:
        """End a job; the files of a completed one are stored. Return False if `owner` has lost the claim."""
        with self._database.transaction() as transaction:
            return bool(self._rows.end_by(transaction, END_OWN, {"ended": job_id, "held_by": owner, **values}, state))


class Message(FrozenModel):
    """Message to one webhook that a job has ended."""

    id: str
    """The same in every attempt, so that receivers can recognise a message they already have."""
    tenant: str
    target: str
    """Name of a webhook of the settings, or the URL that the request names."""
    event: str
    """For example `video.completed` or `shot.failed`."""
    job: str
    created_at: float
    tries: int
    """Failed attempts to deliver it."""
    usage: dict[str, float] | None = None
    """GPU-seconds and cost of the job."""

    @property
    def is_of_request(self) -> bool:
        """Return whether the target is the URL that the request names."""
        return "://" in self.target


class Outbox:
    """Webhook messages that wait for delivery. `JobRows` adds them."""

    def __init__(self, database: Database, steady: Callable[[], float]) -> None:
        self._database = database
        self._steady = steady

    def claim_due(
        self, claim_s: float, only: str | None = None, exclude: Collection[str] = (), busy: Collection[str] = ()
    ) -> Message | None:
        """Return the oldest due message to the target `only`, or to any, that is not in `exclude`.

        It is not due again for `claim_s` seconds. `busy`: tenants of which messages to receivers of requests are left out.
        """
        now = self._steady()
        due = [OUTBOX.c.next_try_at <= now, OUTBOX.c.target.not_in(exclude)]
        due.append(or_(OUTBOX.c.target.not_like("%://%"), OUTBOX.c.tenant.not_in(busy)))
        if only is not None:
            due.append(OUTBOX.c.target == only)
        first = self._database.rows(select(OUTBOX.c.id).where(*due).order_by(OUTBOX.c.seq).limit(1))
        if not first:
            return None
        claim = update(OUTBOX).where(OUTBOX.c.id == first[0].id, *due).values(next_try_at=now + claim_s).returning(OUTBOX)
        with self._database.transaction() as transaction:
            row = transaction.connection.execute(claim).one_or_none()
        return None if row is None else Message.model_validate(row, from_attributes=True)

    def delete(self, message_id: str) -> None:
        """Delete a message that was delivered or dropped."""
        with self._database.transaction() as transaction:
            transaction.connection.execute(delete(OUTBOX).where(OUTBOX.c.id == message_id))

    def postpone(self, message_id: str, seconds: float) -> None:
        """Count a failed attempt and make the message due again after `seconds`."""
        with self._database.transaction() as transaction:
            later = {"tries": OUTBOX.c.tries + 1, "next_try_at": self._steady() + seconds}
            transaction.connection.execute(update(OUTBOX).where(OUTBOX.c.id == message_id).values(**later))
