"""Page of the server: routes (page, gallery, queue, event stream, sign-in, API), templates, security headers, job cards."""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from jinja2 import Environment, PackageLoader, StrictUndefined
from sse_starlette import ServerSentEvent
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from zipstream import ZipStream

from vidgen_ray.engine.messages import OUTPUT
from vidgen_ray.graph import STAGE_BY_NAME, file_sizes, stages_of
from vidgen_ray.limits import MAX_RESULTS
from vidgen_ray.media.images import image_size
from vidgen_ray.online.api_error import ApiError, found
from vidgen_ray.online.auth import SESSION_COOKIE, SESSION_S, Tenant, is_https, is_same_origin
from vidgen_ray.online.delivered_size import SCALES, delivered_artefact_of
from vidgen_ray.online.job_service import allowed_priorities
from vidgen_ray.online.previews import encode_thumbnail, previewed_stage
from vidgen_ray.online.queue_estimate import JobEstimate
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.batches import Batch
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.jobs import FINAL, OPEN_STATES, Job, JobError, JobKind, JobState
from vidgen_ray.online.store.store import ListedLines, UnknownJob
from vidgen_ray.online.uploads import small_form
from vidgen_ray.online.web.batch_rows import BatchRow, completed_lines, recent_batches
from vidgen_ray.online.web.form_controls import BASES, IDEAS, STYLES, clip_defaults, control_groups, size_choices
from vidgen_ray.online.web.usage_view import USAGE_DAYS, budget_text, budget_views, usage_days
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import CLIP_FILES, IMAGE_FILE
from vidgen_ray.report.shot_text import dimensions_text, length_text, settings_text
from vidgen_ray.system.quantities import duration

