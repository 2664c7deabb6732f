"""How a run looks while it runs: bars on a terminal, plain lines elsewhere. Both go to standard error."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vidgen_ray.batch.watcher import Watcher
from vidgen_ray.outputs.manifest import ManifestRow

LOADING = "starting workers, loading weights"


class RunView(Watcher, AbstractContextManager["RunView"], Protocol):
    """A watcher of a run that has a beginning and an end."""


def run_view() -> RunView:
    console = Console(stderr=True)
    return _Bars(console) if console.is_terminal else _Lines(console)


class _Bars:
    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("planning", total=None)
        self._failed = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def planned(self, total: int, done_before: int, refused: int) -> None:
        description = LOADING if total > done_before + refused else "shots"
        self._progress.update(self._task, total=total, description=description)

    def ended(self, row: ManifestRow) -> None:
        if row.status == "failed":
            self._failed += 1
            self._progress.console.print(f"[red]failed[/] {escape(_failure_line(row))}")
        if row.status == "done" or self._failed:
            failed = f" ([red]{self._failed} failed[/])" if self._failed else ""
            self._progress.update(self._task, description=f"shots{failed}")
        self._progress.advance(self._task)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = self._count = 0

    def __enter__(self) -> Self:
        self._begun = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def planned(self, total: int, done_before: int, refused: int) -> None:
        self._total = total
        self._say(f"shots: {total}, done before: {done_before}, lines refused: {refused}")
        if total > done_before + refused:
            self._say(LOADING)

    def ended(self, row: ManifestRow) -> None:
        self._count += 1
        text = _failure_line(row) if row.status == "failed" else row.id
        self._say(f"{self._count}/{self._total} {row.status} {text}")

    def _say(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._begun
        self._console.print(f"{elapsed_s:7.1f}s  {text}", markup=False, highlight=False, soft_wrap=True)


def _failure_line(row: ManifestRow) -> str:
    return f"{row.id} in {row.failure_stage}: {row.failure_message}"
