"""Start, monitor and stop a server on one machine: its API, its director and the owner of its workers are Ray actors."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidgen_ray.engine.ray_cluster import muted_stderr
from vidgen_ray.errors import SetupError, VidgenError, first_line
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.recent_warnings import RecentWarnings
from vidgen_ray.online.server_plan import API, DIRECTOR, WORKERS, ServerPlan, parts_of
from vidgen_ray.stages.base import Stage

log = logging.getLogger(__name__)

_CHECK_S = 2.0
"""Seconds between two health checks of a process."""
MAX_SILENT_CHECKS = 30
"""Health checks after which a process without a response is killed."""
START_POLL_S = 0.1
DRAIN_MARGIN_S = 30.0
"""Seconds in addition to the grace period, in which the director requeues unfinished jobs."""
_STOP_S = 5.0
"""Seconds that the API may take to end its requests, and workers to write their queued cache entries."""


class ServerProcess:
    """Ray actor with one part of a server. It imports only what this part needs.

    If the part cannot be made, each call raises the reason, for Ray starts only processes again that have crashed.
    """

    def __init__(self, path: str, arguments: Sequence[Any]) -> None:
        """`path`: MODULE:CLASS of the part."""
        module, _, name = path.partition(":")
        self._error: Exception | None = None
        self._warnings = RecentWarnings()
        try:
            part = getattr(import_module(module), name)
            self._warnings.install()
            self._part = part(*arguments)
        except Exception as error:
            self._error = error

    async def call(self, method: str, *arguments: Any) -> Any:
        if self._error is not None:
            raise self._error
        return await getattr(self._part, method)(*arguments)

    async def look(self) -> list[str]:
        """Return the warnings since the last look. Raises what `check_health` of the part does."""
        await self.call("check_health")
        return self._warnings.take()


class Handle:
    """Handle of a process, with the calls of a handle of Ray Serve: `handle.method.remote(...)`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)
        return SimpleNamespace(remote=partial(self.actor.call.remote, method))


class Watched:
    """A process of the server, which is started again when it crashes, is unhealthy or hangs."""

    def __init__(self, name: str, path: str, *arguments: Any) -> None:
        # On this machine, which has the port and the database. `vidgen serve` on a cluster may run on a node without CPUs for
        # Ray, so the process reserves none.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(type(name, (ServerProcess,), {}))
        self.name = name
        # Kept: Ray reads it again when it starts the process again.
        self._arguments = ray.put(arguments)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        self.handle = Handle(actor.options(**options).remote(path, self._arguments))
        self.is_up = self._is_healthy = False
        """It has been healthy before."""
        self._check = self.handle.actor.look.remote()
        self._silent = 0

    def look(self) -> None:
        """Take the result of the last health check, and send the next one.

        Raises the error of a part that cannot be made when the server starts.
        """
        if not ray.wait([self._check], timeout=0)[0]:
            # A start may take minutes on a busy machine.
            self._silent += self._is_healthy
            if self._silent > MAX_SILENT_CHECKS:
                self._restart("it does not respond")
            return
        try:
            for warning in ray.get(self._check):
                log.warning("%s: %s", self.name, warning)
            self.is_up = self._is_healthy = True
        except ray.exceptions.RayTaskError as error:
            if not self.is_up:
                raise _user_error(self.name, error) from None
            self._restart(first_line(error.cause))
        # Ray starts it again.
        except ray.exceptions.RayError:
            if self._is_healthy:
                log.warning("%s has crashed and is started again", self.name)
            self._is_healthy = False
        self._check, self._silent = self.handle.actor.look.remote(), 0

    def _restart(self, reason: str) -> None:
        log.warning("%s is started again: %s", self.name, reason)
        ray.kill(self.handle.actor, no_restart=False)
        self._is_healthy, self._silent = False, 0


def _user_error(name: str, error: ray.exceptions.RayTaskError) -> Exception:
    cause: Exception = error.cause
    return cause if isinstance(cause, VidgenError) else SetupError(f"{name} does not start: {type(cause).__name__}: {cause}")


