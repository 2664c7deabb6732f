"""Lines of a script, read and checked, and what all formats share."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vidgen_ray.errors import URL_START, FieldError, ScriptError
from vidgen_ray.limits import MAX_LINE
from vidgen_ray.safety import DEFAULT_POLICY, ContentPolicy
from vidgen_ray.shot import IMAGE_FIELDS, LORA_FIELDS, Shot
from vidgen_ray.system.files import load_yaml

if TYPE_CHECKING:
    from vidgen_ray.content_keys import ShotPlan
    from vidgen_ray.outputs.manifest import Finished
    from vidgen_ray.outputs.records import Failure

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


@dataclass(slots=True)
class Line:
    """A line of a script: its fields, after `LineChecker.check` its shots or errors, and after planning a result per shot."""

    number: int
    """Line number in the file, from 1. For Parquet: row number, from 1. 0 for a shot that is not from a file."""
    fields: dict[str, Any]
    """Fields as they were read. After the check: with defaults and absolute paths, to be copied to another script."""
    strict: bool = True
    """True if the format has types (JSON), false if all values are text (CSV)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the line's scene. They override those of the header."""
    scene: str | None = None
    """Title of the line's scene."""
    source: str = ""
    """Name of the file that was read, for messages."""
    script: str = ""
    """Script of the line. For a line of failures.jsonl: the original script."""
    script_line: int = 0
    """Line number in `script`, from 1. Differs from `number` for a line of failures.jsonl."""
    failed_as: str | None = None
    """Id under which a line of failures.jsonl failed."""
    has_own_id: bool = False
    """False if the id is derived from the content of the line."""
    id: str = ""
    """Id of the line if it is rejected."""
    shots: tuple[Shot, ...] = ()
    """Valid shots with seeds and absolute paths, one for each variant. Empty if there are errors."""
    errors: tuple[FieldError, ...] = ()
    notes: tuple[str, ...] = ()
    """Settings of the line that have no effect, as messages."""
    results: tuple[ShotPlan | Finished | Failure | None, ...] = ()
    """For each shot of a planned line: its plan; the finished shot of an earlier run; the failure if it names a file that does
    not exist or cannot be read; `None` if it starts from the last frame of another shot, and is planned after that one."""

    @property
    def shot(self) -> Shot:
        """The only shot. `unique_lines` yields a line for each shot."""
        (shot,) = self.shots
        return shot

    @property
    def result(self) -> ShotPlan | Finished | Failure | None:
        """Result of planning the only shot."""
        (result,) = self.results
        return result

    @property
    def replaces(self) -> str | None:
        """Id under which the only shot failed in an earlier run, if it differs."""
        return self.failed_as if self.failed_as != self.shot.id else None

    def reject(self, field: str | None, got: str, allowed: str) -> None:
        """Add an error, and drop the shots, their results and the notes."""
        error = FieldError(self.source, self.number or None, field, got, allowed)
        # The shots of a line often have the same error.
        if error not in self.errors:
            self.errors += (error,)
        self.shots = self.results = self.notes = ()


Lines = Iterator[Line]


def unreadable_line(source: str, number: int, got: str, allowed: str, *, field: str | None = None, text: str = "") -> Line:
    """Return a line that could not be parsed. `text`: its content."""
    line = Line(number, {"unreadable": text} if text else {}, source=source)
    line.reject(field, got, allowed)
    return line


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a .yaml script."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    characters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    styles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    title: str | None = None
    film: Mapping[str, Any] | None = None
    """Settings of the film that is made of the clips. Not checked."""


@dataclass(frozen=True)
class Columns:
    """Fields that columns of tables and names in .jsonl stand for, if they are named otherwise."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Column -> field."""
    keep_unknown: bool = False
    """Copy unknown columns to `metadata`. Otherwise they are errors."""


