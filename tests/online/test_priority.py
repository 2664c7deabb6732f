"""Priorities and deadlines of jobs: order of the queue, bounded wait, limit of a key."""

import random
from bisect import bisect, insort
from collections import Counter

import pytest

from tests.online.directors import SMALL, client_of, local_server, settings_with_keys
from tests.online.test_api_videos import error_of, made
from tests.online.test_store import Clock, new_job
from vidgen_ray.online.store.jobs import PRIORITY_STEP, JobState
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.shot import PRIORITIES


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(database_url, clock):
    store = JobStore(database_url, now=clock)
    yield store
    store.close()


def claimed(store, limit=99):
    return [job.id for job in store.queue.claim("d", None, limit)]


def test_higher_priority_starts_first_and_only_within_its_tenant(store):
    low, normal, other = (store.create(new_job(priority=each))[0].id for each in ("low", "normal", "normal"))
    bob = [store.create(new_job("bob", priority="low"))[0].id for _ in range(2)]
    assert store.first_overtaken("ada", "high") == normal
    assert [store.first_overtaken("ada", "normal"), store.first_overtaken("ada", "low")] == [low, None]
    high, second_high = (store.create(new_job(priority="high"))[0].id for _ in range(2))
    assert store.queue_order() == [high, bob[0], second_high, bob[1], normal, other, low]
    assert claimed(store, 3) == [high, bob[0], second_high]
    store.queue.release("d", [high])
    last, _ = store.create(new_job(priority="high"))
    assert claimed(store) == [high, bob[1], last.id, normal, other, low], "a released job keeps its place"


TENANTS = ("eve", "bob", "ada")
QUEUED, RUNNING, CLAIMS = 6, 8, 360


def simulate(store, priority_of):
    """Claim many jobs of tenants that always have queued ones. Return the tenant, the number and the priority of each."""
    draw, created, queued = random.Random(7), Counter(), Counter()
    names, running, claims = {}, [], []
    while len(claims) < CLAIMS:
        for tenant in TENANTS:
            numbers = range(created[tenant], created[tenant] + QUEUED - queued[tenant])
            jobs = [new_job(tenant, priority=priority_of(tenant, number)) for number in numbers]
            names |= {job.id: (tenant, number, job.priority) for job, number in zip(jobs, numbers, strict=True)}
            if jobs:
                store.create_all(jobs)
            created[tenant] += len(jobs)
            queued[tenant] = QUEUED
        ended = [running.pop(draw.randrange(len(running))) for _ in range(len(running) // 2)]
        with store.queue.together():
            for job_id in ended:
                store.queue.end(job_id, "d", JobState.COMPLETED)
            started = claimed(store, RUNNING - len(running))
        running += started
        claims += [names[job_id] for job_id in started]
        queued.subtract(names[job_id][0] for job_id in started)
    return claims


def of_adversary(tenant, number):
    """Return the priority of a job. Eve sends a low and a normal one, and then only high ones. Ada sends all priorities."""
    if tenant == "eve":
        return PRIORITIES[min(number, 2)]
    return "normal" if tenant == "bob" else random.Random(number).choice(PRIORITIES)


def test_wait_is_bounded_and_other_tenants_are_not_delayed(tmp_path):
    stores = [JobStore(f"sqlite:///{tmp_path}/{name}.db", durable=False) for name in ("priorities", "without")]
    claims = simulate(stores[0], of_adversary)
    without = simulate(stores[1], lambda tenant, number: "normal")
    for store in stores:
        store.close()
    assert [tenant for tenant, *_ in claims] == [tenant for tenant, *_ in without]

    overtaken = Counter()
    started = {tenant: [] for tenant in TENANTS}
    for tenant, number, priority in claims:
        later = len(started[tenant]) - bisect(started[tenant], number)
        overtaken[tenant, priority] = max(overtaken[tenant, priority], later)
        insort(started[tenant], number)
    # The bounds, which the adversary reaches: no job starts after more jobs of its tenant that were created later.
    assert (overtaken["eve", "low"], overtaken["eve", "normal"]) == (2 * PRIORITY_STEP, PRIORITY_STEP)
    assert (overtaken["eve", "high"], overtaken["bob", "normal"], overtaken["ada", "high"]) == (0, 0, 0)
    assert 0 < overtaken["ada", "normal"] <= PRIORITY_STEP
    assert 0 < overtaken["ada", "low"] <= 2 * PRIORITY_STEP
    # Nothing waits forever: all but the queued jobs have started.
    assert all(len(numbers) + QUEUED > max(numbers) for numbers in started.values())


def test_late_jobs_fail_unless_they_have_started(store, clock):
    late, in_time, started = (store.create(new_job(start_by=clock.seconds + seconds))[0].id for seconds in (5, 20, 5))
    store.create(new_job("bob"))
    assert claimed(store, 2)[0] == late
    store.queue.release("d", [late])
    clock.seconds += 10
    store.queue.fail_late()
    assert [store.get(each, "ada").state for each in (late, in_time)] == [JobState.QUEUED] * 2
    failed = store.get(started, "ada")
    assert (failed.state, failed.error.code) == (JobState.FAILED, "deadline_exceeded")


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    tenants = {"guest": {"limits": {"max_priority": "low"}}, "ada": {"limits": {"open_jobs": 9}}}
    with local_server(tiny, settings_with_keys(tmp_path_factory.mktemp("server"), tenants)) as running:
        running.director.held.set()
        yield running


def test_request_has_a_deadline_and_a_priority_that_its_key_allows(server):
    ada, guest = client_of(server, "ada"), client_of(server, "guest")
    _, second = (made(ada, priority=each) for each in ("normal", "high"))
    assert (second["priority"], second["queue_position"]) == ("high", 0)
    assert ada.post(f"/v1/videos/{second['id']}/remix", json={"prompt": "x"}).json()["priority"] == "normal"
    assert "'high'" in error_of(ada.post("/v1/videos", json={**SMALL, "priority": 9}), 400)["message"]

    assert made(guest)["priority"] == "low"
    error = error_of(guest.post("/v1/videos", json={**SMALL, "priority": "high"}), 400)
    assert (error["param"], error["message"]) == ("priority", "priority: got high, must be low with this key")
    shot = guest.post("/v1/shots", json={"prompt": "x", "width": 64, "height": 64, "num_frames": 2, "priority": "low"}).json()
    assert shot["priority"] == "low"
    assert "priority" not in shot["shot"]

    late, patient = made(ada, deadline_s=1e-6), made(ada, deadline_s=600)
    server.store.queue.fail_late()
    failed = ada.get(f"/v1/videos/{late['id']}").json()
    assert failed["status"] == "failed"
    assert (failed["error"]["code"], failed["error"]["param"]) == ("deadline_exceeded", "deadline_s")
    assert ada.get(f"/v1/videos/{patient['id']}").json()["status"] == "queued"
    assert error_of(ada.post("/v1/videos", json={**SMALL, "deadline_s": 0}), 400)["param"] == "deadline_s"
