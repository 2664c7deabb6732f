"""Batches: the record of one, and its lines, each of which has a job or an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, JsonValue
from sqlalchemy import ColumnElement, Row, Select, and_, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from vidgen_ray.errors import StrictModel, VidgenError
from vidgen_ray.online.server_settings import Budget
from vidgen_ray.online.store.budgets import BudgetExceeded
from vidgen_ray.online.store.database import BATCH_LINES, BATCHES, JOBS, Database, Transaction
from vidgen_ray.online.store.jobs import IS_OPEN, Job, JobRows, JobState, Timestamp, job_of

BatchStatus = Literal["validating", "failed", "in_progress", "completed", "expired", "cancelling", "cancelled"]
IS_RUNNING = BATCHES.c.ended_at.is_(None)
"""Condition of batches that have not ended. The index of open batches is used only by queries that include it."""


class BatchFields(BaseModel):
    """OpenAI's Batch, as far as it is stored. Times are in seconds since 1970."""

    id: str = Field(description="Id of the batch.")
    endpoint: str = Field(description="Route of all lines.")
    input_file_id: str = Field(description="Id of the input file.")
    completion_window: str = Field(description="As in the request.")
    status: BatchStatus = Field("validating", description="State of the batch.")
    output_file_id: str | None = Field(None, description="File with the responses of completed lines. Null if there are none.")
    error_file_id: str | None = Field(None, description="File with the errors of all other lines. Null if there are none.")
    created_at: Timestamp = Field(description="Time of creation.")
    in_progress_at: Timestamp | None = Field(None, description="Time at which the first lines were read.")
    expires_at: Timestamp = Field(description="Time after which no line starts.")
    cancelling_at: Timestamp | None = Field(None, description="Time at which it was cancelled.")
    metadata: dict[str, str] = Field(description="As in the request.")


class Batch(BatchFields, StrictModel):
    """Requests of a file of a tenant."""

    tenant: str
    key_id: str
    """Key that created the batch. Its limits apply to the lines."""
    ended_at: float | None = None
    total: int = 0
    """Lines of the input file that are not blank."""
    rejected: int = 0
    """Lines that are read and have no job."""
    completed: int = 0
    """Lines in the output file. 0 until the batch has ended."""
    line: int = 0
    """Number of the last line that is read."""
    offset: int = 0
    """Bytes of the input file that are read."""
    error: dict[str, JsonValue] | None = None
    """Why the batch failed or was cancelled by the server: code, message and param."""


class BatchLine(NamedTuple):
    """Line of an input file, with a new job or an error: code, message and param."""

    number: int
    offset: int
    """Bytes of the file up to the end of the line."""
    custom_id: str | None
    result: Job | dict[str, JsonValue]


class StoredLine(NamedTuple):
    """Line that is read. `job` is `None` for a line with an error, and if its job is deleted."""

    number: int
    custom_id: str | None
    job: Job | None
    error: dict[str, JsonValue] | None


class Counts(NamedTuple):
    """Lines of a batch that have ended."""

    completed: int
    failed: int


class OtherBatch(VidgenError):
    """The idempotency key was used before with a different batch."""


