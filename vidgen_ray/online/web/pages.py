"""Routes of the page: the page itself, its gallery, queue and event stream, sign-in, and the page about the API."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from sse_starlette import ServerSentEvent
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from zipstream import ZipStream

from vidgen_ray.engine.calls import CLIP_FILES
from vidgen_ray.limits import MAX_RESULTS
from vidgen_ray.media import image_size
from vidgen_ray.online.api_error import ApiError, not_found
from vidgen_ray.online.auth import SESSION_COOKIE, SESSION_S, Tenant, is_same_origin
from vidgen_ray.online.delivered_size import SCALES, delivered_artefact_of
from vidgen_ray.online.job_service import allowed_priorities
from vidgen_ray.online.previews import encode_thumbnail
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import FINAL, OPEN_STATES, Job, JobState
from vidgen_ray.online.store.store import UnknownJob
from vidgen_ray.online.uploads import small_form
from vidgen_ray.online.web.form_controls import BASES, IDEAS, STYLES, size_choices
from vidgen_ray.online.web.job_cards import estimate_text, file_name
from vidgen_ray.online.web.page_context import HEADERS, PageContext, base_path
from vidgen_ray.outputs.folder import OutputFolder

PAGE_LENGTH = 12
MAX_IDS = 100
"""Jobs of one page, or of one bulk action, that are named by their ids."""
MAX_SEARCH_LENGTH = 200


@dataclass(frozen=True, slots=True)
class GalleryPage:
    """One page of the gallery, newest first."""

    jobs: list[Job]
    search: str = ""
    favourites: bool = False
    """The jobs were named by their ids: they are the favourites that the browser keeps."""
    after: str | None = None
    older: str | None = None
    """Id after which the next page starts. `None` on the last page."""

    @property
    def is_live(self) -> bool:
        """Return whether new clips belong at the start of this page."""
        return not (self.search or self.favourites or self.after)


def gallery_page(server: ServerContext, tenant: Tenant, query: QueryParams) -> GalleryPage | None:
    """Return the page that the query asks for with `q`, `id` and `after`, or `None` if `after` is not a job of the tenant."""
    if "favourites" in query:
        return GalleryPage(jobs_with_ids(server, tenant, query.getlist("id")), favourites=True)
    search, after = query.get("q", "").strip()[:MAX_SEARCH_LENGTH], query.get("after")
    try:
        page = server.store.list(tenant.name, states=FINAL, words=search.split(), after=after, limit=PAGE_LENGTH)
    except UnknownJob:
        return None
    return GalleryPage(page.jobs, search=search, after=after, older=page.jobs[-1].id if page.has_more else None)


def jobs_with_ids(server: ServerContext, tenant: Tenant, ids: Sequence[str]) -> list[Job]:
    """Return the ended jobs of the tenant with these ids, at most `MAX_IDS`. Skips ids of other tenants and deleted jobs."""
    jobs = (server.store.get(each, tenant.name) for each in dict.fromkeys(ids[:MAX_IDS]))
    return [job for job in jobs if job is not None and job.state.is_final]


BLOCK_BYTES = 1 << 20


def clip_routes(router: APIRouter, context: PageContext) -> None:
    async def gallery(request: Request, tenant: Tenant) -> Response:
        page = await asyncio.to_thread(gallery_page, context.server, tenant, request.query_params)
        if page is None:
            return context.message(request, 404, "Not found", "This clip does not exist or was deleted.")
        cards = [context.card(job, base_path(request)) for job in page.jobs]
        return context.render(request, "gallery.html", gallery=page, cards=cards, ideas=())

    async def download_selected(request: Request, tenant: Tenant) -> Response:
        ids = request.query_params.getlist("id")
        archive = await asyncio.to_thread(lambda: _archive(context.server.outputs, jobs_with_ids(context.server, tenant, ids)))
        if not archive.num_queued():
            return context.message(request, 404, "Nothing to download", "Select clips that are completed.")
        headers = {"Content-Disposition": 'attachment; filename="clips.zip"', "Content-Length": str(len(archive))}
        return StreamingResponse(archive, media_type="application/zip", headers=HEADERS | headers)

    router.add_route("/clips", context.for_tenant(gallery), ["GET"])
    router.add_route("/clips/download", context.for_tenant(download_selected), ["GET"])


def _archive(outputs: OutputFolder, jobs: list[Job]) -> ZipStream:
    """Return a ZIP of the delivered file of each completed job. It is read while it is sent, and never held in memory."""
    archive = ZipStream(sized=True)
    for job in jobs:
        done = outputs.find_by_key(job.key) if job.state is JobState.COMPLETED else None
        if done is None:
            continue
        name = CLIP_FILES.get(delivered_artefact_of(job), "image.png")
        size = done.bytes[name]
        archive.add(_blocks(outputs, f"{done.folder}/{name}"), file_name(job), size=size)
    return archive


def _blocks(outputs: OutputFolder, path: str) -> Iterator[bytes]:
    with outputs.storage.local_copy(path) as local, local.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def auth_routes(router: APIRouter, context: PageContext) -> None:
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
            secure="https" in (request.url.scheme, *map(str.strip, request.headers.get("x-forwarded-proto", "").split(","))),
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


def api_page_routes(router: APIRouter, context: PageContext) -> None:
    async def api_page(request: Request, tenant: Tenant) -> Response:
        groups = await asyncio.to_thread(_operations, request.app)
        url = f"{request.base_url}".rstrip("/")
        return context.render(request, "api.html", groups=groups, url=url, model=next(iter(context.server.models)))

    router.add_route("/api-docs", context.for_tenant(api_page), ["GET"])


def _operations(app: FastAPI) -> dict[str, list[tuple[str, str, str]]]:
    """Return tag -> method, path and description of each operation."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            if method != "head":
                tag = operation.get("tags", ["other"])[0]
                description = operation.get("description", operation.get("summary", "")).partition("\n\n")[0]
                groups.setdefault(tag, []).append((method.upper(), path, description))
    return groups