STATIC = Path(__file__).parent / "static"
LOOK_FOLDER = "vidgen_ray.report", "look"
"""Package and folder of the stylesheet and the script that the page shares with the gallery of a run."""
_HEADERS = {
    # No inline scripts or styles, no other origins, no framing. blob: allows previews of chosen photos.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: browsers would then send `Origin: null` with forms, and is_same_origin would reject them.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
TenantHandler = Callable[[Request, Tenant], Awaitable[Response]]


class PageContext:
    """Renders the templates. Holds no state of a request."""

    def __init__(self, server: ServerContext) -> None:
        self.server = server
        self.lora_names = {path: name for name, path in server.settings.loras.items()}
        self.control_groups = control_groups(server.serving_profile)
        self.clip_defaults = clip_defaults(server.serving_profile)
        self._templates = Environment(
            loader=PackageLoader("vidgen_ray.online.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        look = Path(str(resources.files(LOOK_FOLDER[0]))) / LOOK_FOLDER[1]
        self._assets = hashlib.sha256(
            b"".join(file.read_bytes() for folder in (STATIC, look) for file in sorted(folder.iterdir()))
        ).hexdigest()[:12]

    def for_tenant(self, handler: TenantHandler) -> Callable[[Request], Awaitable[Response]]:
        """Return a route that calls the handler for signed-in browsers only."""

        async def route(request: Request) -> Response:
            tenant = await asyncio.to_thread(self.server.auth.page_tenant, request)
            if tenant is None:
                return _signed_out_response(request)
            return await handler(request, tenant)

        return route

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.html(request, template, **values), status, _HEADERS)

    def html(self, request: Request, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(
            base=base_path(request),
            assets=self._assets,
            signed_in=self.server.auth.keys.are_required,
            **values,
        )

    def card(self, job: Job, base: str) -> "Card":
        return card_of(job, base, self.lora_names)

    def job_update(self, job: Job, base: str, with_card: bool = True) -> dict[str, Any]:
        """Return a job as page.js expects it: its progress and, with `with_card`, the HTML of its card."""
        card = self.card(job, base)
        macros: Any = self._templates.get_template("card.html").make_module({"base": base})
        return {
            "id": job.id,
            "version": job.version,
            "state": job.state.value,
            "percent": job.progress,
            "has_begun": job.stage is not None,
            "preview": card.preview,
            "live": str(macros.live(card)) if card.active else None,
            "card": str(macros.card_item(card)) if with_card else None,
        }

    def batch_update(self, row: BatchRow, base: str) -> dict[str, Any]:
        """Return a batch as cards.js expects it: its progress and the HTML of its row."""
        macros: Any = self._templates.get_template("batch.html").make_module({"base": base})
        html = str(macros.batch_item(row))
        return {"id": row.batch.id, "state": row.state, "percent": row.percent, "status": row.status, "html": html}

    def message(self, request: Request, status: int, heading: str, message: str) -> Response:
        """Respond with a page that shows a message."""
        return self.render(request, "message.html", status, heading=heading, message=message)

    def cross_origin_response(self, request: Request) -> Response:
        """Refuse a request sent by a page of another site."""
        return self.message(request, 403, "Request refused", "The request came from another website and was ignored.")


def base_path(request: Request) -> str:
    """Return the path at which the app is mounted, without a trailing slash."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def _signed_out_response(request: Request) -> Response:
    # The script of the page, and its event stream, cannot follow a redirection to a page.
    if request.headers.get("accept") == "application/json" or request.url.path.endswith("/events"):
        return JSONResponse({"message": "Signed out."}, 401, _HEADERS)
    return RedirectResponse(f"{base_path(request)}/sign-in", 303)


PAGE_LENGTH = 12
MAX_IDS = 100
"""Jobs of one page, or of one bulk action, that are named by their ids."""
MAX_SEARCH_LENGTH = 200


@dataclass(frozen=True, slots=True)
class GalleryPage:
    """One page of the gallery, newest first."""

    jobs: list[Job]
    search: str = ""
    batch: Batch | None = None
    """Batch whose lines it shows. Other pages show lines only if they are searched for."""
    favourites: bool = False
    """The jobs were named by their ids: they are the favourites that the browser keeps."""
    after: str | None = None
    older: str | None = None
    """Id after which the next page starts. `None` on the last page."""

    @property
    def is_live(self) -> bool:
        """Return whether new clips belong at the start of this page."""
        return not (self.search or self.batch or self.favourites or self.after)

    @property
    def batch_created(self) -> datetime | None:
        return None if self.batch is None else datetime.fromtimestamp(self.batch.created_at, UTC)


def gallery_page(server: ServerContext, tenant: Tenant, query: QueryParams) -> GalleryPage | None:
    """Return the page that the query asks for with `q`, `batch`, `id` and `after`.

    `None` if `batch` or `after` is not one of the tenant.
    """
    if "favourites" in query:
        return GalleryPage(jobs_with_ids(server, tenant, query.getlist("id")), favourites=True)
    search, after, batch = query.get("q", "").strip()[:MAX_SEARCH_LENGTH], query.get("after"), None
    if "batch" in query:
        batch = server.store.batches.get(query["batch"], tenant.name)
        if batch is None:
            return None
    # A cancelled line has nothing to show.
    lines: ListedLines = "not cancelled" if search or batch else "none"
    only = None if batch is None else batch.id
    words = search.split()
    try:
        page = server.store.list(
            tenant.name, states=FINAL, words=words, lines=lines, batch=only, after=after, limit=PAGE_LENGTH
        )
    except UnknownJob:
        return None
    return GalleryPage(page.jobs, search=search, batch=batch, after=after, older=page.jobs[-1].id if page.has_more else None)


def jobs_with_ids(server: ServerContext, tenant: Tenant, ids: Sequence[str]) -> list[Job]:
    """Return the ended jobs of the tenant with these ids, at most `MAX_IDS`. Skips ids of other tenants and deleted jobs."""
    jobs = (server.store.get(each, tenant.name) for each in dict.fromkeys(ids[:MAX_IDS]))
    return [job for job in jobs if job is not None and job.state.is_final]


_BLOCK_BYTES = 1 << 20


def clip_routes(router: APIRouter, context: PageContext) -> None:
    async def gallery(request: Request, tenant: Tenant) -> Response:
        page = await asyncio.to_thread(gallery_page, context.server, tenant, request.query_params)
        if page is None:
            return context.message(request, 404, "Not found", "This clip does not exist or was deleted.")
        cards = [context.card(job, base_path(request)) for job in page.jobs]
        return context.render(request, "gallery.html", gallery=page, cards=cards, ideas=())

    async def download(request: Request, tenant: Tenant) -> Response:
        if "batch" in request.query_params:
            return await download_batch(request, tenant)
        ids = request.query_params.getlist("id")
        archive = await asyncio.to_thread(lambda: _archive(context.server.outputs, jobs_with_ids(context.server, tenant, ids)))
        if not archive.num_queued():
            return context.message(request, 404, "Nothing to download", "Select clips that are completed.")
        headers = {"Content-Disposition": 'attachment; filename="clips.zip"', "Content-Length": str(len(archive))}
        return StreamingResponse(archive, media_type="application/zip", headers=_HEADERS | headers)

    async def download_batch(request: Request, tenant: Tenant) -> Response:
        batch = await asyncio.to_thread(context.server.store.batches.get, request.query_params["batch"], tenant.name)
        if batch is None:
            return context.message(request, 404, "Not found", "This batch does not exist.")
        headers = {"Content-Disposition": f'attachment; filename="{batch.id}.zip"'}
        lines = completed_lines(context.server.store, batch)
        archive = _growing_archive(context.server.outputs, lines)
        return StreamingResponse(archive, media_type="application/zip", headers=_HEADERS | headers)

    router.add_route("/clips", context.for_tenant(gallery), ["GET"])
    router.add_route("/clips/download", context.for_tenant(download), ["GET"])


def _archive(outputs: OutputFolder, jobs: list[Job]) -> ZipStream:
    """Return a ZIP of the delivered file of each completed job. It is read while it is sent, and never held in memory."""
    archive = ZipStream(sized=True)
    for job in jobs:
        _add_to_archive(archive, outputs, job)
    return archive


def _growing_archive(outputs: OutputFolder, jobs: Iterator[Job]) -> Iterator[bytes]:
    """Yield the bytes of such a ZIP while the jobs are read. Its size is not known in advance."""
    archive = ZipStream()
    for job in jobs:
        _add_to_archive(archive, outputs, job)
        yield from archive.all_files()
    yield from archive.finalize()


def _add_to_archive(archive: ZipStream, outputs: OutputFolder, job: Job) -> None:
    """Add the delivered file of a job, unless it is not completed or its files are deleted."""
    done = outputs.find_by_key(job.key) if job.state is JobState.COMPLETED else None
    if done is None:
        return
    name = CLIP_FILES.get(delivered_artefact_of(job), IMAGE_FILE)
    archive.add(_blocks(outputs, f"{done.folder}/{name}"), file_name(job), size=done.files[name].bytes)


def _blocks(outputs: OutputFolder, path: str) -> Iterator[bytes]:
    with outputs.storage.local_copy(path) as local, local.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
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
        token = await in_write_thread(context.server.auth.sign_in, key)
        if token is None:
            return context.render(request, "sign_in.html", 403, error="Invalid API key.")
        response = RedirectResponse(f"{base_path(request)}/", 303)
        response.set_cookie(
            SESSION_COOKIE,
            token,
            max_age=SESSION_S,
            path=f"{base_path(request)}/",
            secure=is_https(request),
            httponly=True,
            samesite="strict",
        )
        return response

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        if not is_same_origin(request):
            return context.cross_origin_response(request)
        await in_write_thread(context.server.auth.sign_out, request)
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
            # ListedLines of batches have no cards; the page then asks for the rows of the batches.
            own = [job for job in changes.jobs if job.batch is None]
            if changes.jobs or changes.deleted:
                # The whole card is sent only when the state changes.
                jobs = [context.job_update(job, base, with_card=states.get(job.id) != job.state) for job in own]
                states |= {job.id: job.state for job in own}
                deleted = [job.id for job in changes.deleted]
                data = json.dumps({"jobs": jobs, "deleted": deleted, "has_lines": len(own) < len(changes.jobs)})
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
        path = found(await asyncio.to_thread(server.job_service.uploads.find, tenant.name, upload_id), "file", upload_id)
        faces = []
        if control == "photo":
            (photo,) = await server.faces_of(tenant, [upload_id], control)
            faces = [(*map(round, face.box), face is photo.chosen) for face in photo.faces]
        size = await asyncio.to_thread(image_size, path)
        html = context.html(request, "form_image.html", control=control, id=upload_id, size=size, faces=faces)
        return JSONResponse({"html": html}, headers=_HEADERS)

    async def thumbnail(request: Request, tenant: Tenant) -> Response:
        uploads = server.job_service.uploads
        path = await asyncio.to_thread(uploads.find, tenant.name, request.path_params["upload_id"])
        if path is None:
            return Response(status_code=404, headers=_HEADERS)
        webp = await asyncio.to_thread(encode_thumbnail, await uploads.read(tenant, path))
        caching = {"Cache-Control": f"private, max-age={THUMBNAIL_AGE_S}"}
        return Response(webp, media_type="image/webp", headers=_HEADERS | caching)

    async def queue(request: Request, tenant: Tenant) -> Response:
        base, jobs = base_path(request), await asyncio.to_thread(_queue_of, server, tenant)
        updates = [context.job_update(job, base, with_card=False) for job in jobs]
        estimates = [estimate_text(job, await server.queue_estimator.estimate(job)) for job in jobs]
        batches = await asyncio.to_thread(recent_batches, server, tenant.name, time.time())
        content = {
            "jobs": [{**update, "estimate": estimate} for update, estimate in zip(updates, estimates, strict=True)],
            "batches": [context.batch_update(row, base) for row in batches],
            "budget": budget_text(await asyncio.to_thread(budget_views, server, tenant)),
        }
        return JSONResponse(content, headers=_HEADERS)

    async def usage(request: Request, tenant: Tenant) -> Response:
        budgets = await asyncio.to_thread(budget_views, server, tenant)
        days = await asyncio.to_thread(usage_days, server, tenant, datetime.now(UTC).date())
        return context.render(
            request,
            "usage.html",
            budgets=budgets,
            days=days,
            shown_days=USAGE_DAYS,
            has_price=bool(server.settings.gpu_hour_price),
        )

    async def events(request: Request, tenant: Tenant) -> Response:
        # First: a browser that reconnects all the time must not cost a query of the database.
        server.event_streams.check_room(tenant)
        since = request.query_params.get("since", "")
        is_cursor = since.isascii() and since.isdecimal() and len(since) <= MAX_CURSOR_DIGITS
        cursor = int(since) if is_cursor else await asyncio.to_thread(server.store.latest_version)
        return server.event_streams.respond(tenant, _events(context, request, tenant, cursor), _HEADERS)

    router.add_route("/", context.for_tenant(index), ["GET", "HEAD"])
    router.add_route("/inputs/{upload_id}", context.for_tenant(thumbnail), ["GET"])
    router.add_route("/inputs/{upload_id}/{control}", context.for_tenant(form_image), ["GET"])
    router.add_route("/queue", context.for_tenant(queue), ["GET"])
    router.add_route("/usage", context.for_tenant(usage), ["GET"])
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
        batches=recent_batches(server, tenant.name, time.time()),
        budget=budget_text(budget_views(server, tenant)),
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
    return server.store.list(tenant.name, states=OPEN_STATES, lines="none", limit=QUEUE_LENGTH, order="asc").jobs


SAVING = "Save", "Saving"
"""Label and activity of the step after all stages."""
_NAME_LENGTH, ID_LENGTH = 40, 6
"""Characters of the prompt and of the id in a file name."""


@dataclass(frozen=True, slots=True)
class Card:
    """Values of the card template, beside those of the job itself."""

    job: Job
    title: str
    active: bool
    status: str
    stages: tuple[tuple[str, str], ...]
    """Label of each stage, and `done`, `current` or `ahead`."""
    preview: str | None
    """Newest finished stage whose result the preview shows."""
    is_clip: bool
    media: str
    width: int
    height: int
    """Pixels of the delivered file, like `width`."""
    hd_size: str | None
    """Size of the larger file, `None` without one."""
    facts: tuple[str, ...]
    """Length, size, seed and rendering time."""
    error: str | None
    settings: tuple[tuple[str, str], ...]
    created: datetime


def card_of(job: Job, base: str, lora_names: Mapping[str, str]) -> Card:
    """Return the card of a job.

    `base` is the path at which the app is mounted. `lora_names` maps the paths of the server's LoRAs to their names.
    """
    sizes, delivered = file_sizes(job.shot), delivered_artefact_of(job)
    width, height = sizes[delivered]
    finished = list(sizes)[-1]
    character = name if isinstance(name := job.request.get("character"), str) else None
    return Card(
        job=job,
        title=" ".join(job.shot.prompt.split()),
        active=not job.state.is_final,
        status=_status(job),
        stages=tuple(_card_stages(job)),
        preview=previewed_stage(job),
        is_clip=job.kind is not JobKind.IMAGE and job.shot.generate_video,
        media=f"{base}/v1/videos/{job.id}/content",
        width=width,
        height=height,
        hd_size=None if finished == delivered else dimensions_text(*sizes[finished]),
        facts=tuple(_facts(job, width, height)),
        error=error_text(job.error) if job.error and job.state is JobState.FAILED else None,
        settings=tuple(settings_text(job.shot, (width, height), lora_names, character)),
        created=datetime.fromtimestamp(job.created_at, UTC),
    )


def file_name(job: Job) -> str:
    """Return the name of the file in a ZIP: the start of the prompt and the end of the id."""
    words = re.sub(r"[^a-z0-9]+", "-", job.shot.prompt.lower()).strip("-")[:_NAME_LENGTH].strip("-")
    return f"{words or 'clip'}-{job.id[-ID_LENGTH:]}{'.mp4' if job.shot.generate_video else '.png'}"


def error_text(error: JobError) -> str:
    """Return an error in the words of the page: the label of the stage, and the photo in place of the field `face_image`."""
    stage = STAGE_BY_NAME.get(error.stage or "")
    text = error.message.removeprefix(f"{error.stage}: ")
    # The page shows the photos, not the names of their files on the server.
    text = re.sub(r"face_image( \d+ of \d+)? \([^)]*\): ", r"face_image\1: ", text)
    text = text.replace("face_image: ", "").replace("face_image ", "photo ")
    text = text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    return f"{stage.label}: {text}" if stage else text


def estimate_text(job: Job, estimate: JobEstimate) -> str:
    """Return the place in the queue and the time left, in words. Empty for jobs that have ended or wait for a worker."""
    if estimate.eta_s is None or _waits_for_a_worker(job):
        return ""
    left = f"about {duration(max(1, round(estimate.eta_s)))} left"
    if estimate.queue_position is None:
        return left
    return f"Position {estimate.queue_position + 1}, {left}" if estimate.queue_position else f"Next in the queue, {left}"


def _waits_for_a_worker(job: Job) -> bool:
    """Return whether a job in progress has not begun its first stage. The estimate is that of its stages."""
    return job.state is JobState.IN_PROGRESS and job.stage is None


def _status(job: Job) -> str:
    if job.cancel_requested:
        return "Cancelling after this step"
    if job.state is JobState.QUEUED:
        queued = "Queued" if job.claims == 0 else "Queued again after an interruption"
        return queued if job.priority == "normal" else f"{queued}, {job.priority} priority"
    if job.stage is None:
        return "Waiting for a worker"
    stage = STAGE_BY_NAME.get(job.stage)
    activity = stage.activity if stage else SAVING[1]
    if not job.steps:
        return f"{activity} ({job.progress} %)"
    unit = stage.progress_unit if stage else "steps"
    return f"{activity}, {job.step} of {job.steps} {unit} ({job.progress} %)"


def _card_stages(job: Job) -> Iterator[tuple[str, str]]:
    stages = stages_of(job.shot)
    names = [*(stage.name for stage in stages), OUTPUT]
    labels = [*(stage.label for stage in stages), SAVING[0]]
    reached = names.index(job.stage) if job.stage in names else -1
    for number, label in enumerate(labels):
        yield label, "done" if number < reached else "current" if number == reached else "ahead"


def _facts(job: Job, width: int, height: int) -> Iterator[str]:
    shot = job.shot
    if shot.generate_video:
        yield length_text(shot.clip_frames / shot.fps)
    yield dimensions_text(width, height)
    yield f"seed {shot.seed}"
    if job.started_at is not None and job.completed_at is not None:
        duration_s = job.completed_at - job.started_at
        yield f"rendered in {duration(duration_s)}" if duration_s else "already rendered"
