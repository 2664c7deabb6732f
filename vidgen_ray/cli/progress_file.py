"""`progress.jsonl`: how a run goes, for programs; one JSON object a line, the last run's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from vidgen_ray.batch.run_progress import Snapshot
from vidgen_ray.cli.run_pace import RunPace
from vidgen_ray.outputs.manifest import ManifestRow

STATUS_EVERY_S = 5.0


class ProgressFile(AbstractContextManager["ProgressFile"]):
    """Appends an event a line to `path`, from the moment the run is planned; the file of the run before is kept as
    `progress.1.jsonl`.

    Events: `planned`, `ended` (of shots done and failed; those done before are in `planned` alone), `status`, and
    `finished`, which is missing where the process was killed. Each has `at` (UTC) and `elapsed_s`. A disk that takes no
    more ends the file, not the run.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._begun = clock()
        self._told_status = -STATUS_EVERY_S
        self._pace = RunPace()
        self._file: TextIO | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        counts = {"done": self._pace.done, "failed": self._pace.failed, "skipped": self._pace.skipped}
        self._write("finished", **counts, complete=not self._pace.remaining, error=kind.__name__ if kind else None)
        self._close()

    def on_rejected(self, row: ManifestRow) -> None:
        """Nothing: how many there were is in `planned`, and which they were in `failures.jsonl`."""

    def on_planned(self, total: int, done_before: int, refused: int) -> None:
        self._pace.plan(total, done_before, refused, self._clock())
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._path.replace(self._path.with_suffix(f".1{self._path.suffix}"))
            # Whoever follows the file sees whole lines, at once.
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._write("planned", total=total, done_before=done_before, refused=refused)

    def on_finished(self, row: ManifestRow) -> None:
        self._pace.count(row, self._clock())
        if row.status == "done":
            self._write("ended", id=row.id, status=row.status, seconds=row.seconds)
        elif row.status == "failed":
            self._write("ended", id=row.id, status=row.status, stage=row.failure_stage, error=row.failure_error)

    def on_status(self, snapshot: Snapshot) -> None:
        now = self._clock()
        self._pace.see(snapshot, now)
        if now - self._told_status < STATUS_EVERY_S:
            return
        self._told_status = now
        stages = {name: stage._asdict() for name, stage in snapshot.stages.items()}
        eta = self._pace.eta(now)
        self._write(
            "status",
            remaining=self._pace.remaining,
            in_progress=snapshot.in_progress,
            gpus_busy=snapshot.gpus_busy,
            eta_s=[round(end, 1) for end in eta] if eta else None,
            stages=stages,
        )

    def _write(self, event: str, **fields: Any) -> None:
        if self._file is None:
            return
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"event": event, "at": moment, "elapsed_s": round(self._clock() - self._begun, 3), **fields}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError:
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
