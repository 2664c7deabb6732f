"""Actor client on a real cluster: the cause of a lost process, and the Ray error text that the client matches."""

import asyncio
import os
import signal
import threading
import time

import pytest
import ray

from tests.ray_workers import FAST_DETECTION, connected_cluster
from vidgen_ray.engine import actor_client
from vidgen_ray.engine.actor_client import NOT_SENT, ActorCallFailed, ActorClient, Ping
from vidgen_ray.engine.ray_cluster import process_of
from vidgen_ray.engine.retries import Kind
from vidgen_ray.engine.worker import place_of_process

MEMORY = {"object_store_memory": 100 << 20}
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def cluster():
    """Head without CPUs and one worker node."""
    with connected_cluster(num_cpus=0, _system_config=FAST_DETECTION, **MEMORY) as cluster:
        cluster.add_node(num_cpus=1, **MEMORY)
        yield cluster


@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0, max_concurrency=2)
class Sleeper:
    """Actor that restarts slowly if `slow_start` exists."""

    def __init__(self, slow_start=None):
        if slow_start is not None:
            if slow_start.exists():
                time.sleep(600)
            slow_start.touch()

    def place(self):
        return place_of_process()

    def load(self):
        return None

    def activity(self):
        """Say that the load waits for others: on a busy machine, it may take longer than LOAD_CHECK_S."""

    def sleep(self, started):
        started.touch()
        time.sleep(600)

    def nap(self):
        time.sleep(0.3)
        return "rested"

    def crash(self):
        os._exit(1)

    def large(self):
        return bytes(60 << 20), None

    def cancel(self, number):
        """Take no notice."""


def error_of(call):
    with pytest.raises(ray.exceptions.RayActorError) as raised:
        ray.get(call, timeout=60)
    return str(raised.value)


def test_text_of_a_call_that_was_not_sent(cluster, tmp_path):
    """Ray has one exception class for several causes, so only the text tells them apart."""
    changed = f"Ray {ray.__version__} words this error differently. Update vidgen_ray/engine/actor_client.py."
    actor = Sleeper.remote(tmp_path / "slow")
    pid = ray.get(actor.place.remote()).pid
    running = actor.sleep.remote(tmp_path / "started")
    wait_for(tmp_path / "started")
    os.kill(pid, signal.SIGKILL)
    assert NOT_SENT not in error_of(running), changed
    assert NOT_SENT in error_of(actor.place.remote()), changed
    ray.kill(actor)


async def failure_of(call):
    with pytest.raises(ActorCallFailed) as raised:
        await call
    return raised.value


def run(scenario, **options):
    """Run a coroutine function with the client of an actor that is ready. `options`: of the actor."""

    async def with_client():
        actor = Sleeper.options(**options).remote()
        client = ActorClient(actor, "sleeper")
        assert await client.ready() is None
        await scenario(client)
        ray.kill(actor)

    asyncio.run(with_client())


def wait_for(path):
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # polls: files do not send events


@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0, max_concurrency=2)
class Loader:
    """Actor whose first process loads until it was asked for its activity `asked` times. Its activity grows by `growth`."""

    def __init__(self, path, asked, growth):
        self.asked, self.growth, self.activity_so_far = (0 if path.exists() else asked), growth, 0.0
        self.loaded = threading.Event()
        path.touch()

    def place(self):
        return place_of_process()

    def load(self):
        if self.asked:
            self.loaded.wait(TIMEOUT_S)

    def activity(self):
        self.asked -= 1
        if not self.asked:
            self.loaded.set()
        self.activity_so_far += self.growth
        return self.activity_so_far


@pytest.mark.parametrize(("growth", "hangs"), [(100.0, False), (0.0, True)])
def test_load_that_hangs_ends_its_process(cluster, tmp_path, monkeypatch, growth, hangs):
    monkeypatch.setattr(actor_client, "LOAD_CHECK_S", 0.1)
    monkeypatch.setattr(actor_client, "LOAD_SILENCE_S", 1.0)
    actor = Loader.remote(tmp_path / "started", 1000 if hangs else 20, growth)

    async def scenario():
        client = ActorClient(actor, "loader")
        failure = await asyncio.wait_for(client.ready(), TIMEOUT_S)
        if hangs:
            assert failure.error == "TimedOut"
            assert "hangs while it loads its weights: it has neither read nor computed" in failure.message
            failure = await asyncio.wait_for(client.ready(), TIMEOUT_S)
        assert failure is None

    asyncio.run(scenario())
    ray.kill(actor)


