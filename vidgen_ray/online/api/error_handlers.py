"""Every error in one shape, wherever it comes from; and what the document says of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vidgen_ray.online.api.response_models import ErrorBody
from vidgen_ray.online.api_error import INVALID, ApiError

log = logging.getLogger(__name__)

CODES: Mapping[int, tuple[str, str]] = {
    400: (INVALID, "invalid_request"),
    404: (INVALID, "not_found"),
    405: (INVALID, "method_not_allowed"),
    413: (INVALID, "too_large"),
    415: (INVALID, "unsupported_media_type"),
}
"""Status -> type and code, of errors that the framework finds."""
TEXTS: Mapping[int, str] = {
    400: "What is asked for cannot be read or cannot be rendered; `param` names the field",
    401: "No key, or none that is known",
    403: "A browser asks for another site, or under a name that is not this server's",
    404: "There is no such thing, or it is another tenant's",
    408: "The body took too long to arrive",
    409: "Not in this state: a clip without a file, a name or a key that is taken, a file that is in use",
    413: "More bytes than are taken",
    415: "Neither JSON nor a form",
    416: "The file ends before the range",
    429: "The queue is full, or the key has asked too often or has too many jobs; `Retry-After` says when to come back",
    500: "A stage failed, or a mistake of ours",
    503: "The database does not answer",
    504: "The pictures took longer than a request may wait; the jobs go on",
}
ALWAYS = (400, 401, 403, 429, 500, 503)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside its own, for the document."""
    return {status: {"model": ErrorBody, "description": TEXTS[status]} for status in sorted({*ALWAYS, *statuses})}


def install(app: FastAPI) -> None:
    """Make the app answer every error as ErrorBody."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, _no_database)
    app.add_exception_handler(NoConnection, _no_database)
    app.add_exception_handler(Exception, _mistake)


def as_response(error: ApiError) -> JSONResponse:
    return _answer(error.status, error.message, error.type, error.code, error.param, error.headers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return as_response(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return _answer(400, message, INVALID, "invalid_value", param)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind, code = CODES.get(error.status_code, (INVALID if error.status_code < 500 else "server_error", "error"))
    return _answer(error.status_code, str(error.detail), kind, code, headers=error.headers)


async def _no_database(_: Request, error: Exception) -> Response:
    log.error("the database does not answer: %s", type(error).__name__)
    return _answer(
        503, "Jobs cannot be read or stored at the moment", "server_error", "unavailable", headers={"Retry-After": "2"}
    )


async def _mistake(_: Request, error: Exception) -> Response:
    # Starlette raises it again behind this answer, so that it is in the server's log.
    return _answer(500, "The server made a mistake; it is in its log", "server_error", "internal_error")


def _answer(
    status: int, message: str, kind: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    content = {"error": {"message": _printable(message), "type": kind, "param": param and _printable(param), "code": code}}
    return JSONResponse(content, status, headers=dict(headers or {}))


def _printable(text: str) -> str:
    """Half of a letter, from a broken client, cannot be encoded."""
    return text.encode("utf-8", "backslashreplace").decode()
