"""Status and log of a run, as files of its output folder: `status.json` and `logs/<run>-<part>.jsonl`.

Both are written whole, from a thread of their own, so that they work in an object store, and neither slows nor stops the run.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import AwareDatetime, ValidationError

from vidgen_ray.errors import FrozenModel
from vidgen_ray.outputs.lease import in_order
from vidgen_ray.outputs.storage import Storage

STATUS = "status.json"
LOGS = "logs"
INTERVAL_S = 10.0
"""Seconds between two writes of the status, and of the log if it has grown."""
CLOSE_S = 10.0
"""Seconds that the last write may take before the run ends without it."""
PART_BYTES = 1 << 20
"""Size above which the log continues in another file."""
MAX_UNWRITTEN_BYTES = 16 << 20
"""Size of the log in memory above which lines are dropped, because the storage does not take them."""
ATTEMPT_FIELDS = {"at", "shot", "stage", "attempt", "outcome", "started_at", "seconds", "waited", "worker"}
"""Fields that every line of an attempt has."""
_log = logging.getLogger(__name__)
_SILENT_S = 60.0
"""Age of the status of a run that is still going above which it was killed, or is cut off from the folder."""


class RunLabels(FrozenModel):
    """Names of a run, in metrics, status, log and manifest."""

    run: str
    """Name of the run in the manifest: numbered, and unique in the folder."""
    name: str | None
    """Name given by the user."""
    profile: str
    script: str
    team: str | None
    submission_id: str | None
    """Submission id of the Ray job."""

    def of_metrics(self) -> dict[str, str]:
        """Return the labels of metrics besides the profile."""
        labels = {"run": self.name or self.run, "script": self.script, "team": self.team, "submission_id": self.submission_id}
        return {name: value for name, value in labels.items() if value}


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Status of one stage at one moment."""

    queued: int
    """Calls that wait for a worker of this stage."""
    running: int
    """Calls that a worker is running."""
    workers: int
    """Live workers that hold the stage."""
    busy: float
    """Utilization of these workers over the last 30 seconds, 0 to 1."""


class RunStatus(RunLabels):
    """The content of `status.json`."""

    started_at: AwareDatetime
    at: AwareDatetime
    """Time of this status."""
    ended: bool
    error: str | None
    """Class of the error that ended the run."""
    phase: str | None
    """Activity before the first shot has ended. `None` after that."""
    total: int
    """Lines so far."""
    complete: bool
    """The script was read to its end, so that `total` is final."""
    done: int
    failed: int
    skipped: int
    """Lines that were finished before the run."""
    remaining: int
    shots_per_minute: float | None
    """Rate of the last minutes."""
    eta_s: tuple[float, float] | None
    """Lowest and highest estimate of the seconds that are left."""
    waiting_for: str | None
    """Resources that the run waits for, such as GPUs, and who holds them."""
    in_progress: int
    gpus_busy: float | None
    stages: dict[str, StageStatus]
    """Empty when the run has ended."""
    quarantined: tuple[str, ...]
    messages: tuple[str, ...]
    """Last messages for the user."""

    @property
    def age_s(self) -> float:
        return (datetime.now(UTC) - self.at).total_seconds()

    @property
    def is_silent(self) -> bool:
        """True if a run that has not ended has written no status for long."""
        return not self.ended and self.age_s > _SILENT_S


def read_status(storage: Storage) -> RunStatus | None:
    """Return the status of the last run in a folder. `None` if there was no run, or if the file is damaged."""
    try:
        return RunStatus.model_validate_json(storage.read(STATUS) or b"")
    except ValidationError:
        return None


class RunLog:
    """Writes the status and the log of a run, now and then, until `close`."""

    def __init__(self, storage: Storage, run: str, status: Callable[[], RunStatus], may_write: Callable[[], bool]) -> None:
        """`status` and `may_write` are called in another thread."""
        self._storage = storage
        self._run = run
        self._status = status
        self._may_write = may_write
        self._lock = threading.Lock()
        self._part = bytearray()
        """Lines of the current part, written or not."""
        self._written = self._number = self._dropped = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def add(self, **fields: Any) -> None:
        """Append a line with these fields that are not `None`, and the time."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"at": at, **{name: value for name, value in fields.items() if value is not None}}
        with self._lock:
            if len(self._part) > MAX_UNWRITTEN_BYTES:
                self._dropped += 1
                return
            if self._dropped:
                line, self._dropped = {"dropped_lines": self._dropped, **line}, 0
            self._part += f"{json.dumps(line)}\n".encode()

    def close(self) -> None:
        """Write everything, if that takes less than `CLOSE_S`."""
        self._ended.set()
        self._thread.join(CLOSE_S)

    def _write_all(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.is_set()
            try:
                self._write()
            except OSError:
                pass
            except Exception:
                _log.warning("the status of the run cannot be written, trying again", exc_info=True)
            if not ended:
                self._ended.wait(INTERVAL_S)

    def _write(self) -> None:
        if self._may_write():
            self._storage.write(STATUS, self._status().model_dump_json(indent=1))
        with self._lock:
            content = bytes(self._part)
        if len(content) == self._written:
            return
        # Its name is that of the run, so it needs no lease.
        self._storage.write(f"{LOGS}/{self._run}-{self._number:04d}.jsonl", content)
        self._written = len(content)
        if self._written >= PART_BYTES:
            with self._lock:
                del self._part[: self._written]
            self._written = 0
            self._number += 1


def logged_runs(storage: Storage) -> list[str]:
    """Return the runs that have a log, oldest first. Raises OSError."""
    return sorted({name.rpartition("-")[0] for name in storage.files(LOGS)}, key=in_order)


def read_run(storage: Storage, run: str | None, having: bytes = b"") -> Iterator[dict[str, Any]]:
    """Yield the lines in the log of a run, or of all, in order, with the `run`. Leaves out damaged lines. Raises OSError.

    `having`: part of the lines that are read.
    """
    names = sorted((name for name in storage.files(LOGS) if run in (None, name.rpartition("-")[0])), key=in_order)
    for name, content in zip(names, storage.read_each(f"{LOGS}/{name}" for name in names), strict=True):
        for text in (content or b"").splitlines():
            if having in text:
                with suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict):
                        yield {"run": name.rpartition("-")[0], **line}


def read_log(storage: Storage, shot_id: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a shot in the logs of all runs, in order, with the `run`. Leaves out damaged lines. Raises OSError."""
    for line in read_run(storage, None, having=json.dumps(shot_id).encode()):
        if line.get("shot") == shot_id and line.keys() >= ATTEMPT_FIELDS:
            yield line
