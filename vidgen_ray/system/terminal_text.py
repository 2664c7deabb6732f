"""Text of files and of others on a terminal: escaped, and in characters that its encoding has."""

from __future__ import annotations

import codecs
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from vidgen_ray.limits import CONTROL_CHARACTERS

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


def protocol_output() -> AbstractContextManager[Any]:
    """Return a context in which standard output belongs to a protocol: nothing that is written to it is escaped."""
    return redirect_stdout(getattr(sys.stdout, "rich_proxied_file", sys.stdout))


def cursor_movable() -> AbstractContextManager[Any]:
    """Return a context in which progress bars of other libraries can move the cursor on standard error."""
    return redirect_stderr(getattr(sys.stderr, "rich_proxied_file", sys.stderr))
