"""Output and error file of a batch, written piece by piece into the folder of uploads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from vidgen_ray.graph import file_sizes
from vidgen_ray.online.api.responses import CANCELLED, JSON_OBJECT, ImageResult, ImagesResponse, size_text
from vidgen_ray.online.api.video_routes import video_of
from vidgen_ray.online.api_error import INVALID, ApiError, invalid
from vidgen_ray.online.queue_estimate import JobEstimate
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.batches import Batch, BatchStatus, StoredLine
from vidgen_ray.online.store.inputs import UploadDetails
from vidgen_ray.online.store.jobs import LATE, Job, JobError, JobKind, JobState
from vidgen_ray.system.files import flush_to_disk

PIECE_LINES = 1_000
"""Lines that are written at once."""
CANCELLED_LINE = invalid(None, "The batch was cancelled before this line ended.", "batch_cancelled")
EXPIRED_LINE = invalid(None, "The line did not start within the completion window. Send it again.", "batch_expired")
KEY_REMOVED = invalid(None, "The key was removed or has expired. Create the batch again with another key.", "invalid_api_key")
DELETED_LINE = invalid(None, "The result was deleted before the batch ended.", "deleted")
NOT_ANSWERED = frozenset({CANCELLED.code, CANCELLED_LINE.code, EXPIRED_LINE.code, KEY_REMOVED.code, DELETED_LINE.code})
"""Codes of lines that were not answered as requests are: they have an error and no response."""
_LATE_CODES = frozenset({EXPIRED_LINE.code, KEY_REMOVED.code})


class BatchFiles:
    """Both files of a batch whose lines have all ended. Calls block."""

    def __init__(self, server: ServerContext, batch: Batch) -> None:
        """Begin to write the files. Raises OSError."""
        self.batch = batch
        self._server = server
        self._uploads = server.job_service.uploads
        self._files: dict[str, _File] = {}
        self._last = 0
        """Number of the last line that is written."""
        self._completed = 0
        self._is_expired = False
        try:
            for name in ("output", "error"):
                self._files[name] = _File(self._uploads.temporary_file())
        except OSError:
            self.close()
            raise

    def write_piece(self) -> bool:
        """Write the next lines. Return False if there are none. Raises OSError."""
        lines = self._server.store.batches.lines(self.batch, self._last, PIECE_LINES)
        for line in lines:
            error = _error_of(self.batch, line)
            row = _row(self._server, self.batch, line, error)
            self._files["output" if error is None else "error"].write(JSON_OBJECT.dump_json(row) + b"\n")
            self._completed += error is None
            self._is_expired |= error is not None and error["code"] in _LATE_CODES
            self._last = line.number
        return bool(lines)

    def end_batch(self) -> None:
        """Store the files, and end the batch in the same transaction, unless it has changed. Raises OSError."""
        for file in self._files.values():
            file.finish()
        self._server.store.batches.end(self.batch, self._status, self._record, completed=self._completed)

    def close(self) -> None:
        """Delete what was not stored."""
        for file in self._files.values():
            file.close()

    @property
    def _status(self) -> BatchStatus:
        if self.batch.status == "cancelling":
            return "cancelled"
        if self.batch.error is not None:
            return "failed"
        return "expired" if self._is_expired else "completed"

    def _record(self) -> Mapping[str, str]:
        ids = {}
        for name, file in self._files.items():
            if file.bytes:
                details = UploadDetails(f"{self.batch.id}_{name}.jsonl", self.batch.output_expires_s)
                sha256 = file.digest.hexdigest()
                stored = self._uploads.commit(self.batch.tenant, file.path, sha256, file.bytes, "batch_output", None, details)
                ids[f"{name}_file_id"] = stored.id
        return ids


class _File:
    """Temporary file with its digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.digest = hashlib.sha256()
        self._file = path.open("wb")

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self.digest.update(content)
        self.bytes += len(content)

    def finish(self) -> None:
        self._file.close()
        # Not in the transaction, which others wait for.
        flush_to_disk(self.path)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:
            # The rest does not fit on the disk.
            self._file.raw.close()
        self.path.unlink(missing_ok=True)


def line_error(error: ApiError | JobError) -> dict[str, JsonValue]:
    """Return an error as a line stores it, with the status that the request would have got."""
    status = error.status if isinstance(error, ApiError) else 400 if error.type == INVALID else 500
    return {"code": error.code, "message": error.message, "param": error.param, "type": error.type, "status": status}


def batch_error(error: ApiError) -> dict[str, JsonValue]:
    """Return an error of a batch as it is stored."""
    return {"code": error.code, "message": error.message, "param": error.param}


def _error_of(batch: Batch, line: StoredLine) -> dict[str, JsonValue] | None:
    """Return why a line that has ended is not completed, or `None`."""
    job = line.job
    if job is None:
        return line.error or line_error(DELETED_LINE)
    if job.state == JobState.COMPLETED:
        return None
    if job.state == JobState.CANCELLED:
        return line_error(CANCELLED_LINE if batch.status == "cancelling" else CANCELLED)
    assert job.error is not None
    is_late = job.error.code == LATE.code and job.start_by == batch.expires_at
    return line_error(EXPIRED_LINE if is_late else job.error)


def _row(server: ServerContext, batch: Batch, line: StoredLine, error: Mapping[str, JsonValue] | None) -> dict[str, Any]:
    """Return a line of a file, in the format of OpenAI: a request that fails has a response, too."""
    row_id = f"batch_req_{batch.id.removeprefix('batch_')}_{line.number}"
    row: dict[str, Any] = {"id": row_id, "custom_id": line.custom_id, "response": None, "error": None}
    if error is None:
        assert line.job is not None
        return row | {"response": _response(server, line.job)}
    shown = {"code": error["code"], "message": error["message"], "param": error.get("param"), "line": line.number}
    if error["code"] in NOT_ANSWERED:
        return row | {"error": shown}
    body = {"error": {**shown, "type": error.get("type", INVALID)}}
    request_id = row_id if line.job is None else line.job.id
    return row | {"response": {"status_code": error.get("status", 400), "request_id": request_id, "body": body}}


def _response(server: ServerContext, job: Job) -> dict[str, JsonValue]:
    """Return the response to a completed line: a Video, or OpenAI's ImagesResponse with cost and licences."""
    video = video_of(server, job, JobEstimate(None, None, 0.0)).model_dump(mode="json")
    if job.kind == JobKind.IMAGE:
        image = ImageResult(id=job.id, url=f"/v1/videos/{job.id}/content?variant=image")
        size = size_text(file_sizes(job.shot)["image"])
        images = ImagesResponse(created=int(job.completed_at or 0), data=[image], output_format="png", size=size)
        video = {**images.model_dump(mode="json"), "cost": video["cost"], "licences": video["licences"]}
    return {"status_code": 200, "request_id": job.id, "body": video}
