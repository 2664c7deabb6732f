"""Start of Ray on a busy machine."""

import inspect

import pytest
import ray
from ray._private import node

from vidgen_ray.engine.ray_cluster import START_ATTEMPTS, START_TIMEOUT, RayStartTimeout, init_local_ray


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


def start_timeout():
    return Exception(f"The current node {START_TIMEOUT}. This could happen because the GCS is overloaded.")


def test_start_timeout_is_retried(failing_starts):
    failing_starts += [start_timeout(), start_timeout()]
    init_local_ray(num_cpus=1)
    assert failing_starts == []


def test_start_fails_after_the_last_attempt(failing_starts):
    failing_starts += [start_timeout() for _ in range(START_ATTEMPTS + 1)]
    with pytest.raises(RayStartTimeout, match="3 attempts of 30 s each timed out"):
        init_local_ray(num_cpus=1)
    assert len(failing_starts) == 1


def test_other_start_errors_are_not_retried(failing_starts):
    failing_starts += [ValueError("num_cpus: wrong"), start_timeout()]
    with pytest.raises(ValueError, match="num_cpus"):
        init_local_ray(num_cpus=-1)
    assert len(failing_starts) == 1


def test_installed_ray_words_the_start_timeout_this_way():
    assert START_TIMEOUT in inspect.getsource(node), f"Ray {ray.__version__}: update START_TIMEOUT in ray_cluster.py"
