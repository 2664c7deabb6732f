"""Run batches in the background: store their lines as jobs, a few at a time, and write their files when all have ended."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO

from pydantic import JsonValue
from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.graph import file_sizes
from vidgen_ray.online.api.image_routes import image_fields
from vidgen_ray.online.api.requests import BatchRequest, CreateImages, CreateVideo
from vidgen_ray.online.api.responses import CANCELLED, JSON_OBJECT, ImageResult, ImagesResponse, size_text
from vidgen_ray.online.api.video_routes import fields_of_shot, video_fields, video_of
from vidgen_ray.online.api_error import ApiError, invalid
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.queue_estimate import JobEstimate
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.batches import Batch, BatchLine, BatchStatus, StoredLine
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.jobs import LATE, Job, JobError, JobKind, JobState
from vidgen_ray.online.uploads import json_object

_POLL_S = 0.5
LOST_S = 5.0
"""Seconds without a look after another replica has read the same lines, so that one of them reads the next ones, and while
nothing is left of a budget."""
QUEUED = 64
"""Queued jobs of the batches of a tenant. Each job of a higher priority moves all of them back."""
CHUNK_LINES, _CHUNK_BYTES = 1_000, 8 << 20
"""Most lines, and about the most bytes, that are read at once."""
MAX_LINE_BYTES = 1 << 20
MAX_LINES = 1_000_000
_FORMAT = "Send a JSON object a line, with custom_id, url and body."
BOM = b"\xef\xbb\xbf"
_CANCELLED_LINE = invalid(None, "The batch was cancelled before this line ended.", "batch_cancelled")
_EXPIRED_LINE = invalid(None, "The line did not start within the completion window. Send it again.", "batch_expired")
_DELETED_LINE = invalid(None, "The result was deleted before the batch ended.", "deleted")
_KEY_REMOVED = invalid(None, "The key was removed or has expired. Create the batch again with another key.", "invalid_api_key")

log = logging.getLogger("ray.serve")


async def run_batches(server: ServerContext) -> None:
    """Run all batches until cancelled. Several processes may do so: each line is stored by one of them."""
    next_looks: dict[str, float] = {}
    while True:
        soonest = math.inf
        # The database or the storage may come back.
        try:
            running = await asyncio.to_thread(server.store.batches.running)
            next_looks = {batch.id: next_looks.get(batch.id, 0.0) for batch in running}
            of_tenants = Counter(batch.tenant for batch in running)
            for batch in running:
                if next_looks[batch.id] <= time.monotonic():
                    pause_s = await advance(server, batch, max(1, QUEUED // of_tenants[batch.tenant]))
                    next_looks[batch.id] = time.monotonic() + pause_s
            soonest = min(next_looks.values(), default=math.inf)
        except (SQLAlchemyError, OSError) as error:
            log.warning("batches: %s", error)
        await asyncio.sleep(min(_POLL_S, max(0.0, soonest - time.monotonic())))


async def advance(server: ServerContext, batch: Batch, max_queued: int = QUEUED) -> float:
    """Do the next step of a batch, which may have `max_queued` queued jobs. Return the seconds until the next one."""
    batches = server.store.batches
    tenant = server.auth.keys.by_id(batch.key_id)
    path = await asyncio.to_thread(server.job_service.uploads.find, batch.tenant, batch.input_file_id)
    if batch.status != "cancelling" and tenant is None:
        await in_write_thread(batches.cancel, batch, _error(_KEY_REMOVED))
        return 0
    if path is None and time.time() < batch.expires_at:
        # Another machine has the file, unless it was deleted by hand.
        return _POLL_S
    if batch.status == "validating" and path is not None:
        try:
            total = await asyncio.to_thread(_count_lines, path)
            await in_write_thread(batches.start, batch, total)
        except ApiError as refused:
            problem = _error(refused)
            await in_write_thread(lambda: batches.end(batch, "failed", error=problem))
        return 0
    queued, in_progress = await asyncio.to_thread(batches.open_jobs, batch)
    unread = _CANCELLED_LINE if batch.status == "cancelling" else _EXPIRED_LINE if time.time() > batch.expires_at else None
    limit = CHUNK_LINES if unread else max_queued - queued
    read = await asyncio.to_thread(_read_lines, path, batch, limit) if path is not None and limit > 0 else []
    if read:
        lines = [await _line(server, tenant, batch, *line, unread) for line in read]
        budgets = tenant.limits.budgets if tenant is not None else ()
        stored = await in_write_thread(batches.add, batch, lines, server.job_service.files_exist, budgets)
        server.job_service.jobs_changed()
        return 0 if stored else LOST_S
    if queued or in_progress:
        return _POLL_S
    await in_write_thread(_finish, server, batch)
    return 0


def numbered_lines(file: BinaryIO, number: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the numbers and contents of the lines from here on that are not blank, `None` for a line that is too long.

    `number`: of the last line before.
    """
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        is_long = False
        while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            is_long, line = True, rest
        if number == 1:
            line = line.removeprefix(BOM)
        # Blank lines count, too: reading them takes time.
        if is_long or line.strip() or number > MAX_LINES:
            yield number, None if is_long else line


