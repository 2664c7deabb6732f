"""Routes of the page: the page itself, its form, the images of the form, the queue and the event stream."""

import asyncio
import secrets
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.delivered_size import SCALES
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import JOB_ID, Job
from vidgen_ray.online.uploads import receive
from vidgen_ray.online.web.form_images import ImageControl, store_image, thumbnail_of
from vidgen_ray.online.web.form_submission import create_jobs, values_like
from vidgen_ray.online.web.forms import (
    BASES,
    CONTROL_OF,
    IDEAS,
    MAX_COUNT,
    STYLES,
    TEXTS,
    FormError,
    FormValues,
    controls_of,
    is_number,
    size_choices,
)
from vidgen_ray.online.web.gallery import gallery_page
from vidgen_ray.online.web.job_cards import ACTIVE, estimate_text
from vidgen_ray.online.web.live_updates import event_stream
from vidgen_ray.online.web.page_context import HEADERS, PageContext, base_path, wants_json

QUEUE_LENGTH = 100
"""Queued and running jobs shown, at most."""
MAX_CURSOR_DIGITS = 18
"""Longest cursor that fits a 64-bit integer."""
MAX_PROMPT_LENGTH = 2_000
"""Characters of a prompt in the query string."""
THUMBNAIL_AGE_S = 86_400
"""Seconds for which browsers cache an image of the form. Its id is the digest of its content."""


