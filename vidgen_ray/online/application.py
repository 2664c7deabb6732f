"""Ray Serve application: the API, the director, and the owner of the workers and encoders.

Serve configs use `vidgen_ray.online.application:build` as their import path.
"""

# Not `from __future__ import annotations`: Serve reads the annotation of `build` to convert the args of a config to settings.

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen_ray.engine.cache_writer import CacheSettings
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.fleet import labels_of
from vidgen_ray.engine.ray_cluster import LOOPBACK, live_cluster, requires_token
from vidgen_ray.engine.run_trials import run_trials
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.asgi_app import make_app
from vidgen_ray.online.auth import ApiKeys, check_bind_host, check_token_required, load_keys
from vidgen_ray.online.event_streams import MAX_STREAMS
from vidgen_ray.online.job_director import AWAKE_S, JobDirector
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile, serving_profile
from vidgen_ray.online.store.store import open_store
from vidgen_ray.online.workers import Workers
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner import Cluster, Plan, cpus_needed, load_calibration, parse_gpus, plan, profile_for
from vidgen_ray.planner.cluster import Label
from vidgen_ray.planner.layout import Layout
from vidgen_ray.planner.solver import DIRECTOR_CPUS
from vidgen_ray.provenance.signing import check_signing
from vidgen_ray.stages.base import Stage
from vidgen_ray.system.files import private_folder

log = logging.getLogger(__name__)

APP = "vidgen"
API = "Api"
API_CPUS = 0.25
DIRECTOR_TIMEOUT_S = 2.0
"""Seconds that the director may take to say what is missing."""
API_REQUESTS = 1_000
"""Concurrent requests per replica, without event streams."""
DIRECTOR, WORKERS = "Director", "Workers"
WORKERS_CPUS = 0.1
MAX_DIRECTOR_CALLS = 1_000
"""Concurrent calls of the director, all short."""
HEALTH: dict[str, Any] = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0, "graceful_shutdown_wait_loop_s": 0.5}


@dataclass(frozen=True)
class ServerPlan:
    """Plan of a server on a cluster, before it is started."""

    settings: OnlineSettings
    serving_profile: ServingProfile
    layout: Layout
    labels: tuple[Label | None, ...]
    """Label of the node of each slot; see `fleet.labels_of`."""
    reference_s: Mapping[str, float]
    """Stage -> planned seconds of the reference shot."""
    stage_seconds: Mapping[str, float] | None
    """Stage -> mean seconds per shot, to use GPUs that become free later. `None` if the settings name all GPUs."""

    @property
    def cpus(self) -> float:
        """CPUs of all processes at start. The spare CPUs of a layout are enough for the API and the owner of the workers."""
        return cpus_needed(self.layout)


def server_plan(settings: OnlineSettings, detect: Callable[[], Cluster]) -> ServerPlan:
    """Plan a server for the GPUs in the settings, or for those that `detect` returns.

    Raises ProfileError and SetupError as the planner does, and SetupError if nothing can be served, or if Ray cannot
    distinguish GPUs of different sizes.
    """
    cluster = parse_gpus(settings.gpus) if settings.gpus else detect()
    configured = profile_for(settings.profile, lambda: cluster).with_provenance(settings.provenance)
    check_signing(configured.provenance)
    served = serving_profile(configured, settings.require_licence)
    # LoRAs of the examples do not exist.
    examples = [shot for shot in served.example_shots() if not shot.all_loras]
    if (fast := run_trials(configured, examples, None, cluster, log.warning)) != configured:
        served = serving_profile(fast, settings.require_licence)
    served = replace(served, gpu_gb=max(cluster.gpus, default=None))
    chosen = plan_for(served, cluster, settings.shots_at_once)
    served = replace(served, profile=served.profile.with_options(chosen.options))
    stage_seconds = None if settings.gpus else chosen.stage_seconds
    return ServerPlan(settings, served, chosen.layout, tuple(labels_of(chosen, cluster)), chosen.reference_s, stage_seconds)


def plan_for(served: ServingProfile, cluster: Cluster, shots_at_once: int | None = None) -> Plan:
    """Plan the layout of a server. `shots_at_once`: `None` for as many as GPUs. Raises ProfileError and SetupError as the
    planner does."""
    profile, shots = served.profile, shots_at_once or max(1, len(cluster.gpus))
    return plan(
        profile, served.demand(), cluster, calibration=load_calibration(profile.name, cluster.card), shots_at_once=shots
    )


def build(args: OnlineSettings) -> Application:
    """Build the application for `serve deploy` and `serve run`, planned for the cluster that this runs on.

    Raises SetupError and ProfileError, also for a server that listens beyond this machine without protection.
    """
    server = server_plan(args, lambda: live_cluster().total)
    check_exposure(args)
    return application(server)


