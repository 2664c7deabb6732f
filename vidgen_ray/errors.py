"""Errors that a user can fix.

Each message says what was wrong, what is allowed and what to do. The command line prints it without a traceback and exits
with `exit_code`. The functions at the end describe invalid fields: which field, which value, and what is allowed. `StrictModel`
is the base of models that have such fields.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from pydantic import BaseModel, ConfigDict

from vidgen_ray.limits import DECIMAL_COMMA

MAX_MESSAGE_LENGTH = 300
"""Maximum number of characters of a message about a line."""
MAX_MESSAGES = 50
"""Maximum number of messages about lines that are printed. A summary follows."""


class VidgenError(Exception):
    """Base class of all errors in this module."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class FieldError:
    """One invalid field of a script line."""

    source: str
    """File name of the script, or another origin of the shot."""
    line: int | None
    """Line number, from 1. For Parquet: row number, from 1. `None` for a shot that is not from a file."""
    field: str | None
    got: str
    allowed: str

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source} line {self.line}"
        field = f", {self.field}" if self.field else ""
        # Values from a script may contain terminal control characters.
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{where}{field}: got {self.got}, {self.allowed}")
        return text if len(text) <= MAX_MESSAGE_LENGTH else text[: MAX_MESSAGE_LENGTH - 1] + "…"


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, which need not be taken from an index of this project."""
    with suppress(PackageNotFoundError):
        found = [re.split(r"\s*;\s*", each, maxsplit=1) for each in requires("vidgen-ray") or ()]
        wanted = re.compile(rf"extra == ['\"]{extra}['\"]")
        if packages := [name for name, *marker in found if marker and wanted.search(marker[0])]:
            return shlex.join(["pip", "install", *packages])
    return f"pip install '.[{extra}]' in the folder of the project"


OPENCV_LIBRARIES = "apt-get install libgl1 libglib2.0-0"
"""Command that installs the libraries of the system that OpenCV needs."""


def import_problem(error: ImportError) -> str:
    """Return why a package cannot be imported: it is not installed, or a library of the system is missing."""
    package = str(error.name).partition(".")[0]
    if isinstance(error, ModuleNotFoundError):
        return f"the package {package} is not installed"
    return f"the package {package} cannot be loaded ({error})"


class UsageError(VidgenError):
    """The arguments of a command are invalid."""

    exit_code = 2


class ScriptError(VidgenError):
    """The script cannot be read, or has no valid lines."""

    exit_code = 3

    def __init__(self, errors: Sequence[FieldError]) -> None:
        self.errors = tuple(errors)
        super().__init__(self.errors)

    def __str__(self) -> str:
        shown = "\n".join(map(str, self.errors[:MAX_MESSAGES]))
        more = len(self.errors) - MAX_MESSAGES
        return f"{shown}\n... and {more:,} more errors" if more > 0 else shown


class ProfileError(VidgenError):
    """The profile cannot be read, or does not describe runnable stages."""

    exit_code = 3


class LicenceError(ProfileError):
    """A licence of the weights does not allow what the run requires."""

    def __init__(self, required: str, weights: Sequence[str]) -> None:
        self.required = required
        self.weights = tuple(weights)
        super().__init__(required, self.weights)

    def __str__(self) -> str:
        return (
            f"--require-licence {self.required}: not allowed with {'; '.join(self.weights)}. Use a profile with other weights"
        )


class SetupError(VidgenError):
    """Something is missing or unusable on this machine, such as weights, a package, a folder or a Ray cluster."""

    exit_code = 4


class MissingWeights(SetupError):
    """Weights that only some shots need are not on this machine."""


class OtherWeights(SetupError):
    """This machine has other weights than those that the shot was planned with. Another machine may have the right ones."""


class StorageHangs(SetupError):
    """The storage of the output folder has not responded for too long. Another call to it may never return."""


class EngineFailed(SetupError):
    """A bug in the engine: it cannot continue. Finished shots are kept."""


class TooExpensive(VidgenError):
    """The cost exceeds `--max-cost`: the estimate, before anything was started, or that of a run, which stopped."""

    exit_code = 5


class MissingShots(VidgenError):
    """Shots of a film are not finished."""

    MAX_LISTED = 50

    def __init__(self, missing: Sequence[str], wanted: int) -> None:
        self.missing = tuple(missing)
        self.wanted = wanted
        super().__init__(self.missing, wanted)

    def __str__(self) -> str:
        listed = [f"  {line}" for line in self.missing[: self.MAX_LISTED]]
        if len(self.missing) > self.MAX_LISTED:
            listed.append(f"  and {len(self.missing) - self.MAX_LISTED} more")
        advice = "Render them, choose others with --ids, or leave them out with --skip-missing."
        return "\n".join([f"{len(self.missing)} of {self.wanted} shots are not finished:", *listed, advice])


class MediaError(VidgenError):
    """An image or a video cannot be read or written."""


class InputChanged(VidgenError):
    """A photo, start image or LoRA was changed after the shot was planned. Planning the shot again gives it another key."""

    def __init__(self, path: object) -> None:
        self.path = path
        super().__init__(path)

    def __str__(self) -> str:
        return f"{self.path}: changed since the run planned this shot; render the line again"


class WriteError(MediaError):
    """A file cannot be written because of the storage, not because of its content."""


class Cancelled(VidgenError):
    """The work was cancelled. Not a failure of the shot."""


class StageError(VidgenError):
    """A stage cannot process this shot. Other shots are not affected."""


class OutOfMemory(StageError):
    """The shot does not fit into GPU memory, also with the lowest-memory settings. A larger GPU may have room."""


class FrozenModel(BaseModel):
    """A record whose fields do not change."""

    model_config = ConfigDict(frozen=True)


class StrictModel(FrozenModel):
    """A record in which unknown fields, and numbers that are not finite, are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


