"""Batches: the record of one, and its lines, each of which has a job or an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, JsonValue
from sqlalchemy import ColumnElement, Row, ScalarSelect, Select, and_, bindparam, delete, func, insert, select, update

from vidgen_ray.errors import StrictModel, VidgenError
from vidgen_ray.online.server_settings import Budget
from vidgen_ray.online.store.budgets import BudgetExceeded
from vidgen_ray.online.store.database import BATCH_LINES, BATCHES, JOBS, Database, Transaction
from vidgen_ray.online.store.inputs import check_space, keep_upload
from vidgen_ray.online.store.jobs import IS_OPEN, OPEN_STATES, InputMissing, Job, JobRows, JobState, Timestamp, job_of, storable

BatchStatus = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
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
    finalizing_at: Timestamp | None = Field(None, description="Time at which all lines had ended and its files were begun.")
    expires_at: Timestamp = Field(description="Time after which no line starts.")
    cancelling_at: Timestamp | None = Field(None, description="Time at which it was cancelled.")
    metadata: dict[str, str] = Field(description="As in the request.")
    model: str | None = Field(None, description="Model of its first job.")


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
    accepted: int = 0
    """Lines that are read and have, or had, a job."""
    completed: int = 0
    """Lines in the output file. 0 until the batch has ended."""
    line: int = 0
    """Number of the last line that is read."""
    offset: int = 0
    """Bytes of the input file that are read."""
    error: dict[str, JsonValue] | None = None
    """Why the batch failed: code, message and param."""
    reserved_bytes: int = 0
    """Bytes of the tenant's storage that are kept for its output files while it runs."""
    output_expires_s: int | None = None
    """Seconds after which its output files expire. `None`: as other uploads."""

    @property
    def unread(self) -> int:
        """Lines that are not read yet."""
        return self.total - self.accepted - self.rejected


class BatchLine(NamedTuple):
    """Line of an input file, with a new job or an error: code, message, param, type and status."""

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
    """Lines of a batch: all, and those that have ended."""

    total: int
    completed: int
    failed: int


class TooManyBatches(VidgenError):
    """The tenant has as many running batches as its key allows."""


BYTES_PER_LINE = 2_048
"""Bytes of a line of an output file, without what it repeats of the input file."""
_SHOWN_LETTERS = 100
"""Letters of a custom id that an error repeats."""


class OtherBatch(VidgenError):
    """The idempotency key was used before with a different batch."""


