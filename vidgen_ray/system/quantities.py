"""Durations, sizes, amounts of money and tables as people read them."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.table import Table
from rich.text import Text

UNITS_S = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
"""Seconds of a unit, and of the next smaller one."""


def duration(seconds: float) -> str:
    """Return `4 s`, `4.2 s`, `42 s`, `4 min 9 s`, `2 h 5 min` or `3 d 4 h`."""
    if seconds < 9.95:
        return f"{round(seconds, 1):g} s"
    whole = round(seconds)
    for large_s, large, small_s, small in UNITS_S:
        if whole >= large_s:
            rest = whole % large_s // small_s
            return f"{whole // large_s} {large}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def size(n_bytes: float) -> str:
    """Return a size in decimal units: `12.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.3g} {unit}" if n_bytes < 100 else f"{n_bytes:,.0f} {unit}"


def count(number: int, thing: str) -> str:
    """Return `1 shot` or `1,200 shots`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def amount_text(amount: float) -> str:
    """Return `1,234.50` or `0.0012`."""
    return f"{amount:,.2f}" if not amount or amount >= 0.1 else f"{amount:.2g}"


def money(amount: float, currency: str | None) -> str:
    """Return an amount with its currency. Without one, it is in that of `--price` or of the profile."""
    return f"{amount_text(amount)} {currency or '(in the currency of the price)'}"


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
