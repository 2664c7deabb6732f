"""Consoles and tables of rich whose text is escaped."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from rich import console as rich_console
from rich.console import ConsoleOptions, RenderableType
from rich.progress import ProgressColumn, Task
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from vidgen_ray.system.quantities import duration
from vidgen_ray.system.terminal_text import escaped

LINE_EVERY_S = 15.0
"""Seconds between two lines of progress if standard error is not a terminal."""


class Console(rich_console.Console):
    """Console of rich that escapes the text of all it prints. Its own colours and cursor movements are control segments."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is handled. rich would end the process, in the middle of a run."""
        self.quiet = True
        raise  # called in the handler

    def render_str(self, text: str, **options: Any) -> Text:
        """Return escaped text, so that its width is known before a table is drawn."""
        return super().render_str(escaped(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable, each with escaped text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


PLAIN_WIDTH = 10_000
"""Width in columns if standard output is not a terminal. Large enough that lines are not wrapped."""


def stdout_console() -> Console:
    """Return a console for standard output that wraps lines only on a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def table_of(*columns: str, right: Collection[str] = ()) -> Table:
    """Return a table without lines with these columns, of which those in `right` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="")
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name in right else "left")
    return table


class ElapsedColumn(ProgressColumn):
    """Time that a task has taken: `4 min 9 s elapsed`."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text("" if seconds is None else f"{duration(seconds)} elapsed", style="progress.elapsed")
