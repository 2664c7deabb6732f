"""Placement of a fleet on real small clusters: complete sets, waiting, late and lost nodes, free resources."""

import asyncio
import os
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.ray_workers import FAST_DETECTION, connected_cluster, gpus_of_80_gb, removed_nodes
from vidgen_ray.engine import fleet as fleet_module
from vidgen_ray.engine.actor_start import place_when_up
from vidgen_ray.engine.calls import ENCODER
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.fleet import Fleet
from vidgen_ray.engine.ray_cluster import live_cluster
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.layout import Layout, Slot, WorkerSpec

MEMORY = {"object_store_memory": 80 << 20}
TIMEOUT_S = 120


class Place(NamedTuple):
    """Place of a process, like `ActorPlace`, as a tuple."""

    node: str
    gpus: list[str]
    pid: int


@ray.remote(max_restarts=-1, max_task_retries=0)
class TinyActor:
    """Stands in for `Worker` and `Encoder`, which import torch."""

    def __init__(self, *_):
        pass

    def place(self):
        context = ray.get_runtime_context()
        return Place(context.get_node_id(), context.get_accelerator_ids()["GPU"], os.getpid())

    def load(self):
        """Return no failure."""

    def close(self):
        """Do nothing. There are no cache entries to write."""


class Listener:
    """Records the events of a fleet."""

    def __init__(self):
        self.workers, self.stages, self.lost, self.encoders, self.reasons = {}, {}, [], {}, []
        self.not_placed = None
        self._changed = asyncio.Event()

    def worker_started(self, name, spec, actor):
        assert name not in self.workers | self.encoders
        if spec == ENCODER:
            self.encoders[name] = actor
        else:
            self.workers[name], self.stages[name] = actor, spec.stages
        self._changed.set()

    def worker_lost(self, name):
        if self.encoders.pop(name, None) is None:
            del self.workers[name]
            self.lost.append(name)
        self._changed.set()

    def not_placeable(self, reason):
        self.not_placed = reason
        self._changed.set()

    def waiting(self, reason):
        self.reasons.append(reason)
        self._changed.set()

    async def until(self, condition):
        """Wait until the condition holds. It is checked after each event."""
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture(scope="module")
def head():
    """Cluster without work nodes. Every GPU node reports GPUs of 80 GB."""
    with gpus_of_80_gb(4), connected_cluster(num_cpus=0, _system_config=FAST_DETECTION, **MEMORY) as cluster:
        yield cluster