def page_routes(context: PageContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    async def index(request: Request, tenant: Tenant) -> Response:
        return await asyncio.to_thread(_render_page, context, request, tenant)

    async def form(request: Request, tenant: Tenant) -> Response:
        return await asyncio.to_thread(lambda: context.render(request, "form.html", **_form_of(context, request, tenant)))

    async def create(request: Request, tenant: Tenant) -> Response:
        values = FormValues()
        try:
            async with receive(request, context.server.settings.uploads) as received:
                values = FormValues.from_form(received.fields, context.control_groups)
                jobs, character = await create_jobs(context, tenant, received, values)
        except FormError as error:
            return await _form_error_response(context, request, tenant, values, error)
        except ApiError as error:
            if error.param == "consent":
                raised = FormError(_consent_errors(values), status=error.status)
            else:
                raised = _as_form_error(context, error)
            return await _form_error_response(context, request, tenant, values, raised)
        if wants_json(request):
            content = {
                "jobs": [context.job_update(job, base_path(request)) for job in jobs],
                "seed": jobs[-1].shot.seed,
                "submission_id": _new_submission_id(),
                "character": {"id": character.id, "name": character.name} if character else None,
            }
            return JSONResponse(content, 201, HEADERS)
        return RedirectResponse(f"{base_path(request)}/#{jobs[0].id}", 303)

    async def add_image(request: Request, tenant: Tenant) -> Response:
        control: ImageControl = "image" if request.path_params["control"] == "image" else "photo"
        try:
            async with receive(request, context.server.settings.uploads) as received:
                files = received.files("file")
                if len(files) != 1:
                    raise FormError({control: "Send one image."})
                image = await store_image(context, tenant, files[0], control)
        except FormError as error:
            return JSONResponse({"message": error.errors[control]}, error.status, HEADERS)
        except ApiError as error:
            raised = _as_form_error(context, error)
            return JSONResponse({"message": raised.errors.get(control) or raised.message}, error.status, HEADERS)
        html = context.macro(request, "form_images.html", "form_image", image)
        return JSONResponse({"id": image.id, "html": html, "faces": len(image.faces)}, 201, HEADERS)

    async def show_image(request: Request, tenant: Tenant) -> Response:
        webp = await thumbnail_of(context, tenant, request.path_params["upload_id"])
        if webp is None:
            return Response(status_code=404, headers=HEADERS)
        caching = {"Cache-Control": f"private, max-age={THUMBNAIL_AGE_S}"}
        return Response(webp, media_type="image/webp", headers=HEADERS | caching)

    async def queue(request: Request, tenant: Tenant) -> Response:
        base, jobs = base_path(request), await asyncio.to_thread(_queue_of, context.server, tenant)
        updates = [context.job_update(job, base, with_card=False) for job in jobs]
        estimates = [estimate_text(await context.server.queue_estimator.estimate(job)) for job in jobs]
        content = [{**update, "estimate": estimate} for update, estimate in zip(updates, estimates, strict=True)]
        return JSONResponse({"jobs": content}, headers=HEADERS)

    async def events(request: Request, tenant: Tenant) -> Response:
        # First: a browser that reconnects all the time must not cost a query of the database.
        context.server.event_streams.check_room(tenant)
        since = request.query_params.get("since", "")
        cursor = (
            int(since) if is_number(since, MAX_CURSOR_DIGITS) else await asyncio.to_thread(context.server.store.latest_version)
        )
        return event_stream(context, request, tenant, cursor)

    router.add_route("/", context.for_tenant(index), ["GET", "HEAD"])
    router.add_route("/", context.for_tenant(create), ["POST"])
    router.add_route("/form", context.for_tenant(form), ["GET"])
    router.add_route("/inputs/{control}", context.for_tenant(add_image), ["POST"])
    router.add_route("/inputs/{upload_id}", context.for_tenant(show_image), ["GET"])
    router.add_route("/queue", context.for_tenant(queue), ["GET"])
    router.add_route("/events", context.for_tenant(events), ["GET"])
    return router


async def _form_error_response(
    context: PageContext, request: Request, tenant: Tenant, values: FormValues, error: FormError
) -> Response:
    if wants_json(request):
        return JSONResponse({"message": error.message, "errors": error.errors}, error.status, HEADERS)
    return await asyncio.to_thread(_render_page, context, request, tenant, values, error)


def _render_page(
    context: PageContext, request: Request, tenant: Tenant, values: FormValues | None = None, error: FormError | None = None
) -> Response:
    """Render the page. With `values` and `error`, its form shows the submitted values and their errors."""
    server, base = context.server, base_path(request)
    # Read before the lists: the event stream sends all later changes.
    cursor = server.store.latest_version()
    gallery = gallery_page(server, tenant, request.query_params)
    if gallery is None:
        return RedirectResponse(f"{base}/", 303)
    ended = {job.id for job in gallery.jobs}
    return context.render(
        request,
        "index.html",
        error.status if error else 200,
        cursor=cursor,
        now=time.time(),
        profile=server.serving_profile.profile.name,
        # A job that ended between the two queries is in both lists.
        queue=[context.card(job, base) for job in _queue_of(server, tenant) if job.id not in ended],
        cards=[context.card(job, base) for job in gallery.jobs],
        gallery=gallery,
        ideas=IDEAS,
        **_form_of(context, request, tenant, values, error),
    )


def _form_of(
    context: PageContext,
    request: Request,
    tenant: Tenant,
    values: FormValues | None = None,
    error: FormError | None = None,
) -> dict[str, Any]:
    """Return the values of the form's template.

    Without `values`, those of the job `like` or `continue` of the query, or the defaults.
    """
    server, query = context.server, request.query_params
    defaults = FormValues.from_shot(server.default_shot, {}, context.control_groups)
    if values is None:
        like, continued = (server.store.get(query.get(name, ""), tenant.name) for name in ("like", "continue"))
        if like is not None:
            values = values_like(context, tenant, like)
        elif continued is not None:
            values = values_like(context, tenant, continued).continuing(continued.id)
        else:
            values = defaults.with_text("prompt", query.get("prompt", "")[:MAX_PROMPT_LENGTH])
    source_id = values.get("continue_from")
    source = server.store.get(source_id, tenant.name) if JOB_ID.fullmatch(source_id) else None
    fields = {field for stage in server.serving_profile.stages for field in (*stage.reads, *stage.clip_only_fields)}
    rules = server.size_rules
    drawn = rules.default_width, rules.default_height
    return {
        "values": values,
        "errors": error.errors if error else {},
        "message": error.message if error else None,
        "submission_id": _new_submission_id(),
        "groups": context.control_groups,
        "clip_defaults": context.clip_defaults,
        "continued": None if source is None else " ".join(source.shot.prompt.split()),
        "fields": fields,
        "sizes": size_choices(values.get("size"), rules),
        "default_image": None if drawn == rules.default_clip else drawn,
        "scales": SCALES,
        "loras": sorted(server.settings.loras) if fields & {"lora", "klein_lora"} else [],
        "bases": BASES,
        "styles": STYLES if "style_prompt" in fields else (),
        "characters": server.store.characters.list(tenant.name),
        "max_count": MAX_COUNT,
    }


def _queue_of(server: ServerContext, tenant: Tenant) -> list[Job]:
    return server.store.list(tenant.name, states=ACTIVE, limit=QUEUE_LENGTH, order="asc").jobs


def _consent_errors(values: FormValues) -> dict[str, str]:
    """Return the message for a face without a consent, at the control that can add one."""
    if values.get("character"):
        return {"character": "This character has no consent yet. Choose its photos instead, and save them under the same name."}
    return {"consent_basis": "Choose why this face may be used, and name the person."}


def _as_form_error(context: PageContext, error: ApiError) -> FormError:
    """Return an API error as an error of its control or, without a matching control, of the whole form."""
    control = CONTROL_OF.get(error.param or "", error.param)
    text = error.message.removeprefix(f"{error.param}: ")
    text = text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
    if control in (*TEXTS, "photo", "image", "lora", *(each.name for each in controls_of(context.control_groups))):
        return FormError({str(control): text}, status=error.status)
    if wait := error.headers.get("Retry-After"):
        text = f"{text} Try again in {wait} s."
    return FormError({}, text, error.status)


def _new_submission_id() -> str:
    return secrets.token_urlsafe(12)