SESSION_CHECK_S = 15
"""Seconds between checks that the browser is still signed in."""


async def _events(context: PageContext, request: Request, tenant: Tenant, cursor: int) -> AsyncIterator[ServerSentEvent]:
    """Yield one event for all jobs that changed together, until the session ends. Its id is the cursor to resume from."""
    # Sends the headers at once, even through proxies that wait for the first bytes of the body.
    yield ServerSentEvent(comment="open")
    base = base_path(request)
    states: dict[str, str] = {}
    checked_at = time.monotonic()
    async with aclosing(context.server.job_feed.follow_tenant(tenant.name, cursor, SESSION_CHECK_S)) as feed:
        async for changes in feed:
            if changes.jobs or changes.deleted:
                # The whole card is sent only when the state changes.
                jobs = [context.job_update(job, base, with_card=states.get(job.id) != job.state) for job in changes.jobs]
                states |= {job.id: job.state for job in changes.jobs}
                data = json.dumps({"jobs": jobs, "deleted": [job.id for job in changes.deleted]})
                yield ServerSentEvent(data, event="changes", id=str(changes.cursor))
            if time.monotonic() - checked_at >= SESSION_CHECK_S:
                checked_at = time.monotonic()
                if await asyncio.to_thread(context.server.auth.session_tenant, request) is None:
                    yield ServerSentEvent("", event="signed-out", id=str(changes.cursor))
                    return


QUEUE_LENGTH = 100
"""Queued and running jobs shown, at most."""
MAX_CURSOR_DIGITS = 18
"""Longest cursor that fits a 64-bit integer."""
THUMBNAIL_AGE_S = 86_400
"""Seconds for which browsers cache an image of the form. Its id is the digest of its content."""


def page_routes(router: APIRouter, context: PageContext) -> None:
    server = context.server

    async def index(request: Request, tenant: Tenant) -> Response:
        return await asyncio.to_thread(_render_page, context, request, tenant)

    async def form_image(request: Request, tenant: Tenant) -> Response:
        """Return the HTML of an uploaded image in the form, with the faces of a photo. Raises ApiError."""
        control, upload_id = request.path_params["control"], request.path_params["upload_id"]
        path = await asyncio.to_thread(server.job_service.uploads.find, tenant.name, upload_id)
        if path is None:
            raise not_found("file", upload_id[:100])
        faces = []
        if control == "photo":
            (photo,) = await server.faces_of(tenant, [upload_id], control)
            faces = [(*map(round, face.box), face is photo.chosen) for face in photo.faces]
        size = await asyncio.to_thread(image_size, path)
        html = context.html(request, "form_image.html", control=control, id=upload_id, size=size, faces=faces)
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
        return server.event_streams.respond(tenant, _events(context, request, tenant, cursor), HEADERS)

    router.add_route("/", context.for_tenant(index), ["GET", "HEAD"])
    router.add_route("/inputs/{upload_id}", context.for_tenant(thumbnail), ["GET"])
    router.add_route("/inputs/{upload_id}/{control}", context.for_tenant(form_image), ["GET"])
    router.add_route("/queue", context.for_tenant(queue), ["GET"])
    router.add_route("/events", context.for_tenant(events), ["GET"])


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
        "priorities": allowed_priorities(tenant.limits),
    }


def _queue_of(server: ServerContext, tenant: Tenant) -> list[Job]:
    return server.store.list(tenant.name, states=OPEN_STATES, limit=QUEUE_LENGTH, order="asc").jobs