def _count_lines(path: Path) -> int:
    """Return the number of lines of an input file that are not blank. Raises ApiError if it cannot be one."""
    total, is_jsonl = 0, False
    with path.open("rb") as file:
        for number, line in numbered_lines(file, 0):
            total += 1
            is_jsonl |= line is not None and line.lstrip().startswith(b"{")
            if number > MAX_LINES:
                raise invalid(None, f"The input file has more than {MAX_LINES} lines. Divide it.", "too_many_lines")
    if not total:
        raise invalid(None, f"The input file has no lines. {_FORMAT}", "empty_file")
    if not is_jsonl:
        raise invalid(None, f"The input file is not JSONL in UTF-8. {_FORMAT}", "invalid_json")
    return total


def _read_lines(path: Path, batch: Batch, limit: int) -> list[tuple[int, int, bytes | None]]:
    """Read up to `limit` lines after those that are read: number, bytes of the file up to the end of the line, and content."""
    lines: list[tuple[int, int, bytes | None]] = []
    with path.open("rb") as file:
        file.seek(batch.offset)
        for number, line in numbered_lines(file, batch.line):
            lines.append((number, file.tell(), line))
            if len(lines) == limit or file.tell() - batch.offset > _CHUNK_BYTES:
                break
    return lines


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
            return BatchLine(number, offset, custom_id, _error(unread or _CANCELLED_LINE))
        request = BatchRequest.parse(fields)
        if request.url != batch.endpoint:
            raise invalid("url", f"got {request.url[:100]!r}, must be the endpoint of the batch, {batch.endpoint}")
        return BatchLine(number, offset, custom_id, await _job(server, tenant, batch, request.body))
    except ApiError as error:
        return BatchLine(number, offset, custom_id, _error(error))
    except (SQLAlchemyError, OSError):
        raise
    # A bug must stop only its line.
    except Exception:
        log.exception("line %d of %s failed", number, batch.id)
        return BatchLine(number, offset, custom_id, _error(invalid(None, "Internal server error.", "internal_error")))


def _error(error: ApiError | JobError) -> dict[str, JsonValue]:
    return {"code": error.code, "message": error.message, "param": error.param}


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


def _finish(server: ServerContext, batch: Batch) -> None:
    """Write the files of a batch whose lines have all ended, and end it. After a crash, the same files are written again."""
    total, completed, after, is_expired = 0, 0, 0, False
    with SpooledTemporaryFile[bytes](_CHUNK_BYTES) as output, SpooledTemporaryFile[bytes](_CHUNK_BYTES) as errors:
        while lines := server.store.batches.lines(batch, after, CHUNK_LINES):
            for line in lines:
                error = _error_of(batch, line)
                is_expired |= error is not None and error["code"] == _EXPIRED_LINE.code
                completed += error is None
                response = None if line.job is None or error is not None else _response(server, batch, line.job)
                row: dict[str, Any] = {
                    "id": f"batch_req_{batch.id.removeprefix('batch_')}_{line.number}",
                    "custom_id": line.custom_id,
                    "response": response,
                    "error": error and {"param": None, **error, "line": line.number},
                }
                (errors if error else output).write(JSON_OBJECT.dump_json(row) + b"\n")
            total += len(lines)
            after = lines[-1].number
        files: dict[str, str] = {}
        for name, file in (("output_file_id", output), ("error_file_id", errors)):
            if file.tell():
                file.seek(0)
                files[name] = server.job_service.uploads.add(batch.tenant, file, "batch_output").id
    status: BatchStatus = "cancelled" if batch.status == "cancelling" else "expired" if is_expired else "completed"
    # A batch that was cancelled before its file was scanned has no total yet.
    server.store.batches.end(batch, status, total=total, completed=completed, **files)


def _error_of(batch: Batch, line: StoredLine) -> dict[str, JsonValue] | None:
    """Return why a line that has ended is not completed, or `None`."""
    job = line.job
    if job is None:
        return line.error or _error(_DELETED_LINE)
    if job.state == JobState.COMPLETED:
        return None
    if job.state == JobState.CANCELLED:
        return _error(_CANCELLED_LINE if batch.status == "cancelling" else CANCELLED)
    assert job.error is not None
    return _error(_EXPIRED_LINE if job.error.code == LATE.code and job.start_by == batch.expires_at else job.error)


def _response(server: ServerContext, batch: Batch, job: Job) -> dict[str, JsonValue]:
    """Return the response to a completed line: a Video, or OpenAI's ImagesResponse with cost and licences."""
    video = video_of(server, job, JobEstimate(None, None, 0.0)).model_dump(mode="json")
    if job.kind == JobKind.IMAGE:
        image = ImageResult(id=job.id, url=f"/v1/videos/{job.id}/content?variant=image")
        size = size_text(file_sizes(job.shot)["image"])
        images = ImagesResponse(created=int(job.completed_at or 0), data=[image], output_format="png", size=size)
        video = {**images.model_dump(mode="json"), "cost": video["cost"], "licences": video["licences"]}
    return {"status_code": 200, "request_id": job.id, "body": video}
