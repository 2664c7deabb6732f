"""Lines of a script before their validation, and what all formats share."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vidgen_ray.errors import FieldError, ScriptError
from vidgen_ray.invalid_fields import URL
from vidgen_ray.limits import MAX_LINE
from vidgen_ray.shot import IMAGE_FIELDS, LORA_FIELDS, Shot

TEXT_FIELDS = frozenset(name for name, field in Shot.model_fields.items() if field.annotation in (str, str | None))
"""Fields in which `7` is text."""
TEXT_OR_LIST_FIELDS = ("face_image",)
"""Fields in which `7` is text and `["a", "b"]` a list."""
PATH_FIELDS = (*IMAGE_FIELDS, "face_image", *LORA_FIELDS)
"""Fields that name files: a path, a list of paths, or `{path: ...}`."""
FAILURE_FIELD = "failure"
"""Field that `failures.jsonl` adds to a line. Not a field of the shot."""
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Characters that `surrogateescape` substitutes for bytes that are not UTF-8."""


NO_DEFAULTS: Mapping[str, Any] = {}


class Line(NamedTuple):
    """Unvalidated fields of a script line. A tuple, since all lines of a script are sent to other processes."""

    number: int | None
    """Line number, from 1. For Parquet: row number, from 1. `None` for a shot that is not from a file."""
    fields: dict[str, Any]
    strict: bool
    """True if the format has types (JSON), false if all values are text (CSV)."""
    defaults: Mapping[str, Any] = NO_DEFAULTS
    """Defaults of the line's scene. They override those of the header."""
    scene: str | None = None
    """Title of the line's scene."""


@dataclass(frozen=True, slots=True)
class UnreadableLine:
    """Line that could not be parsed."""

    text: str
    error: FieldError


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a .yaml script."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    characters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    styles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    title: str | None = None
    film: Mapping[str, Any] | None = None
    """Settings of the film that is made of the clips. Not checked."""


class WrongField(Exception):
    """A field of a line is wrong. The line becomes a rejected one."""

    def __init__(self, field: str, got: str, allowed: str) -> None:
        self.field, self.got, self.allowed = field, got, allowed
        super().__init__(field, got, allowed)


Lines = Iterator[tuple[int, Line | UnreadableLine]]
NO_HEADER = Header()


def parse_text_fields(fields: Mapping[str, str]) -> dict[str, Any]:
    """Parse field values given as text, in a CSV cell or on the command line."""
    return {name: _parse_field(name, value) for name, value in fields.items()}


def _parse_field(name: str, text: str) -> Any:
    value = text if name in TEXT_FIELDS else _parse_value(text)
    return text if name in TEXT_OR_LIST_FIELDS and not isinstance(value, list) else value


def _parse_value(text: str) -> Any:
    boolean = {"true": True, "false": False}.get(text.strip().lower())
    if boolean is not None:
        return boolean
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, int | float | list | dict) else text


def with_absolute_paths(field: str, value: Any, absolute: Callable[[str], str]) -> Any:
    """Return the unvalidated value of a field with the paths that `absolute` returns. Names of built-in files are kept."""
    if field not in PATH_FIELDS:
        return value
    if isinstance(value, str):
        return value if value.startswith("builtin:") else absolute(value)
    if isinstance(value, list | tuple):
        # A list in a list is wrong, and may be deep.
        return [item if isinstance(item, list | tuple) else with_absolute_paths(field, item, absolute) for item in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": with_absolute_paths(field, value["path"], absolute)}
    return value


def absolute_path(folder: Path, path: str) -> str:
    """Return a path relative to a folder as an absolute one, and a URL unchanged.

    Unlike pathlib, accepts unknown users in `~user`.
    """
    if URL.match(path):
        return path
    # Names of users with NUL or surrogates. There is no such file either.
    with suppress(ValueError):
        path = os.path.expanduser(path)
    return os.path.abspath(os.path.join(folder, path))


def file_error(path: Path, got: str, allowed: str) -> ScriptError:
    return ScriptError([FieldError(path.name, None, None, got, allowed)])


def encoding_error(path: Path, line: int | None) -> ScriptError:
    return ScriptError([FieldError(path.name, line, None, "bytes that are not UTF-8", "save the script as UTF-8")])


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines, each with its line end converted to a line feed. Raises ScriptError on a read error."""
    file = path.open(encoding="utf-8-sig", errors="surrogateescape")

    def lines() -> Iterator[str]:
        number = 0
        with file:
            try:
                while text := file.readline(MAX_LINE):
                    number += 1
                    if not text.isascii() and NOT_UTF8.search(text):
                        raise encoding_error(path, number)
                    if len(text) == MAX_LINE:
                        got, allowed = f"more than {MAX_LINE:,} characters", "must be one shot per line"
                        raise ScriptError([FieldError(path.name, number, None, got, allowed)])
                    yield text
            except OSError as error:
                raise file_error(path, f"a read error after line {number}", f"must be readable ({error.strerror})") from None

    return lines()
