"""Progress bars of stages that run in this process, on a terminal or in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.stages.progress import ProgressCallback


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[ProgressCallback]:
    """Show a bar per stage in this block. Yields the callback that moves them. Default `console`: standard output."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, step: int, steps: int) -> None:
            if stage not in tasks:
                label = STAGE_BY_NAME[stage].label if stage in STAGE_BY_NAME else stage
                tasks[stage] = bars.add_task(label, total=None)
            bars.update(tasks[stage], completed=step, total=steps or None)

        yield on_progress