SCHEMA_COMMAND = "`vidgen schema shot`"
MAX_LISTED = 200
"""Longest list of field names in an error message, in characters."""
MIN_NAME_SIMILARITY = 0.65
"""Least similarity of an unknown field to the one that a message proposes, as difflib counts it."""

URL_START = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Start of a URL, also after pathlib has removed one of its slashes."""
NOT_A_URL = "must be a file on this machine; URLs are not read, download it first"


def first_line(error: object) -> str:
    """Return the first line of a message, or the name of the error's class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def short_reason(error: object) -> str:
    """Return the message of an error of a library on one line, at most 200 characters, or the name of its class.

    Some messages list every layer or tensor.
    """
    return " ".join(str(error).split())[:200] or type(error).__name__


def shortened_value(value: object) -> str:
    """Return the value as an error message shows it, at most 80 characters long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a value that is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def in_json(value: object) -> str:
    """Return a value of a JSON or YAML file as an error message shows it."""
    return "null" if value is None else shortened_value(value)


def encodable(text: str) -> str:
    """Escape lone surrogates. Malformed lines and requests may have them; UTF-8 cannot encode them."""
    return text.encode("utf-8", "backslashreplace").decode()


def explain(detail: Any, fields: Iterable[str], reference: str = SCHEMA_COMMAND) -> tuple[str | None, str, str]:
    """Return the field, the value and what is allowed, from a pydantic error of a model with these fields.

    `reference` says where all fields are listed.
    """
    # `lora.weight` and `steps.flux`. Only metadata is nested deeper, to any depth.
    field = ".".join([part for part in detail["loc"] if isinstance(part, str)][:2]) or None
    if detail["type"] == "extra_forbidden" and field and "." in field:
        return field, "an unknown field", f"{field.split('.')[0]} has no such field"
    if detail["type"] == "extra_forbidden":
        return field, "an unknown field", known_fields(field or "", fields, reference)
    if detail["type"] == "missing":
        return field, "nothing", "this field is required"
    if detail["type"] in ("float_parsing", "int_parsing") and DECIMAL_COMMA.fullmatch(str(detail["input"]).strip()):
        return field, shortened_value(detail["input"]), f"must have a decimal point: {detail['input'].replace(',', '.')}"
    is_of_all = field is None and detail["type"] == "value_error"
    return field, "fields that do not fit together" if is_of_all else shortened_value(detail["input"]), allowed_of(detail)


def allowed_of(detail: Any) -> str:
    """Return what a pydantic error says is allowed, as the end of a message."""
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    return str(message[:1].lower() + message[1:])


def known_fields(name: str, fields: Iterable[str], reference: str = SCHEMA_COMMAND) -> str:
    """Say what may stand in place of an unknown field: the most similar name, or all names if these are few."""
    fields = list(fields)
    if similar := get_close_matches(name[:MAX_LISTED].lower(), fields, 1, MIN_NAME_SIMILARITY):
        return f"did you mean {similar[0]}?"
    names = ", ".join(fields)
    return f"must be one of {names}" if len(names) <= MAX_LISTED else f"see {reference} for all fields"
