"""How a run looks while it runs: a live picture on a terminal, plain lines elsewhere, both on standard error; and beside
either of them a file for programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vidgen_ray.batch.run_progress import ProgressListener, Snapshot
from vidgen_ray.cli.progress_file import ProgressFile
from vidgen_ray.cli.run_pace import RunPace, span
from vidgen_ray.outputs.manifest import ManifestRow

PLANNING = "planning"
LOADING = "starting workers, loading weights"
FIRST_SHOTS = "the first shots are under way"
SMALL_RUN = 50
"""Lines of a script up to which every shot that ends is worth a line of its own."""
SUMMARY_EVERY_S = 10.0
QUIET_AT_MOST_S = 60.0
"""A small run is silent for so long before it says that it still works."""
FAILURES_SHOWN = 1000
MESSAGE_CHARACTERS = 300
BAR_CELLS = 40


class RunView(ProgressListener, AbstractContextManager["RunView"], Protocol):
    """A watcher of a run that has a beginning and an end."""


def run_view(progress_file: Path | None = None) -> RunView:
    """What fits standard error; with `progress_file` its events are written there, too."""
    console = Console(stderr=True)
    live = console.is_terminal and not console.is_dumb_terminal
    seen: RunView = TerminalView(console) if live else LineView(console)
    return Watchers(seen, ProgressFile(progress_file)) if progress_file else Watchers(seen)


class Watchers:
    """Views of one run; each is told everything, one event at a time, whatever thread it comes from."""

    def __init__(self, *views: RunView) -> None:
        self._views = views
        self._telling = threading.Lock()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            for view in self._views:
                opening.enter_context(view)
            self._open = opening.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def on_rejected(self, row: ManifestRow) -> None:
        with self._telling:
            for view in self._views:
                view.on_rejected(row)

    def on_planned(self, total: int, done_before: int, refused: int) -> None:
        with self._telling:
            for view in self._views:
                view.on_planned(total, done_before, refused)

    def on_finished(self, row: ManifestRow) -> None:
        with self._telling:
            for view in self._views:
                view.on_finished(row)

    def on_status(self, snapshot: Snapshot) -> None:
        with self._telling:
            for view in self._views:
                view.on_status(snapshot)


class TerminalView:
    """Bar, pace, what is left, and the stages, redrawn four times a second; failures scroll by above."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self._pace = RunPace()
        self._snapshot: Snapshot | None = None
        self._planned = self._over = False
        self._refused = 0
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over = True
        self._live.stop()

    def on_rejected(self, row: ManifestRow) -> None:
        self._refused += 1
        self._tell_failure(row, self._refused)

    def on_planned(self, total: int, done_before: int, refused: int) -> None:
        self._pace.plan(total, done_before, refused, self._clock())
        self._planned = True

    def on_finished(self, row: ManifestRow) -> None:
        self._pace.count(row, self._clock())
        self._tell_failure(row, self._pace.failed)

    def _tell_failure(self, row: ManifestRow, failed: int) -> None:
        failure = _failure(row, failed)
        if failure:
            self._live.console.print(Text(failure, style="red"))

    def on_status(self, snapshot: Snapshot) -> None:
        self._pace.see(snapshot, self._clock())
        self._snapshot = snapshot

    def _picture(self) -> RenderableType:
        parts = [self._headline(), self._counts()]
        if self._snapshot and self._snapshot.stages and not self._over:
            parts.append(_stages(self._snapshot))
        return Group(*parts)

    def _headline(self) -> RenderableType:
        now, pace = self._clock(), self._pace
        if not self._over and (not self._planned or pace.waits_for_first):
            self._spinner.update(text=_phase(pace) if self._planned else PLANNING)
            return self._spinner
        line = Text.assemble("shots ", _bar(pace), f" {pace.ended:,}/{pace.total:,}")
        if not self._over:
            line.append("".join(f"   {words}" for words in _speed(pace, now)))
        return line

    def _counts(self) -> Text:
        pace = self._pace
        parts = [
            (f"{pace.done:,} done", "green"),
            (f"{pace.failed:,} failed", "red" if pace.failed else "dim"),
            (f"{pace.skipped:,} done before", "blue" if pace.skipped else "dim"),
        ]
        if self._snapshot and not self._over:
            parts.append((f"{self._snapshot.in_progress:,} in progress", ""))
            if self._snapshot.gpus_busy is not None:
                parts.append((f"GPUs {self._snapshot.gpus_busy:.0%} busy", "bold"))
        parts.append((f"{timedelta(seconds=int(self._clock() - self._begun))}", "dim"))
        return Text("   ").join(Text(words, style=style) for words, style in parts)


