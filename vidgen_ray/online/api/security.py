"""Who asks, and whether a browser asks for somebody else."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import Request

from vidgen_ray.online.api.state import Server, server_of
from vidgen_ray.online.keys import Tenant, is_loopback
from vidgen_ray.online.page.origin import same_origin
from vidgen_ray.online.problems import ApiError

SAFE = ("GET", "HEAD", "OPTIONS")

bearer = HTTPBearer(
    auto_error=False, description="An API key. A server without keys, which only its own machine reaches, asks for none."
)


def tenant_of(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    server: Annotated[Server, Depends(server_of)],
) -> Tenant:
    """Whose key the request brings. Raises ApiError 401, 403, and 429 for too many requests."""
    if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
        # PostgreSQL cannot even be asked for it.
        raise ApiError(400, "A NUL stands in the URL", code="invalid_url")
    if not server.keys.are_required:
        _check_is_local(request)
    if request.method not in SAFE and not same_origin(request):
        raise ApiError(403, "A page of another site cannot ask for this", code="cross_origin")
    tenant = server.keys.verify(credentials.credentials if credentials else None)
    if tenant is None and request.method in SAFE and "authorization" not in request.headers:
        tenant = server.cookie_tenant(request)
    if tenant is None:
        message = "Incorrect API key" if "authorization" in request.headers else "No API key: send Authorization: Bearer KEY"
        raise ApiError(
            401, message, code="invalid_api_key", type="authentication_error", headers={"WWW-Authenticate": "Bearer"}
        )
    server.rate.check(tenant)
    return tenant


def _check_is_local(request: Request) -> None:
    """Raises ApiError 403 where a server without keys is asked by another machine, or for a page of another site."""
    # Behind a proxy on this machine everybody looks local; only the name tells.
    if request.client is not None and not is_loopback(request.client.host):
        raise ApiError(403, "Without API keys this server answers to its own machine only", code="unknown_host")
    if not is_loopback(host_of(request.headers)):
        # A name of somebody's own that leads here would let his page read what this server answers.
        raise ApiError(403, "Without API keys this server answers to localhost only", code="unknown_host")


def host_of(headers: Headers) -> str:
    """The name by which the server was asked, without its port."""
    host = headers.get("host", "")
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


Asking = Annotated[Tenant, Depends(tenant_of)]