@dataclass(frozen=True)
class ScriptSettings:
    """Settings for reading a script.

    Missing fields of a line come from the header, then from `defaults`, then from `profile_defaults`.
    """

    path: Path
    run_seed: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults from the command line."""
    profile_defaults: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are set on every shot after its checks."""
    characters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Characters that are not from the script itself. See `read_characters`."""
    policy: ContentPolicy = DEFAULT_POLICY
    """Rules for the content of lines."""
    columns: Columns = Columns()
    files: tuple[Path, ...] = ()
    """Files that are read as one script, of which `path` is only the name. Default: `path`."""
    base: Path | None = None
    """Folder to which paths of the script are relative. Default: that of the script."""

    @property
    def folder(self) -> Path:
        """Folder to which paths of the script are relative."""
        return self.base or (self.path if self.path.is_dir() else self.path.parent)


class WrongField(Exception):
    """A field of a line is wrong. The line becomes a rejected one."""

    def __init__(self, field: str, got: str, allowed: str) -> None:
        self.field, self.got, self.allowed = field, got, allowed
        super().__init__(field, got, allowed)


NO_HEADER = Header()


def parse_text_fields(fields: Mapping[str, str]) -> dict[str, Any]:
    """Parse field values given as text, in a CSV cell or on the command line."""
    return {name: parse_field(name, value) for name, value in fields.items()}


def parse_field(name: str, text: str) -> Any:
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
    if URL_START.match(path):
        return path
    # Names of users with NUL or surrogates. There is no such file either.
    with suppress(ValueError):
        path = os.path.expanduser(path)
    return os.path.abspath(os.path.join(folder, path))


def file_error(path: Path, got: str, allowed: str) -> ScriptError:
    return ScriptError([FieldError(path.name, None, None, got, allowed)])


def read_yaml_file(path: Path) -> Any:
    """Return the content of a YAML file. Raises ScriptError."""
    try:
        return load_yaml(path)
    except OSError as error:
        raise file_error(path, "the file", f"must be readable ({error.strerror})") from None
    except ValueError as error:
        raise file_error(path, "invalid YAML", str(error)) from None


SIGNATURES = {
    b"\xff\xfe": ("UTF-16 text", "save the script as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save the script as UTF-8"),
    b"\x1f\x8b": ("gzip data", "name the file .jsonl.gz, .csv.gz or .txt.gz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard data", "name the file .jsonl.zst, .csv.zst or .txt.zst"),
    b"PAR1": ("Parquet data", "name the file .parquet"),
    b"PK\x03\x04": ("a ZIP archive, such as a spreadsheet", "save the sheet as .csv"),
}
"""First bytes of a file -> what it is, and what to do."""
COMPRESSED = (".gz", ".zst")
"""Endings of compressed text."""


def encoding_error(path: Path, line: int | None) -> ScriptError:
    with path.open("rb") as file:
        start = file.read(4)
    found = (each for mark, each in SIGNATURES.items() if start.startswith(mark))
    sheet = ", in Excel as CSV UTF-8 (comma delimited)" if path.suffix.lower() == ".csv" else ""
    kind, advice = next(found, ("", f"save the script as UTF-8{sheet}"))
    got = "bytes that are not UTF-8" + (f": the file is {kind}" if kind else "")
    return ScriptError([FieldError(path.name, line, None, got, advice)])


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() in COMPRESSED:
        import pyarrow

        content = pyarrow.input_stream(str(path), compression="detect")
        return io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape")
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines, each with its line end converted to a line feed. Raises ScriptError on a read error."""
    file = _open_text(path)

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
            # ValueError for damaged compressed data.
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise file_error(path, f"a read error after line {number}", f"must be readable ({reason})") from None

    return lines()


class ScriptIndex:
    """Ids of a script and their lines."""

    def __init__(self) -> None:
        self.line_of: dict[str, int] = {}
        """Id -> line number."""
        self._last_numbers: dict[str, int] = {}

    def unused_name(self, name: str) -> str:
        """Return `name`, `name-2`, `name-3`, ... : the first that no line has."""
        # Without the counter, thousands of lines with the same default id would take quadratic time.
        for number in count(self._last_numbers.get(name, 1)):
            candidate = name if number == 1 else f"{name}-{number}"
            if candidate not in self.line_of:
                if number > 1:
                    self._last_numbers[name] = number
                return candidate
        raise AssertionError
