"""Routes of the page: the page itself, the images of its form, the queue and the event stream."""

import asyncio
import time
from typing import Any, NamedTuple

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from vidgen_ray.limits import MAX_RESULTS
from vidgen_ray.media import image_size
from vidgen_ray.online.api.characters import check_faces
from vidgen_ray.online.api_error import not_found
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.delivered_size import SCALES
from vidgen_ray.online.previews import encode_thumbnail
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job
from vidgen_ray.online.web.form_controls import BASES, IDEAS, STYLES, size_choices
from vidgen_ray.online.web.gallery import gallery_page
from vidgen_ray.online.web.job_cards import ACTIVE, estimate_text
from vidgen_ray.online.web.live_updates import event_stream
from vidgen_ray.online.web.page_context import HEADERS, PageContext, base_path

QUEUE_LENGTH = 100
"""Queued and running jobs shown, at most."""
MAX_CURSOR_DIGITS = 18
"""Longest cursor that fits a 64-bit integer."""
THUMBNAIL_AGE_S = 86_400
"""Seconds for which browsers cache an image of the form. Its id is the digest of its content."""


class Box(NamedTuple):
    """Box of a face, in pixels of the photo."""

    x: int
    y: int
    width: int
    height: int
    chosen: bool
    """The face that is used."""


def page_routes(context: PageContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    server = context.server

    async def index(request: Request, tenant: Tenant) -> Response:
        return await asyncio.to_thread(_render_page, context, request, tenant)

    async def form_image(request: Request, tenant: Tenant) -> Response:
        """Return the HTML of an uploaded image in the form, with the faces of a photo. Raises ApiError."""
        control, upload_id = request.path_params["control"], request.path_params["upload_id"]
        path = await asyncio.to_thread(server.job_service.uploads.find, tenant.name, upload_id)
        if path is None:
            raise not_found("file", upload_id[:100])
        faces: list[Box] = []
        if control == "photo":
            check = server.face_check.run_exclusively(lambda: check_faces(server, tenant, [upload_id], control))
            (photo,) = await check
            faces = [_box(face.box, face is photo.chosen) for face in photo.faces]
        size = await asyncio.to_thread(image_size, path)
        html = context.macro(request, "form_images.html", "form_image", control, upload_id, size, faces)
        return JSONResponse({"html": html}, headers=HEADERS)

    async def thumbnail(request: Request, tenant: Tenant) -> Response:
        uploads = server.job_service.uploads
        path = await asyncio.to_thread(uploads.find, tenant.name, request.path_params["upload_id"])
        if path is None:
            return Response(status_code=404, headers=HEADERS)
        webp = await asyncio.to_thread(encode_thumbnail, await uploads.read(path))
        caching = {"Cache-Control": f"private, max-age={THUMBNAIL_AGE_S}"}
        return Response(webp, media_type="image/webp", headers=HEADERS | caching)

    async def queue(request: Request, tenant: Tenant) -> Response:
        base, jobs = base_path(request), await asyncio.to_thread(_queue_of, server, tenant)
        updates = [context.job_update(job, base, with_card=False) for job in jobs]
        estimates = [estimate_text(await server.queue_estimator.estimate(job)) for job in jobs]
        content = [{**update, "estimate": estimate} for update, estimate in zip(updates, estimates, strict=True)]
        return JSONResponse({"jobs": content}, headers=HEADERS)

    async def events(request: Request, tenant: Tenant) -> Response:
        # First: a browser that reconnects all the time must not cost a query of the database.
        server.event_streams.check_room(tenant)
        since = request.query_params.get("since", "")
        is_cursor = since.isascii() and since.isdecimal() and len(since) <= MAX_CURSOR_DIGITS
        cursor = int(since) if is_cursor else await asyncio.to_thread(server.store.latest_version)
        return event_stream(context, request, tenant, cursor)

    router.add_route("/", context.for_tenant(index), ["GET", "HEAD"])
    router.add_route("/inputs/{upload_id}", context.for_tenant(thumbnail), ["GET"])
    router.add_route("/inputs/{upload_id}/{control}", context.for_tenant(form_image), ["GET"])
    router.add_route("/queue", context.for_tenant(queue), ["GET"])
    router.add_route("/events", context.for_tenant(events), ["GET"])
    return router


def _render_page(context: PageContext, request: Request, tenant: Tenant) -> Response:
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
        cursor=cursor,
        now=time.time(),
        profile=server.serving_profile.profile.name,
        # A job that ended between the two queries is in both lists.
        queue=[context.card(job, base) for job in _queue_of(server, tenant) if job.id not in ended],
        cards=[context.card(job, base) for job in gallery.jobs],
        gallery=gallery,
        ideas=IDEAS,
        **_form_values(context, tenant),
    )


def _form_values(context: PageContext, tenant: Tenant) -> dict[str, Any]:
    """Return the values of the form's template."""
    server = context.server
    fields = {field for stage in server.serving_profile.stages for field in (*stage.reads, *stage.clip_only_fields)}
    rules = server.size_rules
    drawn = rules.default_width, rules.default_height
    return {
        "shot": server.default_shot,
        "groups": context.control_groups,
        "clip_defaults": context.clip_defaults,
        "fields": fields,
        "sizes": size_choices(rules),
        "default_image": None if drawn == rules.default_clip else drawn,
        "scales": SCALES,
        "loras": sorted(server.settings.loras) if fields & {"lora", "klein_lora"} else [],
        "bases": BASES,
        "styles": STYLES if "style_prompt" in fields else (),
        "characters": server.store.characters.list(tenant.name),
        "max_count": MAX_RESULTS,
    }


def _queue_of(server: ServerContext, tenant: Tenant) -> list[Job]:
    return server.store.list(tenant.name, states=ACTIVE, limit=QUEUE_LENGTH, order="asc").jobs


def _box(box: tuple[float, float, float, float], chosen: bool) -> Box:
    left, top, right, bottom = (round(value) for value in box)
    return Box(left, top, right - left, bottom - top, chosen)
