"""Connect to Ray: to the one already connected, one at an address, or a new local one.

Describe its nodes, and download weights on them.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import grpc
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidgen_ray.engine.ray_internals import (
    AGENT_PORTS,
    START_TIMEOUT,
    actor_entry,
    call_without_token,
    free_resources,
    keep_loopback_address,
    only_needed_services,
)
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.planner.choose_layout import Plan
from vidgen_ray.planner.cluster import GB, Cluster, Label, Node
from vidgen_ray.system.threads import in_daemon_thread
from vidgen_ray.weights.download import Hub, PullResult, pull_all

GPU_TYPE_LABEL, NODE_ID_LABEL = "ray.io/accelerator-type", "ray.io/node-id"
"""Labels that Ray sets on its nodes."""
START_ATTEMPTS = 3
CONNECT_TIMEOUT_S = 10
LOOPBACK = "127.0.0.1"
AGENT_PORT_RANGE = (20_000, 32_768)
"""Above the default ports of Ray's workers, below the ports that Linux gives to outgoing connections."""
GPU_QUERY_TIMEOUT_S = 120
AGENT_DELAY_S = 15.0
"""Seconds until the agents of a local Ray for a run start. Short runs need none, long ones load their models meanwhile."""
SHUTDOWN_S = 30.0
"""Seconds after which the process ends although Ray does not."""
CLUSTER_CONNECT_S = 600.0
"""Seconds after which the process ends if a cluster does not accept it: no worker of its node starts."""
SAVE_S = 10.0
"""Seconds in which results are saved if Ray is lost. Ray itself ends the process 15 s after this module notices."""
LOCAL_SETTINGS = {
    # `ray.init` would wait for the first workers, without end if they need longer than the next setting allows.
    "RAY_prestart_worker_first_driver": "0",
    # Seconds in which a worker must start. Ray's default, 60, does not suffice if Python is on a slow disk.
    "RAY_worker_register_timeout_seconds": "180",
}
"""Environment variables of a local Ray, unless the user has set them."""

HEAD_TIMEOUT_S, HEAD_SHARE = 60, 0.75
"""Seconds after which Ray ends a process that does not reach the head process, and the share of them after which we do."""

_T = TypeVar("_T")


@contextmanager
def connected(
    address: str | None,
    cpus: float,
    *,
    agent_delay_s: float = AGENT_DELAY_S,
    on_lost: Callable[[str], object] = lambda _: None,
) -> Iterator[None]:
    """Connect to Ray while the block runs: to `address`, or to a new local Ray with at least `cpus` CPUs.

    If this process is already connected, keep that connection. `agent_delay_s`: see `only_needed_services`.
    If Ray is lost, this process ends with exit code 4, without leaving the block: calls of Ray wait forever. Before that,
    `on_lost` is called in another thread with the reason, for up to `SAVE_S`.
    """
    if ray.is_initialized():
        yield
        return
    _start_ray(address, cpus, agent_delay_s)
    ended, exiting = threading.Event(), threading.Lock()
    threading.Thread(target=_exit_without_ray, args=(ended, exiting, on_lost), daemon=True).start()
    try:
        yield
    finally:
        # Waits forever if the process is about to end.
        with exiting:
            ended.set()
        # Hide the errors of messages to processes that are shutting down.
        with muted_stderr(), suppress(SetupError):
            within(SHUTDOWN_S, ray.shutdown)


def _exit_without_ray(ended: threading.Event, exiting: threading.Lock, on_lost: Callable[[str], object]) -> None:
    """End this process if Ray's head process is not reached for too long, or Ray's process of this machine has ended.

    Ray would do the first itself, with another exit code. After the second, its calls wait forever, `ray.shutdown` too.
    """
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    this_node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    limit_s = HEAD_SHARE * float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", HEAD_TIMEOUT_S))  # noqa: SIM112  # Ray's name
    reached = time.monotonic()
    while not ended.wait(limit_s / 10):
        lost = None
        with suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), limit_s / 10).close()
            reached = time.monotonic()
        if time.monotonic() - reached > limit_s:
            lost = f"no response of its head node for {limit_s:g} s"
        try:
            socket.create_connection((this_node["NodeManagerAddress"], this_node["NodeManagerPort"]), limit_s / 10).close()
        except ConnectionRefusedError:
            lost = "its process of this machine (raylet) has ended"
        except OSError:
            pass  # it may be suspended
        if lost is None:
            continue
        with exiting:
            if not ended.is_set():
                _end_process(f"lost connection to Ray: {lost}. Run the same command again", on_lost)


