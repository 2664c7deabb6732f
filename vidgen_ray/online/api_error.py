"""Error responses in OpenAI's format, and the exception handlers that answer every error in it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as ConnectionTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from vidgen_ray.errors import FieldError, ScriptError, VidgenError, encodable, explain
from vidgen_ray.outputs.storage import is_disk_full
from vidgen_ray.script.lines import PATH_FIELDS

INVALID = "invalid_request_error"
_CLIENT_CLOSED_REQUEST = 499
"""Status of a response that no client receives."""
MAX_FIELD_ERRORS = 10
"""Wrong fields that one error describes."""
_NAME_LENGTH = 100
"""Characters of the name of a field or object that an error repeats."""
MESSAGE_LENGTH = 4_000
"""Characters of a message. Some repeat what the client sent."""
FOLDERS = re.compile(r"(?<![\w./:])/(?:[^\s/:'\",;]+/)+")
URLS = re.compile(r"https?://(?:\[[^\]\s]*\]|[\w.-]+)(?::\d+)?(?:/[^\s:'\",;]*)?")

_T = TypeVar("_T")


class ApiError(VidgenError):
    """Error response. `message` is shown to the client and must not contain internals of the server."""

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
        self.message = message = shortened(message, MESSAGE_LENGTH)
        self.type = type
        self.param = param and param[:_NAME_LENGTH]
        """Request field that caused the error."""
        self.code = code
        self.headers = dict(headers or {})
        super().__init__(message)


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Return a 400 error for an invalid field."""
    return ApiError(400, message if param is None else f"{param}: {message}", code=code, param=param)


def not_found(kind: str, name: str, param: str | None = None) -> ApiError:
    """Return a 404 error. It is the same for an object that does not exist and for one of another tenant."""
    return ApiError(404, f"No such {kind}: {name[:_NAME_LENGTH]!r}", code=f"{kind}_not_found", param=param)


def found(value: _T | None, kind: str, name: str) -> _T:
    """Return a value that is not `None`. Raises the error of `not_found`."""
    if value is None:
        raise not_found(kind, name)
    return value


def invalid_fields(error: ScriptError) -> ApiError:
    """Return a 400 error with all invalid fields of a shot. `param` is the first of them."""
    first = error.errors[0]
    return ApiError(400, "; ".join(map(_sentence, error.errors)), code=_code(first), param=first.field)


def validation_failed(details: Sequence[Any], fields: Iterable[str] = ()) -> ApiError:
    """Return the error for pydantic's error details of a model with these fields."""
    errors = []
    # Unknown fields first: a misspelt name is also a missing one.
    for detail in sorted(details, key=lambda detail: detail["type"] != "extra_forbidden")[:MAX_FIELD_ERRORS]:
        field, got, allowed = explain(detail, fields, "/openapi.json")
        errors.append(FieldError("request", None, field and field[:_NAME_LENGTH], got, allowed))
    # A parameter that the route and its authentication read fails twice.
    return invalid_fields(ScriptError(list(dict.fromkeys(errors))))


def too_many_requests(message: str, code: str, seconds: float) -> ApiError:
    """Return a 429 error with the retry delay in `Retry-After` (whole seconds) and `retry-after-ms`."""
    headers = {"Retry-After": str(max(1, ceil(seconds))), "retry-after-ms": str(max(1, round(seconds * 1000)))}
    return ApiError(429, message, code=code, type="rate_limit_error", headers=headers)


def without_internals(text: str) -> str:
    """Remove the folders from file paths in a message, and URLs of other servers, which clients must not see."""
    return FOLDERS.sub("", URLS.sub("a server", text))


def shortened(text: str, length: int) -> str:
    """Return a text of at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _sentence(error: FieldError) -> str:
    field = f"{error.field}: " if error.field else ""
    if error.field in PATH_FIELDS and "looked for" in error.allowed:
        # The original message lists the searched paths.
        return f"{field}the file is no longer on the server"
    return f"{field}got {error.got}, {error.allowed}"


def _code(error: FieldError) -> str:
    if error.got == "an unknown field":
        return "unknown_parameter"
    return "missing_required_parameter" if error.got == "nothing" else "invalid_value"


log = logging.getLogger("ray.serve")

_CODES: Mapping[int, tuple[str, str]] = {
    400: (INVALID, "invalid_request"),
    404: (INVALID, "not_found"),
    405: (INVALID, "method_not_allowed"),
    413: (INVALID, "too_large"),
    415: (INVALID, "unsupported_media_type"),
}
"""Status -> type and code of errors that the framework raises."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def install(app: FastAPI) -> None:
    """Install handlers that answer every error as `ErrorBody`."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, _database_error)
    app.add_exception_handler(ConnectionTimeout, _database_error)
    app.add_exception_handler(OSError, _storage_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _internal_error)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # The location starts with the kind of parameter: query, header or path.
    return await _api_error(_, validation_failed([{**detail, "loc": detail["loc"][1:]} for detail in error.errors()]))


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind, code = _CODES.get(error.status_code, (INVALID if error.status_code < 500 else "server_error", "error"))
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed_methods(request))
    return _response(error.status_code, str(error.detail), kind, code, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes of a path. Starlette names those of the first route only."""
    scope = request.scope
    # /v1/videos/sync is not a video, although it matches /v1/videos/{video_id}.
    own = request.app.openapi()["paths"].get(scope["path"].removeprefix(scope.get("root_path", "")))
    return [
        name
        for name in METHODS
        if any(route.matches({**scope, "method": name})[0] is Match.FULL for route in request.app.routes)
        and (own is None or name == "HEAD" or name.lower() in own)
    ]


async def _database_error(_: Request, error: Exception) -> Response:
    is_full = is_disk_full(error)
    log.error("the database %s: %s", "is full" if is_full else "does not respond", type(error).__name__)
    return _unavailable("The disk of the server is full" if is_full else "The database does not respond")


async def _storage_error(request: Request, error: Exception) -> Response:
    log.error("the storage failed", exc_info=error)
    if is_disk_full(error):
        return _unavailable("The disk of the server is full")
    return await _internal_error(request, error)


def _unavailable(reason: str) -> Response:
    return _response(503, f"{reason}. Try again later.", "server_error", "unavailable", headers={"Retry-After": "2"})


async def _internal_error(_: Request, error: Exception) -> Response:
    # Starlette raises the error again after this response, so it is logged.
    return _response(500, "Internal server error. See the log of the server.", "server_error", "internal_error")


def error_response(error: ApiError) -> Response:
    """Return the response to an error that no handler catches, such as one of a middleware."""
    return _response(error.status, error.message, error.type, error.code, error.param, error.headers)


def _response(
    status: int, message: str, kind: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    content = {"error": {"message": encodable(message), "type": kind, "param": param and encodable(param), "code": code}}
    return JSONResponse(content, status, headers=dict(headers or {}))
