"""Server on a real small cluster whose nodes come and go: the director and the owner of the workers, without Serve."""

import asyncio
import math
import os
import time
from types import SimpleNamespace

import pytest
import ray
from ray.autoscaler.v2.sdk import get_cluster_resource_state

from tests.online.on_serve.applications import IMAGE_ONLY, scripted_profile
from tests.online.scripted_stages import SCRIPTED, pipes_open, steps_run
from tests.ray_workers import FAST_DETECTION, connected_cluster, gpus_of_80_gb, removed_nodes
from vidgen_ray.engine import fleet as fleet_module
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.online import job_director as director_module
from vidgen_ray.online import workers as workers_module
from vidgen_ray.online.auth import ApiKeys
from vidgen_ray.online.job_director import JobDirector
from vidgen_ray.online.server_plan import plan_for
from vidgen_ray.online.server_settings import Limits, OnlineSettings
from vidgen_ray.online.serving_profile import serving_profile
from vidgen_ray.online.store.jobs import Job, JobKind, JobState, new_id
from vidgen_ray.online.store.store import open_store
from vidgen_ray.online.workers import Workers
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.cluster import parse_gpus
from vidgen_ray.planner.layout import Layout, Slot, WorkerSpec
from vidgen_ray.render.cache_writer import CacheSettings
from vidgen_ray.shot import Shot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MEMORY = {"object_store_memory": 200 << 20}
TIMEOUT_S = 300
STAGED = Layout(
    "staged",
    (
        Slot((WorkerSpec(("instantid", "image_likeness", "clip_likeness", "flux", "lora"), 0.1, 1.0),), 40.0),
        Slot((WorkerSpec(("svd", "realesrgan"), 0.1, 1.0),), 30.0),
    ),
    encoders=1,
    window=6,
)
"""Two slots that need each other."""
POLL_S = 0.05


@pytest.fixture(scope="module")
def cluster():
    """Cluster without work nodes. Every GPU node reports one GPU of 80 GB."""
    with pytest.MonkeyPatch.context() as patch, gpus_of_80_gb(1):
        patch.setenv("PYTHONPATH", os.getcwd())
        with connected_cluster(num_cpus=0, _system_config=FAST_DETECTION, **MEMORY) as cluster:
            yield cluster


@pytest.fixture
def add_node(cluster):
    """Function that adds a node with one GPU."""
    with removed_nodes(cluster, num_cpus=8, num_gpus=1, memory=200 << 30, **MEMORY) as add:
        yield add


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Short intervals."""
    for name in ("POLL_S", "FIRST_MESSAGE_S", "MESSAGE_INTERVAL_S", "LOST_AFTER_S", "LAST_LOST_AFTER_S", "WITHDRAW_AFTER_S"):
        monkeypatch.setattr(fleet_module, name, 0.4)
    monkeypatch.setattr(workers_module, "REPLAN_POLL_S", 2.0)
    monkeypatch.setattr(director_module, "ATTACH_INTERVAL_S", 0.2)


class RunningServer:
    """Director and workers of a server in this process, without Serve, and their job store."""

    def __init__(self, profile, folder, **settings):
        self.served = serving_profile(scripted_profile(profile).model_copy(update={"layout": "auto"}))
        self._outputs = OutputFolder(folder)
        self._outputs.prepare()
        self._settings = OnlineSettings(data=str(folder), **settings)
        self._store = open_store(self._settings)

    async def start(self, layout=None):
        """Start with this layout, or the one for one GPU."""
        chosen = plan_for(self.served, parse_gpus("1x80GB"))
        self.layout = layout = layout or chosen.layout
        self.kinds = [layout.kind]

        def make_plan(cluster):
            plan = plan_for(self.served, cluster)
            self.kinds.append(plan.layout.kind)
            return plan

        stages = {stage.name: SCRIPTED[stage.name] for stage in self.served.stages}
        config = EngineConfig(
            f"server-{new_id('x')}", self.served.profile, self._outputs, stages, CacheSettings("all", wait=True)
        )
        stage_seconds = None if self._settings.gpus else chosen.stage_seconds
        self.workers = Workers(config, layout, [None] * len(layout.slots), stage_seconds, make_plan)
        await self.workers.ready()
        methods = ("actors", "add_copy", "newest_copy", "release")
        handle = SimpleNamespace(**{name: SimpleNamespace(remote=getattr(self.workers, name)) for name in methods})
        self.director = JobDirector(config, self._settings, layout, ApiKeys([], Limits()), handle)

    async def accept(self, **fields):
        shot = Shot(**{**self.served.profile.defaults, "seed": 3, **IMAGE_ONLY, **fields, "id": new_id("shot")})
        key = self.served.plan(shot).key
        job = Job(id=new_id("shot"), tenant="me", kind=JobKind.SHOT, shot=shot, key=key, created_at=time.time())
        self._store.create(job)
        await self.director.wake()
        return job.id

    async def until(self, job_id, condition):
        async with asyncio.timeout(TIMEOUT_S):
            while not condition(job := self._store.get(job_id, "me")):
                assert not job.state.is_final, job
                await asyncio.sleep(POLL_S)  # polls: the store does not send events
        return job

    async def end(self, job_id):
        return await self.until(job_id, lambda job: job.state.is_final)

    async def worker_of(self, stage):
        """Return the actor with a stage, and its node."""
        actors = await self.workers.actors("", 0)
        actor = next(actor for spec, actor in actors.workers.values() if stage in spec.stages)
        return actor, (await actor.place.remote()).node

    async def stop(self):
        await self.director.drain(0)
        for task in (*self.director._background, self.workers._replanning):
            task.cancel()
        await self.director._renderer.stop()
        await self.workers._fleet.stop()


@pytest.fixture
def server(tiny, tmp_path):
    return RunningServer(tiny, tmp_path / "data")


def run(server, scenario):
    async def to_the_end():
        try:
            await scenario()
        finally:
            await server.stop()

    asyncio.run(to_the_end())


async def missing(server, text):
    """Wait until the server says that something with this text is missing. Return its sentence."""
    async with asyncio.timeout(TIMEOUT_S):
        while text not in (reason := await server.director.missing() or ""):
            await asyncio.sleep(POLL_S)
    return reason


def test_jobs_continue_with_another_layout_on_the_nodes_that_are_left(cluster, add_node, server, pipe):
    async def scenario():
        await server.start(STAGED)
        running = await server.accept(prompt=f"steps 3 pause at 2 {pipe}")
        await server.until(running, lambda job: job.step == 1)
        _, node = await server.worker_of("svd")
        lost = next(each for each in nodes if each.node_id == node)
        cluster.remove_node(lost, allow_graceful=False)
        assert (await missing(server, "(1 slot of svd+realesrgan)")).startswith("no worker for ")
        waiting = await server.accept(prompt="behind it")
        await server.until(running, lambda job: job.step == 1 and len(steps_run(pipe)) == 4)
        with pipes_open(pipe):
            jobs = [await server.end(running), await server.end(waiting)]
        assert [(job.state, job.error) for job in jobs] == [(JobState.COMPLETED, None)] * 2
        assert jobs[0].claims == 1, "a lost node is not the fault of the job"
        # A process that is being killed may still run a step.
        assert steps_run(pipe)[:5] == [1, 2, 1, 2, 3]
        assert (server.kinds[0], server.kinds[-1]) == ("staged", "fused")
        assert await server.director.missing() is None

    nodes = [add_node(), add_node()]
    run(server, scenario)


def test_server_says_what_is_missing_until_a_node_comes(cluster, add_node, server):
    async def scenario():
        await server.start()
        cluster.remove_node(node, allow_graceful=False)
        assert "the cluster has 0 GPUs" in await missing(server, "waiting for 1 GPU")
        waiting = await server.accept(prompt="it waits")
        add_node()
        assert (await server.end(waiting)).state == JobState.COMPLETED

    node = add_node()
    run(server, scenario)


def requested():
    """Return the bundles that Ray's autoscaler reads as demand for nodes."""
    state = get_cluster_resource_state(ray._private.worker.global_worker.gcs_client)
    return [dict(bundle.resources_bundle) for gang in state.pending_gang_resource_requests for bundle in gang.requests]


