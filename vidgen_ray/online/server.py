"""Start, monitor and stop a server on the connected Ray. Prints nothing."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig, ServeStatus

from vidgen_ray.engine.ray_cluster import SHUTDOWN_S, muted_stderr, within
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.application import APP, DIRECTOR, ServerPlan, application
from vidgen_ray.stages.base import Stage

POLL_S = 0.2
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

    def check_running(self) -> None:
        """Raise SetupError if Serve or its Ray is gone."""
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


def wait_for(stop: threading.Event, server: Server, poll_s: float = 5.0) -> None:
    """Wait until `stop` is set. Raises SetupError if the server is gone before."""
    while not stop.wait(poll_s):
        server.check_running()


def _reason(messages: str) -> str:
    """Return the cause from a Serve error message: the vidgen error, else the last error line, else the first line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    if vidgen_errors := [line.partition(": ")[2] for line in lines if line.startswith(VIDGEN_ERROR_PREFIX)]:
        return vidgen_errors[-1]
    errors = [line for line in lines if ERROR.match(line)]
    return [*lines, "Ray Serve failed to start the application and gave no reason"][0] if not errors else errors[-1]
