"""The errors a person can mend. Each says what was got, what is allowed and what to do; the command line shows them
without a traceback and ends with `exit_code`."""

from collections.abc import Sequence
from dataclasses import dataclass


class VidgenError(Exception):
    """Base of everything in this file."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing wrong with one field of one line."""

    source: str
    """The script's file name, or what else the shot came from."""
    line: int | None
    """Counted from 1 as an editor does; for Parquet the row, counted from 1."""
    field: str | None
    got: str
    allowed: str

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source} line {self.line}"
        field = f", {self.field}" if self.field else ""
        # A path or a name from a file may hold what a terminal obeys.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{where}{field}: got {self.got}, {self.allowed}")


class UsageError(VidgenError):
    """A command was called with arguments that do not go together."""

    exit_code = 2


class ScriptError(VidgenError):
    """The script cannot be read, or none of its lines can be rendered."""

    exit_code = 3

    def __init__(self, errors: Sequence[FieldError]) -> None:
        self.errors = tuple(errors)
        super().__init__(self.errors)

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))


class ProfileError(VidgenError):
    """The profile cannot be read or does not describe runnable stages."""

    exit_code = 3


class SetupError(VidgenError):
    """Something is missing on this machine: weights, a provider, a package."""

    exit_code = 4


class MissingWeights(SetupError):
    """Weights that only some shots need are not on this machine. A script with such a shot cannot be rendered here."""


class TooExpensive(VidgenError):
    """The plan costs more than `--max-cost` allows. Nothing was started."""

    exit_code = 5


class MediaError(VidgenError):
    """An image or a video cannot be read or written."""


class WriteError(MediaError):
    """A file cannot be written: the disk's business, not that of what was to be written."""


class Cancelled(VidgenError):
    """Nobody wants the result any more, so the work ended in its middle. Not a failure of the shot."""


class StageError(VidgenError):
    """A stage cannot do what this shot asks of it. The shot fails, its neighbours do not."""