def _end_process(message: str, save: Callable[[str], object] = lambda _: None) -> None:
    """End this process with a message, after `save` was called with it. Nothing else of the process is waited for."""
    # The storage may hang, the terminal may be closed.
    with suppress(Exception):
        within(SAVE_S, lambda: save(message))
    with suppress(Exception):
        sys.stderr.write(f"vidgen: {message}\n")
        sys.stderr.flush()
    os._exit(SetupError.exit_code)


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """Return the result of a call of Ray that waits forever if Ray is gone. Raises SetupError after `seconds`."""
    try:
        return in_daemon_thread(call).result(seconds)
    except concurrent.futures.TimeoutError:
        raise SetupError(f"lost connection to Ray: no response for {seconds:g} s") from None


def expect_gpus(count: int) -> None:
    """Raise SetupError if the local Ray has fewer GPUs. Otherwise the run would wait for them forever."""
    available = int(ray.cluster_resources().get("GPU", 0))
    if available < count:
        raise SetupError(
            f"the plan needs {count} GPUs, this machine has {available}. "
            "Use a cluster with --address, or leave out --gpus to detect the GPUs."
        )


class LiveCluster(NamedTuple):
    """Nodes of the connected Ray."""

    total: Cluster
    free: Cluster
    """The same nodes with the GPUs, CPUs and memory that no actor or task has reserved."""

    def plan(self, make_plan: Callable[[Cluster], Plan]) -> tuple[Plan, Cluster]:
        """Return a plan for the free resources, or for the whole cluster if they do not suffice, and the cluster planned for.

        In the second case the run waits until others end. Raises what `make_plan` raises for the whole cluster.
        """
        if self.free != self.total:
            with suppress(SetupError, ProfileError):
                return make_plan(self.free), self.free
        return make_plan(self.total), self.total


def live_cluster() -> LiveCluster:
    """Return the nodes of the connected Ray. Each node reports the memory of its GPUs itself, once per process.

    Raises SetupError if a node does not report it.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    _query_gpus([node["NodeID"] for node in alive if node["Resources"].get("GPU", 0) >= 1])
    available = free_resources()
    total = [_node(node, node["Resources"]) for node in alive]
    # A node that is missing has just joined or died.
    free = [_node(node, available.get(node["NodeID"], {})) for node in alive]
    labels = list(_labels(alive, total))
    return LiveCluster(*(Cluster(tuple(map(_labelled, nodes, labels))) for nodes in (total, free)))


def process_of(actor: Any) -> tuple[str, int] | None:
    """Return the node id and the port of the actor's process, which may still start. `None` if it has none. Blocks."""
    entry = actor_entry(actor)
    has_process = bool(entry) and entry["State"] != "DEAD" and entry["Address"]["Port"]
    return (entry["Address"]["NodeID"], entry["Address"]["Port"]) if has_process else None


def _labelled(node: Node, label: Label) -> Node:
    return replace(node, label=label)


_gpus_of_nodes: dict[str, tuple[tuple[str, float | None], ...]] = {}
"""Node id -> name and GB of memory of each GPU, `None` if it is unified. Node ids are never used again."""


