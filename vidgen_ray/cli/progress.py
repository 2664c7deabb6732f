"""Progress display of a run on standard error: a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vidgen_ray.batch.results import ProgressListener
from vidgen_ray.cli.progress_file import ProgressFile
from vidgen_ray.cli.progress_tracker import ProgressTracker
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.errors import MAX_MESSAGE_LENGTH, MAX_MESSAGES
from vidgen_ray.outputs.manifest import REJECTED, ManifestRow

PLANNING = "planning"
LOADING = "starting workers, loading weights"
FIRST_SHOTS = "rendering the first shots"
RENDERING = "shots"
SMALL_RUN = 50
"""Maximum number of lines in a script for which `LineView` prints a line for every shot."""
SUMMARY_INTERVAL_S = 10.0
"""Seconds between two summaries of `LineView`."""
SMALL_RUN_SUMMARY_INTERVAL_S = 60.0
"""Seconds without other output before `LineView` prints a summary of a small run."""


class RunView(ProgressListener, AbstractContextManager["RunView"], Protocol):
    """Progress listener that is open for the duration of a run."""


def run_view(progress_file: Path | None = None) -> RunView:
    """Return the view for standard error. With `progress_file`, events are also written to that file."""
    console = Console(stderr=True)
    is_live = console.is_terminal and not console.is_dumb_terminal
    view: RunView = TerminalView(console) if is_live else LineView(console)
    return ViewGroup(view, ProgressFile(progress_file)) if progress_file else ViewGroup(view)


class ViewGroup:
    """Forwards each event to several views, one event at a time. Thread-safe."""

    def __init__(self, *views: RunView) -> None:
        self._views = views
        self._lock = threading.Lock()
        self._open_views = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            for view in self._views:
                opening.enter_context(view)
            self._open_views = opening.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open_views.__exit__(kind, error, trace)

    def on_rejected(self, row: ManifestRow) -> None:
        with self._lock:
            for view in self._views:
                view.on_rejected(row)

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        with self._lock:
            for view in self._views:
                view.on_lines(total, skipped, rejected, complete)

    def on_message(self, message: str) -> None:
        with self._lock:
            for view in self._views:
                view.on_message(message)

    def on_finished(self, row: ManifestRow) -> None:
        with self._lock:
            for view in self._views:
                view.on_finished(row)

    def on_status(self, snapshot: Snapshot) -> None:
        with self._lock:
            for view in self._views:
                view.on_status(snapshot)


class TerminalView(Progress):
    """Progress bar, counts and a table of the stages. Failures are printed above."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracker = ProgressTracker(clock)  # Progress.__init__ calls get_renderables.
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

    def on_rejected(self, row: ManifestRow) -> None:
        self._tracker.on_rejected(row)
        self._print_failure(row)

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        self._tracker.on_lines(total, skipped, rejected, complete)
        self._update_task()

    def on_message(self, message: str) -> None:
        self.console.print(Text(message, style="yellow"))

    def on_finished(self, row: ManifestRow) -> None:
        self._tracker.on_finished(row)
        self._print_failure(row)
        self._update_task()

    def on_status(self, snapshot: Snapshot) -> None:
        self._tracker.on_status(snapshot)
        self._update_task()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the progress bar, the counts and the table of the stages."""
        snapshot = self._tracker.snapshot
        yield from super().get_renderables()
        yield _counts_line(self._tracker, snapshot)
        if snapshot and snapshot.stages:
            yield _stage_table(snapshot)

    def _update_task(self) -> None:
        tracker = self._tracker
        self.update(
            self._run_task,
            description=_phase(tracker) or RENDERING,
            total=tracker.total if tracker.complete else None,
            completed=tracker.ended,
            speed=", ".join(_speed(tracker)),
        )

    def _print_failure(self, row: ManifestRow) -> None:
        if failure := _failure_line(row, self._tracker.failed):
            self.console.print(Text(failure, style="red"))


class LineView:
    """Prints a line for each shot of a small run. For a large run, prints failures and a summary every ten seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._started = self._last_summary = clock()
        self._tracker = ProgressTracker(clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._is_small:
            self._print_summary(self._counts())

    def on_rejected(self, row: ManifestRow) -> None:
        self._tracker.on_rejected(row)
        if failure := _failure_line(row, self._tracker.failed):
            self._print(failure)

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        is_first = not self._tracker.total
        self._tracker.on_lines(total, skipped, rejected, complete)
        if is_first or complete:
            so_far = "" if complete else " so far"
            self._print_summary(f"{total:,} shots{so_far}, {skipped:,} already done, {rejected:,} lines rejected")
        if is_first and self._tracker.remaining:
            self._print(LOADING)

    def on_message(self, message: str) -> None:
        self._print(message)

    def on_finished(self, row: ManifestRow) -> None:
        self._tracker.on_finished(row)
        failure = _failure_line(row, self._tracker.failed)
        if self._is_small:
            self._print_summary(f"{self._tracker.ended}/{self._tracker.total} {failure or f'{row.status} {row.id}'}")
        else:
            if failure:
                self._print(failure)
            self._summarise_if_due()

    def on_status(self, snapshot: Snapshot) -> None:
        self._tracker.on_status(snapshot)
        self._summarise_if_due()

    @property
    def _is_small(self) -> bool:
        return self._tracker.complete and self._tracker.total <= SMALL_RUN

    def _summarise_if_due(self) -> None:
        interval_s = SMALL_RUN_SUMMARY_INTERVAL_S if self._is_small else SUMMARY_INTERVAL_S
        if self._clock() - self._last_summary < interval_s:
            return
        tracker = self._tracker
        self._print_summary(_phase(tracker) or ", ".join([self._counts(), *_speed(tracker), *_busiest(tracker.snapshot)]))

    def _counts(self) -> str:
        t = self._tracker
        return f"{t.ended:,}/{t.total:,} shots: {t.done:,} done, {t.failed:,} failed, {t.skipped:,} already done"

    def _print_summary(self, text: str) -> None:
        self._last_summary = self._clock()
        self._print(text)

    def _print(self, text: str) -> None:
        elapsed_s = self._clock() - self._started
        self._console.print(f"{elapsed_s:7.1f}s  {text}", markup=False, highlight=False, soft_wrap=True)


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
