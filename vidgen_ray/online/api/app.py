"""The app: routes, errors, who may ask, and a document that says so."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi

from vidgen_ray.errors import SetupError
from vidgen_ray.online.api import characters, error_handlers, files, images, models, shots, video_content, video_events, videos
from vidgen_ray.online.api.deps import Server, ServerDep
from vidgen_ray.online.api.job_feed import JobFeed
from vidgen_ray.online.api.response_models import SHOT_PARTS, Health, ImagesResponse
from vidgen_ray.online.auth import Keys
from vidgen_ray.online.inputs.face_check import FaceCheck
from vidgen_ray.online.inputs.http_fetch import ImageFetcher
from vidgen_ray.online.inputs.image_references import ImageReferences
from vidgen_ray.online.inputs.uploads import BodyCap
from vidgen_ray.online.job_service import Accepted, JobService
from vidgen_ray.online.limits import RequestRate
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.version import __version__

ABOUT = """Clips and pictures by text, photo and LoRA, in the shape of OpenAI's videos and images.

Requests that create take JSON or a form. Every error is `{"error": {"message", "type", "param", "code"}}`."""

THREADS = 32

health = APIRouter(tags=["health"])


@health.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """Whether the process answers."""
    return Health()


@health.get("/readyz", response_model=Health, responses={503: error_handlers.error_responses()[503]})
async def readyz(server: ServerDep) -> Health:
    """Whether jobs can be stored."""
    await asyncio.to_thread(server.store.ping)
    return Health()


def make_app(
    settings: OnlineSettings,
    store: JobStore,
    outputs: OutputFolder,
    serving_profile: ServingProfile,
    keys: Keys,
    *,
    accepted: Accepted = lambda: None,
    page: bool = True,
) -> FastAPI:
    """The API of a server, and its page. `accepted` is called when there is something new for the director.

    Raises SetupError for a LoRA that is not there.
    """
    for name, path in settings.loras.items():
        if not path.startswith("builtin:") and not os.path.isfile(path):
            raise SetupError(f"loras.{name}: no such file, {path}")
    intake = JobService(settings, store, outputs, serving_profile, accepted)
    fetching = settings.url_inputs
    fetched = ImageFetcher(fetching.allow_hosts, fetching.timeout_s, fetching.redirects, settings.uploads.image_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Ray gives the loop as many threads as the replica has CPUs, and few more: too few to wait in for a database.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "api"))
        yield
        store.close()

    app = FastAPI(
        title="vidgen-ray",
        version=__version__,
        description=ABOUT,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.server = Server(
        settings=settings,
        store=store,
        outputs=outputs,
        serving_profile=serving_profile,
        keys=keys,
        rate=RequestRate(),
        intake=intake,
        references=ImageReferences(intake.uploads, fetched if fetching.enabled else None),
        followers=JobFeed(store, settings.poll_s),
        faces=FaceCheck(serving_profile),
        started_at=int(time.time()),
    )
    error_handlers.install(app)
    app.add_middleware(BodyCap, cap_bytes=settings.uploads.body_bytes)
    # Before /v1/videos/{video_id}, which would take `characters` for an id.
    app.include_router(characters.router)
    for module in (videos, video_content, video_events, images, shots, models, files):
        app.include_router(module.router)
    app.include_router(health)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]  # as FastAPI's own documentation does it
    if page:
        from vidgen_ray.online.web import add_page

        add_page(app, app.state.server)
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's account, without the errors that it would answer and this app does not."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    parts = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    parts["Pictures"] = ImagesResponse.model_json_schema(ref_template="#/components/schemas/{model}")
    parts |= parts["Pictures"].pop("$defs", {})
    parts |= SHOT_PARTS
    document["components"]["schemas"] = dict(sorted(parts.items()))
    app.openapi_schema = document
    return document
