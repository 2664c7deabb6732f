"""Assemble the ASGI application: the API and the web page around one `ServerContext`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from vidgen_ray.errors import SetupError
from vidgen_ray.online import api_error
from vidgen_ray.online.api.openapi import TenantDep
from vidgen_ray.online.api.routes import add_api
from vidgen_ray.online.auth import ApiKeys, Authenticator, Sessions
from vidgen_ray.online.event_streams import EventStreams, JobFeed
from vidgen_ray.online.face_check import FaceCheck
from vidgen_ray.online.http_fetch import ImageFetcher
from vidgen_ray.online.job_service import JobService, NotifyDirector
from vidgen_ray.online.queue_estimate import QueueEstimator
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.store.database import POOL_SIZE
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.online.uploads import LARGE_JSON_BODIES, BodyCap, ImageReferences
from vidgen_ray.online.web import add_page
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.version import __version__


async def _nothing() -> None:
    """Default of `missing`: there is no director to ask."""


DESCRIPTION = """Videos and images from text, photos and LoRAs, in the format of OpenAI's API.

Create requests accept JSON or a form. Every error is `{"error": {"message", "type", "param", "code"}}`."""

THREADS = POOL_SIZE
"""Threads of `asyncio.to_thread` for blocking calls, each with a connection to the database.

Starlette's `run_in_threadpool` is not used: in Ray Serve's event loop, each call looks through all tasks, of which 1,000 event
streams have several thousand.
"""

document = APIRouter()


@document.get("/openapi.json", include_in_schema=False)
async def openapi_json(request: Request, _: TenantDep) -> JSONResponse:
    """Return the OpenAPI document. It names the stages and models of the server."""
    return JSONResponse(request.app.openapi())


def make_app(
    settings: OnlineSettings,
    store: JobStore,
    outputs: OutputFolder,
    serving_profile: ServingProfile,
    keys: ApiKeys,
    *,
    jobs_changed: NotifyDirector = lambda: None,
    missing: Callable[[], Awaitable[str | None]] = _nothing,
) -> FastAPI:
    """Return the app of a server: its API and its web page. `jobs_changed`: see `JobService`.

    `missing` returns what the server lacks to run jobs, for `/readyz`.

    Raises SetupError for a missing LoRA file.
    """
    _check_loras(settings)
    hosts = settings.url_inputs.allow_hosts
    fetcher = ImageFetcher(hosts, settings.uploads.image_bytes) if hosts else None
    job_service = JobService(settings, store, outputs, serving_profile, jobs_changed)
    server = ServerContext(
        settings=settings,
        store=store,
        outputs=outputs,
        serving_profile=serving_profile,
        auth=Authenticator(keys, Sessions(store.engine)),
        job_service=job_service,
        job_feed=JobFeed(store),
        event_streams=EventStreams(),
        queue_estimator=QueueEstimator(store, serving_profile.profile),
        image_references=ImageReferences(job_service.uploads, fetcher),
        face_check=FaceCheck(serving_profile),
        started_at=int(time.time()),
        missing=missing,
    )
    app = _empty_app(settings, store)
    app.state.server = server
    app.state.large_json = asyncio.Semaphore(LARGE_JSON_BODIES)
    app.state.body_parser = ThreadPoolExecutor(1, "parse")
    app.add_middleware(BodyCap, cap_bytes=settings.uploads.body_bytes)
    api_error.install(app)
    add_api(app)
    app.include_router(document)
    add_page(app, server)
    return app


def _check_loras(settings: OnlineSettings) -> None:
    for name, path in settings.loras.items():
        if not path.startswith("builtin:") and not os.path.isfile(path):
            raise SetupError(f"loras.{name}: no such file, {path}")


def _empty_app(settings: OnlineSettings, store: JobStore) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Ray sizes the loop's default executor by the replica's CPUs, which is too few threads for blocking database calls.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "api"))
        yield
        store.close()

    return FastAPI(
        title="vidgen-ray",
        version=__version__,
        description=DESCRIPTION,
        # Its own route requires a key.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
