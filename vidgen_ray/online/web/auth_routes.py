"""Sign-in and sign-out routes, for servers with API keys."""

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import SESSION_COOKIE, SESSION_S, is_same_origin
from vidgen_ray.online.uploads import small_form
from vidgen_ray.online.web.page_context import PageContext, base_path


def auth_routes(context: PageContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/sign-in")
    async def sign_in_form(request: Request) -> Response:
        if await asyncio.to_thread(context.server.auth.page_tenant, request):
            return RedirectResponse(f"{base_path(request)}/", 303)
        return context.render(request, "sign_in.html", error=None)

    @router.post("/sign-in")
    async def sign_in(request: Request) -> Response:
        if not is_same_origin(request):
            return context.cross_origin_response(request)
        try:
            key = (await small_form(request, context.server.settings.uploads)).get("key", "").strip()
        except ApiError as error:
            return context.render(request, "message.html", error.status, heading="Not signed in", message=error.message)
        token = await asyncio.to_thread(context.server.auth.sign_in, key)
        if token is None:
            return context.render(request, "sign_in.html", 403, error="Invalid API key.")
        response = RedirectResponse(f"{base_path(request)}/", 303)
        response.set_cookie(
            SESSION_COOKIE,
            token,
            max_age=SESSION_S,
            path=f"{base_path(request)}/",
            # A proxy that terminates TLS sets X-Forwarded-Proto. A client that forges it only loses its own session.
            secure="https" in (request.url.scheme, request.headers.get("x-forwarded-proto")),
            httponly=True,
            samesite="strict",
        )
        return response

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        if not is_same_origin(request):
            return context.cross_origin_response(request)
        await asyncio.to_thread(context.server.auth.sign_out, request)
        response = RedirectResponse(f"{base_path(request)}/sign-in", 303)
        response.delete_cookie(SESSION_COOKIE, path=f"{base_path(request)}/", httponly=True, samesite="strict")
        return response

    return router