class Batches:
    """Batches of the store."""

    def __init__(self, database: Database, rows: JobRows, now: Callable[[], float]) -> None:
        self._database = database
        self._rows = rows
        self._now = now

    def create(self, batch: Batch) -> Batch:
        """Store a new batch, or return the stored one with its id. Raises OtherBatch if that has another content."""
        with self._database.transaction() as transaction:
            if (row := transaction.connection.execute(_of(batch.id, batch.tenant)).one_or_none()) is None:
                values = {**batch.model_dump(mode="json"), "seq": transaction.version}
                transaction.connection.execute(insert(BATCHES).values(values))
                return batch
        same = {"endpoint", "input_file_id", "completion_window", "metadata"}
        if (stored := _batch(row)).model_dump(include=same) != batch.model_dump(include=same):
            raise OtherBatch(batch.id)
        return stored

    def get(self, batch_id: str, tenant: str) -> Batch | None:
        """Return a batch of the tenant, or `None`."""
        found = self._database.rows(_of(batch_id, tenant))
        return _batch(found[0]) if found else None

    def list(self, tenant: str, after: str | None, limit: int) -> Sequence[Batch]:
        """Return the tenant's batches, the newest first, starting after the one with id `after`, if that exists."""
        query = select(BATCHES).where(BATCHES.c.tenant == tenant).order_by(BATCHES.c.seq.desc()).limit(limit)
        if after is not None:
            last = select(BATCHES.c.seq).where(BATCHES.c.id == after, BATCHES.c.tenant == tenant).scalar_subquery()
            query = query.where(BATCHES.c.seq < func.coalesce(last, 2**62))
        return [_batch(row) for row in self._database.rows(query)]

    def running(self) -> Sequence[Batch]:
        """Return all batches that have not ended, the oldest first."""
        return [_batch(row) for row in self._database.rows(select(BATCHES).where(IS_RUNNING).order_by(BATCHES.c.seq))]

    def uses(self, tenant: str, file: str) -> bool:
        """Return whether a running batch reads this upload."""
        own = BATCHES.c.tenant == tenant, BATCHES.c.input_file_id == file
        return bool(self._database.rows(select(BATCHES.c.id).where(IS_RUNNING, *own).limit(1)))

    def counts(self, batch: Batch) -> Counts:
        """Return how many lines have ended."""
        if batch.ended_at is not None:
            return Counts(batch.completed, batch.total - batch.completed)
        jobs = self._jobs(batch)
        failed = jobs.get(JobState.FAILED, 0) + jobs.get(JobState.CANCELLED, 0)
        return Counts(jobs.get(JobState.COMPLETED, 0), failed + batch.rejected)

    def open_jobs(self, batch: Batch) -> tuple[int, int]:
        """Return how many jobs of a batch are queued, and how many are in progress."""
        jobs = self._jobs(batch, IS_OPEN)
        return jobs.get(JobState.QUEUED, 0), jobs.get(JobState.IN_PROGRESS, 0)

    def _jobs(self, batch: Batch, *where: ColumnElement[bool]) -> dict[str, int]:
        """Return state -> number of jobs of a batch that match `where`."""
        query = select(JOBS.c.state, func.count().label("jobs")).where(_jobs_of(batch), *where).group_by(JOBS.c.state)
        return {row.state: row.jobs for row in self._database.rows(query)}

    def start(self, batch: Batch, total: int) -> None:
        """Begin to read a batch with so many lines."""
        self._update(batch, BATCHES.c.status == "validating", status="in_progress", total=total, in_progress_at=self._now())

    def add(
        self, batch: Batch, lines: Sequence[BatchLine], files_exist: Callable[[Job], bool], budgets: Sequence[Budget] = ()
    ) -> bool:
        """Store the next lines of a batch and their jobs, until a budget of the key is reserved or spent that will reset.

        `files_exist`: see `JobStore.create_all`.

        A line with the `custom_id` of an earlier one gets an error without it. Return False, and store nothing, if another
        process has read these lines, the batch was cancelled after `batch` was read, or nothing is left of a budget.
        """
        unchanged = BATCHES.c.offset == batch.offset, BATCHES.c.status == batch.status
        with self._database.transaction() as transaction:
            if not self._update(batch, *unchanged, offset=batch.offset):
                return False
            last, rejected = None, 0
            for line in lines:
                try:
                    rejected += not self._add_line(transaction, batch, line, files_exist, budgets, is_first=last is None)
                except BudgetExceeded as exceeded:
                    if exceeded.can_pass_later:
                        break
                    error: dict[str, JsonValue] = {"code": "budget_exceeded", "message": str(exceeded)}
                    self._add_line(transaction, batch, line._replace(result=error), files_exist, budgets)
                    rejected += 1
                last = line
            if last is not None:
                read = {"line": last.number, "offset": last.offset}
                self._update(batch, rejected=BATCHES.c.rejected + rejected, **read)
            return last is not None

    def _add_line(
        self,
        transaction: Transaction,
        batch: Batch,
        line: BatchLine,
        files_exist: Callable[[Job], bool],
        budgets: Sequence[Budget],
        is_first: bool = False,
    ) -> bool:
        """Store a line. Return whether it has a job. Raises BudgetExceeded."""
        row = {"batch": batch.id, "line": line.number, "custom_id": line.custom_id, "job": None, "error": None}
        row |= {"job": line.result.id} if isinstance(line.result, Job) else {"error": line.result}
        try:
            with transaction.connection.begin_nested():
                transaction.connection.execute(INSERT_LINE, row)
                if isinstance(line.result, Job):
                    job = line.result if not line.result.state.is_final or files_exist(line.result) else line.result.queued()
                    self._rows.insert(transaction, job, is_first, budgets)
        except IntegrityError:
            message = f"custom_id: {line.custom_id!r} is that of an earlier line, must be unique"
            error = {"code": "duplicate_custom_id", "message": message, "param": "custom_id"}
            transaction.connection.execute(INSERT_LINE, {**row, "custom_id": None, "job": None, "error": error})
            return False
        return isinstance(line.result, Job)

    def cancel(self, batch: Batch, error: dict[str, JsonValue] | None = None) -> None:
        """Cancel a batch and its open jobs, unless it has ended. `error`: if the server does so by itself."""
        with self._database.transaction() as transaction:
            values = {"status": "cancelling", "cancelling_at": self._now(), "error": error}
            if self._update(batch, BATCHES.c.status.in_(("validating", "in_progress")), **values):
                self._rows.cancel(transaction, [_jobs_of(batch)])

    def lines(self, batch: Batch, after: int, limit: int) -> Sequence[StoredLine]:
        """Return up to `limit` lines that are read, starting after the line with number `after`."""
        query = select(BATCH_LINES.c.line, BATCH_LINES.c.custom_id, BATCH_LINES.c.error.label("problem"), JOBS)
        query = query.join_from(
            BATCH_LINES, JOBS, and_(BATCH_LINES.c.job == JOBS.c.id, JOBS.c.deleted_at.is_(None)), isouter=True
        )
        query = query.where(BATCH_LINES.c.batch == batch.id, BATCH_LINES.c.line > after)
        rows = self._database.rows(query.order_by(BATCH_LINES.c.line).limit(limit))
        return [StoredLine(row.line, row.custom_id, None if row.id is None else job_of(row), row.problem) for row in rows]

    def end(self, batch: Batch, status: BatchStatus, **values: Any) -> None:
        """End a batch in which nothing has changed, and add its webhook messages. Its lines are in its files.

        Files of jobs are kept from now on as long as if they had just ended.
        """
        with self._database.transaction() as transaction:
            if self._update(batch, BATCHES.c.status == batch.status, status=status, ended_at=self._now(), **values):
                transaction.connection.execute(delete(BATCH_LINES).where(BATCH_LINES.c.batch == batch.id))
                self._rows.keep(transaction, _jobs_of(batch))
                self._rows.add_messages(transaction, batch.tenant, f"batch.{status}", batch.id)

    def _update(self, batch: Batch, *where: ColumnElement[bool], **values: Any) -> bool:
        """Update a batch that has not ended. Return whether it matches `where`."""
        with self._database.transaction() as transaction:
            statement = update(BATCHES).where(BATCHES.c.id == batch.id, IS_RUNNING, *where).values(**values)
            return transaction.connection.execute(statement).rowcount > 0


INSERT_LINE = insert(BATCH_LINES)


def _of(batch_id: str, tenant: str) -> Select[Any]:
    return select(BATCHES).where(BATCHES.c.id == batch_id, BATCHES.c.tenant == tenant)


def _jobs_of(batch: Batch) -> ColumnElement[bool]:
    return and_(JOBS.c.batch.is_not(None), JOBS.c.batch == batch.id)


def _batch(row: Row[Any]) -> Batch:
    return Batch.model_validate(row, from_attributes=True)
