"""Durations, sizes, amounts of money and tables as people read them. Text of files on a terminal."""

from __future__ import annotations

import codecs
import io
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from rich import console as rich_console
from rich.console import ConsoleOptions, RenderableType
from rich.progress import ProgressColumn, Task
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from vidgen_ray.limits import CONTROL_CHARACTERS

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


NOT_FOR_TERMINALS = re.compile(rf"{CONTROL_CHARACTERS.pattern}|[\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters with which the text of a file could hide or forge lines: C0, C1, and overrides of the direction of text."""


def escaped(text: str) -> str:
    """Return text for a terminal, with `\\u001b` instead of an escape character. JSON keeps its meaning."""
    return NOT_FOR_TERMINALS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


PLAIN = {"−": "-", "–": "-", "…": "...", "×": "x", "→": "->"}
"""Characters of messages -> what a terminal shows that cannot show them."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Return what is written in place of characters that an encoding does not have, such as `\\u05e9`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(PLAIN.get(each) or ascii(each)[1:-1] for each in unknown), error.end


codecs.register_error("vidgen", _plain)


class Console(rich_console.Console):
    """Console of rich that escapes the text of all it prints. Its own colours and cursor movements are control segments."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return escaped text, so that its width is known before a table is drawn."""
        return super().render_str(escaped(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable, each with escaped text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


class _EscapedStream:
    """Text stream that escapes what is written to it. rich writes to the stream behind it."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream
        self.escape: Callable[[str], str] = escaped

    def write(self, text: str) -> int:
        return self.rich_proxied_file.write(self.escape(text))

    def writelines(self, lines: Iterable[str]) -> None:
        self.rich_proxied_file.writelines(map(self.escape, lines))

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            # click would write to it if the encoding is ASCII.
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what the block writes to the standard output and the standard error: prompts, names and messages of others.

    Characters that their encoding does not have are written as plain ones.
    """
    for each in (sys.stdout, sys.stderr):
        if isinstance(each, io.TextIOWrapper):
            each.reconfigure(errors="vidgen")
    streams = _EscapedStream(sys.stdout), _EscapedStream(sys.stderr)
    try:
        with redirect_stdout(cast("TextIO", streams[0])), redirect_stderr(cast("TextIO", streams[1])):
            yield
    finally:
        # Libraries that were imported in the block keep the streams, and reset colours at exit.
        for stream in streams:
            stream.escape = str


def cursor_movable() -> AbstractContextManager[Any]:
    """Return a context in which progress bars of other libraries can move the cursor on standard error."""
    return redirect_stderr(getattr(sys.stderr, "rich_proxied_file", sys.stderr))


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
