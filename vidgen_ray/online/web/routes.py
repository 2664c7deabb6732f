"""The page itself: what is shown, what a form asks for, and the stream of what changes."""

import secrets

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import Tenant, is_same_origin
from vidgen_ray.online.inputs.uploads import receive
from vidgen_ray.online.store.jobs import FINAL
from vidgen_ray.online.store.store import UnknownJob
from vidgen_ray.online.web.auth_routes import refusal
from vidgen_ray.online.web.form_submission import accepted, as_asked, job_of
from vidgen_ray.online.web.forms import (
    CONTROL_OF,
    IDEAS,
    MORE_FIELDS,
    STYLES,
    FormError,
    FormValues,
    is_number,
    sizes_like,
)
from vidgen_ray.online.web.job_cards import ACTIVE
from vidgen_ray.online.web.live_updates import event_stream
from vidgen_ray.online.web.page_context import HEADERS, PageContext, base_of, wants_json
from vidgen_ray.shot import Shot

GALLERY_LENGTH = 12
QUEUE_LENGTH = 100
"""Most jobs that are shown as being made; a key rarely may have more."""
CURSOR_DIGITS = 18
"""What a database counts with has one more."""
PROMPT_LETTERS = 2_000
"""Of a prompt that comes in the page's address."""


def page_routes(site: PageContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        tenant = await run_in_threadpool(site.server.auth.page_tenant, request)
        if tenant is None:
            return RedirectResponse(f"{base_of(request)}/sign-in", 303)
        return await run_in_threadpool(_page, site, request, tenant)

    @router.post("/")
    async def create(request: Request) -> Response:
        tenant = await run_in_threadpool(site.server.auth.page_tenant, request)
        if tenant is None:
            return _signed_out(request)
        if not is_same_origin(request):
            return refusal(site, request)
        values = FormValues()
        try:
            async with receive(request, site.server.settings.uploads) as received:
                values = FormValues.of_form(received.fields)
                job, saved = await accepted(site, tenant, received, values)
        except FormError as error:
            return await _refused(site, request, tenant, values, error)
        except ApiError as error:
            return await _refused(site, request, tenant, values, _as_form_error(error))
        if wants_json(request):
            written = site.job_update(job, base_of(request))
            character = {"id": saved.id, "name": saved.name} if saved else None
            return JSONResponse({"job": written, "once": _once(), "character": character}, 201, HEADERS)
        return RedirectResponse(f"{base_of(request)}/#{job.id}", 303)

    @router.post("/clips/{job_id}/cancel")
    async def cancel(request: Request, job_id: str) -> Response:
        return await _change(site, request, job_id, "cancel")

    @router.post("/clips/{job_id}/delete")
    async def delete(request: Request, job_id: str) -> Response:
        return await _change(site, request, job_id, "delete")

    @router.get("/events")
    async def events(request: Request) -> Response:
        tenant = await run_in_threadpool(site.server.auth.page_tenant, request)
        if tenant is None:
            return _signed_out(request)
        since = request.query_params.get("since", "")
        cursor = int(since) if is_number(since, CURSOR_DIGITS) else await run_in_threadpool(site.server.store.latest)
        return event_stream(site, request, tenant, cursor)

    return router


async def _change(site: PageContext, request: Request, job_id: str, what: str) -> Response:
    tenant = await run_in_threadpool(site.server.auth.page_tenant, request)
    if tenant is None:
        return _signed_out(request)
    if not is_same_origin(request):
        return refusal(site, request)
    base = base_of(request)
    job = await site.server.job_service.cancel(tenant, job_id) if what == "cancel" else await job_of(site, tenant, job_id)
    if job is None:
        message = "This clip is not there any more."
        if wants_json(request):
            return JSONResponse({"message": message}, 404, HEADERS)
        return site.answer(request, "message.html", 404, heading="Not found", message=message)
    if what == "delete":
        await site.server.job_service.delete(tenant, job_id)
    if wants_json(request):
        return JSONResponse({"deleted": True} if what == "delete" else {"job": site.job_update(job, base)}, headers=HEADERS)
    return RedirectResponse(f"{base}/#gallery" if what == "delete" else f"{base}/#{job_id}", 303)


async def _refused(site: PageContext, request: Request, tenant: Tenant, values: FormValues, error: FormError) -> Response:
    if wants_json(request):
        return JSONResponse({"message": error.message, "errors": error.errors}, error.status, HEADERS)
    return await run_in_threadpool(_page, site, request, tenant, values, error)


def _page(
    site: PageContext, request: Request, tenant: Tenant, values: FormValues | None = None, error: FormError | None = None
) -> Response:
    """The whole page; with `values` and `error` the form as it was sent, and what is wrong with it."""
    base, query = base_of(request), request.query_params
    # Before the lists are read: what changes after it comes by the stream.
    cursor = site.server.store.latest()
    queue = site.server.store.list(tenant.name, states=ACTIVE, limit=QUEUE_LENGTH, order="asc")
    after = query.get("after")
    try:
        gallery = site.server.store.list(tenant.name, states=FINAL, after=after, limit=GALLERY_LENGTH)
    except UnknownJob:
        return RedirectResponse(f"{base}/", 303)
    like = site.server.store.get(query.get("like", ""), tenant.name)
    plain = Shot.model_validate({"prompt": "-", **site.server.serving_profile.profile.defaults})
    if values is None:
        values = FormValues.of_shot(like.shot if like else plain, site.lora_names)
        values = values if like else values.with_prompt(query.get("prompt", "")[:PROMPT_LETTERS])
    errors = error.errors if error else {}
    shown_size = sizes_like(plain.width, plain.height, values.size)
    return site.answer(
        request,
        "index.html",
        error.status if error else 200,
        cursor=cursor,
        first_page=after is None,
        signed_in=site.server.auth.keys_are_required,
        profile=site.server.serving_profile.profile.name,
        # One that ended between the two reads is in both lists.
        queue=[site.card(job, base) for job in queue.jobs if job.id not in {ended.id for ended in gallery.jobs}],
        gallery=[site.card(job, base) for job in gallery.jobs],
        older=gallery.jobs[-1].id if gallery.has_more else None,
        ideas=IDEAS,
        values=values,
        errors=errors,
        message=error.message if error else None,
        more_open=bool(MORE_FIELDS & errors.keys()),
        once=_once(),
        like=like.id if like else "",
        like_seed=like.shot.seed if like else None,
        like_photos=like is not None and bool(as_asked(site, like).get("face_image")),
        sizes=shown_size,
        characters=site.server.store.characters.list(tenant.name),
        loras=sorted(site.server.settings.loras) if "lora" in site.server.serving_profile.params else [],
        styles=STYLES if "hunyuan" in site.server.serving_profile.params else (),
        faces="instantid" in site.server.serving_profile.params,
    )


def _as_form_error(error: ApiError) -> FormError:
    """What the intake refuses, beside the control that it is about or above the form."""
    control = CONTROL_OF.get(error.param or "", error.param)
    text = error.message.removeprefix(f"{error.param}: ")
    text = text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
    if control in FormValues.__slots__ or control == "photo":
        return FormError({str(control): text}, status=error.status)
    if wait := error.headers.get("Retry-After"):
        text = f"{text} Try again in {wait} s."
    return FormError({}, text, error.status)


def _signed_out(request: Request) -> Response:
    if wants_json(request) or request.url.path.endswith("/events"):
        return JSONResponse({"message": "Signed out."}, 401, HEADERS)
    return RedirectResponse(f"{base_of(request)}/sign-in", 303)


def _once() -> str:
    return secrets.token_urlsafe(12)