class Batches:
    """Batches of the store."""

    def __init__(self, database: Database, rows: JobRows, now: Callable[[], float]) -> None:
        self._database = database
        self._rows = rows
        self._now = now

    def create(self, batch: Batch, max_open: int | None = None, max_bytes: int | None = None) -> Batch:
        """Store a new batch, or return the stored one with its id. Reserves space for its output files.

        `max_open`: most running batches of the tenant, `max_bytes`: that it may store.
        Raises OtherBatch if that has another content, UploadMissing if the input file is not an upload of the tenant,
        TooManyBatches and StorageFull.
        """
        with self._database.transaction() as transaction:
            connection = transaction.connection
            row = connection.execute(_of(batch.id, batch.tenant)).one_or_none()
            if row is None:
                file = keep_upload(transaction, batch.tenant, batch.input_file_id, self._now())
                own = IS_RUNNING, BATCHES.c.tenant == batch.tenant
                running = connection.scalar(select(func.count()).select_from(BATCHES).where(*own)) or 0
                if max_open is not None and running >= max_open:
                    raise TooManyBatches(f"At most {max_open} batches of a tenant may run at once. Wait until one has ended")
                reserved = reserved_bytes(file.lines, file.bytes)
                if max_bytes is not None:
                    check_space(connection, batch.tenant, reserved, max_bytes)
                batch = batch.model_copy(update={"reserved_bytes": reserved})
                connection.execute(insert(BATCHES).values({**batch.model_dump(mode="json"), "seq": transaction.version}))
                return batch
        stored = _batch(row)
        if any(getattr(stored, field) != getattr(batch, field) for field in REQUEST_FIELDS):
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

    def counts(self, batch: Batch) -> Counts:
        """Return how many lines there are, and how many have ended, all at one time."""
        rows = self._database.rows(COUNTS, {"of_batch": batch.id})
        if not rows:
            return Counts(batch.total, batch.completed, batch.total - batch.completed)
        (row,) = rows
        if row.ended_at is not None:
            return Counts(row.total, row.completed, row.total - row.completed)
        # Lines whose jobs were deleted fail, too.
        return Counts(row.total, row.done, row.read - row.done - row.open)

    def open_jobs(self, batch: Batch) -> tuple[int, int]:
        """Return how many jobs of a batch are queued, and how many are in progress, without deleted ones."""
        own = _jobs_of(batch), IS_OPEN, JOBS.c.deleted_at.is_(None)
        query = select(JOBS.c.state, func.count().label("jobs")).where(*own).group_by(JOBS.c.state)
        jobs = {row.state: row.jobs for row in self._database.rows(query)}
        return jobs.get(JobState.QUEUED, 0), jobs.get(JobState.IN_PROGRESS, 0)

    def start(self, batch: Batch, total: int, size: int) -> None:
        """Store how many lines a batch has, in a file of so many bytes. They are read from now on."""
        with self._database.transaction():
            self._update(batch, total=total, reserved_bytes=reserved_bytes(total, size))
            self._update(batch, BATCHES.c.status == "validating", status="in_progress", in_progress_at=self._now())

    def lose_input(self, batch: Batch, error: dict[str, JsonValue]) -> None:
        """Store why no further line of a batch is read. It fails when its jobs have ended."""
        self._update(batch, error=error)

    def finalize(self, batch: Batch) -> None:
        """Begin to write the files of a batch."""
        begun = BATCHES.c.status.in_(("validating", "in_progress"))
        self._update(batch, begun, status="finalizing", finalizing_at=self._now())

    def add(
        self, batch: Batch, lines: Sequence[BatchLine], files_exist: Callable[[Job], bool], budgets: Sequence[Budget] = ()
    ) -> bool:
        """Store the next lines of a batch and their jobs, until a budget of the key is reserved or spent that will reset.

        `files_exist`: see `storable`.

        A line with the `custom_id` of an earlier one gets an error without it. Return False, and store nothing, if another
        process has read these lines, the batch was cancelled after `batch` was read, or nothing is left of a budget.
        """
        unchanged = BATCHES.c.offset == batch.offset, BATCHES.c.status == batch.status
        with self._database.transaction() as transaction:
            if not self._update(batch, *unchanged, offset=batch.offset):
                return False
            rows = self._line_rows(transaction, batch, lines, files_exist, budgets)
            if not rows:
                return False
            transaction.connection.execute(insert(BATCH_LINES), rows)
            last = lines[len(rows) - 1]
            jobs = [line.result for line, row in zip(lines, rows, strict=False) if row["job"] is not None]
            read = {"accepted": BATCHES.c.accepted + len(jobs), "rejected": BATCHES.c.rejected + len(rows) - len(jobs)}
            self._update(batch, line=last.number, offset=last.offset, **read)
            if batch.model is None and jobs and isinstance(jobs[0], Job):
                self._update(batch, model=str(jobs[0].request.get("model"))[:128])
            return True

    def _line_rows(
        self,
        transaction: Transaction,
        batch: Batch,
        lines: Sequence[BatchLine],
        files_exist: Callable[[Job], bool],
        budgets: Sequence[Budget],
    ) -> Sequence[dict[str, Any]]:
        """Store the jobs of lines, until a budget is reserved that will reset. Return the rows of these lines."""
        rows = list[dict[str, Any]]()
        known = self._custom_ids(transaction, batch, lines)
        jobs = 0
        for line in lines:
            custom_id, result = line.custom_id, line.result
            if custom_id in known:
                message = f"custom_id: {custom_id[:_SHOWN_LETTERS]!r} is that of an earlier line, must be unique"
                custom_id, result = None, {"code": "duplicate_custom_id", "message": message, "param": "custom_id"}
            if isinstance(result, Job):
                try:
                    self._rows.insert(transaction, storable(result, files_exist), is_first=not jobs, budgets=budgets)
                    jobs += 1
                except InputMissing as missing:
                    result = {"code": "file_not_found", "message": str(missing)}
                except BudgetExceeded as exceeded:
                    if exceeded.can_pass_later:
                        break
                    result = {"code": "budget_exceeded", "message": str(exceeded), "type": "insufficient_quota", "status": 429}
            if custom_id is not None:
                known.add(custom_id)
            outcome = {"job": result.id, "error": None} if isinstance(result, Job) else {"job": None, "error": result}
            rows.append({"batch": batch.id, "line": line.number, "custom_id": custom_id, **outcome})
        return rows

    def _custom_ids(self, transaction: Transaction, batch: Batch, lines: Sequence[BatchLine]) -> set[str]:
        """Return those of the custom ids of new lines that earlier lines have."""
        new = [line.custom_id for line in lines if line.custom_id is not None]
        query = select(BATCH_LINES.c.custom_id).where(BATCH_LINES.c.batch == batch.id, BATCH_LINES.c.custom_id.in_(new))
        return set(transaction.connection.scalars(query)) if new else set()

    def cancel(self, batch: Batch) -> None:
        """Cancel a batch and its open jobs, unless it has ended."""
        with self._database.transaction() as transaction:
            begun = BATCHES.c.status.in_(("validating", "in_progress", "finalizing"))
            if self._update(batch, begun, status="cancelling", cancelling_at=self._now()):
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

    def end(
        self,
        batch: Batch,
        status: BatchStatus,
        record_files: Callable[[], Mapping[str, str]] = dict,
        error: dict[str, JsonValue] | None = None,
        completed: int = 0,
    ) -> None:
        """End a batch whose status has not changed, cancel its open jobs, and add its webhook messages.

        `record_files` records its output files in the same transaction and returns their ids. `error`: why it failed. Files of
        jobs are kept from now on as long as if they had just ended.
        """
        with self._database.transaction() as transaction:
            if not self._update(batch, BATCHES.c.status == batch.status, reserved_bytes=0):
                return
            values = {**record_files(), "completed": completed, **({"error": error} if error else {})}
            self._update(batch, status=status, ended_at=self._now(), **values)
            transaction.connection.execute(delete(BATCH_LINES).where(BATCH_LINES.c.batch == batch.id))
            self._rows.cancel(transaction, [_jobs_of(batch), IS_OPEN])
            self._rows.keep(transaction, _jobs_of(batch))
            self._rows.add_messages(transaction, batch.tenant, f"batch.{status}", batch.id)

    def delete_ended(self, before: float) -> None:
        """Delete the batches that have ended before this time, in seconds since 1970. Their files are uploads."""
        with self._database.transaction() as transaction:
            transaction.connection.execute(delete(BATCHES).where(BATCHES.c.ended_at.is_not(None), BATCHES.c.ended_at < before))

    def _update(self, batch: Batch, *where: ColumnElement[bool], **values: Any) -> bool:
        """Update a batch that has not ended. Return whether it matches `where`."""
        with self._database.transaction() as transaction:
            statement = update(BATCHES).where(BATCHES.c.id == batch.id, IS_RUNNING, *where).values(**values)
            return transaction.connection.execute(statement).rowcount > 0


