"""Error responses of a route for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vidgen_ray.online.api.response_models import ErrorBody

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
