"""Ray error texts that `actor_client` matches, checked against the installed Ray.

Ray has one exception class for several causes, so only the text tells them apart.
"""

import os
import signal
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from vidgen_ray.engine.actor_client import NODE_DIED, NOT_SENT

CHANGED = f"Ray {ray.__version__} words this error differently. Update vidgen_ray/engine/actor_client.py."
MEMORY = {"object_store_memory": 100 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    """Head without CPUs and one worker node."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **MEMORY})
    node = cluster.add_node(num_cpus=1, **MEMORY)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, node
    ray.shutdown()
    cluster.shutdown()


@ray.remote(num_cpus=0.1)
class Sleeper:
    """Actor whose start takes long if `slow_start` exists."""

    def __init__(self, slow_start):
        if slow_start.exists():
            time.sleep(600)
        slow_start.touch()

    def pid(self):
        return os.getpid()

    def sleep(self):
        time.sleep(600)


def error_of(call):
    with pytest.raises(ray.exceptions.RayActorError) as raised:
        ray.get(call, timeout=60)
    return str(raised.value)


def test_text_of_a_call_that_was_not_sent(cluster, tmp_path):
    actor = Sleeper.options(max_restarts=-1, max_task_retries=0).remote(tmp_path / "slow")
    pid = ray.get(actor.pid.remote())
    running = actor.sleep.remote()
    os.kill(pid, signal.SIGKILL)
    assert NOT_SENT not in error_of(running), CHANGED
    assert NOT_SENT in error_of(actor.pid.remote()), CHANGED
    ray.kill(actor)


def test_text_of_an_actor_lost_with_its_node(cluster, tmp_path):
    cluster, node = cluster
    actor = Sleeper.remote(tmp_path / "slow")
    ray.get(actor.pid.remote())
    running = actor.sleep.remote()
    cluster.remove_node(node)
    assert NODE_DIED in error_of(running), CHANGED
