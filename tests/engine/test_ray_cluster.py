"""Start of Ray on a busy machine."""

import inspect
import socket
import threading
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import ray
from ray._private import node, parameter

from vidgen_ray.engine.ray_cluster import START_ATTEMPTS, START_TIMEOUT, RayStartTimeout, _unused_ports, init_local_ray, within
from vidgen_ray.errors import SetupError


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


def test_installed_ray_words_the_start_timeout_this_way():
    assert START_TIMEOUT in inspect.getsource(node), f"Ray {ray.__version__}: update START_TIMEOUT in ray_cluster.py"


def test_local_ray_starts_only_services_that_are_used(local_ray):
    assert set(ray._private.worker._global_node.all_processes) <= {"gcs_server", "raylet", "reaper"}


def test_ray_is_changed_during_its_start_only(monkeypatch):
    before = parameter.RayParams, node.Node.start_api_server
    meanwhile = []
    monkeypatch.setattr(ray, "init", lambda **_: meanwhile.extend((parameter.RayParams, node.Node.start_api_server)))
    init_local_ray(num_cpus=1, log_to_driver=False)
    assert (parameter.RayParams, node.Node.start_api_server) == before
    assert all(changed is not original for changed, original in zip(meanwhile, before, strict=True))


def test_ports_of_agents_are_free_and_not_those_of_connections():
    with ExitStack() as stack:
        for port in _unused_ports(4):
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
            first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
            assert port < first_of_connections or first_of_connections < 32_768


def test_call_that_never_returns_is_a_lost_connection():
    with pytest.raises(SetupError, match=r"no response for 0\.05 s"):
        within(0.05, threading.Event().wait)
    assert within(60, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(60, lambda: {}["missing"])