class Server:
    """A running server."""

    def __init__(self, plan: ServerPlan, port: str, stages: Mapping[str, type[Stage[Any]]]) -> None:
        """`port`: see `listening_socket`."""
        parts = parts_of(plan, stages)
        self._settings = plan.settings
        # Loading models takes longest.
        self._workers = Watched(WORKERS, "vidgen_ray.online.workers:Workers", *parts.workers)
        director = (*parts.director, self._workers.handle)
        self._director = Watched(DIRECTOR, "vidgen_ray.online.job_director:JobDirector", *director)
        self._api = Watched(API, "vidgen_ray.online.api_process:HttpApi", port, *parts.api, self._director.handle)

    @property
    def url(self) -> str:
        """URL with the configured host."""
        host, port = self._settings.host, self._settings.port
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def director(self) -> Handle:
        return self._director.handle

    def wait_until_accepting(self, stop: threading.Event) -> None:
        """Wait until the API accepts jobs. Models may still be loading. Raises SetupError if the server cannot start."""
        while not stop.wait(START_POLL_S) and not (self._api.is_up and self._director.is_up):
            self._api.look()
            self._director.look()

    def wait_until_ready(self, stop: threading.Event, on_message: Callable[[str], None] = lambda _: None) -> None:
        """Wait until every stage has a worker with loaded weights. `on_message` gets each reason for a delay once.

        Raises SetupError if no worker can load the weights of a stage.
        """
        reported: set[str | None] = {None}
        while not stop.is_set():
            try:
                is_ready, reason = ray.get(self._workers.handle.start_state.remote())
            except ray.exceptions.RayTaskError as error:
                raise _user_error(WORKERS, error) from None
            except ray.exceptions.RayError:
                is_ready, reason = False, None
            if is_ready:
                return
            if reason not in reported:
                reported.add(reason)
                on_message(reason)
            stop.wait(START_POLL_S)

    def wait(self, stop: threading.Event) -> None:
        """Start processes again that crash or hang, until `stop` is set."""
        while not stop.wait(_CHECK_S):
            for process in (self._api, self._director, self._workers):
                process.look()

    def drain(self, grace_s: float) -> int:
        """Start no more jobs, and give running ones `grace_s` seconds. Return how many were queued again."""
        try:
            return int(ray.get(self.director.drain.remote(grace_s), timeout=grace_s + DRAIN_MARGIN_S))
        # Its running jobs are queued again when their claims expire.
        except (TimeoutError, ray.exceptions.RayError):
            return 0

    def stop(self) -> None:
        """End the processes, without waiting for running jobs."""
        with suppress(ray.exceptions.RayError, TimeoutError):
            # Killed while it starts workers, their owner would leave their reserved GPUs behind on a cluster.
            ray.get([process.handle.stop.remote() for process in (self._api, self._workers)], timeout=_STOP_S)
        for process in (self._api, self._director, self._workers):
            ray.kill(process.handle.actor)


@contextmanager
def serving(
    plan: ServerPlan, listening: socket.socket, stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME
) -> Iterator[Server]:
    """Start a server, and stop it when the block ends, without waiting for running jobs.

    `listening`: its port. This process has it, too, so that clients wait while the API starts again. `stages`: stage name ->
    class that implements it.
    """
    with _shared(listening) as port:
        server = Server(plan, port, stages)
        try:
            yield server
        finally:
            # Ray prints errors about pending calls.
            with muted_stderr():
                server.stop()


@contextmanager
def _shared(listening: socket.socket) -> Iterator[str]:
    """Give the socket to each process that connects to the Unix socket whose path is yielded."""
    with TemporaryDirectory(prefix="vidgen-") as folder, socket.socket(socket.AF_UNIX) as shared:
        path = str(Path(folder, "port"))
        shared.bind(path)
        shared.listen()

        def send() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, _ = shared.accept()
                    with connection, suppress(OSError):
                        socket.send_fds(connection, [b"s"], [listening.fileno()])

        threading.Thread(target=send, daemon=True).start()
        yield path
        shared.shutdown(socket.SHUT_RDWR)
