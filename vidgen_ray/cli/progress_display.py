"""Progress of a run: a progress bar on a terminal, lines elsewhere, both on standard error, and `progress.jsonl` for
programs.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from math import sqrt
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vidgen_ray.engine.status import Snapshot
from vidgen_ray.errors import MAX_MESSAGE_LENGTH, MAX_MESSAGES
from vidgen_ray.outputs.manifest import REJECTED, ManifestRow

RECENT_SHARE = 0.25
"""Length of the recent interval as a fraction of the run, between the two limits below."""
RECENT_MIN_S = 60.0
RECENT_MAX_S = 600.0
STATUS_INTERVAL_S = 5.0
"""Seconds between two `status` events."""
PLANNING = "planning"
LOADING = "starting workers, loading weights"
FIRST_SHOTS = "rendering the first shots"
RENDERING = "shots"
SMALL_RUN = 50
"""Maximum number of lines in a script for which `LineDisplay` prints a line for every shot."""
SUMMARY_INTERVAL_S = 10.0
"""Seconds between two summaries of `LineDisplay`."""
SMALL_RUN_SUMMARY_INTERVAL_S = 60.0
"""Seconds without other output before `LineDisplay` prints a summary of a small run."""


class Throughput(NamedTuple):
    """Number of shots that were rendered or failed in an interval of a run."""

    shots: int
    seconds: float


def eta_range(remaining: int, whole: Throughput, recent: Throughput) -> tuple[float, float] | None:
    """Return the lowest and highest estimate of the seconds until `remaining` shots are finished. `None` if unknown.

    The range covers the throughput of the whole run and of the recent interval. It is widened by the relative uncertainty
    of a count, `1 / sqrt(shots)`. A recent interval without shots counts as one shot, so that the highest estimate grows
    while no shot finishes.
    """
    if not whole.shots or whole.seconds <= 0:
        return None
    seconds_per_shot = [interval.seconds / max(interval.shots, 1) for interval in (whole, recent) if interval.seconds > 0]
    margin = 1 + 1 / sqrt(whole.shots)
    return remaining * min(seconds_per_shot) / margin, remaining * max(seconds_per_shot) * margin


class ProgressTracker:
    """Counts lines and estimates the remaining time.

    Events must come one at a time. Properties and estimates can be read from any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = self.done = self.failed = self.skipped = 0
        self.complete = False
        """True once the script has been read to its end, so that `total` is final."""
        self.snapshot: Snapshot | None = None
        """Last status. `None` before the first."""
        self.shots_started = False
        """True once a worker has loaded its weights and works on a shot."""
        self._clock = clock
        self._started: float | None = None
        self._finish_times: list[float] = []

    @property
    def ended(self) -> int:
        """Lines that are done, failed or skipped."""
        return self.done + self.failed + self.skipped

    @property
    def remaining(self) -> int:
        """Lines that have not ended."""
        return max(self.total - self.ended, 0)

    @property
    def is_waiting_for_first_shot(self) -> bool:
        """True if there are shots to render and none has finished."""
        return bool(self.remaining) and not self._finish_times

    def on_rejected(self, row: ManifestRow) -> None:
        """Count a rejected line as failed."""
        self.failed += 1

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        """Set the number of lines so far. The rejected ones have been counted."""
        self.total, self.skipped, self.complete = total, skipped, complete
        if self._started is None:
            self._started = self._clock()

    def on_finished(self, row: ManifestRow) -> None:
        """Count a shot that is done or failed."""
        if row.status == "failed":
            self.failed += 1
        else:
            self.done += 1
        self._finish_times.append(self._clock())

    def on_status(self, snapshot: Snapshot) -> None:
        """Store the status. Throughput is measured from when the first worker starts a shot: loading weights is excluded."""
        self.snapshot = snapshot
        if not self.shots_started and any(stage.running for stage in snapshot.stages.values()):
            self.shots_started = True
            self._started = self._clock()

    def shots_per_minute(self) -> float | None:
        """Return the throughput of the recent interval. `None` before the first shot."""
        recent = self._recent()
        return 60 * recent.shots / recent.seconds if self._finish_times and recent.seconds > 0 else None

    def eta(self) -> tuple[float, float] | None:
        """Return the lowest and highest estimate of the remaining seconds. `None` if unknown."""
        if not self.complete:
            return None
        return eta_range(self.remaining, Throughput(len(self._finish_times), self._elapsed()), self._recent())

    def _elapsed(self) -> float:
        return 0.0 if self._started is None else self._clock() - self._started

    def _recent(self) -> Throughput:
        now, elapsed, times = self._clock(), self._elapsed(), self._finish_times
        seconds = min(elapsed, max(RECENT_MIN_S, min(RECENT_MAX_S, RECENT_SHARE * elapsed)))
        return Throughput(len(times) - bisect_right(times, now - seconds), seconds)


