"""Lines of a script after their validation."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from vidgen_ray.errors import FieldError
from vidgen_ray.shot import Shot


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """Invalid line, with all of its errors."""

    id: str
    script: str
    """Script of the line. For a line of failures.jsonl: the original script."""
    line: int
    """Line number, from 1."""
    source: str
    """Name of the file that was read, for messages."""
    fields: dict[str, Any]
    """Fields with defaults filled in and absolute paths, so that the line can be copied to another script."""
    errors: tuple[FieldError, ...]
    origin_line: int
    """Line number in `script`, from 1. Differs from `line` for a line of failures.jsonl."""


class CheckedLine(NamedTuple):
    """Valid shot with its seed and absolute paths. A line with variants yields one for each variant."""

    shot: Shot
    line: int
    """Line number in the script, from 1."""
    script: str
    """Script of the line. For a line of failures.jsonl: the original script."""
    replaces: str | None
    """Id under which the line failed in an earlier run, if it differs."""
    notes: tuple[str, ...] = ()
    """Settings of the line that have no effect, as messages. Empty for all but the first variant."""


class ValidLine(NamedTuple):
    """Valid line whose ids have not been compared with those of other lines."""

    shots: tuple[Shot, ...]
    """One for each variant."""
    as_rejected: RejectedLine
    """The line without errors, for the case that its id is taken."""
    failed_as: str | None
    """Id under which a line of failures.jsonl failed."""
    has_own_id: bool
    """False if the id is derived from the content of the line."""
    notes: tuple[str, ...] = ()
    """Settings of the line that have no effect, as messages."""
