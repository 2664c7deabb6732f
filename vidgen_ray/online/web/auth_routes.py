"""Signing in and out, where the server has API keys."""

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import SESSION_COOKIE, SESSION_S, is_same_origin
from vidgen_ray.online.inputs.uploads import small_form
from vidgen_ray.online.web.page_context import PageContext, base_of


def door_routes(site: PageContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/sign-in")
    async def ask(request: Request) -> Response:
        if await run_in_threadpool(site.server.auth.page_tenant, request):
            return RedirectResponse(f"{base_of(request)}/", 303)
        return site.answer(request, "sign_in.html", error=None)

    @router.post("/sign-in")
    async def sign_in(request: Request) -> Response:
        if not is_same_origin(request):
            return refusal(site, request)
        try:
            key = (await small_form(request, site.server.settings.uploads)).get("key", "").strip()
        except ApiError as error:
            return site.answer(request, "message.html", error.status, heading="Not signed in", message=error.message)
        token = await run_in_threadpool(site.server.auth.sign_in, key)
        if token is None:
            return site.answer(request, "sign_in.html", 403, error="Invalid API key.")
        answer = RedirectResponse(f"{base_of(request)}/", 303)
        answer.set_cookie(
            SESSION_COOKIE,
            token,
            max_age=SESSION_S,
            path=f"{base_of(request)}/",
            # From a proxy that ends TLS, as it says; who says so falsely only keeps himself out.
            secure="https" in (request.url.scheme, request.headers.get("x-forwarded-proto")),
            httponly=True,
            samesite="strict",
        )
        return answer

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        if not is_same_origin(request):
            return refusal(site, request)
        await run_in_threadpool(site.server.auth.sign_out, request)
        answer = RedirectResponse(f"{base_of(request)}/sign-in", 303)
        answer.delete_cookie(SESSION_COOKIE, path=f"{base_of(request)}/", httponly=True, samesite="strict")
        return answer

    return router


def refusal(site: PageContext, request: Request) -> Response:
    """What a request of another site's page gets."""
    message = "This request came from another web site. Nothing was done."
    return site.answer(request, "message.html", 403, heading="Refused", message=message)