class RunView(AbstractContextManager["RunView"]):
    """Progress listener of a run: counts its lines, shows them, and writes `progress.jsonl`. One event at a time."""

    def __init__(self, tracker: ProgressTracker, display: TerminalDisplay | LineDisplay, file: ProgressFile) -> None:
        self._tracker = tracker
        self._display = display
        self._file = file
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        tracker = self._tracker
        counts = {"done": tracker.done, "failed": tracker.failed, "skipped": tracker.skipped}
        self._file.write("finished", **counts, complete=not tracker.remaining, error=kind.__name__ if kind else None)
        self._file.close()
        self._display.__exit__(kind, error, trace)

    def on_rejected(self, row: ManifestRow) -> None:
        with self._lock:
            self._tracker.on_rejected(row)
            if failure := _failure_line(row, self._tracker.failed):
                self._display.note(failure, "red")

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        with self._lock:
            is_first = not self._tracker.total
            self._tracker.on_lines(total, skipped, rejected, complete)
            self._file.open()
            if complete:
                self._file.write("planned", total=total, skipped=skipped, rejected=rejected)
            self._display.show_lines(rejected, is_first=is_first)

    def on_message(self, message: str) -> None:
        with self._lock:
            self._file.write("message", message=message)
            self._display.note(message, "yellow")

    def on_finished(self, row: ManifestRow) -> None:
        with self._lock:
            self._tracker.on_finished(row)
            if row.status == "failed":
                self._file.write("ended", id=row.id, status=row.status, stage=row.failure_stage, error=row.failure_error)
            else:
                self._file.write("ended", id=row.id, status=row.status, seconds=row.seconds)
            self._display.show_finished(row, _failure_line(row, self._tracker.failed))

    def on_status(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._tracker.on_status(snapshot)
            self._file.write_status(self._tracker, snapshot)
            self._display.show_status()


def run_view(progress_file: Path | None = None) -> RunView:
    """Return the view for standard error. With `progress_file`, events are also written to that file."""
    console, tracker = Console(stderr=True), ProgressTracker()
    is_live = console.is_terminal and not console.is_dumb_terminal
    display = TerminalDisplay(console, tracker) if is_live else LineDisplay(console, tracker)
    return RunView(tracker, display, ProgressFile(progress_file))


class ProgressFile:
    """`progress.jsonl`: progress events of a run for programs, one JSON object per line.

    The file of the previous run is kept as `progress.1.jsonl`. Events: `planned` (the script was read to its end), `message`,
    `ended` (shots that are done or failed; shots that were already done are only counted in `planned`), `status`, and
    `finished`, which is missing if the process was killed. Each event has `at` (UTC) and `elapsed_s`. If the file cannot be
    written, it ends and the run continues.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`path`: `None` writes nothing."""
        self._path = path
        self._clock = clock
        self._started = clock()
        self._last_status = -STATUS_INTERVAL_S
        self._file: TextIO | None = None

    def open(self) -> None:
        """Open the file, unless it is open. Nothing is written before."""
        if self._file is not None or self._path is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._path.replace(self._path.with_suffix(f".1{self._path.suffix}"))
            # Line-buffered: readers that follow the file see complete lines immediately.
            self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def write(self, event: str, **fields: Any) -> None:
        if self._file is None:
            return
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"event": event, "at": at, "elapsed_s": round(self._clock() - self._started, 3), **fields}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError:
            self.close()
            self._path = None

    def write_status(self, tracker: ProgressTracker, snapshot: Snapshot) -> None:
        """Write a status event, at most one in `STATUS_INTERVAL_S`."""
        now = self._clock()
        if now - self._last_status < STATUS_INTERVAL_S:
            return
        self._last_status = now
        eta = tracker.eta()
        self.write(
            "status",
            remaining=tracker.remaining,
            in_progress=snapshot.in_progress,
            gpus_busy=snapshot.gpus_busy,
            eta_s=[round(seconds, 1) for seconds in eta] if eta else None,
            stages={name: stage._asdict() for name, stage in snapshot.stages.items()},
        )

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


