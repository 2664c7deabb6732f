"""Rays whose workers start in a tenth of the time: forks of one process that has imported torch, diffusers and the package.

This file is also the program of that process, and the one that Ray starts in place of a worker.
"""

import atexit
import gc
import io
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ADDRESS = "VIDGEN_TEST_RAY_WORKERS"
"""Environment variable with the socket of the process that is forked."""
PRELOADED = (
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus",
    "spandrel",
    "vidgen_ray.pipeline",
    "vidgen_ray.online.asgi_app",
    "google.protobuf.json_format",
    "google.protobuf.timestamp_pb2",
    "jsonschema",
    "msgpack",
    "pandas",
    "pdb",
    "pyarrow.json",
    "pyarrow.parquet",
    "requests",
    "uvloop",
    "wcwidth",
)
"""Modules that workers import. Not `ray`, which reads the environment of its process when it is imported."""
FAST_DETECTION = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""Settings of a cluster that finds lost nodes within two seconds."""
AGENT_PORTS = ("dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
"""Names of the files in which the agents of a node write their ports."""


# In the process of the tests


def own_workers():
    """Return arguments of a node with workers that Ray starts itself: children of the node with an environment of their own."""
    folder = Path(find_spec("ray").submodule_search_locations[0])
    return {"setup_worker_path": str(folder / "_private" / "workers" / "setup_worker.py")}


_prepared = None
"""Address of the process that `prepare` has forked, and what keeps it alive."""


def listen():
    """Return a listening socket, and its address in a short path: paths of sockets are limited to 107 characters."""
    folder = tempfile.mkdtemp(prefix="vw", dir="/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(f"{folder}/socket")
    listening.listen(100)
    return listening, f"{folder}/socket"


def prepare():
    """Fork the process from this one, which has not imported Ray yet and will import all of PRELOADED anyway."""
    global _prepared
    for name in PRELOADED:
        __import__(name)
    listening, address = listen()
    reading, writing = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            forget_the_tests({listening.fileno(), reading})
            serve(listening, reading)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else end.code is not None
        finally:
            atexit._run_exitfuncs()
            os._exit(code)
    listening.close()
    os.close(reading)
    _prepared = address, writing


def forget_the_tests(kept):
    """Close what a forked process has from that of the tests: its files other than `kept`, captured output, handlers, hooks."""
    atexit._clear()
    for number in set(map(int, os.listdir("/proc/self/fd"))) - kept - {0, 1, 2}:
        with suppress(OSError):  # the one that has read the folder
            os.close(number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False), line_buffering=True) for number in (1, 2))
    sys.meta_path[:] = [finder for finder in sys.meta_path if "pytest" not in type(finder).__module__]


@cache
def start():
    """Start the process, unless `prepare` or a parent process has, and let all Rays that this process starts use it."""
    from ray._private import parameter

    if _prepared:
        os.environ[ADDRESS] = _prepared[0]
    elif ADDRESS not in os.environ:
        listening, os.environ[ADDRESS] = listen()
        with listening:
            number = listening.fileno()
            # It ends when this process does and closes its standard input.
            process = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(number)],
                stdin=subprocess.PIPE,
                pass_fds=[number],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            )
        atexit.register(process.stdin.close)

    class Parameters(parameter.RayParams):
        def __init__(self, *arguments, **fields):
            super().__init__(*arguments, **{"setup_worker_path": __file__, **fields})

    parameter.RayParams = Parameters


@contextmanager
def without_agents():
    """Let nodes start idle processes instead of the agents that serve a dashboard, metrics and runtime environments."""
    from ray._private import services

    build = services._build_python_executable_command_memory_profileable
    services._build_python_executable_command_memory_profileable = lambda *_: [sys.executable, __file__, "--agent"]
    try:
        yield
    finally:
        services._build_python_executable_command_memory_profileable = build


@contextmanager
def repeated_question_for_nodes():
    """Ask a second time whether a node has started: Ray gives up after 30 s, which is also the timeout of one lost question."""
    from ray._private import services

    ask = services.get_node

    def get_node(*arguments):
        try:
            return ask(*arguments)
        except RuntimeError:
            return ask(*arguments)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = ask


def small_cluster(**head):
    """Return a started cluster without what only dashboards and runtime environments need. `head`: arguments of its head node.

    The caller connects to it, and shuts it down.
    """
    from ray.cluster_utils import Cluster

    from vidgen_ray.engine.ray_cluster import _unused_ports
    from vidgen_ray.engine.ray_internals import AGENT_PORTS, only_needed_services

    class SmallCluster(Cluster):
        def add_node(self, **options):
            ports = dict(zip(AGENT_PORTS, _unused_ports(len(AGENT_PORTS)), strict=True))
            listening = {"dashboard_agent_listen_port": ports["dashboard_agent_listen_port"]}
            with only_needed_services(log_to_driver=False, ports=ports), without_agents(), repeated_question_for_nodes():
                return super().add_node(include_dashboard=False, **listening, **options)

    start()
    return SmallCluster(initialize_head=True, head_node_args=head)


@contextmanager
def gpus_of_80_gb(count):
    """Let the nodes that are started report that each of their GPUs, `count` at most, has 80 GB."""
    path = os.environ["PATH"]
    # Processes of the nodes ask later, too.
    folder = tempfile.mkdtemp(prefix="vidgen-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = Path(folder, "nvidia-smi")
    program.write_text("#!/bin/sh\n" + count * "echo NVIDIA H100 80GB HBM3, 81559\n")
    program.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path


@contextmanager
def connected_cluster(**head):
    """Connect this process to a small cluster until the end of the block."""
    import ray

    cluster = small_cluster(**head)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@contextmanager
def removed_nodes(cluster, **common):
    """Return a function that adds a node with the given and the common resources, until the end of the block."""
    nodes = []

    def add(**resources):
        nodes.append(cluster.add_node(**common, **resources))
        return nodes[-1]

    yield add
    for node in nodes:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)


# In the process that is forked


def use_small_images():
    """Let Qwen-Image-Edit see images of 128x128 pixels. diffusers scales them to 1024x1024, which takes seconds on a CPU."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = 128 * 128


