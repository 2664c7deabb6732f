"""Processes on a real cluster: start, load and pings, what is known of a lost process, and the texts of Ray's errors."""

import asyncio
import os
import signal
import threading
import time
from itertools import count
from unittest.mock import Mock

import pytest
import ray

from tests.ray_workers import FAST_DETECTION, connected_cluster, removed_nodes
from vidgen_ray.engine import actor_start, shell
from vidgen_ray.engine.actor_start import Ping, load_weights, ping, place_when_up, start
from vidgen_ray.engine.calls import CallResult, ShotFailed
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.messages import Call, Died, Ended, Kind, Ready, Report, Silent
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.engine.ray_cluster import process_of
from vidgen_ray.engine.shell import NOT_SENT, Shell, WorkerCall
from vidgen_ray.engine.worker import place_of_process
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.layout import Layout, WorkerSpec

MEMORY = {"object_store_memory": 100 << 20}
TIMEOUT_S = 120
NAME = "sleeper"


@pytest.fixture(scope="module")
def cluster():
    """Head without CPUs and one worker node."""
    with connected_cluster(num_cpus=0, _system_config=FAST_DETECTION, **MEMORY) as cluster:
        cluster.add_node(num_cpus=1, **MEMORY)
        yield cluster


class Placed:
    """Base of actors. It starts only while the file `closed` does not exist."""

    def __init__(self, closed=None):
        while closed is not None and closed.exists():
            time.sleep(0.02)  # polls: files do not send events

    def place(self):
        return place_of_process()

    def load(self):
        return None

    def activity(self):
        """Say that the load waits for others: on a busy machine, it may take longer than LOAD_CHECK_S."""


@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0, max_concurrency=4)
class Sleeper(Placed):
    """Actor whose methods are those of a worker: they get a number and a plan, and return outputs and a result."""

    def attach(self, number):
        return None

    def sleep_once(self, number, plan, started):
        """Sleep in the first call of all processes."""
        if not started.exists():
            started.touch()
            time.sleep(600)
        return {}, CallResult()

    def nap(self, number, plan):
        time.sleep(0.3)
        return {}, CallResult()

    def crash(self, number, plan):
        os._exit(1)

    def large(self, number, plan):
        return bytes(60 << 20), CallResult()

    def cancel(self, number):
        """Take no notice."""


