"""Ray Serve application: the API, the director, and the owner of the workers and encoders; start, monitor and stop it.

Serve configs use `vidgen_ray.online.application:build` as their import path.
"""

# Not `from __future__ import annotations`: Serve reads the annotation of `build` to convert the args of a config to settings.

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig, ServeStatus
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.fleet import labels_of
from vidgen_ray.engine.ray_cluster import LOOPBACK, SHUTDOWN_S, live_cluster, muted_stderr, requires_token, within
from vidgen_ray.engine.ray_internals import serve_http_config
from vidgen_ray.engine.trials import run_trials
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online import HeapTrim
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
from vidgen_ray.render.cache_writer import CacheSettings
from vidgen_ray.stages.base import Stage
from vidgen_ray.system.files import private_folder

log = logging.getLogger(__name__)

APP = "vidgen"
API = "Api"
API_CPUS = 0.25
HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
DIRECTOR_TIMEOUT_S = 2.0
"""Seconds that the director may take to say what is missing."""
API_REQUESTS = 1_000
"""Concurrent requests per replica, without event streams, and those that wait for it in each proxy. Others get 503."""
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
    if os.environ.get(HA_PROXY) == "1":
        raise SetupError(
            f"{HA_PROXY}=1: HAProxy's metrics and statistics listen on all interfaces, without a key. "
            f"Run `unset {HA_PROXY}`, and start Ray again."
        )
    keys = load_keys(settings.keys_file, settings.limits)
    token_is_required = requires_token()
    if not token_is_required:
        log.warning("Ray requires no token: anyone who reaches one of its ports can run code. Set RAY_AUTH_MODE=token.")
    running = serve_http_config()
    for host in {settings.host, *([] if running is None else [running.host or LOOPBACK])}:
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
        max_queued_requests=API_REQUESTS,
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
        app.add_middleware(HeapTrim)
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


POLL_S = 0.2
CHECK_S = 5.0
HEALTH_TIMEOUT_S = 2.0
RESPONSE_S = 60.0
"""Seconds without a response of Ray after which the server ends."""
START_ATTEMPTS = 3
DRAIN_MARGIN_S = 30.0
"""Seconds in addition to the grace period, in which the director requeues unfinished jobs."""
VIDGEN_ERROR_PREFIX = "vidgen_ray.errors."
"""Start of the traceback line of an error that the user can fix."""
ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit): ")


class Server:
    """A running server."""

    def __init__(self, plan: ServerPlan) -> None:
        self._plan = plan

    @property
    def url(self) -> str:
        """URL with the configured host."""
        host, port = self._plan.settings.host, self._plan.settings.port
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def wait_until_accepting(self, stop: threading.Event) -> None:
        """Wait until the API accepts jobs. Models may still be loading. Raises SetupError if the server cannot start."""
        while not stop.is_set():
            self._check_deployed()
            with suppress(OSError, URLError), urlopen(f"{self._local_url}/healthz", timeout=HEALTH_TIMEOUT_S) as response:
                if response.status == 200:
                    return
            stop.wait(POLL_S)

    def wait_until_ready(self, stop: threading.Event, on_message: Callable[[str], None] = lambda _: None) -> None:
        """Wait until every stage has a worker with loaded weights. `on_message` gets each reason for a delay once.

        Raises SetupError if no worker can load the weights of a stage.
        """
        reported: set[str] = set()
        while not stop.is_set() and self._check_deployed() != ApplicationStatus.RUNNING:
            for deployment in _status().applications[APP].deployments.values():
                if deployment.message and (reason := _reason(deployment.message)) not in reported:
                    reported.add(reason)
                    on_message(reason)
            stop.wait(POLL_S)

    def drain(self, grace_s: float) -> int:
        """Start no more jobs, and give running ones `grace_s` seconds. Return how many were queued again."""
        director = serve.get_deployment_handle(DIRECTOR, APP)
        try:
            return int(director.drain.remote(grace_s).result(timeout_s=grace_s + DRAIN_MARGIN_S))
        # Its running jobs are queued again when their leases expire.
        except (TimeoutError, RayServeException, ray.exceptions.RayError):
            return 0

    def wait(self, stop: threading.Event) -> None:
        """Wait until `stop` is set. Raises SetupError if Serve or its Ray is gone before."""
        while not stop.wait(CHECK_S):
            try:
                _status()
            except SetupError:
                raise
            except Exception as error:
                raise SetupError(f"lost connection to Ray: {str(error).strip().splitlines()[0]}") from None

    @property
    def _local_url(self) -> str:
        host, port = self._plan.settings.host, self._plan.settings.port
        reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{reached}:{port}"

    def _check_deployed(self) -> ApplicationStatus:
        app = _status().applications[APP]
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
            raise SetupError(_reason("\n".join(messages)))
        return app.status


@contextmanager
def serving(plan: ServerPlan, stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME) -> Iterator[Server]:
    """Start a server, and stop it when the block ends, without waiting for running jobs."""
    # Errors are reported by vidgen itself.
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        _start_serve(HTTPOptions(host=plan.settings.host, port=plan.settings.port), quiet)
        target = serve.RunTarget(application(plan, stages), name=APP, route_prefix="/", logging_config=quiet)
        serve.run_many([target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)
        yield Server(plan)
    finally:
        # Ray prints errors about pending calls to the Serve controller.
        with muted_stderr(), suppress(SetupError):
            within(SHUTDOWN_S, serve.shutdown)


def _status() -> ServeStatus:
    return within(RESPONSE_S, serve.status)


def _start_serve(http: HTTPOptions, logs: LoggingConfig) -> None:
    """Start Serve. Raises SetupError if its HTTP proxy does not start."""
    for _ in range(START_ATTEMPTS):
        # Serve replaces a proxy that starts slowly, but waits for the first one only.
        with suppress(ray.exceptions.RayActorError, TimeoutError):
            serve.start(http_options=http, logging_config=logs)
            return
    raise SetupError("The HTTP proxy of Ray Serve does not start. The machine may be overloaded.")


def _reason(messages: str) -> str:
    """Return the cause from a Serve error message: the vidgen error, else the last error line, else the first line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    if vidgen_errors := [line.partition(": ")[2] for line in lines if line.startswith(VIDGEN_ERROR_PREFIX)]:
        return vidgen_errors[-1]
    errors = [line for line in lines if ERROR.match(line)]
    return [*lines, "Ray Serve failed to start the application and gave no reason"][0] if not errors else errors[-1]
