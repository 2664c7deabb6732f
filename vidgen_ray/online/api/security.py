"""Who asks, and whether a browser asks for somebody else."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from vidgen_ray.online.api.deps import Server, server_of
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.web.origin import check_is_local, check_url, same_origin

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
    check_url(request)
    if not server.keys.are_required:
        check_is_local(request)
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


TenantDep = Annotated[Tenant, Depends(tenant_of)]