@pytest.fixture
def add_node(head):
    """Function that adds a node with these GPUs and 4 CPUs."""
    with removed_nodes(head, num_cpus=4, **MEMORY) as add:
        yield lambda gpus: add(num_gpus=gpus)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Short intervals, and actors that start quickly."""
    for name in ("POLL_S", "FIRST_MESSAGE_S", "MESSAGE_INTERVAL_S", "LOST_AFTER_S", "LAST_LOST_AFTER_S", "WITHDRAW_AFTER_S"):
        monkeypatch.setattr(fleet_module, name, 0.4)
    monkeypatch.setattr(fleet_module, "worker_class", lambda parallel: TinyActor)
    monkeypatch.setattr(fleet_module, "encoder_class", lambda parallel: TinyActor)


class Fleets(list):
    """Fleets of a test."""

    def __init__(self, profile, folder):
        super().__init__()
        self._profile, self._outputs = profile, OutputFolder(folder)

    def make(self, run, **options):
        """Return a fleet of a run with this name, and its listener."""
        listener = Listener()
        config = EngineConfig(run, self._profile, self._outputs, {})
        self.append(Fleet(config, listener, **options))
        return self[-1], listener

    def run(self, scenario):
        """Run a coroutine function with this object, and stop the fleets. Return its result."""

        async def run():
            try:
                return await scenario(self.make)
            finally:
                await asyncio.gather(*(fleet.stop() for fleet in self))

        return asyncio.run(run())


@pytest.fixture
def fleets(tiny, tmp_path):
    return Fleets(tiny, tmp_path)


def slot(*stages, cpus=1):
    return Slot((WorkerSpec(stages, cpus, 1.0),), 1.0)


def layout(*slots, encoders=1):
    return Layout("staged", slots, encoders, 1)


STAGED = layout(slot("flux"), slot("svd"))


async def places_of(listener):
    """Return name -> (node, GPU ids, pid) of all workers."""
    return {name: await actor.place.remote() for name, actor in listener.workers.items()}


def test_holders_are_runs_with_their_folders_and_jobs_with_their_actors_even_without_a_dashboard(monkeypatch):
    def group(name, state="CREATED", node="n1"):
        bundles = {0: {"GPU": 2.0, "CPU": 1.0}}
        return {"name": name, "state": state, "bundles": bundles, "bundles_to_node_id": {0: node}}

    film = "000001-film/1 in s3://clips/film since 2026-01-01 10:00 UTC/group/1-2-3/0"
    names = {"own": "own", "a": film, "b": "train"}
    groups = {key: group(name) for key, name in names.items()} | {"c": group("gone", "REMOVED"), "d": group("", node="")}
    monkeypatch.setattr(fleet_module, "placement_group_table", lambda: groups)
    job = {"job_id": "02", "required_resources": {"GPU": 1.0}}
    actors = [
        SimpleNamespace(name=None, class_name="Trainer", **job),
        SimpleNamespace(name="me/encoder/0", class_name="E", **job),
    ]
    known = fleet_module._JobHoldings({"02": "train-1"}, {"b": "02"}, actors)
    monkeypatch.setattr(fleet_module, "_job_holdings", lambda: known)
    run = "000001-film in s3://clips/film since 2026-01-01 10:00 UTC (2 GPUs)"
    named = f": job train-1 with placement group train (2 GPUs), {run}, job train-1 with Trainer (1 GPU)"
    assert fleet_module._holders({"own"}, "me", ["GPU"]) == named
    monkeypatch.setattr(fleet_module, "_job_holdings", lambda: 1 / 0)
    assert fleet_module._holders({"own"}, "me", ["GPU"]) == f": placement group train (2 GPUs), {run}"


@pytest.mark.slow
def test_second_staged_fleet_waits_until_the_first_one_stops(add_node, fleets):
    async def scenario(make_fleet):
        started = [make_fleet(name) for name in ("first", "second")]
        await asyncio.gather(*(fleet.start(STAGED, [None, None]) for fleet, _ in started))
        await asyncio.gather(*(listener.until(lambda li=listener: li.workers or li.reasons) for _, listener in started))
        (fleet, running), (_, waiting) = sorted(started, key=lambda pair: not pair[1].workers)
        await running.until(lambda: len(running.workers) == 2 and running.encoders)
        gpus = [gpus for _, gpus, _ in (await places_of(running)).values()]
        assert sorted(gpus) == [["0"], ["1"]]
        assert not waiting.workers
        assert waiting.reasons[0].startswith(
            "waiting for 2 GPUs and 2.5 CPUs (1 slot of flux, 1 slot of svd, 1 encoder): "
            "the cluster has 2 GPUs and 4 CPUs, 0 GPUs and 1.5 CPUs are free; others hold 2 GPUs and 2.5 CPUs: "
            f"{fleet._config.name} in {fleets._outputs.url} since "
        )
        assert " UTC (2 GPUs and 2.5 CPUs)" in waiting.reasons[0]
        await fleet.stop()
        await waiting.until(lambda: len(waiting.workers) == 2)
        await places_of(waiting)

    add_node(2)
    fleets.run(scenario)


@pytest.mark.slow
def test_slots_beyond_the_complete_set_are_requested_when_it_is_placed(add_node, fleets):
    async def scenario(make_fleet):
        fleet, listener = make_fleet("partly")
        await fleet.start(layout(*[slot("flux"), slot("flux"), slot("svd")], encoders=2), [None] * 3)
        await listener.until(lambda: len(listener.workers) == 2 and len(listener.encoders) == 2 and listener.reasons)
        assert sorted(listener.stages.values()) == [("flux",), ("svd",)]
        assert listener.reasons[0].startswith("waiting for 1 GPU and 1 CPU (1 slot of flux): the cluster has 2 GPUs")
        add_node(1)
        await listener.until(lambda: len(listener.workers) == 3)
        assert listener.not_placed is None

    add_node(2)
    fleets.run(scenario)


def test_slot_that_no_node_can_hold_is_named_and_needs_another_layout(add_node, fleets):
    async def scenario(make_fleet):
        fleet, listener = make_fleet("impossible")
        await fleet.start(layout(slot("flux", "lora", cpus=64)), [("ray.io/accelerator-type", "H100")])
        await listener.until(lambda: len(listener.reasons) == 2 and listener.not_placed)
        needs = ". No node has 1 GPU and 64 CPUs and the label ray.io/accelerator-type=H100, which one slot of flux+lora needs"
        assert listener.reasons[0].endswith(needs)
        assert listener.not_placed.endswith(needs)

    add_node(1)
    fleets.run(scenario)


@pytest.mark.slow
def test_late_node_gets_added_slots_unless_another_user_waits_and_loses_them_with_the_node(head, add_node, fleets):
    offered = []

    def more_slots(_, free):
        offered.append(free)
        return [(slot("flux"), node.label) for node in free.nodes for _ in node.gpus]

    async def scenario(make_fleet):
        fleet, listener = make_fleet("grows", more_slots=more_slots)
        waiting, waiting_listener = make_fleet("waiting")
        await fleet.start(layout(slot("flux"), encoders=2), [None])
        await listener.until(lambda: listener.workers)
        first = set(listener.workers)
        await waiting.start(layout(*map(slot, ("flux", "svd", "hunyuan", "realesrgan"))), [None] * 4)
        await waiting_listener.until(lambda: waiting_listener.reasons)
        late = add_node(2)
        await waiting_listener.until(lambda: "has 3 GPUs" in waiting_listener.reasons[-1])
        assert set(listener.workers) == first
        await waiting.stop()
        await listener.until(lambda: len(listener.workers) == 3 and len(listener.encoders) == 6)
        total = (await asyncio.to_thread(live_cluster)).total
        assert sorted(len(node.gpus) for node in total.nodes) == [0, 1, 2]
        assert offered[0].gpus == (81559 / 1024,) * 2, "those that no fleet has reserved"
        assert [node.label for node in offered[0].nodes] == [node.label for node in total.nodes]
        places = await places_of(listener)
        assert sorted(gpus for node, gpus, _ in places.values() if node == late.node_id) == [["0"], ["1"]]
        head.remove_node(late, allow_graceful=False)
        await listener.until(lambda: len(listener.lost) == 2)
        assert set(listener.workers) == first
        assert not listener.reasons, "an added slot is not waited for"

    add_node(1)
    fleets.run(scenario)


def test_lost_slot_is_reported_and_starts_again_on_a_new_node(head, add_node, fleets):
    async def scenario(make_fleet):
        fleet, listener = make_fleet("moves")
        await fleet.start(STAGED, [None, None])
        await listener.until(lambda: len(listener.workers) == 2)
        assert fleet.held_gpus == 2
        places = await places_of(listener)
        head.remove_node(nodes[0], allow_graceful=False)
        await listener.until(lambda: listener.lost and listener.reasons)
        assert fleet.held_gpus == 1
        (lost,) = listener.lost
        (kept,) = listener.workers
        assert places[lost][0] == nodes[0].node_id
        assert "(1 slot of " in listener.reasons[0]
        add_node(1)
        await listener.until(lambda: len(listener.workers) == 2)
        after = await places_of(listener)
        assert after[kept] == places[kept], "the other worker keeps running"
        assert lost not in after
        assert {listener.stages[name] for name in after} == {("flux",), ("svd",)}

    nodes = [add_node(1), add_node(1)]
    fleets.run(scenario)


def test_actor_of_a_preempted_node_restarts_on_another_node(head, add_node):
    """The node is drained for preemption, as by an autoscaler, and then lost."""

    async def scenario():
        on_node = NodeAffinitySchedulingStrategy(lost.node_id, soft=True)
        actor = TinyActor.options(num_gpus=1, max_restarts=-1, scheduling_strategy=on_node).remote()
        async with asyncio.timeout(TIMEOUT_S):
            assert (await place_when_up(actor)).node == lost.node_id
            gcs = GcsClient(address=head.address)
            deadline_ms = int(1000 * (time.time() + 20))
            assert gcs.drain_node(lost.node_id, DRAIN_NODE_REASON_PREEMPTION, "preempted", deadline_ms) == (True, "")
            head.remove_node(lost, allow_graceful=False)
            while (await place_when_up(actor)).node != other.node_id:
                pass

    lost, other = add_node(1), add_node(1)
    asyncio.run(scenario())
