"""Start of Ray on a busy machine, and the private names of Ray."""

import ast
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import ray
from ray._private import node, parameter, services, utils

from vidgen_ray.engine import ray_cluster, ray_internals
from vidgen_ray.engine.ray_cluster import START_ATTEMPTS, RayStartTimeout, _unused_ports, init_local_ray, within
from vidgen_ray.engine.ray_internals import AGENT_PORTS, START_TIMEOUT
from vidgen_ray.errors import SetupError
from vidgen_ray.planner.cluster import GB


def start_timeout():
    return Exception(f"The current node {START_TIMEOUT}. This could happen because the GCS is overloaded.")


@pytest.fixture
def failing_starts(monkeypatch):
    """Makes the next `ray.init` calls fail with the given errors. Returns the list of errors that are left."""
    errors = []

    def init(**_):
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return errors


@pytest.mark.parametrize(
    ("errors", "raised", "left"),
    [
        ([start_timeout()] * 2, None, 0),
        ([start_timeout()] * (START_ATTEMPTS + 1), RayStartTimeout, 1),
        ([ValueError("num_cpus: wrong"), start_timeout()], ValueError, 1),
    ],
)
def test_start_is_repeated_after_a_timeout_only(failing_starts, errors, raised, left):
    failing_starts += errors
    with nullcontext() if raised is None else pytest.raises(raised, match=r"num_cpus|3 attempts of 30 s each timed out"):
        init_local_ray(num_cpus=1)
    assert len(failing_starts) == left


CONNECTED = """
import sys, threading
from vidgen_ray.engine.ray_cluster import connected
with connected(None, 1, on_lost=print):
    print("connected", flush=True)
    sys.stdout.reconfigure(line_buffering=True)
    threading.Event().wait()
"""


