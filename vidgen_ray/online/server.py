"""A server from its start to its end, on the Ray that this process is connected to. Says nothing to anybody itself."""

from __future__ import annotations

import logging
import re
import socket
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
from ray.serve.schema import ApplicationStatus, LoggingConfig

from vidgen_ray.engine.ray_cluster import muted_stderr
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.application import APP, ServerPlan, application
from vidgen_ray.online.deployments import DIRECTOR
from vidgen_ray.stages.base import Stage

LOOK_S = 0.2
ASK_S = 2.0
STARTS = 3
DRAIN_MARGIN_S = 30.0
"""Beside the time of grace, for the director to put away what is left."""
OURS = "vidgen_ray.errors."
"""How the line of a traceback begins that says what a person can mend."""
ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit): ")


class Server:
    """A server that has been started."""

    def __init__(self, of: ServerPlan) -> None:
        self._of = of

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        host, port = self._of.settings.host, self._of.settings.port
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def wait_until_it_answers(self, stop: threading.Event) -> None:
        """Jobs are accepted from then on, whether or not models are loaded. Raises SetupError where it will never be."""
        while not stop.is_set():
            self._expect_no_failure()
            with suppress(OSError, URLError), urlopen(f"{self._local_url}/healthz", timeout=ASK_S) as answer:
                if answer.status == 200:
                    return
            stop.wait(LOOK_S)

    def wait_until_it_renders(self, stop: threading.Event, told: Callable[[str], None] = lambda _: None) -> None:
        """Until every replica has its weights. `told` hears, once each, why that takes long.

        Raises SetupError where a replica cannot load its weights.
        """
        said: set[str] = set()
        while not stop.is_set() and self._expect_no_failure() != ApplicationStatus.RUNNING:
            for deployment in serve.status().applications[APP].deployments.values():
                if deployment.message and (why := _reason(deployment.message)) not in said:
                    said.add(why)
                    told(why)
            stop.wait(LOOK_S)

    def drain(self, grace_s: float) -> int:
        """Begin no more jobs, and give those in progress so many seconds. How many were queued again."""
        director = serve.get_deployment_handle(DIRECTOR, APP)
        try:
            return int(director.drain.remote(grace_s).result(timeout_s=grace_s + DRAIN_MARGIN_S))
        # Whatever it has in hand goes back into the queue by itself, when its lease runs out.
        except (TimeoutError, RayServeException, ray.exceptions.RayError):
            return 0

    def expect_to_run(self) -> None:
        """Raises SetupError where Serve or its Ray is gone."""
        try:
            serve.status()
        except Exception as error:
            raise SetupError(f"the server's Ray is gone: {str(error).strip().splitlines()[0]}") from None

    @property
    def _local_url(self) -> str:
        host, port = self._of.settings.host, self._of.settings.port
        reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{reached}:{port}"

    def _expect_no_failure(self) -> ApplicationStatus:
        app = serve.status().applications[APP]
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
            raise SetupError(_reason("\n".join(messages)))
        return app.status


@contextmanager
def serving(of: ServerPlan, stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME) -> Iterator[Server]:
    """Start a server; it ends with the block, whatever it has in hand."""
    # What goes wrong is told once, by us.
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        _start_serve(HTTPOptions(host=of.settings.host, port=of.settings.port), quiet)
        target = serve.RunTarget(application(of, stages), name=APP, route_prefix="/", logging_config=quiet)
        serve.run_many([target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)
        yield Server(of)
    finally:
        # Ray tells of calls to Serve's controller that are lost with it.
        with muted_stderr():
            serve.shutdown()


def _start_serve(http: HTTPOptions, logs: LoggingConfig) -> None:
    """Raises SetupError where its HTTP proxy does not come up."""
    for _ in range(STARTS):
        # Of a proxy that is slow to start Serve thinks that it is dead, and puts another in its place, which nobody waits for.
        with suppress(ray.exceptions.RayActorError, TimeoutError):
            serve.start(http_options=http, logging_config=logs)
            return
    raise SetupError("Serve's HTTP proxy does not start; this machine may be too busy")


def check_port(host: str, port: int) -> None:
    """Raises SetupError where something else listens there, or nobody can: Serve itself would try again for ever."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: a port of a server that has just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SetupError(
                f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --port"
            ) from None


def wait_for(stop: threading.Event, server: Server, look_s: float = 5.0) -> None:
    """Until told to stop. Raises SetupError where the server is gone before that."""
    while not stop.wait(look_s):
        server.expect_to_run()


def _reason(messages: str) -> str:
    """What of Serve's account, which holds a traceback, a person can mend; else the error, else its first line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    if ours := [line.partition(": ")[2] for line in lines if line.startswith(OURS)]:
        return ours[-1]
    errors = [line for line in lines if ERROR.match(line)]
    return [*lines, "Serve could not start it, and does not say why"][0] if not errors else errors[-1]