class Recording(list):
    """Recorder that keeps events and commands."""

    def begin(self, core):
        self.has_more = asyncio.Event()

    def add(self, now, event, commands):
        self += [event, *commands]
        self.has_more.set()

    def of(self, kind):
        return [each for each in self if isinstance(each, kind)]

    async def until(self, kind, number=1):
        """Return the last event or command of a kind when there are this many of it."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.of(kind)) < number:
                self.has_more.clear()
                await self.has_more.wait()
        return self.of(kind)[-1]


ORDERS = count()


def call(shell, method, *args, timeout_s=TIMEOUT_S):
    """Let the actor run a method for a shot of its own."""
    asked = Call(0, next(ORDERS), method, ("flux",), timeout_s=timeout_s)
    return asyncio.ensure_future(shell.call(asked, WorkerCall(method, None, args)))


async def failure_of(called):
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(ShotFailed) as raised:
            await called
    return raised.value


def run(profile, actor, scenario, parallel=1, **limits):
    """Run a coroutine function with a shell whose only process is that of this actor, and with its recording."""

    async def with_shell():
        record = Recording()
        config = EngineConfig("test", profile, OutputFolder("unused"), {}, limits=CoreLimits(**limits), attempts=1)
        only = Shell(config, Layout("fused", (), encoders=0, window=1), Mock(), Mock(), record)
        only.add(NAME, WorkerSpec(("flux",), cpus=1, gpus=0.0, parallel=parallel), actor)
        await scenario(only, record)
        only.close()

    asyncio.run(with_shell())
    ray.kill(actor)


def wait_for(path):
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # polls: files do not send events


def row_of(shell):
    return shell.core.table.rows[NAME]


def error_of(returned):
    with pytest.raises(ray.exceptions.RayActorError) as raised:
        ray.get(returned, timeout=60)
    return str(raised.value)


def test_call_that_was_never_sent_is_not_the_cause_of_a_crash(cluster, tiny, tmp_path):
    """Ray has one exception class for several causes, so only the text tells them apart."""
    changed = f"Ray {ray.__version__} words this error differently. Update vidgen_ray/engine/shell.py."
    actor = Sleeper.remote(tmp_path / "closed")

    async def scenario(shell, record):
        await record.until(Ready)
        (tmp_path / "closed").touch()
        running = actor.sleep_once.remote(0, None, tmp_path / "started")
        await asyncio.to_thread(wait_for, tmp_path / "started")
        os.kill(row_of(shell).pid, signal.SIGKILL)
        assert NOT_SENT not in await asyncio.to_thread(error_of, running), changed
        assert NOT_SENT in await asyncio.to_thread(error_of, actor.place.remote()), changed
        napping = call(shell, "nap")
        assert (await record.until(Died)).suspects == ()
        (tmp_path / "closed").unlink()
        await asyncio.wait_for(napping, TIMEOUT_S)
        assert [each.kind for each in record.of(Ended)] == [Kind.NOT_RUN, None]

    run(tiny, actor, scenario)


@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0, max_concurrency=2)
class Loader(Placed):
    """Actor whose first process loads until it was asked for its activity `asked` times. Its activity grows by `growth`."""

    def __init__(self, path, asked, growth):
        self.asked, self.growth, self.activity_so_far = (0 if path.exists() else asked), growth, 0.0
        self.loaded = threading.Event()
        path.touch()

    def attach(self, number):
        return None

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
def test_load_that_hangs_ends_its_process(cluster, tiny, tmp_path, monkeypatch, growth, hangs):
    monkeypatch.setattr(actor_start, "LOAD_CHECK_S", 0.1)
    actor = Loader.remote(tmp_path / "started", 1000 if hangs else 30, growth)

    async def scenario(shell, record):
        await record.until(Ready)
        reasons = [report.reason for report in record.of(Report)]
        assert len(reasons) == hangs
        if hangs:
            assert "hangs while it loads its weights: it has neither read nor computed for 1 s" in reasons[0]
        assert row_of(shell).failed_loads == 0

    run(tiny, actor, scenario, load_silence_s=1.0, restart_s=0.1)


def test_start_fails_if_the_process_crashes_or_can_never_start(cluster):
    @ray.remote(num_cpus=1, max_restarts=-1)
    class Crashing(Placed):
        def load(self):
            os._exit(1)

    @ray.remote(num_cpus=1, max_restarts=0)
    class Raising(Placed):
        def __init__(self):
            raise ImportError("no module")

    async def scenario(kind, reason):
        actor = kind.remote()
        failure = await asyncio.wait_for(start(actor, NAME), TIMEOUT_S)
        assert (failure.stage, failure.error) == ("loading", "WorkerDied")
        assert failure.message.startswith("sleeper did not start: ")
        assert reason in failure.message
        ray.kill(actor)

    asyncio.run(scenario(Crashing, ""))
    asyncio.run(scenario(Raising, "died"))


def test_crash_with_one_call_fails_it_and_with_several_each_runs_alone(cluster, tiny, tmp_path):
    async def scenario(shell, record):
        failed = await failure_of(call(shell, "crash"))
        assert (failed.failure.error, failed.kind) == ("WorkerDied", Kind.ERROR)
        assert "the process crashed: " in failed.failure.message
        await record.until(Ready, 2)
        sleeping = call(shell, "sleep_once", tmp_path / "started")
        await asyncio.to_thread(wait_for, tmp_path / "started")
        failed = await failure_of(call(shell, "crash"))
        assert (failed.failure.error, failed.kind) == ("WorkerDied", Kind.ERROR)
        await asyncio.wait_for(sleeping, TIMEOUT_S)
        kinds = [each.kind for each in record.of(Ended)]
        assert kinds[:3] == [Kind.ERROR, Kind.SHARED_CRASH, Kind.SHARED_CRASH]
        assert sorted(map(str, kinds[3:])) == ["None", str(Kind.ERROR)], "each of them alone"

    run(tiny, Sleeper.remote(), scenario, parallel=2)


def test_idle_process_that_was_killed_is_down(cluster, tiny, monkeypatch):
    monkeypatch.setattr(shell, "PING_S", 0.2)

    async def scenario(shell, record):
        await record.until(Ready)
        before = row_of(shell).pid
        os.kill(before, signal.SIGKILL)
        assert (await record.until(Died)).suspects == ()
        await record.until(Ready, 2)
        assert row_of(shell).pid != before

    run(tiny, Sleeper.remote(), scenario)


def test_result_that_the_node_cannot_store_is_an_error_of_the_node(cluster, tiny):
    """Its disk counts as full, and its object store has room for one result."""
    full = {"RAY_local_fs_capacity_threshold": "0.001"}

    async def scenario(shell, record):
        first = await call(shell, "large")
        second = call(shell, "large")
        await record.until(Report)
        (failed,) = [each.failure for each in record.of(Ended) if each.kind is Kind.NODE]
        assert failed.error == "OutOfDiskError"
        assert "Ray could not store its result: OutOfDiskError: " in failed.message
        assert record.of(Report)[0].reason == failed.message
        del first
        second.cancel()

    with removed_nodes(cluster, **MEMORY) as add_node:
        add_node(num_cpus=1, resources={"full": 1}, env_vars=full)
        run(tiny, Sleeper.options(resources={"full": 1}).remote(), scenario)


def test_timeout_restarts_the_process_unless_the_driver_was_stopped(cluster, tiny, tmp_path):
    """A timeout then ends before the driver can read the responses that came meanwhile."""

    async def scenario(shell, record):
        await record.until(Ready)
        napping = call(shell, "nap", timeout_s=0.5)
        await asyncio.sleep(0)
        time.sleep(2)  # the driver is stopped while the call ends
        await napping
        before = row_of(shell).pid
        failed = await failure_of(call(shell, "sleep_once", tmp_path / "started", timeout_s=0.5))
        assert (failed.failure.error, failed.kind) == ("TimedOut", Kind.ERROR)
        await record.until(Ready, 2)
        assert row_of(shell).pid != before

    run(tiny, Sleeper.remote(), scenario, late_s=0.5)


def test_frozen_process_is_killed_and_its_running_call_is_the_cause(cluster, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shell, "PING_S", 0.2)

    async def scenario(shell, record):
        sleeping = call(shell, "sleep_once", tmp_path / "started")
        await asyncio.to_thread(wait_for, tmp_path / "started")
        behind = call(shell, "nap")
        with monkeypatch.context() as patch:
            patch.setattr(actor_start, "SILENT_S", 2.0)
            os.kill(row_of(shell).pid, signal.SIGSTOP)
            await record.until(Silent)
        failed = await failure_of(sleeping)
        assert (failed.failure.error, failed.kind) == ("TimedOut", Kind.ERROR)
        assert "killed, because it has not responded for " in record.of(Report)[0].reason
        await asyncio.wait_for(behind, TIMEOUT_S)

    run(tiny, Sleeper.remote(), scenario)


def test_process_that_freezes_while_it_starts_is_killed(cluster, monkeypatch):
    actor = Sleeper.remote()

    async def scenario():
        before = await asyncio.wait_for(place_when_up(actor), TIMEOUT_S)
        assert await load_weights(actor, lambda: None) is None
        assert await ping(actor, before) is Ping.UP
        frozen = process_of(actor)
        os.kill(before.pid, signal.SIGSTOP)
        monkeypatch.setattr(actor_start, "LOAD_CHECK_S", 0.5)
        monkeypatch.setattr(actor_start, "START_SILENCE_S", 1.0)
        # The next process may take longer than START_SILENCE_S to start on a busy machine.
        monkeypatch.setattr(actor_start, "process_of", lambda actor: frozen if process_of(actor) == frozen else None)
        after = await asyncio.wait_for(place_when_up(actor), TIMEOUT_S)
        assert after.pid != before.pid
        assert await ping(actor, before) is Ping.DOWN

    asyncio.run(scenario())
    ray.kill(actor)


def test_process_lost_with_its_node_is_told_from_a_crash(cluster, tiny, tmp_path):
    """The next process is on another node, which is how the engine knows that the node is lost: no failure counts."""

    async def scenario(shell, record):
        await record.until(Ready)
        (node,) = [node for node in cluster.worker_nodes if node.node_id == row_of(shell).node]
        sleeping = call(shell, "sleep_once", tmp_path / "started")
        await asyncio.to_thread(wait_for, tmp_path / "started")
        await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
        await record.until(Died)
        # Ray starts nodes in the main thread only.
        cluster.add_node(num_cpus=1, **MEMORY)
        await asyncio.wait_for(sleeping, TIMEOUT_S)
        assert row_of(shell).node != node.node_id

    run(tiny, Sleeper.remote(), scenario)
