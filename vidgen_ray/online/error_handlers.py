"""Exception handlers that answer every error in the shape of OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as ConnectionTimeout
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vidgen_ray.online.api_error import INVALID, ApiError, validation_failed
from vidgen_ray.outputs.disk_space import is_disk_full

log = logging.getLogger(__name__)

CODES: Mapping[int, tuple[str, str]] = {
    400: (INVALID, "invalid_request"),
    404: (INVALID, "not_found"),
    405: (INVALID, "method_not_allowed"),
    413: (INVALID, "too_large"),
    415: (INVALID, "unsupported_media_type"),
}
"""Status -> type and code of errors that the framework raises."""


def install(app: FastAPI) -> None:
    """Install handlers that answer every error as `ErrorBody`."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, _database_error)
    app.add_exception_handler(ConnectionTimeout, _database_error)
    app.add_exception_handler(OSError, _storage_error)
    app.add_exception_handler(Exception, _internal_error)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error.status, error.message, error.type, error.code, error.param, error.headers)


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # The location starts with the kind of parameter: query, header or path.
    return await _api_error(_, validation_failed([{**detail, "loc": detail["loc"][1:]} for detail in error.errors()]))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind, code = CODES.get(error.status_code, (INVALID if error.status_code < 500 else "server_error", "error"))
    return _response(error.status_code, str(error.detail), kind, code, headers=error.headers)


async def _database_error(_: Request, error: Exception) -> Response:
    is_full = is_disk_full(str(error))
    log.error("the database %s: %s", "is full" if is_full else "does not respond", type(error).__name__)
    return _unavailable("The disk of the server is full" if is_full else "The database does not respond")


async def _storage_error(request: Request, error: Exception) -> Response:
    log.error("the storage failed", exc_info=error)
    if is_disk_full(str(error)):
        return _unavailable("The disk of the server is full")
    return await _internal_error(request, error)


def _unavailable(reason: str) -> Response:
    return _response(503, f"{reason}. Try again later.", "server_error", "unavailable", headers={"Retry-After": "2"})


async def _internal_error(_: Request, error: Exception) -> Response:
    # Starlette raises the error again after this response, so it is logged.
    return _response(500, "Internal server error. See the log of the server.", "server_error", "internal_error")


def _response(
    status: int, message: str, kind: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    content = {"error": {"message": _printable(message), "type": kind, "param": param and _printable(param), "code": code}}
    return JSONResponse(content, status, headers=dict(headers or {}))


def _printable(text: str) -> str:
    """Escape lone surrogates, which cannot be encoded."""
    return text.encode("utf-8", "backslashreplace").decode()
