"""Private names of Ray. The project uses no others.

They may change with every minor version of Ray, so `pyproject.toml` allows only the one whose names are tested.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast
from unittest.mock import patch

import grpc
import ray
from ray._private import node as node_module
from ray._private import parameter, ray_constants, services, state, utils
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.experimental import internal_kv

START_TIMEOUT = "timed out during startup"
"""Text in Ray's error when its processes do not start within 30 s."""
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""Parameters of Ray for the ports of its agents."""
_AGENTS = (ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT)
NODE_POLL_S, NODE_WAIT_S = 0.02, 10.0
"""Seconds between two looks whether the node has started, and until Ray waits for it in its own way."""


_START_LATER = """
import os, sys, time
raylet, start_s = int(os.environ["RAY_RAYLET_PID"]), time.monotonic() + float(sys.argv[1])
while time.monotonic() < start_s and os.getppid() == raylet:
    time.sleep(0.2)
if os.getppid() == raylet:
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Program that starts a command after some seconds, unless the raylet, its parent process, has ended."""


@contextmanager
def keep_loopback_address() -> Iterator[None]:
    """Let `ray.init` use the loopback address as the address of the node, as it does on macOS and Windows.

    On Linux it replaces that address by the one of a network interface, and most of its ports then listen on all interfaces.
    """
    with patch.object(services, "resolve_ip_for_localhost", lambda host: host):
        yield


@contextmanager
def only_needed_services(*, log_to_driver: bool, ports: Mapping[str, int], agent_delay_s: float = 0.0) -> Iterator[None]:
    """Let `ray.init` start neither a server for the dashboard nor an autoscaler, and its agents after `agent_delay_s`.

    Ray starts both even without a dashboard and for one machine, waits for the server, then waits until its agents have chosen
    their ports. It asks once a second whether its node has started, and imports packages of the dashboard to see whether it has
    them. `ports`: that of each of `AGENT_PORTS`. `log_to_driver`: start the monitor of log files, which only the output of
    workers needs. The agents take 1.6 CPU seconds to start, and only metrics and runtime environments need them. Counts that a
    process reports before that are lost; by default, it first reports after 10 s. Runtime environments wait for it.
    """
    make_params, get_node, start_process = parameter.RayParams, services.get_node, services.start_ray_process
    python_command = services._build_python_executable_command_memory_profileable
    fixed: dict[str, Any] = {"no_monitor": True, "include_log_monitor": log_to_driver, **ports}

    def make_params_without_services(**params: Any) -> parameter.RayParams:
        given = {name: value for name, value in params.items() if value is not None}
        return make_params(**{**params, **fixed, **given})

    def get_started_node(gcs_address: str, node_id: str) -> Any:
        client, deadline_s = GcsClient(address=gcs_address), time.monotonic() + NODE_WAIT_S
        with suppress(ray.exceptions.RayError):  # no response
            while all(node.hex() != node_id for node in client.get_all_node_info(timeout=NODE_WAIT_S)):
                if time.monotonic() > deadline_s:
                    break
                time.sleep(NODE_POLL_S)
        return get_node(gcs_address, node_id)

    def start_with_port(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:
        # Without this flag, which Ray does not pass, the raylet waits until the agent has written the port to a file.
        port = [f"--dashboard_agent_listen_port={fixed['dashboard_agent_listen_port']}"]
        is_raylet = process_type == ray_constants.PROCESS_TYPE_RAYLET
        return start_process([*command, *port] if is_raylet else command, process_type, *args, **options)

    def delayed_command(component: str, *args: Any, **options: Any) -> list[str]:
        later = [sys.executable, "-ISc", _START_LATER, str(agent_delay_s)]
        return [*(later if agent_delay_s and component in _AGENTS else ()), *python_command(component, *args, **options)]

    with (
        patch.object(services, "_build_python_executable_command_memory_profileable", delayed_command),
        patch.object(services, "start_ray_process", start_with_port),
        patch.object(parameter, "RayParams", make_params_without_services),
        patch.object(node_module.Node, "start_api_server", lambda self, **_: None),
        patch.object(services, "get_node", get_started_node),
        patch.object(utils, "get_dashboard_dependency_error", lambda: None),
    ):
        yield


def actor_table() -> dict[str, dict[str, Any]]:
    """Return actor id -> its entry, of all actors of the connected Ray."""
    return cast(dict[str, dict[str, Any]], state.actors())


def actor_entry(actor: Any) -> dict[str, Any]:
    """Return the entry of one actor, by its handle. Empty if Ray does not know it."""
    return cast(dict[str, Any], state.actors(actor._actor_id.hex()))


def free_resources() -> dict[str, dict[str, float]]:
    """Return node id -> resources that nothing has reserved, by their names."""
    return cast(dict[str, dict[str, float]], state.available_resources_per_node())


def started_address() -> str | None:
    """Return the address of the Ray that `ray start` has started on this machine, HOST:PORT. `None` without one."""
    return cast(str | None, services.find_bootstrap_address(None))


def call_without_token(address: str, timeout_s: float) -> grpc.StatusCode:
    """Call the control service of the Ray at `address` (HOST:PORT) without its token, and return the status of the answer."""
    with grpc.insecure_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def dashboard_url() -> str | None:
    """Return the URL of the dashboard of the connected Ray. `None` if it has none."""
    found = internal_kv._internal_kv_get(ray_constants.DASHBOARD_ADDRESS, namespace=ray_constants.KV_NAMESPACE_DASHBOARD)
    return f"http://{found.decode()}" if found else None


def task_attempt() -> int:
    """Return how often the task that this process executes was started before."""
    return int(ray._private.worker.global_worker.core_worker.get_current_task_attempt_number())


def submission_id() -> str | None:
    """Return the submission id if this process is the driver of a Ray job."""
    with suppress(KeyError, ValueError, TypeError):
        return str(json.loads(os.environ[RAY_JOB_CONFIG_JSON_ENV_VAR])["metadata"]["job_submission_id"])
    return None


def serve_http_config() -> Any:
    """Return the HTTP options of the running Ray Serve. `None` if none runs."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config
