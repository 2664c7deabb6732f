"""Routes that list and download ended jobs of the page."""

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from zipstream import ZipStream

from vidgen_ray.engine.chunks import CLIP_FILES
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.delivered_size import delivered_artefact_of
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.online.web.gallery import gallery_page, jobs_with_ids
from vidgen_ray.online.web.job_cards import file_name
from vidgen_ray.online.web.page_context import HEADERS, PageContext, base_path
from vidgen_ray.outputs.folder import OutputFolder

BLOCK_BYTES = 1 << 20


def clip_routes(context: PageContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)

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
    return router


def _archive(outputs: OutputFolder, jobs: list[Job]) -> ZipStream:
    """Return a ZIP of the delivered file of each completed job. It is read while it is sent, and never held in memory."""
    archive = ZipStream(sized=True)
    for job in jobs:
        done = outputs.find_by_key(job.key) if job.state is JobState.COMPLETED else None
        if done is None:
            continue
        name = CLIP_FILES.get(delivered_artefact_of(job), "image.png")
        size = done.summary.bytes[name]
        archive.add(_blocks(outputs, f"{done.summary.folder}/{name}"), file_name(job), size=size)
    return archive


def _blocks(outputs: OutputFolder, path: str) -> Iterator[bytes]:
    with outputs.storage.local_copy(path) as local, local.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block
