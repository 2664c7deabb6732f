"""What is wrong with a request, as OpenAI's clients read it: a status, and message, type, param and code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil

from vidgen_ray.errors import FieldError, ScriptError, VidgenError

INVALID = "invalid_request_error"
FILE_FIELDS = ("image", "face_image", "lora")
FOLDERS = re.compile(r"(?<![\w./:])/(?:[^\s/:'\",;]+/)+")


class ApiError(VidgenError):
    """An answer that is an error. `message` is shown to whoever asked and says nothing of the server's inside."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        type: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        """The field that it is about."""
        self.code = code
        self.headers = dict(headers or {})
        super().__init__(message)


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A field that cannot be what it is."""
    return ApiError(400, message if param is None else f"{param}: {message}", code=code, param=param)


def not_found(what: str, name: str, param: str | None = None) -> ApiError:
    """Nothing of that name, or nothing that this tenant may see: the two look alike."""
    return ApiError(404, f"No such {what}: {name!r}", code=f"{what}_not_found", param=param)


def invalid_fields(error: ScriptError) -> ApiError:
    """All that is wrong with a shot's fields; `param` is the first of them."""
    first = error.errors[0]
    return ApiError(400, "; ".join(map(_sentence, error.errors)), code=_code(first), param=first.field)


def too_many_requests(message: str, code: str, seconds: float, param: str | None = None) -> ApiError:
    """429, with the time after which another try may do, as both headers that clients know."""
    headers = {"Retry-After": str(max(1, ceil(seconds))), "retry-after-ms": str(max(1, round(seconds * 1000)))}
    return ApiError(429, message, code=code, param=param, type="rate_limit_error", headers=headers)


def without_paths(text: str) -> str:
    """The text with files by their names alone: where they lie on the server is nobody else's business."""
    return FOLDERS.sub("", text)


def _sentence(error: FieldError) -> str:
    field = f"{error.field}: " if error.field else ""
    if error.field in FILE_FIELDS and "looked for" in error.allowed:
        # Where it was looked for is nobody else's business.
        return f"{field}its file is not on the server any more"
    return f"{field}got {error.got}, {error.allowed}"


def _code(error: FieldError) -> str:
    if error.got == "an unknown field":
        return "unknown_parameter"
    return "missing_required_parameter" if error.got == "nothing" else "invalid_value"