class LineView:
    """One line a shot in small runs; in large ones a summary every ten seconds and one line a failure."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._begun = self._told = clock()
        self._pace = RunPace()
        self._refused = 0
        self._snapshot: Snapshot | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._small:
            self._say(self._counts())

    def on_rejected(self, row: ManifestRow) -> None:
        self._refused += 1
        failure = _failure(row, self._refused)
        if failure:
            self._say(failure)

    def on_planned(self, total: int, done_before: int, refused: int) -> None:
        self._pace.plan(total, done_before, refused, self._clock())
        self._say(f"shots: {total}, done before: {done_before}, lines refused: {refused}")
        if total > done_before + refused:
            self._say(LOADING)

    def on_finished(self, row: ManifestRow) -> None:
        self._pace.count(row, self._clock())
        failure = _failure(row, self._pace.failed)
        if self._small:
            self._say(f"{self._pace.ended}/{self._pace.total} {failure or f'{row.status} {row.id}'}")
        else:
            if failure:
                self._console_line(failure)
            self._summarise()

    def on_status(self, snapshot: Snapshot) -> None:
        self._pace.see(snapshot, self._clock())
        self._snapshot = snapshot
        self._summarise()

    @property
    def _small(self) -> bool:
        return self._pace.total <= SMALL_RUN

    def _summarise(self) -> None:
        now = self._clock()
        if now - self._told < (QUIET_AT_MOST_S if self._small else SUMMARY_EVERY_S):
            return
        if self._pace.waits_for_first:
            self._say(_phase(self._pace))
            return
        parts = [self._counts(), *_speed(self._pace, now)]
        if self._snapshot:
            parts += _busy(self._snapshot)
        self._say(", ".join(parts))

    def _counts(self) -> str:
        pace = self._pace
        return f"{pace.ended:,}/{pace.total:,} shots: {pace.done:,} done, {pace.failed:,} failed, {pace.skipped:,} done before"

    def _say(self, text: str) -> None:
        self._told = self._clock()
        self._console_line(text)

    def _console_line(self, text: str) -> None:
        elapsed_s = self._clock() - self._begun
        self._console.print(f"{elapsed_s:7.1f}s  {text}", markup=False, highlight=False, soft_wrap=True)


def _phase(pace: RunPace) -> str:
    return FIRST_SHOTS if pace.shots_begun else LOADING


def _speed(pace: RunPace, now: float) -> list[str]:
    words = []
    per_minute = pace.per_minute(now)
    if per_minute is not None:
        words.append(f"{per_minute:.1f} a minute" if per_minute >= 1 else f"{per_minute * 60:.1f} an hour")
    eta = pace.eta(now)
    if eta is not None and pace.remaining:
        words.append(f"{span(*eta)} left")
    return words


def _busy(snapshot: Snapshot) -> list[str]:
    """The GPUs, and the stage that is the busiest."""
    words = [] if snapshot.gpus_busy is None else [f"GPUs {snapshot.gpus_busy:.0%} busy"]
    if snapshot.stages:
        name, stage = max(snapshot.stages.items(), key=lambda item: (item[1].busy, item[1].queued))
        words.append(f"busiest {name} {stage.busy:.0%} with {stage.queued} queued")
    return words


def _stages(snapshot: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage")
    for heading in ("queued", "running", "workers", "busy"):
        table.add_column(heading, justify="right")
    for name, stage in snapshot.stages.items():
        table.add_row(name, f"{stage.queued:,}", f"{stage.running:,}", f"{stage.workers:,}", f"{stage.busy:.0%}")
    return table


def _bar(pace: RunPace) -> Text:
    """Done before, done, failed, and what is left; full only when every line has ended."""
    bar = Text()
    ended = cells = 0
    for count, style in ((pace.skipped, "blue"), (pace.done, "green"), (pace.failed, "red")):
        ended += count
        upto = BAR_CELLS * ended // max(pace.total, 1)
        if count and upto == cells < BAR_CELLS - 1:
            upto += 1  # a single failed shot among thousands is seen
        bar.append("━" * (upto - cells), style)
        cells = upto
    return bar.append("━" * (BAR_CELLS - cells), "bright_black")


def _failure(row: ManifestRow, failed: int) -> str | None:
    """One line for the `failed`th line that failed, None for a shot that did not or where enough have been shown."""
    if row.status != "failed" or failed > FAILURES_SHOWN + 1:
        return None
    if failed > FAILURES_SHOWN:
        return f"failed: more than {FAILURES_SHOWN} lines; the others are in failures.jsonl"
    words = f"failed {row.id} in {row.failure_stage}: {row.failure_message}"
    # Messages may hold line breaks, and control codes that a script's author put there.
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in words).split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 1] + "…"