def serve(listening, lifetime):
    """Fork a worker for each connection, until the other end of `lifetime` is closed."""
    assert "ray" not in sys.modules
    gc.freeze()
    signal.signal(signal.SIGCHLD, reap)
    while True:
        readable, _, _ = select.select([listening, lifetime], [], [])
        if lifetime in readable:
            return
        use_small_images()
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            become_worker(connection)
            return
        connection.close()


def reap(*_):
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def become_worker(connection):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    folder, count, *words = message.decode().split("\0")
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(word.split("=", 1) for word in words[int(count) :])
    threading.Thread(target=end_with, args=[connection], daemon=True).start()
    sys.argv = words[: int(count)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def end_with(connection):
    """End this process when the one that Ray has started ends."""
    connection.recv(1)
    os._exit(1)


# In the process that Ray starts


def ask_for_worker():
    """Ask for a worker with the arguments, environment and files of this process, and wait until it ends."""
    # The options of Ray's own program come first.
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--language", "--serialized-runtime-env-context"))]
    variables = (f"{name}={value}" for name, value in os.environ.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as template:
        template.connect(os.environ[ADDRESS])
        message = "\0".join([os.getcwd(), str(len(arguments)), *arguments, *variables])
        socket.send_fds(template, [message.encode()], [0, 1, 2])
        template.recv(1)


def stand_in_for_an_agent():
    """Write the ports that Ray waits for, on which nothing listens, and wait until the node ends, perhaps by SIGKILL."""
    node = os.getppid()
    given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[2:] if "=" in word)
    for name in AGENT_PORTS:
        path = Path(given["session-dir"], f"{name}_{given['node-id']}")
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text("1")
        part.rename(path)
    while os.getppid() == node:
        time.sleep(1)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        for name in PRELOADED:
            __import__(name)
        serve(socket.socket(fileno=int(sys.argv[2])), sys.stdin.fileno())
    elif sys.argv[1] == "--agent":
        stand_in_for_an_agent()
    else:
        ask_for_worker()
