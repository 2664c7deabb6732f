"""Worker pool with fake workers in simulated time: slow calls are copied, and sick workers fail no shot."""

import asyncio
from pathlib import Path
from unittest.mock import AsyncMock, Mock

from benchmarks.fake_actors import FakeActorClient, run_in_simulated_time
from benchmarks.simulated_director import plan_of
from vidgen_ray.engine.actor_client import ActorCallFailed
from vidgen_ray.engine.calls import ENCODER, CallResult
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.retries import Kind, ShotFailed
from vidgen_ray.engine.scheduler import Work
from vidgen_ray.engine.supervisor import MAX_QUARANTINES, RELEASED
from vidgen_ray.engine.worker_checks import MIN_SLOW_S
from vidgen_ray.engine.worker_pool import WorkerPool
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.planner.layout import Layout, Slot, WorkerSpec
from vidgen_ray.profile import ActorProfile, Profile

CALL_S = 8.0


class Client(FakeActorClient):
    """Client of a worker for FLUX. `slow`: seconds of each of its calls. `error`: of each of its calls.

    Shots in `poison` fail. With `confused`, each call returns the result of the previous one. With `full`, none can be stored.
    """

    def __init__(self, name, *, slow=CALL_S, error=None, poison=(), confused=False, full=False, load_s=1):
        super().__init__(name, lambda *_: slow, self.respond, load_s=load_s)
        self.slow, self.error, self.poison, self.confused, self.full = slow, error, poison, confused, full
        self.key = "of an earlier shot"
        self.orders, self.restarts = [], 0

    def restart(self, *, blame_running=False):
        self.restarts += 1

    def respond(self, method, number, plan, names, reference):
        self.orders.append(plan.shot.id)
        if self.full:
            raise ActorCallFailed("OutOfDiskError", "the disk is full", Kind.NODE, self.name)
        if self.error or plan.shot.id in self.poison:
            message = self.error or "it broke"
            return CallResult(
                failure=Failure(stage="flux", error="RuntimeError", message=message, attempts=1, worker="w")
            ), None
        key, self.key = (self.key if self.confused else plan.steps[0].key), plan.steps[0].key
        record = StepRecord(stage="flux", key=key, weights=(), seconds=self.slow, gpu_seconds=1, cached=False)
        return CallResult((record,)), self.name


def config():
    """Return the settings of an engine with all stages."""
    actors = {stage.actor: ActorProfile(weights="tiny") for stage in STAGE_BY_NAME.values()}
    return EngineConfig("run", Profile(name="p", about="", actors=actors), OutputFolder(Path("unused")), STAGE_BY_NAME)


def pool_of(clients, window=1, servers=False):
    """Return a pool of these workers for FLUX. `servers`: each stands for one."""
    specs = [WorkerSpec(("flux",), cpus=1, gpus=1, server=client.name if servers else "") for client in clients]
    layout = Layout("fused", tuple(Slot((spec,), 0.0) for spec in specs), encoders=1, window=window)
    pool = WorkerPool(config(), layout, Mock(), Mock(over=AsyncMock()))
    for spec, client in zip(specs, clients, strict=True):
        pool.add(spec, client)
    return pool


def run(clients, shots, encoder=None):
    """Run one call for each shot, all at once. Return shot -> name of its worker or error, and the simulated seconds.

    With an encoder, the clients stand for servers.
    """

    async def main():
        pool = pool_of(clients, len(shots), servers=encoder is not None)
        if encoder is not None:
            pool.add(ENCODER, encoder)

        async def call(order):
            try:
                _, output = await pool.call(Work("flux", order), 1800, "run", plan_of(order), ["flux"], ("flux",), None)
            except ShotFailed as failed:
                return failed.failure
            return output.reference

        results = await asyncio.gather(*map(call, shots))
        pool.close()
        return dict(zip(shots, results, strict=True))

    return run_in_simulated_time(main())


def test_slow_call_is_copied_to_an_idle_worker():
    slow = Client("slow", slow=1000)
    results, seconds = run([Client("a"), slow, Client("b")], range(12))
    assert slow.orders == []
    assert set(results.values()) == {"a", "b"}
    assert seconds < 6 * CALL_S + 3 * MIN_SLOW_S


def test_sick_workers_fail_no_shot_while_a_sound_one_works():
    """Three of four fail at once with the same error: more than a shot has attempts."""
    sick = [Client(name, slow=0.1, error="CUDA error") for name in "abc"]
    results, _ = run([*sick, Client("sound")], range(6))
    assert set(results.values()) == {"sound"}


def test_servers_that_fail_quarantine_neither_others_nor_the_node():
    good, encoder = Client("good"), Client("encoder")
    bad = [Client(name, slow=0.1, error="connection refused") for name in ("liar", "down")]
    results, _ = run([good, *bad], range(30), encoder)
    assert set(results.values()) == {"good"}
    assert [bool(client.restarts) for client in (good, encoder, *bad)] == [False, False, True, True]


def test_workers_that_are_gone_leave_no_rows_when_their_calls_have_ended():
    clients = [Client("lost"), Client("stays")]

    async def main():
        pool = pool_of(clients, 2)
        calls = [pool.call(Work("flux", n), 1800, "run", plan_of(n), ["flux"], ("flux",), None) for n in range(2)]
        running = asyncio.gather(*calls)
        await asyncio.sleep(CALL_S / 2)
        pool.remove("lost", RELEASED)
        await asyncio.sleep(0.1)
        assert len(pool._clients) == 2
        await pool.until_unused(["lost"])
        await running
        await asyncio.sleep(0.1)
        (stays,) = pool._clients
        assert [*pool._workers, *pool._supervisor._clients] == [clients[1], clients[1]]
        assert set(pool._canary._left) == {stays}
        assert (pool._supervisor.given_up, pool.quarantined) == ({}, [])
        assert pool._supervisor._health._records.keys() == {clients[1]}
        pool.close()

    run_in_simulated_time(main())


def test_nodes_that_cannot_store_results_fail_no_shot_while_another_can():
    """More of them than a shot has attempts. A worker that is given up restarts, too: its process then holds no GPU memory."""
    full = [Client(name, slow=0.1, full=True) for name in "abcdef"]
    results, _ = run([*full, Client("sound")], range(6))
    assert set(results.values()) == {"sound"}
    full = [Client(name, slow=0.1, full=True) for name in "ab"]
    results, _ = run(full, range(6))
    assert {client.restarts for client in full} == {MAX_QUARANTINES}
    assert all("the disk is full" in failure.message for failure in results.values())


def test_retry_does_not_wait_for_a_worker_that_starts():
    clients = [Client("bad", slow=0.1, error="it broke"), Client("sound"), Client("late", load_s=10_000)]
    results, seconds = run(clients, range(4))
    assert set(results.values()) == {"sound"}
    assert seconds < 8 * CALL_S


def test_result_of_another_shot_is_a_failure_of_its_worker():
    results, _ = run([Client("confused", confused=True), Client("sound")], range(12))
    assert set(results.values()) == {"sound"}