REQUEST_FIELDS = "endpoint", "input_file_id", "completion_window", "metadata", "output_expires_s"
"""Fields of a batch that its request sets."""


def _jobs_in(*states: JobState) -> ScalarSelect[int]:
    """Return the number of jobs of a batch in these states, without deleted ones."""
    of_batch = JOBS.c.batch.is_not(None), JOBS.c.batch == BATCHES.c.id, JOBS.c.deleted_at.is_(None)
    return select(func.count()).select_from(JOBS).where(*of_batch, JOBS.c.state.in_(states)).scalar_subquery()


# One statement sees one state of the database.
COUNTS = select(
    *BATCHES.c["ended_at", "total", "completed"],
    (BATCHES.c.accepted + BATCHES.c.rejected).label("read"),
    _jobs_in(JobState.COMPLETED).label("done"),
    _jobs_in(*OPEN_STATES).label("open"),
).where(BATCHES.c.id == bindparam("of_batch"))


def reserved_bytes(lines: int, size: int) -> int:
    """Return the bytes that the output files of an input file may have."""
    return lines * BYTES_PER_LINE + size


def _of(batch_id: str, tenant: str) -> Select[Any]:
    return select(BATCHES).where(BATCHES.c.id == batch_id, BATCHES.c.tenant == tenant)


def _jobs_of(batch: Batch) -> ColumnElement[bool]:
    return and_(JOBS.c.batch.is_not(None), JOBS.c.batch == batch.id)


def _batch(row: Row[Any]) -> Batch:
    return Batch.model_validate(row, from_attributes=True)