def test_process_ends_soon_after_the_raylet_of_its_machine():
    with subprocess.Popen(
        [sys.executable, "-c", CONNECTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout.readline() == "connected\n"
        (raylet,) = (child for child in psutil.Process(driver.pid).children() if child.name() == "raylet")
        raylet.kill()
        saved, errors = driver.communicate(timeout=120)
    assert driver.returncode == SetupError.exit_code
    assert saved == errors.splitlines()[-1].removeprefix("vidgen: ") + "\n"
    assert errors.endswith(
        "vidgen: lost connection to Ray: its process of this machine (raylet) has ended. Run the same command again\n"
    )


SLOW_WORKER = "import signal, sys\nif any('default_worker.py' in word for word in sys.orig_argv): signal.pause()\n"


@pytest.mark.slow
def test_run_whose_workers_never_start_ends_with_the_reason(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_WORKER)
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": "a ball", "generate_video": False}))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-m", "vidgen_ray", "render", tmp_path / "s.jsonl", "-p", "tiny", "-o", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": path, "RAY_worker_register_timeout_seconds": "2"}
    environment.pop("RAY_prestart_worker_first_driver", None)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, "worker startup repeatedly failed" in ended.stderr) == (SetupError.exit_code, True), ended.stderr


def test_cluster_that_accepts_no_driver_ends_the_process(monkeypatch, capsys):
    codes, ended = [], threading.Event()
    monkeypatch.setattr(ray_cluster, "CLUSTER_CONNECT_S", 0.01)
    monkeypatch.setattr(ray, "init", lambda **_: ended.wait(60))
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_cluster._start_ray("auto", 1, 0)
    assert codes == [SetupError.exit_code]
    assert "the Ray cluster at auto has not accepted this process for 0.01 s" in capsys.readouterr().err


def test_installed_ray_words_the_start_timeout_this_way():
    assert START_TIMEOUT in inspect.getsource(node), f"Ray {ray.__version__}: update START_TIMEOUT in ray_internals.py"


def test_installed_ray_takes_ports_of_its_agents():
    original = parameter.RayParams.__mro__[-2]  # tests/ray_workers.py derives from it
    assert set(AGENT_PORTS) < set(inspect.signature(original).parameters)


def test_local_ray_starts_only_services_that_are_used(local_ray):
    assert set(ray._private.worker._global_node.all_processes) <= {"gcs_server", "raylet", "reaper"}


def test_ray_is_changed_during_its_start_only(monkeypatch):
    def changed_names():
        return (
            parameter.RayParams,
            node.Node.start_api_server,
            services.get_node,
            services.start_ray_process,
            utils.get_dashboard_dependency_error,
        )

    before, meanwhile = changed_names(), []
    monkeypatch.setattr(ray, "init", lambda **_: meanwhile.extend(changed_names()))
    init_local_ray(num_cpus=1, log_to_driver=False)
    assert changed_names() == before
    assert all(changed is not original for changed, original in zip(meanwhile, before, strict=True))


@pytest.mark.parametrize(
    ("background", "delay_s", "output"), [("", 0, "started\n"), ("&", 3600, "")], ids=["later", "raylet ended"]
)
def test_agents_start_later_unless_the_raylet_has_ended(background, delay_s, output):
    command = [sys.executable, "-ISc", ray_internals._START_LATER, str(delay_s), "/bin/echo", "started"]
    raylet = ["sh", "-c", f'RAY_RAYLET_PID=$$ "$@" {background}\n:', "_", *command]
    # Returns when the last process has closed the output.
    assert subprocess.run(raylet, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout == output


def test_ports_of_agents_are_reserved_and_not_those_of_connections():
    with ExitStack() as stack:
        for port in _unused_ports(4):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
            # It sets SO_REUSEADDR.
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
            first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
            assert port < first_of_connections or first_of_connections < 32_768


def test_call_that_never_returns_is_a_lost_connection():
    with pytest.raises(SetupError, match=r"no response for 0\.05 s"):
        within(0.05, threading.Event().wait)
    assert within(60, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(60, lambda: {}["missing"])


@pytest.fixture(scope="module")
def idle(local_ray):
    class Idle:
        def node(self):
            return ray.get_runtime_context().get_node_id()

    actor = ray.remote(num_cpus=0)(Idle).remote()
    return actor, ray.get(actor.node.remote())


def attempt_that_succeeds():
    if (attempt := ray_internals.task_attempt()) == 0:
        raise ValueError
    return attempt


def check_actor_entry(actor, node):
    entry = ray_internals.actor_entry(actor)
    assert (entry["State"], entry["Address"]["NodeID"]) == ("ALIVE", node)
    assert entry["Address"]["Port"] > 0


def check_actor_table(actor, node):
    assert any(
        row["ActorClassName"].endswith("Idle") and row["State"] == "ALIVE" for row in ray_internals.actor_table().values()
    )


def check_free_resources(actor, node):
    assert 0 <= ray_internals.free_resources()[node]["CPU"] <= ray.cluster_resources()["CPU"]


def check_call_without_token(actor, node):
    status = ray_internals.call_without_token(ray.get_runtime_context().gcs_address, 10)
    assert status.name in ("OK", "UNAUTHENTICATED")


def check_dashboard_url(actor, node):
    from ray.dashboard import head

    assert ray_internals.dashboard_url() is None
    written = inspect.getsource(head)
    assert "ray_constants.DASHBOARD_ADDRESS" in written
    assert "ray_constants.KV_NAMESPACE_DASHBOARD" in written


def check_task_attempt(actor, node):
    retried = ray.remote(num_cpus=0, max_retries=1, retry_exceptions=True)(attempt_that_succeeds)
    assert ray.get(retried.remote()) == 1


def check_serve_http_config(actor, node):
    from ray.serve.config import HTTPOptions

    assert ray_internals.serve_http_config() is None
    assert HTTPOptions(host="127.0.0.1").host == "127.0.0.1"


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_private_names_of_ray_do_what_they_are_used_for(idle, name):
    CHECKS[name](*idle)


@pytest.mark.parametrize(
    ("shown", "gpus", "card"),
    [
        ("NVIDIA GB10, [N/A]\n", (74.0,), "GB10"),
        ("Orin (nvgpu), [Not Supported]\n", (74.0,), "GB10"),
        ("NVIDIA A10-12Q, [N/A]\n", (22.1,), "A10"),
        ("NVIDIA L40S, 46080\nNVIDIA L40S, [GPU requires reset]\n", (45.0,), "L40S"),
        ("", (), None),
    ],
)
def test_node_has_the_gpus_that_nvidia_smi_shows(monkeypatch, shown, gpus, card):
    """It shows no unified memory, and no memory of a GPU with an error."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: Mock(stdout=shown))
    monkeypatch.setitem(ray_cluster._gpus_of_nodes, "id", ray_cluster._gpus())
    resources = {"GPU": len(gpus), "CPU": 20.0, "memory": 80 * GB}
    node = ray_cluster._node({"NodeID": "id", "NodeManagerAddress": "10.0.0.1"}, resources)
    assert (node.gpus, node.card and node.card.name) == (gpus, card)
    assert node.memory_gb == (74 if node.is_unified else 80)
    with pytest.raises(SetupError, match=f"Ray has {len(gpus) + 1} GPUs, nvidia-smi shows {len(gpus)}"):
        ray_cluster._node({"NodeID": "id", "NodeManagerAddress": "10.0.0.1"}, {**resources, "GPU": len(gpus) + 1})


def test_started_address_is_the_one_that_ray_start_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(ray._private.utils, "get_ray_address_file", lambda folder: str(tmp_path / "ray_current_cluster"))
    assert ray_internals.started_address() is None
    ray._private.utils.write_ray_address("127.0.0.1:7")
    assert ray_internals.started_address() == "127.0.0.1:7"


def test_submission_id_is_that_of_the_job_config(monkeypatch):
    assert ray_internals.submission_id() is None
    config = json.dumps({"metadata": {"job_submission_id": "film-1"}})
    monkeypatch.setenv(ray_internals.RAY_JOB_CONFIG_JSON_ENV_VAR, config)
    assert ray_internals.submission_id() == "film-1"


def test_private_names_of_ray_are_used_in_one_module_only():
    """Imports from private or generated modules, private names of public ones, and `ray._private...` as an expression."""
    product = Path(ray_internals.__file__).parents[1]
    found = set()
    for file in product.rglob("*.py"):
        for each in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in each.names] if isinstance(each, ast.Import | ast.ImportFrom) else []
            if isinstance(each, ast.ImportFrom):
                names = [f"{each.module}.{name}" for name in names]
            elif isinstance(each, ast.Attribute):
                names = [ast.unparse(each)]
            if any(re.match(r"ray\.(.*\.)?(_|core\.|experimental\.)", name) for name in names):
                found.add(file.relative_to(product).as_posix())
    assert found == {"engine/ray_internals.py"}
