"""Progress of a run on standard error: a progress bar on a terminal, lines elsewhere. The status of a run as text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn
from rich.table import Table
from rich.text import Text

from vidgen_ray.batch.progress import CONNECTING, PLANNING, ProgressTracker
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.errors import MAX_MESSAGE_LENGTH, MAX_MESSAGES
from vidgen_ray.outputs.manifest import REJECTED, ManifestRow
from vidgen_ray.outputs.run_log import RunStatus
from vidgen_ray.system.console import Console, ElapsedColumn, table_of
from vidgen_ray.system.quantities import count, duration

RENDERING = "shots"
SMALL_RUN = 50
"""Maximum number of lines in a script for which `LineDisplay` prints a line for every shot."""
SUMMARY_INTERVAL_S = 10.0
"""Seconds between two summaries of `LineDisplay`."""
SMALL_RUN_SUMMARY_INTERVAL_S = 60.0
"""Seconds without other output before `LineDisplay` prints a summary of a small run."""


class RunView(AbstractContextManager["RunView"]):
    """Progress listener of a run: counts its lines and shows them. One event at a time."""

    def __init__(self, tracker: ProgressTracker, display: TerminalDisplay | LineDisplay) -> None:
        self._tracker = tracker
        self._display = display
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
            self._display.show_lines(rejected, is_first=is_first)

    def on_message(self, message: str) -> None:
        with self._lock:
            self._display.note(message, "yellow")

    def on_finished(self, row: ManifestRow) -> None:
        with self._lock:
            self._tracker.on_finished(row)
            self._display.show_finished(row, _failure_line(row, self._tracker.failed))

    def on_status(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._tracker.on_status(snapshot)
            self._display.show_status()


def run_view(before_first_status: str = CONNECTING) -> RunView:
    """Return the view for standard error. `before_first_status`: as in `ProgressTracker`."""
    console, tracker = Console(stderr=True), ProgressTracker(before_first_status=before_first_status)
    is_live = console.is_terminal and not console.is_dumb_terminal
    display = TerminalDisplay(console, tracker) if is_live else LineDisplay(console, tracker)
    return RunView(tracker, display)


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
            ElapsedColumn(),
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
            description=tracker.phase or RENDERING,
            total=tracker.total if tracker.complete else None,
            completed=tracker.ended,
            speed=", ".join(speed_texts(tracker)),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the progress bar, the counts and the table of the stages."""
        snapshot = self._tracker.snapshot
        yield from super().get_renderables()
        yield counts_line(self._tracker, snapshot)
        if snapshot and snapshot.stages:
            yield stage_table(snapshot)


class LineDisplay:
    """Prints a line for each shot of a small run. For a large run, prints failures and a summary every ten seconds."""

    def __init__(self, console: Console, tracker: ProgressTracker, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._tracker = tracker
        self._clock = clock
        self._started = self._last_summary = clock()
        self._shown_phase: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tracker.total and not self._is_small:
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
                f"{count(tracker.total, 'shot')}{so_far}, {tracker.skipped:,} already done, {count(rejected, 'line')} rejected"
            )
        if is_first and tracker.remaining:
            self.note(tracker.before_first_status)

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
        tracker = self._tracker
        is_new, self._shown_phase = tracker.phase not in (None, self._shown_phase), tracker.phase
        if not is_new and self._clock() - self._last_summary < interval_s:
            return
        self._print_summary(tracker.phase or ", ".join([self._counts(), *speed_texts(tracker), *_busiest(tracker.snapshot)]))

    @property
    def _is_small(self) -> bool:
        return self._tracker.complete and self._tracker.total <= SMALL_RUN

    def _counts(self) -> str:
        t = self._tracker
        return f"{t.ended:,}/{t.total:,} shots: {t.done:,} done, {t.failed:,} failed, {t.skipped:,} already done"

    def _print_summary(self, text: str) -> None:
        self._last_summary = self._clock()
        self.note(text)


def speed_texts(tracker: ProgressTracker | RunStatus) -> list[str]:
    """Return `6.0 shots/min` and `4 min to 7 min left`, as far as they are known."""
    if not tracker.remaining:
        return []
    per_minute, eta = tracker.shots_per_minute, tracker.eta_s
    texts = []
    if per_minute:
        texts.append(f"{per_minute:.1f} shots/min" if per_minute >= 1 else f"{per_minute * 60:.1f} shots/h")
    if eta is not None:
        low, high = map(duration, eta)
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


def counts_line(tracker: ProgressTracker | RunStatus, snapshot: Snapshot | None) -> Text:
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


def stage_table(snapshot: Snapshot) -> Table:
    numbers = ("queued", "running", "workers", "busy")
    table = table_of("stage", *numbers, right=numbers)
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