def check_exposure(settings: OnlineSettings) -> None:
    """Raise SetupError if the server listens beyond this machine without API keys, or on a Ray that requires no token.

    Call it when connected to Ray. Also checks the host of a running Ray Serve, which a config sets apart from the settings.
    """
    keys = load_keys(settings.keys_file, settings.limits)
    token_is_required = requires_token()
    if not token_is_required:
        log.warning("Ray requires no token: anyone who reaches one of its ports can run code. Set RAY_AUTH_MODE=token.")
    running = _get_global_client(raise_if_no_controller_running=False)
    for host in {settings.host, *([] if running is None else [running.http_config.host or LOOPBACK])}:
        check_bind_host(host, keys)
        check_token_required(host, token_is_required)


def application(server: ServerPlan, stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME) -> Application:
    """Return the application of a server plan. `stages`: stage name -> class that implements it."""
    settings = server.settings
    outputs = OutputFolder(settings.data)
    if outputs.storage.local is not None:
        # Prompts and photos of clients. Files of shots keep the modes of a batch run: the folder shuts other users out.
        private_folder(outputs.storage.local)
    outputs.prepare()
    config = EngineConfig(
        name=APP,
        profile=server.serving_profile.profile,
        planned_s=server.reference_s,
        outputs=outputs,
        stages={stage.name: stages[stage.name] for stage in server.serving_profile.stages if stage.name in stages},
        # Streamed images are read from the cache while a job runs, and lost artefacts are taken from it.
        cache=CacheSettings("all", wait=True),
    )
    make_plan = partial(plan_for, server.serving_profile, shots_at_once=settings.shots_at_once)
    # Passed to the replicas, which may run on another machine without the keys file. Without keys they would require none.
    keys = load_keys(settings.keys_file, settings.limits)
    director = director_application(config, settings, server.layout, keys, server.labels, server.stage_seconds, make_plan)
    return serve.deployment(
        serve.ingress()(Api),
        name=API,
        num_replicas=1,
        ray_actor_options={"num_cpus": API_CPUS},
        max_ongoing_requests=API_REQUESTS + MAX_STREAMS,
        **HEALTH,
    ).bind(settings, server.serving_profile, outputs, keys, director)


def director_application(
    config: EngineConfig,
    settings: OnlineSettings,
    layout: Layout,
    keys: ApiKeys,
    labels: Sequence[Label | None],
    stage_seconds: Mapping[str, float] | None = None,
    make_plan: Callable[[Cluster], Plan] | None = None,
) -> Application:
    """Return the application of the director and the deployment that it calls.

    `labels`, `stage_seconds`, `make_plan`: see `Workers`.
    """
    workers = serve.deployment(
        Workers, name=WORKERS, num_replicas=1, ray_actor_options={"num_cpus": WORKERS_CPUS}, **HEALTH
    ).bind(config, layout, labels, stage_seconds, make_plan)
    return serve.deployment(
        JobDirector,
        name=DIRECTOR,
        num_replicas=1,
        ray_actor_options={"num_cpus": DIRECTOR_CPUS},
        max_ongoing_requests=MAX_DIRECTOR_CALLS,
        **HEALTH,
    ).bind(config, settings, layout, keys, workers)


class Api:
    """HTTP API replica. It stores new jobs and then wakes the director."""

    def __init__(
        self, settings: OnlineSettings, serving_profile: ServingProfile, outputs: OutputFolder, keys: ApiKeys, director: Any
    ) -> None:
        self._settings = settings
        self._serving_profile = serving_profile
        self._outputs = outputs
        self._keys = keys
        self._director = director

    def __serve_build_asgi_app__(self) -> Any:
        store = open_store(self._settings)
        director = DirectorClient(self._director)
        app = make_app(
            self._settings,
            store,
            self._outputs,
            self._serving_profile,
            self._keys,
            jobs_changed=director.wake,
            missing=director.missing,
        )
        app.add_middleware(DisconnectedClients)
        return app


class DisconnectedClients:
    """Middleware that receives `http.disconnect` also if Ray Serve's proxy has cancelled the call that waits for it.

    Without it, a third of the event streams that clients close are logged as errors with a traceback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_disconnect() -> Message:
            try:
                return await receive()
            except ray.exceptions.TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_disconnect, send)


class DirectorClient:
    """Client of the director. Use it inside an event loop."""

    def __init__(self, director: Any) -> None:
        self._director = director
        self._call: asyncio.Task[None] | None = None
        self._awake_until = 0.0

    def wake(self) -> None:
        """Wake the director for new jobs or cancel requests, if it is not awake.

        One call at a time: none pile up while the director is down.
        """
        if time.monotonic() >= self._awake_until and (self._call is None or self._call.done()):
            self._call = asyncio.ensure_future(self._wake())

    async def _wake(self) -> None:
        sent = time.monotonic()
        # A restarted director polls the store anyway.
        with suppress(ray.exceptions.RayError, RayServeException):
            await self._director.wake.remote()
            self._awake_until = sent + AWAKE_S / 2

    async def missing(self) -> str | None:
        """Return what the server lacks to run jobs. `None` if nothing is missing."""
        try:
            missing: str | None = await asyncio.wait_for(self._director.missing.remote(), DIRECTOR_TIMEOUT_S)
        except (TimeoutError, ray.exceptions.RayError, RayServeException):
            return "the director does not respond; it starts again by itself"
        return missing
