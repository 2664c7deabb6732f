"""`progress.jsonl`: progress events of a run for programs, one JSON object per line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from vidgen_ray.cli.progress_tracker import ProgressTracker
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.outputs.manifest import ManifestRow

STATUS_INTERVAL_S = 5.0
"""Seconds between two `status` events."""


class ProgressFile(AbstractContextManager["ProgressFile"]):
    """Progress listener that writes events to `path` from the first lines on.

    The file of the previous run is kept as `progress.1.jsonl`. Events: `planned` (the script was read to its end), `message`,
    `ended` (shots that are done or failed; shots that were already done are only counted in `planned`), `status`, and
    `finished`, which is missing if the process was killed. Each event has `at` (UTC) and `elapsed_s`. If the file cannot be
    written, it ends and the run continues.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._started = clock()
        self._last_status = -STATUS_INTERVAL_S
        self._tracker = ProgressTracker(clock)
        self._file: TextIO | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        tracker = self._tracker
        counts = {"done": tracker.done, "failed": tracker.failed, "skipped": tracker.skipped}
        self._write("finished", **counts, complete=not tracker.remaining, error=kind.__name__ if kind else None)
        self._close()

    def on_rejected(self, row: ManifestRow) -> None:
        """Do nothing. `planned` contains the number of rejected lines, and `failures.jsonl` the lines."""

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        self._tracker.on_lines(total, skipped, rejected, complete)
        if self._file is None:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if self._path.exists():
                    self._path.replace(self._path.with_suffix(f".1{self._path.suffix}"))
                # Line-buffered: readers that follow the file see complete lines immediately.
                self._file = self._path.open("a", encoding="utf-8", buffering=1)
        if complete:
            self._write("planned", total=total, skipped=skipped, rejected=rejected)

    def on_message(self, message: str) -> None:
        self._write("message", message=message)

    def on_finished(self, row: ManifestRow) -> None:
        self._tracker.on_finished(row)
        if row.status == "done":
            self._write("ended", id=row.id, status=row.status, seconds=row.seconds)
        elif row.status == "failed":
            self._write("ended", id=row.id, status=row.status, stage=row.failure_stage, error=row.failure_error)

    def on_status(self, snapshot: Snapshot) -> None:
        self._tracker.on_status(snapshot)
        now = self._clock()
        if now - self._last_status < STATUS_INTERVAL_S:
            return
        self._last_status = now
        stages = {name: stage._asdict() for name, stage in snapshot.stages.items()}
        eta = self._tracker.eta()
        self._write(
            "status",
            remaining=self._tracker.remaining,
            in_progress=snapshot.in_progress,
            gpus_busy=snapshot.gpus_busy,
            eta_s=[round(seconds, 1) for seconds in eta] if eta else None,
            stages=stages,
        )

    def _write(self, event: str, **fields: Any) -> None:
        if self._file is None:
            return
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"event": event, "at": at, "elapsed_s": round(self._clock() - self._started, 3), **fields}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError:
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
