"""Routes of the page: the page itself, its forms and its event stream."""

import secrets
from typing import Any, Literal

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import Tenant, is_same_origin
from vidgen_ray.online.inputs.uploads import receive
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import FINAL
from vidgen_ray.online.store.store import UnknownJob
from vidgen_ray.online.web.auth_routes import cross_origin_response
from vidgen_ray.online.web.form_submission import client_fields_of, create_job, job_of
from vidgen_ray.online.web.forms import (
    CONTROL_OF,
    IDEAS,
    MORE_FIELDS,
    STYLES,
    FormError,
    FormValues,
    is_number,
    size_choices,
)
from vidgen_ray.online.web.job_cards import ACTIVE
from vidgen_ray.online.web.live_updates import event_stream
from vidgen_ray.online.web.page_context import HEADERS, PageContext, base_path, wants_json
from vidgen_ray.shot import Shot

GALLERY_LENGTH = 12
QUEUE_LENGTH = 100
"""Queued and running jobs shown, at most."""
MAX_CURSOR_DIGITS = 18
"""Longest cursor that fits a 64-bit integer."""
MAX_PROMPT_LENGTH = 2_000
"""Characters of a prompt in the query string."""


def page_routes(context: PageContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        tenant = await run_in_threadpool(context.server.auth.page_tenant, request)
        if tenant is None:
            return RedirectResponse(f"{base_path(request)}/sign-in", 303)
        return await run_in_threadpool(_render_page, context, request, tenant)

    @router.post("/")
    async def create(request: Request) -> Response:
        tenant = await run_in_threadpool(context.server.auth.page_tenant, request)
        if tenant is None:
            return _signed_out_response(request)
        if not is_same_origin(request):
            return cross_origin_response(context, request)
        values = FormValues()
        try:
            async with receive(request, context.server.settings.uploads) as received:
                values = FormValues.from_form(received.fields)
                job, character = await create_job(context, tenant, received, values)
        except FormError as error:
            return await _form_error_response(context, request, tenant, values, error)
        except ApiError as error:
            return await _form_error_response(context, request, tenant, values, _as_form_error(error))
        if wants_json(request):
            content = {
                "job": context.job_update(job, base_path(request)),
                "submission_id": _new_submission_id(),
                "character": {"id": character.id, "name": character.name} if character else None,
            }
            return JSONResponse(content, 201, HEADERS)
        return RedirectResponse(f"{base_path(request)}/#{job.id}", 303)

    @router.post("/clips/{job_id}/cancel")
    async def cancel(request: Request, job_id: str) -> Response:
        return await _change_job(context, request, job_id, "cancel")

    @router.post("/clips/{job_id}/delete")
    async def delete(request: Request, job_id: str) -> Response:
        return await _change_job(context, request, job_id, "delete")

    @router.get("/events")
    async def events(request: Request) -> Response:
        tenant = await run_in_threadpool(context.server.auth.page_tenant, request)
        if tenant is None:
            return _signed_out_response(request)
        since = request.query_params.get("since", "")
        cursor = (
            int(since) if is_number(since, MAX_CURSOR_DIGITS) else await run_in_threadpool(context.server.store.latest_version)
        )
        return event_stream(context, request, tenant, cursor)

    return router


async def _change_job(context: PageContext, request: Request, job_id: str, action: Literal["cancel", "delete"]) -> Response:
    tenant = await run_in_threadpool(context.server.auth.page_tenant, request)
    if tenant is None:
        return _signed_out_response(request)
    if not is_same_origin(request):
        return cross_origin_response(context, request)
    base, jobs = base_path(request), context.server.job_service
    job = await jobs.cancel(tenant, job_id) if action == "cancel" else await job_of(context, tenant, job_id)
    if job is None:
        message = "This clip does not exist or was deleted."
        if wants_json(request):
            return JSONResponse({"message": message}, 404, HEADERS)
        return context.render(request, "message.html", 404, heading="Not found", message=message)
    if action == "delete":
        await jobs.delete(tenant, job_id)
    if wants_json(request):
        content = {"deleted": True} if action == "delete" else {"job": context.job_update(job, base)}
        return JSONResponse(content, headers=HEADERS)
    return RedirectResponse(f"{base}/#gallery" if action == "delete" else f"{base}/#{job_id}", 303)


async def _form_error_response(
    context: PageContext, request: Request, tenant: Tenant, values: FormValues, error: FormError
) -> Response:
    if wants_json(request):
        return JSONResponse({"message": error.message, "errors": error.errors}, error.status, HEADERS)
    return await run_in_threadpool(_render_page, context, request, tenant, values, error)


def _render_page(
    context: PageContext, request: Request, tenant: Tenant, values: FormValues | None = None, error: FormError | None = None
) -> Response:
    """Render the page. With `values` and `error`, its form shows the submitted values and their errors."""
    server, base, query = context.server, base_path(request), request.query_params
    # Read before the lists: the event stream sends all later changes.
    cursor = server.store.latest_version()
    queue = server.store.list(tenant.name, states=ACTIVE, limit=QUEUE_LENGTH, order="asc")
    after = query.get("after")
    try:
        gallery = server.store.list(tenant.name, states=FINAL, after=after, limit=GALLERY_LENGTH)
    except UnknownJob:
        return RedirectResponse(f"{base}/", 303)
    like = server.store.get(query.get("like", ""), tenant.name)
    default_shot = Shot.model_validate({"prompt": "-", **server.serving_profile.profile.defaults})
    if values is None:
        values = FormValues.from_shot(like.shot if like else default_shot, context.lora_names)
        values = values if like else values.with_prompt(query.get("prompt", "")[:MAX_PROMPT_LENGTH])
    errors = error.errors if error else {}
    return context.render(
        request,
        "index.html",
        error.status if error else 200,
        cursor=cursor,
        first_page=after is None,
        signed_in=server.auth.keys_are_required,
        profile=server.serving_profile.profile.name,
        # A job that ended between the two queries is in both lists.
        queue=[context.card(job, base) for job in queue.jobs if job.id not in {ended.id for ended in gallery.jobs}],
        gallery=[context.card(job, base) for job in gallery.jobs],
        older=gallery.jobs[-1].id if gallery.has_more else None,
        ideas=IDEAS,
        values=values,
        errors=errors,
        message=error.message if error else None,
        more_open=bool(MORE_FIELDS & errors.keys()),
        submission_id=_new_submission_id(),
        like=like.id if like else "",
        like_seed=like.shot.seed if like else None,
        like_photos=like is not None and bool(client_fields_of(context, like).get("face_image")),
        sizes=size_choices(default_shot.width, default_shot.height, values.size),
        characters=server.store.characters.list(tenant.name),
        **_stage_controls(server),
    )


def _stage_controls(server: ServerContext) -> dict[str, Any]:
    """Return the choices of the controls whose stages the server has."""
    fields = {field for stage in server.serving_profile.stages for field in stage.reads}
    return {
        "loras": sorted(server.settings.loras) if "lora" in fields else [],
        "styles": STYLES if "style_prompt" in fields else (),
        "faces": "face_image" in fields,
    }


def _as_form_error(error: ApiError) -> FormError:
    """Return an API error as an error of its control or, without a matching control, of the whole form."""
    control = CONTROL_OF.get(error.param or "", error.param)
    text = error.message.removeprefix(f"{error.param}: ")
    text = text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
    if control in FormValues.__slots__ or control == "photo":
        return FormError({str(control): text}, status=error.status)
    if wait := error.headers.get("Retry-After"):
        text = f"{text} Try again in {wait} s."
    return FormError({}, text, error.status)


def _signed_out_response(request: Request) -> Response:
    if wants_json(request) or request.url.path.endswith("/events"):
        return JSONResponse({"message": "Signed out."}, 401, HEADERS)
    return RedirectResponse(f"{base_path(request)}/sign-in", 303)


def _new_submission_id() -> str:
    return secrets.token_urlsafe(12)
