"""FastAPI dependencies of the API's routes."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.server_context import ServerContext

bearer = HTTPBearer(
    auto_error=False, description="API key. A server without keys, which accepts local requests only, needs none."
)


async def server_of(request: Request) -> ServerContext:
    server: ServerContext = request.app.state.server
    return server


ServerDep = Annotated[ServerContext, Depends(server_of)]


async def tenant_of(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)], server: ServerDep
) -> Tenant:
    """Authenticate the request. Raises ApiError 400, 401, 403 or 429; see `Authenticator.api_tenant`."""
    key = credentials.credentials if credentials else None
    if server.auth.reads_session(request):
        return await asyncio.to_thread(server.auth.api_tenant, request, key)
    return server.auth.api_tenant(request, key)


TenantDep = Annotated[Tenant, Depends(tenant_of)]