async def until(condition):
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(POLL_S)


@pytest.mark.very_slow
def test_long_queue_adds_a_copy_of_the_layout_and_an_unneeded_copy_is_drained(cluster, add_node, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(director_module, "SCALE_INTERVAL_S", 0.2)
    monkeypatch.setattr(director_module, "UNNEEDED_S", math.inf)
    rounds, table = [], fleet_module.placement_group_table
    monkeypatch.setattr(fleet_module, "placement_group_table", lambda: rounds.append(None) or table())
    server = RunningServer(tiny, tmp_path / "data", gpus="1x80GB", max_queue_s=1e-3)
    pipes = [tmp_path / name for name in ("first", "second")]
    for pipe in pipes:
        os.mkfifo(pipe)

    async def scenario():
        await server.start()
        window = server.layout.window
        await server.end(await server.accept(prompt="its duration is known"))
        assert not requested()
        first = await server.accept(prompt=f"steps 3 pause at 2 {pipes[0]}")
        others = [await server.accept(prompt=f"other {number}") for number in range(window + 4)]
        await server.until(first, lambda job: job.step == 1)
        # The request ends after LAST_LOST_AFTER_S, and is repeated while the queue is too long.
        for expected in (True, False):
            await until(lambda expected=expected: bool(requested()) == expected)
        monkeypatch.setattr(fleet_module, "LAST_LOST_AFTER_S", float(TIMEOUT_S))
        await until(requested)
        assert sorted(bundle.get("GPU", 0) for bundle in requested()) == [0.0] * server.layout.encoders + [1.0]
        assert not await server.workers.newest_copy()
        add_node()
        # On the new worker: the other one is busy.
        ended = [await server.end(others.pop())]
        second = await server.accept(prompt=f"steps 3 pause at 2 {pipes[1]}")
        await server.until(second, lambda job: job.step == 1)
        engine = server.director._renderer.engine
        assert engine.window.shots == 2 * window
        monkeypatch.setattr(director_module, "UNNEEDED_S", 0.4)
        with pipes_open(pipes[0]):
            ended += [await server.end(job) for job in (first, *others)]
        # The copy stays while the second one runs there. The fleet would have stopped it in its next round.
        await until(lambda: engine.window.shots == window)
        drained_at = len(rounds)
        await until(lambda: len(rounds) > drained_at + 2)
        copy = await server.workers.newest_copy()
        assert len(copy) == len(server.layout.workers) + server.layout.encoders
        with pipes_open(pipes[1]):
            ended.append(await server.end(second))
        assert {(job.state, job.claims) for job in ended} == {(JobState.COMPLETED, 1)}
        await until(lambda: ray.available_resources().get("GPU") == 1.0)
        assert not await server.workers.newest_copy()
        assert not engine.snapshot().quarantined
        # What was planned stays.
        assert (await server.end(await server.accept(prompt="the last one"))).state == JobState.COMPLETED

    add_node()
    run(server, scenario)
