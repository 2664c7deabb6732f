"""One hostile input: how it is built, and what must happen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["refused", "used"]


@dataclass(frozen=True)
class Case:
    """A hostile input. Its class is `refused`, with a message, or `used`."""

    name: str
    outcome: Outcome
    message: str = ""
    """Part of the message of a refused input."""
    field: str | None = None
    """Field of a script line, or `param` of an HTTP error, that the message must name."""
    build: Callable[[Path], Any] = lambda _: None
    """For files: write the file at this path. For others: return the line, or the request's arguments."""
    status: int = 0
    """HTTP status of a refused request."""
    ending: str = ""
    """End of the name of the file."""

    def __str__(self) -> str:
        return self.name


def refused(name: str, message: str, build: Callable[[Path], Any], **more: Any) -> Case:
    return Case(name, "refused", message, build=build, **more)


def used(name: str, build: Callable[[Path], Any], **more: Any) -> Case:
    return Case(name, "used", build=build, **more)


def content(data: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    """Return a builder that writes these bytes, or those that a function returns."""

    def build(path: Path) -> None:
        path.write_bytes(data if isinstance(data, bytes) else data())

    return build