def _query_gpus(nodes: Sequence[str]) -> None:
    """Ask the nodes that have not been asked before for their GPUs."""
    query = ray.remote(num_cpus=0)(_gpus)
    queries = {
        node: query.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
        if node not in _gpus_of_nodes
    }
    try:
        sizes = ray.get(list(queries.values()), timeout=GPU_QUERY_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise SetupError(
            f"the GPU nodes of the cluster did not respond within {GPU_QUERY_TIMEOUT_S} s. "
            "Name the GPUs with --gpus, e.g. 8x80GB."
        ) from None
    _gpus_of_nodes.update(zip(queries, sizes, strict=True))


def _labels(alive: Sequence[dict[str, Any]], nodes: Sequence[Node]) -> Iterator[Label]:
    """Yield for each node a label that selects nodes with the same GPUs.

    That is the GPU type if it determines the GPU size, so that a replacement node matches as well. Otherwise it is the node id.
    """
    gpu_types = [node.get("Labels", {}).get(GPU_TYPE_LABEL) for node in alive]
    sizes: defaultdict[str | None, set[int]] = defaultdict(set)
    for gpu_type, node in zip(gpu_types, nodes, strict=True):
        sizes[gpu_type] |= node.sizes_gb
    for gpu_type, ray_node in zip(gpu_types, alive, strict=True):
        yield (GPU_TYPE_LABEL, gpu_type) if gpu_type and len(sizes[gpu_type]) == 1 else (NODE_ID_LABEL, ray_node["NodeID"])


def _node(node: dict[str, Any], resources: Mapping[str, float]) -> Node:
    """Return the node with these of its resources. Part of a GPU counts as none."""
    gpus = int(resources.get("GPU", 0))
    found = _gpus_of_nodes.get(node["NodeID"], ())
    if gpus > len(found):
        raise SetupError(
            f"node {node['NodeManagerAddress']}: Ray has {gpus} GPUs, nvidia-smi shows {len(found)}. "
            "Name the GPUs with --gpus, e.g. 8x80GB."
        )
    return Node.of_gpus(found[:gpus], resources.get("CPU", 0.0), resources.get("memory", 0.0) / GB)


def _gpus() -> tuple[tuple[str, float | None], ...]:
    """Return the name of each GPU of this machine and its memory in units of 2**30 bytes, as reported by nvidia-smi.

    `None` for memory that nvidia-smi does not report, as a unified one. A GPU with an error is missing.
    """
    try:
        output = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],  # noqa: S607  # its folder differs between distributions
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    lines = (line.rpartition(",")[::2] for line in output.split("\n"))
    gpus = ((name.strip(), mebibytes.strip()) for name, mebibytes in lines)
    known = ((name, None if mib in UNREPORTED else mib) for name, mib in gpus if mib in UNREPORTED or mib.isdigit())
    return tuple((name, None if mib is None else float(mib) / 1024) for name, mib in known)


UNREPORTED = ("[N/A]", "[Not Supported]")
"""What nvidia-smi prints for memory that it does not report."""


def _start_ray(address: str | None, cpus: float, agent_delay_s: float) -> None:
    # Errors are reported by vidgen itself. Ray would print the traceback of each worker as well.
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address:
        try:
            # Ray takes `auto` from this variable, if it is set.
            address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
            _check_reachable(address)
            with _keep_sigterm_handler(), _connect_limit(address):
                ray.init(address=address, **quiet)
        except (OSError, ValueError) as error:
            raise SetupError(f"no Ray cluster at {address!r}: {str(error).strip().splitlines()[0]}") from None
        return
    # Let Ray place all actors even on a small machine. The operating system shares the CPUs.
    num_cpus = max(os.cpu_count() or 1, math.ceil(cpus))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with muted_stderr(), _keep_sigterm_handler():
            init_local_ray(agent_delay_s=agent_delay_s, num_cpus=num_cpus, **quiet)
    except RayStartTimeout as error:
        raise SetupError(f"Ray did not start on this machine: {error}") from None


@contextmanager
def _connect_limit(address: str) -> Iterator[None]:
    """End this process if the block takes longer than `CLUSTER_CONNECT_S`. Nothing can interrupt `ray.init`, not even SIGINT.

    It returns when the node of this process has started its first workers.
    """
    message = (
        f"the Ray cluster at {address} has not accepted this process for {CLUSTER_CONNECT_S:g} s. If its workers start slowly, "
        "start its nodes with RAY_worker_register_timeout_seconds=300, otherwise see raylet.err in the logs of this node"
    )
    timer = threading.Timer(CLUSTER_CONNECT_S, _end_process, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class RayStartTimeout(Exception):
    """Ray's processes did not start in time, even after retries."""


def init_local_ray(*, agent_delay_s: float = 0.0, **options: Any) -> None:
    """Start Ray on this machine with `ray.init` options, without the dashboard.

    Its ports, those of the metrics included, listen on the loopback address only. The exception is the gRPC port of each
    replica of Ray Serve, which requires Ray's token. `agent_delay_s`: see `only_needed_services`.
    Sets `LOCAL_SETTINGS`. Ray waits 30 s for its own processes. On a busy machine that may be too short, so the start is
    retried. Raises RayStartTimeout.
    """
    # Ray creates the token in this folder, readable by everyone. If it cannot, it reports that.
    token = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):
        token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_TMPDIR" not in os.environ:
        options = {"_temp_dir": _private_folder(), **options}
    for attempt in range(1, START_ATTEMPTS + 1):
        ports = dict(zip(AGENT_PORTS, _unused_ports(len(AGENT_PORTS)), strict=True))
        try:
            log_to_driver = options.get("log_to_driver", True)
            services = only_needed_services(log_to_driver=log_to_driver, ports=ports, agent_delay_s=agent_delay_s)
            with keep_loopback_address(), services:
                ray.init(address="local", include_dashboard=False, _node_ip_address=LOOPBACK, **options)
            with suppress(OSError):  # there is none without token authentication
                token.chmod(0o600)
            return
        except Exception as error:
            if START_TIMEOUT not in str(error):
                raise
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise RayStartTimeout(
                    f"{START_ATTEMPTS} attempts of 30 s each timed out; the machine may be overloaded"
                ) from error


