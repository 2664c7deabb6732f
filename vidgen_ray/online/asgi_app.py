"""Assemble the ASGI application around one `ServerContext`: the API with the routes of models and health, and the web page."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import date
from functools import partial
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query
from pydantic import BeforeValidator
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vidgen_ray.errors import SetupError
from vidgen_ray.online import api_error
from vidgen_ray.online.api import batch_routes, content_routes, image_routes, input_routes, video_routes
from vidgen_ray.online.api.batch_runner import run_batches
from vidgen_ray.online.api.openapi import ServerDep, TenantDep, error_responses, openapi_document, without_keys
from vidgen_ray.online.api.responses import (
    Health,
    LoadedLora,
    LoadedLoras,
    Lora,
    LoraPage,
    Model,
    ModelPage,
    Readiness,
    UsagePage,
    UsageRow,
    WebhookSecret,
    budget_response,
)
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import ApiKeys, Authenticator
from vidgen_ray.online.event_streams import EventStreams, JobFeed
from vidgen_ray.online.http_fetch import ImageFetcher
from vidgen_ray.online.job_service import JobService, NotifyDirector, StorageCheck
from vidgen_ray.online.queue_estimate import QueueEstimator
from vidgen_ray.online.server_context import FaceCheck, ServerContext
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.store.database import READER_THREADS
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.online.uploads import LARGE_JSON_BODIES, BodyBudget, BodyCap, ImageReferences
from vidgen_ray.online.web import add_page
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.version import __version__


async def _nothing() -> None:
    """Default of `missing`: there is no director to ask."""


DESCRIPTION = """Videos and images from text, photos and LoRAs, in the format of OpenAI's API.

Create requests accept JSON or a form. Every error is `{"error": {"message", "type", "param", "code"}}`."""

READY_S = 5.0
"""Seconds within which `/readyz` responds."""
_THREADS = READER_THREADS
"""Threads of `asyncio.to_thread` for blocking calls, each with a connection to the database.

Starlette's `run_in_threadpool` is not used: in Ray's event loop, each call looks through all tasks, of which 1,000 event
streams have several thousand.
"""


def make_app(
    settings: OnlineSettings,
    store: JobStore,
    outputs: OutputFolder,
    serving_profile: ServingProfile,
    keys: ApiKeys,
    *,
    changed: Callable[[], Awaitable[None]],
    jobs_changed: NotifyDirector = lambda **_: None,
    missing: Callable[[], Awaitable[str | None]] = _nothing,
) -> FastAPI:
    """Return the app of a server: its API and its web page. `changed`: see `JobFeed`; `jobs_changed`: see `NotifyDirector`.

    `missing` returns what the server lacks to run jobs, for `/readyz`.

    Raises SetupError for a missing LoRA file, and for a budget in money without a price.
    """
    for name, path in settings.loras.items():
        if not path.startswith("builtin:") and not os.path.isfile(path):
            raise SetupError(f"loras.{name}: no such file, {path}")
    keys.check_budgets(settings.gpu_hour_price)
    hosts = settings.url_inputs.allow_hosts
    fetcher = ImageFetcher(hosts, settings.uploads.image_bytes) if hosts else None
    job_service = JobService(settings, store, outputs, serving_profile, jobs_changed)
    server = ServerContext(
        settings=settings,
        store=store,
        outputs=outputs,
        serving_profile=serving_profile,
        auth=Authenticator(keys, store.engine),
        job_service=job_service,
        job_feed=JobFeed(store, changed),
        event_streams=EventStreams(),
        queue_estimator=QueueEstimator(store, serving_profile.profile),
        storage_check=StorageCheck(store, outputs),
        image_references=ImageReferences(job_service.uploads, fetcher),
        face_check=FaceCheck(serving_profile),
        body_budget=BodyBudget(settings.uploads),
        started_at=int(time.time()),
        missing=missing,
    )
    app = _empty_app(settings, store)
    app.state.server = server
    app.state.large_json = asyncio.Semaphore(LARGE_JSON_BODIES)
    app.state.body_parser = ThreadPoolExecutor(1, "parse")
    app.add_middleware(BodyCap, cap_bytes=settings.uploads.body_bytes)
    if settings.root_path:
        app.add_middleware(RootPath, root_path=settings.root_path)
    api_error.install(app)
    _add_api(app)
    add_page(app, server)
    return app


class RootPath:
    """Middleware that serves an app under a path. The proxy may pass this path on or remove it."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            is_inside = f"{scope['path']}/".startswith(f"{self._root_path}/")
            path = scope["path"] if is_inside else self._root_path + scope["path"]
            # Without a slash at the end it is the page, too.
            path += "/" * (path == self._root_path)
            scope = {**scope, "path": path, "root_path": self._root_path}
        await self._app(scope, receive, send)


def _empty_app(settings: OnlineSettings, store: JobStore) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Ray sizes the loop's default executor by the CPUs of the process, which is too few for blocking database calls.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "api"))
        batches = asyncio.ensure_future(run_batches(app.state.server))
        yield
        batches.cancel()
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


def _add_api(app: FastAPI) -> None:
    """Add the API's routes and OpenAPI document to the app."""
    for each in (
        image_routes.router,
        # Before videos: /v1/videos/{video_id} matches /v1/videos/characters, too.
        input_routes.character_router,
        video_routes.estimate_router,
        video_routes.router,
        content_routes.sync_router,
        content_routes.router,
        video_routes.shot_router,
        router,
        input_routes.file_router,
        batch_routes.router,
        usage_router,
        webhook_router,
        health,
    ):
        app.include_router(each)
    # Replacing the method is FastAPI's documented way to extend the document.
    root_path = app.state.server.settings.root_path
    app.openapi = lambda: openapi_document(app, root_path)  # type: ignore[method-assign]


