"""Run batches in the background: count the lines of their files, store them as jobs, a few at a time, and write their results.

Tenants take turns: each step does a bounded piece of work for one batch of a tenant.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.online.api.batch_files import (
    CANCELLED_LINE,
    EXPIRED_LINE,
    KEY_REMOVED,
    BatchFiles,
    batch_error,
    line_error,
)
from vidgen_ray.online.api.image_routes import image_fields
from vidgen_ray.online.api.requests import BatchRequest, CreateImages, CreateVideo
from vidgen_ray.online.api.video_routes import fields_of_shot, video_fields
from vidgen_ray.online.api_error import ApiError, invalid
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.batches import Batch, BatchLine, BatchStatus
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.jobs import Job, JobKind
from vidgen_ray.online.uploads import json_object

_POLL_S = 0.5
_ROUND_S = 0.5
"""Most seconds for which a round waits for its steps. A longer one continues beside the next rounds."""
LOST_S = 5.0
"""Seconds without a look after another replica has read the same lines, while nothing is left of a budget, and after an error
of the database."""
QUEUED = 64
"""Queued jobs of the batches of a tenant. Each job of a higher priority moves all of them back."""
CHUNK_LINES, _CHUNK_BYTES = 1_000, 8 << 20
"""Most lines that are not blank, and about the most bytes, that are read at once."""
COUNTED_LINES = 20_000
"""Most lines that are passed at once."""
_PAUSE_AFTER_S = 0.005
"""Seconds after which requests are answered between two lines that are checked: a line can take 30 ms."""
_STEP_S = 0.25
"""Seconds after which a step checks no further line."""
MAX_LINE_BYTES = 1 << 20
MAX_LINES = 1_000_000
MAX_FAILURES = 20
"""Failed steps in a row after which a batch fails, about two hours after the first one."""
FIRST_BATCH_BACKOFF_S, BATCH_BACKOFF_S = 1.0, 600.0
"""Seconds after the first failed step, doubled by each further one, and the most."""
INPUT_WAIT_S = 600.0
"""Seconds for which a batch waits for an input file that cannot be found."""
_FORMAT = "Send a JSON object a line, with custom_id, url and body."
BOM = b"\xef\xbb\xbf"
_INPUT_LOST = invalid(
    None, "The input file was lost before all lines were read. Upload it, and create the batch again.", "input_lost"
)
_INTERNAL_ERROR = ApiError(500, "Internal server error.", code="internal_error")

log = logging.getLogger("ray.serve")


async def run_batches(server: ServerContext) -> None:
    """Run all batches until cancelled, also after an error. Several processes may do so: each line is stored by one."""
    runner = BatchRunner(server)
    try:
        while True:
            pause_s = LOST_S
            try:
                pause_s = await runner.round()
            except (SQLAlchemyError, OSError) as error:
                log.warning("batches wait: %s", error)
            except Exception:
                log.exception("the round of batches failed and is repeated")
            await asyncio.sleep(pause_s)
    finally:
        runner.close()


class BatchRunner:
    """Runs the batches of all tenants in turn."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server
        self._batches = server.store.batches
        self._uploads = server.job_service.uploads
        self._runs: dict[str, _Run] = {}
        """Id of each running batch -> what this process knows about it."""

    async def round(self) -> float:
        """Begin a step of one batch of each tenant that has none in progress. Return the seconds until the next round."""
        running = await asyncio.to_thread(self._batches.running)
        self._forget_ended({batch.id for batch in running})
        of_tenants = Counter(batch.tenant for batch in running)
        for batch in self._next_of_each_tenant(running):
            max_queued = max(1, QUEUED // of_tenants[batch.tenant])
            self._runs[batch.id].step = asyncio.ensure_future(self._step(batch, max_queued))
        if steps := self._steps:
            await asyncio.wait(steps, timeout=_ROUND_S)
        idle = [run.next_look for run in self._runs.values() if not run.is_busy]
        return min(_POLL_S, max(0.0, min(idle, default=float("inf")) - time.monotonic()))

    def close(self) -> None:
        """Stop all steps, and delete unfinished files."""
        for step in self._steps:
            step.cancel()
        for run in self._runs.values():
            run.close()

    @property
    def _steps(self) -> Sequence[asyncio.Future[None]]:
        """Steps in progress."""
        return [run.step for run in self._runs.values() if run.step is not None and run.is_busy]

    def _forget_ended(self, running: Collection[str]) -> None:
        ended = [each for each, run in self._runs.items() if each not in running and not run.is_busy]
        for batch_id in ended:
            self._runs.pop(batch_id).close()

    def _next_of_each_tenant(self, running: Iterable[Batch]) -> Iterable[Batch]:
        """Return for each tenant without a step in progress the due batch that has waited for the longest time."""
        now = time.monotonic()
        chosen: dict[str, Batch] = {}
        busy = set[str]()
        for batch in running:
            run = self._runs.setdefault(batch.id, _Run())
            if run.is_busy:
                busy.add(batch.tenant)
            if run.status != batch.status:
                # A cancelled batch does not wait for the next attempt.
                run.status, run.next_look = batch.status, min(run.next_look, now)
            other = chosen.get(batch.tenant)
            if run.next_look <= now and (other is None or run.next_look < self._runs[other.id].next_look):
                chosen[batch.tenant] = batch
        return [batch for tenant, batch in chosen.items() if tenant not in busy]

    async def _step(self, batch: Batch, max_queued: int) -> None:
        """Do the next step of a batch. An error delays only this batch."""
        run = self._runs[batch.id]
        try:
            pause_s = await self._advance(batch, run, max_queued)
        except SQLAlchemyError as error:
            log.warning("%s waits for the database: %s", batch.id, error)
            pause_s = LOST_S
        except OSError as error:
            reason = error.strerror or type(error).__name__
            log.warning("%s of %s: its files cannot be read or written: %s", batch.id, batch.tenant, reason)
            message = f"The files of the batch could not be read or written: {reason}. Its jobs are kept."
            pause_s = await self._failed(batch, run, ApiError(500, message, code="storage"))
        except Exception:
            log.exception("a step of %s failed", batch.id)
            pause_s = await self._failed(batch, run, _INTERNAL_ERROR)
        run.next_look = time.monotonic() + pause_s

    async def _failed(self, batch: Batch, run: _Run, error: ApiError) -> float:
        """Count a failed step. Return the seconds until the next one."""
        run.close()
        place = batch.status, batch.offset, batch.total
        run.failures = run.failures + 1 if run.failed_at == place else 1
        run.failed_at = place
        if run.failures < MAX_FAILURES:
            return min(BATCH_BACKOFF_S, FIRST_BATCH_BACKOFF_S * 2.0 ** (run.failures - 1))
        log.error("%s of %s has failed: %s", batch.id, batch.tenant, error.message)
        try:
            await in_write_thread(lambda: self._batches.end(batch, "failed", error=batch_error(error)))
        except (SQLAlchemyError, OSError) as later:
            log.warning("%s: %s", batch.id, later)
        return BATCH_BACKOFF_S

    async def _advance(self, batch: Batch, run: _Run, max_queued: int) -> float:
        """Do the next step of a batch, which may have `max_queued` queued jobs. Return the seconds until the next one."""
        if batch.status == "finalizing":
            return await self._write(batch, run)
        is_read = bool(batch.total) and not batch.unread
        if not is_read and batch.error is None:
            return await self._read(batch, run, max_queued)
        if any(await asyncio.to_thread(self._batches.open_jobs, batch)):
            return _POLL_S
        if batch.status == "cancelling":
            return await self._write(batch, run)
        await in_write_thread(self._batches.finalize, batch)
        return 0

    async def _read(self, batch: Batch, run: _Run, max_queued: int) -> float:
        """Read a piece of the input file."""
        path = await asyncio.to_thread(self._uploads.find, batch.tenant, batch.input_file_id)
        if path is None:
            return await self._wait_for_input(batch, run)
        run.missing_since = None
        if not batch.total:
            return await self._count(batch, run, path)
        queued, _ = await asyncio.to_thread(self._batches.open_jobs, batch)
        return await self._add(batch, run, path, max_queued - queued)

    async def _wait_for_input(self, batch: Batch, run: _Run) -> float:
        """Wait for the input file: its disk may be away, or another machine may have the file. After a time it is lost."""
        if not self._uploads.exists and self._is_shared:
            raise FileNotFoundError(2, "the folder of uploads is missing")
        if run.missing_since is None:
            run.missing_since = time.monotonic()
            log.warning("%s of %s: its input file is missing", batch.id, batch.tenant)
        end = batch.cancelling_at or batch.expires_at
        has_waited = self._is_shared and time.monotonic() - run.missing_since >= INPUT_WAIT_S
        if has_waited or time.time() >= end + INPUT_WAIT_S:
            await self._lose_input(batch)
            return 0
        return _POLL_S

    @property
    def _is_shared(self) -> bool:
        """All API processes see the same uploads."""
        return self._server.outputs.storage.local is not None

    async def _lose_input(self, batch: Batch) -> None:
        log.error("%s of %s: its input file is lost, %d lines were not read", batch.id, batch.tenant, batch.unread)
        # Jobs of the lines that were read go on.
        await in_write_thread(self._batches.lose_input, batch, batch_error(_INPUT_LOST))

    async def _count(self, batch: Batch, run: _Run, path: Path) -> float:
        """Count further lines of the input file, and start the batch if these are all."""
        try:
            is_done = await asyncio.to_thread(run.count.add_piece, path)
            if is_done:
                size = (await asyncio.to_thread(path.stat)).st_size
                await in_write_thread(self._batches.start, batch, run.count.total, size)
        except ApiError as refused:
            problem = batch_error(refused)
            status: BatchStatus = "cancelled" if batch.status == "cancelling" else "failed"
            await in_write_thread(lambda: self._batches.end(batch, status, error=problem))
        return 0

    async def _add(self, batch: Batch, run: _Run, path: Path, room: int) -> float:
        """Store further lines, with at most `room` new jobs."""
        tenant = self._server.auth.keys.by_id(batch.key_id)
        unread = _reason_not_to_start(batch, tenant)
        if unread is None and tenant is None:
            if not run.has_warned:
                log.warning("%s of %s waits: its key is not in the keys file, or has expired", batch.id, batch.tenant)
                run.has_warned = True
            return LOST_S
        if unread is None and room <= 0:
            return _POLL_S
        start = max((batch.line, batch.offset), run.passed)
        read = await asyncio.to_thread(_read_lines, path, *start)
        if not read.lines:
            run.passed = read.line, read.offset
            if read.is_end:
                # Shorter than it was when it was counted.
                await self._lose_input(batch)
            return 0
        lines = await self._checked(batch, tenant, read.lines, room, unread)
        budgets = tenant.limits.budgets if tenant is not None else ()
        stored = await in_write_thread(self._batches.add, batch, lines, self._server.job_service.files_exist, budgets)
        self._server.job_service.jobs_changed()
        return 0 if stored else LOST_S

    async def _checked(
        self,
        batch: Batch,
        tenant: Tenant | None,
        read: Sequence[tuple[int, int, bytes | None]],
        room: int,
        unread: ApiError | None,
    ) -> Sequence[BatchLine]:
        """Return lines with their jobs or errors, until there are `room` jobs or this takes too long."""
        lines = list[BatchLine]()
        now = time.monotonic()
        deadline, pause_at = now + _STEP_S, now + _PAUSE_AFTER_S
        for each in read:
            line = await _line(self._server, tenant, batch, *each, unread)
            lines.append(line)
            room -= isinstance(line.result, Job)
            now = time.monotonic()
            if room <= 0 or now > deadline:
                break
            if now > pause_at:
                # A request needs several turns of the loop.
                await asyncio.sleep(now - pause_at)
                pause_at = time.monotonic() + _PAUSE_AFTER_S
        return lines

    async def _write(self, batch: Batch, run: _Run) -> float:
        """Write further lines of the files, and end the batch if these are all."""
        if run.files is None or run.files.batch != batch:
            run.close()
            run.files = await asyncio.to_thread(BatchFiles, self._server, batch)
        if not await asyncio.to_thread(run.files.write_piece):
            await in_write_thread(run.files.end_batch)
            run.close()
        return 0


class _Run:
    """What a process knows about a running batch."""

    def __init__(self) -> None:
        self.next_look = 0.0
        """Time of the next step."""
        self.step: asyncio.Future[None] | None = None
        """Latest step."""
        self.status: BatchStatus | None = None
        """Latest known status."""
        self.failures = 0
        """Failed steps in a row."""
        self.failed_at: object = None
        """State of the batch at these."""
        self.missing_since: float | None = None
        """Time at which the input file was first missing."""
        self.has_warned = False
        self.count = _LineCount()
        self.passed = (0, 0)
        """Number and offset of the last blank line that was passed."""
        self.files: BatchFiles | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a step is in progress."""
        return self.step is not None and not self.step.done()

    def close(self) -> None:
        """Delete unfinished files."""
        files, self.files = self.files, None
        if files is not None:
            files.close()


def _reason_not_to_start(batch: Batch, tenant: Tenant | None) -> ApiError | None:
    """Return why unread lines of a batch do not start any more, or `None`."""
    if batch.status == "cancelling":
        return CANCELLED_LINE
    if time.time() <= batch.expires_at:
        return None
    return KEY_REMOVED if tenant is None else EXPIRED_LINE


def numbered_lines(file: BinaryIO, number: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the numbers and contents of the lines from here on, `None` for a line that is too long.

    `number`: of the last line before.
    """
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        is_long = False
        while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            is_long, line = True, rest
        if number == 1:
            line = line.removeprefix(BOM)
        yield number, None if is_long else line


class _LineCount:
    """Number of the lines of an input file that are not blank, counted piece by piece."""

    def __init__(self) -> None:
        self.total = 0
        self._number = self._offset = 0
        """Number of the last line that was counted, and where it ends."""
        self._is_jsonl = False

    def add_piece(self, path: Path) -> bool:
        """Count further lines. Return whether these are all. May be called again after that, and after an error.

        Raises OSError, and ApiError if it cannot be an input file.
        """
        piece = _read_lines(path, self._number, self._offset, MAX_LINES)
        # Blank lines count, too: reading them takes time.
        if piece.line > MAX_LINES:
            raise invalid(None, f"The input file has more than {MAX_LINES} lines. Divide it.", "too_many_lines")
        self.total += len(piece.lines)
        self._is_jsonl |= any(content is not None and content.lstrip().startswith(b"{") for _, _, content in piece.lines)
        self._number, self._offset = piece.line, piece.offset
        if not piece.is_end:
            return False
        if not self.total:
            raise invalid(None, f"The input file has no lines. {_FORMAT}", "empty_file")
        if not self._is_jsonl:
            raise invalid(None, f"The input file is not JSONL in UTF-8. {_FORMAT}", "invalid_json")
        return True


class _Read(NamedTuple):
    """Piece of an input file."""

    lines: Sequence[tuple[int, int, bytes | None]]
    """Lines that are not blank: number, bytes of the file up to the end of the line, and content."""
    line: int
    """Number of the last line, which may be blank."""
    offset: int
    """Bytes of the file up to its end."""
    is_end: bool


def _read_lines(path: Path, line: int, offset: int, max_lines: int = CHUNK_LINES) -> _Read:
    """Read further lines, up to `max_lines` that are not blank, after a line with this number, which ends at this offset."""
    lines: list[tuple[int, int, bytes | None]] = []
    number, end = line, offset
    with path.open("rb") as file:
        file.seek(offset)
        for number, content in numbered_lines(file, line):
            end = file.tell()
            if content is None or not content.isspace():
                lines.append((number, end, content))
            if len(lines) == max_lines or number - line == COUNTED_LINES or end - offset > _CHUNK_BYTES:
                return _Read(lines, number, end, is_end=False)
    return _Read(lines, number, end, is_end=True)


async def _line(
    server: ServerContext,
    tenant: Tenant | None,
    batch: Batch,
    number: int,
    offset: int,
    content: bytes | None,
    unread: ApiError | None,
) -> BatchLine:
    """Return a line with its job, or with an error: `unread` if it is given."""
    custom_id = None
    try:
        if content is None:
            raise invalid(None, f"longer than {MAX_LINE_BYTES} bytes. Upload images, and send their ids.", "too_large")
        fields = json_object(content)
        given = fields.get("custom_id")
        custom_id = given if isinstance(given, str) and 0 < len(given) <= 512 and "\0" not in given else None
        if unread is not None or tenant is None:
            return BatchLine(number, offset, custom_id, line_error(unread or CANCELLED_LINE))
        request = BatchRequest.parse(fields)
        if request.url != batch.endpoint:
            raise invalid("url", f"got {request.url[:100]!r}, must be the endpoint of the batch, {batch.endpoint}")
        return BatchLine(number, offset, custom_id, await _job(server, tenant, batch, request.body))
    except ApiError as error:
        return BatchLine(number, offset, custom_id, line_error(error))
    except (SQLAlchemyError, OSError):
        raise
    # A bug must stop only its line.
    except Exception:
        log.exception("line %d of %s failed", number, batch.id)
        return BatchLine(number, offset, custom_id, line_error(_INTERNAL_ERROR))


async def _job(server: ServerContext, tenant: Tenant, batch: Batch, body: Mapping[str, Any]) -> Job:
    """Return the job of the body of a line. Raises ApiError."""
    if batch.endpoint == "/v1/shots":
        kind, (fields, returned) = JobKind.SHOT, fields_of_shot(server, body)
        shots = [fields]
    elif batch.endpoint == "/v1/videos":
        video = CreateVideo.parse(body)
        kind, (fields, returned) = JobKind.VIDEO, await video_fields(server, tenant, video)
        shots = video.repeated(fields)
    else:
        images = CreateImages.parse(body)
        if images.stream or (images.response_format != "url" and "response_format" in images.model_fields_set):
            name = "stream" if images.stream else "response_format"
            raise invalid(name, "is not supported in batches, whose output has the path of each image")
        kind, (fields, returned) = JobKind.IMAGE, await image_fields(server, tenant, images)
        shots = images.repeated(fields)
    if len(shots) > 1:
        raise invalid("n", f"got {len(shots)} results, must be 1 in a batch: send a line for each")
    job = await in_write_thread(server.job_service.new_job, tenant, kind, {**shots[0], "priority": "low"}, returned)
    start_by = min(job.start_by or batch.expires_at, batch.expires_at)
    return job.model_copy(update={"batch": batch.id, "start_by": start_by})