def _private_folder() -> str:
    """Return a folder for Ray's sockets and logs that no other user of the machine can enter.

    Ray opens its own folder to all users. The path is short, because those of sockets are limited to 107 characters.
    Raises SetupError if the folder cannot be made, or belongs to another user.
    """
    parent = Path(f"/tmp/ray-{os.getuid()}")
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        problem = "belongs to another user" if parent.is_symlink() or parent.stat().st_uid != os.getuid() else None
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
    if problem is not None:
        raise SetupError(f"{parent} {problem}. Set RAY_TMPDIR to a folder of your own with a short path")
    parent.chmod(0o700)
    return str(parent / "ray")


_reserved: list[socket.socket] = []
"""Bound to the ports that `_unused_ports` has returned last."""


def _unused_ports(count: int) -> list[int]:
    """Return ports of the loopback address that no process uses, reserved until the next call.

    Only servers that set SO_REUSEADDR, as Ray's agents do, can listen on them. They are below the ports that the system gives
    to connections.
    """
    for each in _reserved:
        each.close()
    _reserved.clear()
    # Not seeded: processes that start at the same time must not choose the same ports.
    choose = random.SystemRandom()
    while len(_reserved) < count:
        reserved = socket.socket()
        with suppress(OSError):
            reserved.bind((LOOPBACK, choose.randrange(*AGENT_PORT_RANGE)))
            # Not before: two processes could bind the same port.
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _reserved.append(reserved)
    return [each.getsockname()[1] for each in _reserved]


def requires_token() -> bool:
    """Return whether the connected Ray rejects a call without its token or a certificate.

    Raises SetupError if it does not answer.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    status = call_without_token(ray.get_runtime_context().gcs_address, CONNECT_TIMEOUT_S)
    if status not in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED):
        raise SetupError(f"Ray's control service does not answer ({status.name})")
    return status is grpc.StatusCode.UNAUTHENTICATED


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore the SIGTERM handler, which `ray.init` replaces with one that exits at once."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # In other threads neither Ray nor this function can set a handler.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def muted_stderr() -> Iterator[None]:
    """Discard standard error, on which Ray's C++ core prints messages. Errors are still raised."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _check_reachable(address: str) -> None:
    """Raise OSError if HOST:PORT refuses connections. Ray would retry for minutes. Addresses such as `auto` are not checked."""
    url = urlsplit(address if "//" in address else f"//{address}")
    if url.hostname and url.port:
        socket.create_connection((url.hostname, url.port), CONNECT_TIMEOUT_S).close()


def pull_on_all_nodes(
    references: Sequence[tuple[str, Path | None]], hub: Hub, *, dry_run: bool, verify: bool
) -> list[PullResult]:
    """Download on every node of the connected Ray, into the node's own HF_HOME, with the node's own token.

    Nodes with a shared folder wait for each other and find the files complete.
    """
    task = ray.remote(num_cpus=0, max_retries=1)(pull_all)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    results = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            references, hub, dry_run=dry_run, verify=verify
        )
        for node in nodes
    ]
    found = []
    for node, result in zip(nodes, results, strict=True):
        try:
            pulled = ray.get(result)
        except ray.exceptions.RayError as error:
            pulled = PullResult((), (f"the node was lost during the download ({type(error).__name__}); run the command again",))
        found.append(replace(pulled, node=node["NodeManagerAddress"]))
    return found
