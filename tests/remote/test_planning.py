"""Servers in the plan."""

import pytest

from tests.remote.fake_server import MODEL
from vidgen_ray.batch.line_planner import ScriptCounts
from vidgen_ray.cli.plan import _facts
from vidgen_ray.errors import SetupError, TooExpensive
from vidgen_ray.planner.choose_layout import plan_run
from vidgen_ray.planner.cluster import Cluster, Node, parse_gpus
from vidgen_ray.planner.demand import demand_of
from vidgen_ray.planner.solver import more_slots
from vidgen_ray.profile import ActorProfile, Profile
from vidgen_ray.shot import Shot
from vidgen_ray.system.quantities import money

SERVERS = ["http://first", "http://second"]


def planned(shots, gpus, *, seconds=30.0, **options):
    """Return the plan of shots of 2 s whose image is FLUX's and whose clip two servers make."""
    actors = {
        "flux": ActorProfile(weights="w", device="cuda", memory_gb=34, seconds={"flux": 4.0}),
        "remote": ActorProfile(
            weights=f"remote:{MODEL}",
            cpus=0.5,
            seconds={"remote": seconds},
            options={"servers": SERVERS, "parallel": 8, **options},
        ),
    }
    profile = Profile(name="test", about="for tests", actors=actors, price_per_gpu_hour=2)
    fields = {"video_model": "remote", "upscale_video": False, "num_frames": 50, "fps": 25}
    return plan_run(profile, demand_of(Shot(prompt="a", **fields) for _ in range(shots)), gpus)


def test_servers_limit_the_rate_and_are_part_of_layout_window_and_cost():
    cluster = parse_gpus("4x80GB")
    slow, fast = planned(400, cluster, seconds=300.0), planned(400, cluster, seconds=0.1)
    assert (slow.bottleneck, fast.bottleneck) == ("remote", "flux")
    # The reference shot has 25 frames.
    assert slow.shots_per_hour == pytest.approx(2 * 8 * 3600 / 600)
    assert fast.shots_per_hour == pytest.approx(4 * 3600 / 4)
    workers = [worker for worker in slow.layout.workers if worker.server]
    assert [(worker.server, worker.stages, worker.parallel) for worker in workers] == [
        (server, ("remote",), 8) for server in SERVERS
    ]
    assert slow.layout.window >= 2 * 8
    assert len(slow.nodes) == len(slow.shares) == len(slow.layout.slots)
    priced = planned(400, cluster, seconds=0.1, price_per_second=0.05)
    assert priced.server_cost == pytest.approx(400 * 2 * 0.05)
    assert priced.cost == pytest.approx(priced.server_cost + priced.gpu_hours * 2)
    assert priced.price_per_gpu_hour == pytest.approx(2)
    with pytest.raises(TooExpensive, match="GPU-hours and servers"):
        priced.check_cost(priced.server_cost)


def test_free_gpus_get_slots_whatever_servers_there_are():
    slots = planned(400, parse_gpus("1x80GB")).layout.slots
    added = more_slots(slots, {"flux": 4.0, "remote": 30.0}, parse_gpus("2x80GB"))
    assert [slot.stages for slot, _ in added] == [{"flux"}] * 2


def test_servers_leave_their_cpus_to_no_other_worker():
    one = Shot(prompt="a", image="a.png", video_model="remote", upscale_video=False)
    actor = ActorProfile(weights=f"remote:{MODEL}", cpus=0.5, options={"servers": SERVERS, "price_per_second": 1})
    profile = Profile(name="test", about="for tests", actors={"remote": actor})
    alone = plan_run(profile, demand_of([one] * 3), Cluster((Node((), 4, 8),)))
    assert [slot.cpus for slot in alone.layout.slots] == [0.5, 0.5]
    assert (alone.gpu_hours, alone.cost) == (0, pytest.approx(3 * one.clip_frames / one.fps))
    with pytest.raises(TooExpensive, match="for servers, --max-cost"):
        alone.check_cost(1)
    with pytest.raises(SetupError, match="no node for the workers of remote"):
        plan_run(profile, demand_of([one]), Cluster(()))
    facts = dict(_facts(alone, profile, demand_of([one] * 3), Cluster((Node((), 4, 8),)), ScriptCounts(3, 0, 0, 0)))
    assert facts["cost"] == money(alone.cost, None)