class TerminalDisplay(Progress):
    """Progress bar, counts and a table of the stages. Failures are printed above."""

    def __init__(self, console: Console, tracker: ProgressTracker, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracker = tracker  # Progress.__init__ calls get_renderables.
        super().__init__(
            SpinnerColumn(),
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "{task.fields[speed]}",
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
            get_time=clock,
        )
        self._run_task = self.add_task(PLANNING, total=None, speed="")

    def stop(self) -> None:
        """Stop the display. The last frame has no estimate and no stages."""
        self._tracker.snapshot = None
        self.update(self._run_task, description=RENDERING, speed="")
        super().stop()

    def note(self, text: str, style: str = "") -> None:
        """Print a message or a failure."""
        self.console.print(Text(text, style=style))

    def show_lines(self, rejected: int, *, is_first: bool) -> None:
        """Show the lines read so far, of which `rejected` are wrong."""
        self.show_status()

    def show_finished(self, row: ManifestRow, failure: str | None) -> None:
        """Show that a shot is done or has failed. `failure`: line to print, if any."""
        if failure:
            self.note(failure, "red")
        self.show_status()

    def show_status(self) -> None:
        """Called about every second."""
        tracker = self._tracker
        self.update(
            self._run_task,
            description=_phase(tracker) or RENDERING,
            total=tracker.total if tracker.complete else None,
            completed=tracker.ended,
            speed=", ".join(_speed(tracker)),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the progress bar, the counts and the table of the stages."""
        snapshot = self._tracker.snapshot
        yield from super().get_renderables()
        yield _counts_line(self._tracker, snapshot)
        if snapshot and snapshot.stages:
            yield _stage_table(snapshot)


class LineDisplay:
    """Prints a line for each shot of a small run. For a large run, prints failures and a summary every ten seconds."""

    def __init__(self, console: Console, tracker: ProgressTracker, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._tracker = tracker
        self._clock = clock
        self._started = self._last_summary = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._is_small:
            self._print_summary(self._counts())

    def note(self, text: str, style: str = "") -> None:
        """Print a message or a failure."""
        elapsed_s = self._clock() - self._started
        self._console.print(f"{elapsed_s:7.1f}s  {text}", markup=False, highlight=False, soft_wrap=True)

    def show_lines(self, rejected: int, *, is_first: bool) -> None:
        """Show the lines read so far, of which `rejected` are wrong."""
        tracker = self._tracker
        if is_first or tracker.complete:
            so_far = "" if tracker.complete else " so far"
            self._print_summary(
                f"{tracker.total:,} shots{so_far}, {tracker.skipped:,} already done, {rejected:,} lines rejected"
            )
        if is_first and tracker.remaining:
            self.note(LOADING)

    def show_finished(self, row: ManifestRow, failure: str | None) -> None:
        """Show that a shot is done or has failed. `failure`: line to print, if any."""
        if self._is_small:
            self._print_summary(f"{self._tracker.ended}/{self._tracker.total} {failure or f'{row.status} {row.id}'}")
            return
        if failure:
            self.note(failure)
        self.show_status()

    def show_status(self) -> None:
        """Called about every second."""
        interval_s = SMALL_RUN_SUMMARY_INTERVAL_S if self._is_small else SUMMARY_INTERVAL_S
        if self._clock() - self._last_summary < interval_s:
            return
        tracker = self._tracker
        self._print_summary(_phase(tracker) or ", ".join([self._counts(), *_speed(tracker), *_busiest(tracker.snapshot)]))

    @property
    def _is_small(self) -> bool:
        return self._tracker.complete and self._tracker.total <= SMALL_RUN

    def _counts(self) -> str:
        t = self._tracker
        return f"{t.ended:,}/{t.total:,} shots: {t.done:,} done, {t.failed:,} failed, {t.skipped:,} already done"

    def _print_summary(self, text: str) -> None:
        self._last_summary = self._clock()
        self.note(text)


def _phase(tracker: ProgressTracker) -> str | None:
    """Return the phase of a run that is waiting for its first shot, otherwise `None`."""
    if not tracker.is_waiting_for_first_shot:
        return None
    return FIRST_SHOTS if tracker.shots_started else LOADING


def _speed(tracker: ProgressTracker) -> list[str]:
    """Return `6.0 shots/min` and `0:04:00 to 0:07:00 left`, as far as they are known."""
    if not tracker.remaining:
        return []
    per_minute, eta = tracker.shots_per_minute(), tracker.eta()
    texts = []
    if per_minute is not None:
        texts.append(f"{per_minute:.1f} shots/min" if per_minute >= 1 else f"{per_minute * 60:.1f} shots/h")
    if eta is not None:
        low, high = (str(timedelta(seconds=round(seconds))) for seconds in eta)
        texts.append(f"{low} left" if low == high else f"{low} to {high} left")
    return texts


def _busiest(snapshot: Snapshot | None) -> list[str]:
    """Return the load of the GPUs and of the busiest stage."""
    if snapshot is None:
        return []
    texts = [] if snapshot.gpus_busy is None else [f"GPUs {snapshot.gpus_busy:.0%} busy"]
    if snapshot.stages:
        name, stage = max(snapshot.stages.items(), key=lambda item: (item[1].busy, item[1].queued))
        texts.append(f"busiest stage {name} ({stage.busy:.0%}, {stage.queued:,} queued)")
    return texts


def _counts_line(tracker: ProgressTracker, snapshot: Snapshot | None) -> Text:
    parts = [
        (f"{tracker.done:,} done", "green"),
        (f"{tracker.failed:,} failed", "red" if tracker.failed else "dim"),
        (f"{tracker.skipped:,} already done", "blue" if tracker.skipped else "dim"),
    ]
    if snapshot:
        parts.append((f"{snapshot.in_progress:,} in progress", ""))
        if snapshot.gpus_busy is not None:
            parts.append((f"GPUs {snapshot.gpus_busy:.0%} busy", "bold"))
    return Text("   ").join(Text(text, style=style) for text, style in parts)


def _stage_table(snapshot: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage")
    for heading in ("queued", "running", "workers", "busy"):
        table.add_column(heading, justify="right")
    for name, stage in snapshot.stages.items():
        table.add_row(name, f"{stage.queued:,}", f"{stage.running:,}", f"{stage.workers:,}", f"{stage.busy:.0%}")
    return table


def _failure_line(row: ManifestRow, failed: int) -> str | None:
    """Return one line for the `failed`-th failure. `None` if the row is no failure or enough have been printed."""
    if row.status != "failed" or failed > MAX_MESSAGES + 1:
        return None
    if failed > MAX_MESSAGES:
        return f"more than {MAX_MESSAGES:,} lines failed; all of them are in failures.jsonl"
    line = f"{row.script} line {row.line} " if row.line and row.failure_stage != REJECTED else ""
    text = f"failed {line}{row.id} in {row.failure_stage}: {row.failure_message}"
    # Messages may contain line breaks, and control characters from the script.
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MAX_MESSAGE_LENGTH else line[: MAX_MESSAGE_LENGTH - 1] + "…"