def test_cause_of_a_crash(cluster, tmp_path):
    async def scenario(client):
        failed = await failure_of(client.call("crash", stage="flux", timeout_s=60))
        assert (failed.error, failed.kind) == ("WorkerDied", Kind.ERROR)
        assert await asyncio.wait_for(client.ready(), TIMEOUT_S) is None
        assert not client.has_moved
        # Of several calls, each may be the cause.
        sleeping = asyncio.ensure_future(client.call("sleep", tmp_path / "started", stage="flux", timeout_s=60))
        await asyncio.to_thread(wait_for, tmp_path / "started")
        crashing = client.call("crash", stage="flux", timeout_s=60)
        failures = await asyncio.gather(failure_of(sleeping), failure_of(crashing))
        assert [failed.kind for failed in failures] == [Kind.SHARED_CRASH, Kind.SHARED_CRASH]
        assert await asyncio.wait_for(client.ready(), TIMEOUT_S) is None
        # A call to a process that is being killed does not count.
        client.restart()
        failed = await failure_of(client.call("sleep", tmp_path / "started", stage="flux", timeout_s=60))
        assert failed.kind is Kind.NOT_RUN
        assert await asyncio.wait_for(client.ready(), TIMEOUT_S) is None
        assert not client.has_moved
        os.kill(client.place.pid, signal.SIGKILL)
        assert await client.ping() is Ping.DOWN, "an idle process"

    run(scenario)


def test_result_that_the_node_cannot_store_is_an_error_of_the_node(cluster):
    """Its disk counts as full, and its object store has room for one result."""
    cluster.add_node(num_cpus=1, resources={"full": 1}, env_vars={"RAY_local_fs_capacity_threshold": "0.001"}, **MEMORY)

    async def scenario(client):
        first = await client.call("large", stage="flux", timeout_s=60, num_returns=2)
        failed = await failure_of(client.call("large", stage="flux", timeout_s=60, num_returns=2))
        assert (failed.error, failed.kind) == ("OutOfDiskError", Kind.NODE)
        assert "Ray could not store its result: OutOfDiskError: " in str(failed)
        del first

    run(scenario, resources={"full": 1})


def test_timeout_and_an_ignored_cancellation_restart_the_process_unless_the_driver_was_stopped(cluster, tmp_path, monkeypatch):
    """A timeout then ends before the driver can read the responses that came meanwhile."""

    async def scenario(client):
        with monkeypatch.context() as patch:
            patch.setattr(actor_client, "LATE_S", 0.5)
            call = asyncio.ensure_future(client.call("nap", stage="flux", timeout_s=0.5))
            await asyncio.sleep(0)
            time.sleep(2)  # the driver is stopped while the call ends
            assert await call == "rested"
        before = client.place
        sleeping = asyncio.ensure_future(client.call("sleep", tmp_path / "started", stage="flux", timeout_s=0.5))
        failed = await failure_of(sleeping)
        assert (failed.error, failed.kind) == ("TimedOut", Kind.ERROR)
        assert await client.ready() is None
        assert client.place.pid != before.pid
        monkeypatch.setattr(actor_client, "CANCEL_S", 0.5)
        cancelled = asyncio.ensure_future(client.call("sleep", tmp_path / "number", stage="flux", timeout_s=600))
        await asyncio.to_thread(wait_for, tmp_path / "number")
        client.cancel(tmp_path / "number")
        assert (await failure_of(cancelled)).error == "TimedOut"

    run(scenario)


def test_frozen_process_is_silent_or_killed_while_it_starts(cluster, tmp_path, monkeypatch):
    async def scenario(client):
        sleeping = asyncio.ensure_future(client.call("sleep", tmp_path / "started", stage="flux", timeout_s=600))
        await asyncio.to_thread(wait_for, tmp_path / "started")
        assert await client.ping() is Ping.UP
        os.kill(client.place.pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(actor_client, "SILENT_S", 2.0)
            assert await client.ping() is Ping.SILENT
        client.restart(blame_running=True)
        assert (await failure_of(sleeping)).kind is Kind.ERROR, "its running call is the cause"
        assert await client.ready() is None
        assert await client.ping() is Ping.UP
        frozen = process_of(client._actor)
        os.kill(client.place.pid, signal.SIGSTOP)
        monkeypatch.setattr(actor_client, "LOAD_CHECK_S", 0.5)
        monkeypatch.setattr(actor_client, "LOAD_SILENCE_S", 1.0)
        # The next process may take longer than LOAD_SILENCE_S to start on a busy machine.
        monkeypatch.setattr(actor_client, "process_of", lambda actor: frozen if process_of(actor) == frozen else None)
        starting = ActorClient(client._actor, "starting")
        assert await starting.ready() is None
        assert starting.place.pid != client.place.pid

    run(scenario)


def test_process_lost_with_its_node_is_told_from_a_crash(cluster, tmp_path):
    """The successor runs on another node, which is how the client knows that the node is lost."""

    async def scenario(client):
        (node,) = [node for node in cluster.worker_nodes if node.node_id == client.node]
        sleeping = asyncio.ensure_future(client.call("sleep", tmp_path / "started", stage="flux", timeout_s=60))
        await asyncio.to_thread(wait_for, tmp_path / "started")
        await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
        await failure_of(sleeping)
        # Ray starts nodes in the main thread only.
        cluster.add_node(num_cpus=1, **MEMORY)
        assert await asyncio.wait_for(client.ready(), TIMEOUT_S) is None
        assert client.has_moved

    run(scenario)
