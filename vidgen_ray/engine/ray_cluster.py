"""The Ray that a run is on: the one this process is connected to, one at an address, or one of its own."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidgen_ray.errors import SetupError
from vidgen_ray.planner import Cluster, Node
from vidgen_ray.planner.cluster import Label

KIND_OF_CARD, THIS_NODE = "ray.io/accelerator-type", "ray.io/node-id"
"""Labels that Ray gives its nodes."""
CONNECT_S = 10
ASK_S = 120


@contextmanager
def connected(address: str | None, cpus: float) -> Iterator[None]:
    """Have a Ray for the block: the one there is, the one at `address`, or one of its own with at least so many CPUs."""
    ours = not ray.is_initialized()
    if ours:
        _start_ray(address, cpus)
    try:
        yield
    finally:
        if ours:
            # What was still on its way to processes that end now is no news.
            with muted_stderr():
                ray.shutdown()


def expect_gpus(count: int) -> None:
    """Raises SetupError where the Ray that was started here has fewer: a run would wait for them for ever."""
    has = int(ray.cluster_resources().get("GPU", 0))
    if has < count:
        raise SetupError(
            f"the plan needs {count} GPUs, this machine has {has}; "
            "render on a cluster with --address, or leave --gpus out, so that the run looks what is there"
        )


def live_cluster() -> Cluster:
    """The nodes of the Ray that this process is connected to, with each GPU's memory as its own machine gives it."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(num_cpus=0)(_gpus_gb)
    asked = {
        node["NodeID"]: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in alive
        if node["Resources"].get("GPU", 0) >= 1
    }
    try:
        found = dict(zip(asked, ray.get(list(asked.values()), timeout=ASK_S), strict=True))
    except ray.exceptions.GetTimeoutError:
        raise SetupError("the cluster's GPU nodes do not answer; say what they have by --gpus, as 8x80GB") from None
    nodes = [_node(node, found.get(node["NodeID"], ())) for node in alive]
    return Cluster(tuple(replace(node, label=label) for node, label in zip(nodes, _labels(alive, nodes), strict=True)))


def _labels(alive: Sequence[dict[str, Any]], nodes: Sequence[Node]) -> Iterator[Label]:
    """By which Ray finds nodes with the same cards: their kind, which a node that takes the place of another has, too, or else
    the node itself."""
    kinds = [node.get("Labels", {}).get(KIND_OF_CARD) for node in alive]
    sizes: defaultdict[str | None, set[int]] = defaultdict(set)
    for kind, node in zip(kinds, nodes, strict=True):
        sizes[kind] |= node.sizes_gb
    for kind, told in zip(kinds, alive, strict=True):
        yield (KIND_OF_CARD, kind) if kind and len(sizes[kind]) == 1 else (THIS_NODE, told["NodeID"])


def _node(node: dict[str, Any], gpus_gb: tuple[float, ...]) -> Node:
    has = node["Resources"]
    counted = int(has.get("GPU", 0))
    if counted > len(gpus_gb):
        raise SetupError(
            f"node {node['NodeManagerAddress']} has {counted} GPUs for Ray, and nvidia-smi shows {len(gpus_gb)}; "
            "say what they have by --gpus, as 8x80GB"
        )
    return Node(gpus=gpus_gb[:counted], cpus=has.get("CPU", 0.0), memory_gb=has.get("memory", 0.0) / 1e9 or None)


def _gpus_gb() -> tuple[float, ...]:
    """The memory of each GPU of this machine, in GB of 2**30 bytes, as its driver tells it."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(float(line) / 1024 for line in told.split("\n") if line.strip())


def _start_ray(address: str | None, cpus: float) -> None:
    # What goes wrong is told once, by us; Ray would put each worker's traceback before it.
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address:
        try:
            _knock(address)
            with _own_sigterm():
                ray.init(address=address, **quiet)
        except (OSError, ValueError) as error:
            raise SetupError(f"no Ray cluster at {address!r}: {str(error).strip().splitlines()[0]}") from None
        return
    # The actors of a small machine take turns, which is the operating system's business, not Ray's.
    enough = max(os.cpu_count() or 1, math.ceil(cpus))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with muted_stderr(), _own_sigterm():
        ray.init(address="local", num_cpus=enough, include_dashboard=False, **quiet)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray makes SIGTERM end the driver at once, whoever had it before."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # Elsewhere neither Ray nor we may.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def muted_stderr() -> Iterator[None]:
    """Ray's C++ core tells standard error that it was told to be quiet. What goes wrong is raised all the same."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _knock(address: str) -> None:
    """OSError where nobody listens at HOST:PORT; Ray would try again for minutes. `auto` and the like pass."""
    place = urlsplit(address if "//" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), CONNECT_S).close()