router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelPage, responses=error_responses())
@router.get("/models", response_model=ModelPage, responses=error_responses())
async def list_models(server: ServerDep, tenant: TenantDep) -> ModelPage:
    """List the models. The first is the default."""
    return ModelPage(data=[_described(server, name) for name in server.models])


@router.get("/v1/models/{model_id:path}", response_model=Model, responses=error_responses(404))
async def get_model(server: ServerDep, tenant: TenantDep, model_id: str) -> Model:
    """Return a model."""
    name, _ = server.model(model_id)
    return _described(server, name)


def _described(server: ServerContext, name: str) -> Model:
    return Model(id=name, created=server.started_at, revision=server.serving_profile.revision)


@router.get("/v1/loras", response_model=LoraPage, responses=error_responses())
async def list_loras(server: ServerDep, tenant: TenantDep) -> LoraPage:
    """List the LoRAs that requests can use."""
    return LoraPage(data=[Lora(id=name) for name in sorted(server.settings.loras)])


@router.get("/v1/list_loras", response_model=LoadedLoras, responses=error_responses())
async def list_loaded_loras(server: ServerDep, tenant: TenantDep) -> LoadedLoras:
    """List the LoRAs that requests can use, in SGLang's format."""
    adapters = [LoadedLora(nickname=name, path=name) for name in sorted(server.settings.loras)]
    return LoadedLoras(loaded_adapters=adapters, active={})


@router.get("/openapi.json", include_in_schema=False)
async def openapi_json(request: Request, server: ServerDep, _: TenantDep) -> JSONResponse:
    """Return the OpenAPI document. It names the stages and models of the server."""
    document = request.app.openapi()
    return JSONResponse(document if server.auth.keys.are_required else without_keys(document))


webhook_router = APIRouter(tags=["webhooks"])


@webhook_router.get("/v1/webhooks/default/secret", response_model=WebhookSecret, responses=error_responses())
async def get_webhook_secret(server: ServerDep, tenant: TenantDep) -> WebhookSecret:
    """Return the secret that signs messages to the receivers that requests of the tenant name."""
    return WebhookSecret(key=await asyncio.to_thread(server.auth.webhook_secret, tenant))


usage_router = APIRouter(tags=["usage"])


def _as_day(value: object) -> object:
    """Refuse numbers, which pydantic takes for seconds since 1970."""
    if isinstance(value, str) and not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        raise ValueError("must be a day, YYYY-MM-DD")
    return value


Day = Annotated[date | None, BeforeValidator(_as_day), Query(description="UTC day, YYYY-MM-DD.")]
MAX_USAGE_ROWS = 1000
UsageAfter = Annotated[
    str | None, Query(pattern=r"^[^/]{1,10}/[^/]{1,128}/.{1,128}$", description="`last_id` of the previous page.")
]


@usage_router.get("/v1/usage", response_model=UsagePage, responses=error_responses())
async def get_usage(
    server: ServerDep,
    tenant: TenantDep,
    first: Day = None,
    last: Day = None,
    limit: Annotated[int, Query(ge=1, le=MAX_USAGE_ROWS, description="Rows of a page.")] = MAX_USAGE_ROWS,
    after: UsageAfter = None,
) -> UsagePage:
    """Return what the jobs of the tenant have used from `first` to `last`, by default all days, and the budgets of the key."""
    day, key_id, model = after.split("/", 2) if after else ("", "", "")
    days = str(first or date.min), str(last or date.max)
    find_rows = partial(server.store.usage.rows, after=(day, key_id, model), limit=limit + 1)
    rows = await asyncio.to_thread(find_rows, tenant.name, *days)
    states = await asyncio.to_thread(server.store.usage.states, tenant.key_id, tenant.limits.budgets)
    page = [UsageRow.model_validate(row) for row in rows[:limit]]
    ids = [f"{row.day}/{row.key_id}/{row.model}" for row in page]
    return UsagePage(
        data=page,
        budgets=[budget_response(state) for state in states],
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=len(rows) > limit,
    )


health = APIRouter(tags=["health"])


@health.get("/healthz", response_model=Health)
@health.get("/health", response_model=Health)
@health.head("/healthz", include_in_schema=False)
@health.head("/health", include_in_schema=False)
async def healthz() -> Health:
    """Respond with 200 while the process is alive."""
    return Health()


@health.get("/readyz", response_model_exclude_none=True, responses={503: error_responses()[503]})
@health.head("/readyz", include_in_schema=False)
async def readyz(server: ServerDep) -> Readiness:
    """Respond with 200 if jobs and files can be stored, after writing to the database and the output folder.

    Says what is missing to run jobs.
    """
    try:
        async with asyncio.timeout(READY_S):
            problem = await server.storage_check.problem()
    except TimeoutError:
        problem = f"The job store or the output folder has not responded for {READY_S:g} s."
    if problem is not None:
        raise ApiError(503, problem, code="not_ready", type="server_error", headers={"Retry-After": "5"})
    missing = await server.missing()
    return Readiness(status="ok" if missing is None else "waiting", missing=missing)
