"""The job store, its queue and its query plans, on SQLite and PostgreSQL."""

import multiprocessing
import os
import random
import re
import signal
import time
from bisect import bisect, insort
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from sqlalchemy import Column, Integer, MetaData, create_engine, event, inspect, make_url, text

from benchmarks.stored_jobs import MAIN_TENANT, fill
from vidgen_ray.errors import SetupError
from vidgen_ray.online.server_settings import Budget
from vidgen_ray.online.store import database
from vidgen_ray.online.store.batches import Batch, BatchLine
from vidgen_ray.online.store.database import TABLES
from vidgen_ray.online.store.jobs import FINAL, Job, JobKind, JobProgress, JobState, new_id, new_owner
from vidgen_ray.online.store.store import (
    PURGE_DELAY_S,
    IdempotencyConflict,
    JobStore,
    LimitReached,
    QueueFull,
    UnknownJob,
)
from vidgen_ray.shot import PRIORITIES, PRIORITY_STEP, Shot


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def steady():
    """Clock that cannot be set."""
    return Clock()


@pytest.fixture
def store(database_url, clock, steady):
    store = JobStore(database_url, retention_s=3600, targets=lambda tenant, event, is_line: ["hook"], now=clock, steady=steady)
    yield store
    store.close()


def new_job(tenant="ada", kind=JobKind.VIDEO, **fields) -> Job:
    shot = Shot(id="online-1", prompt="a man «ünter» 🌧", seed=7, metadata={"a": [1, None]})
    values = {"id": new_id(kind), "tenant": tenant, "kind": kind, "shot": shot, "key": "k" * 64, "created_at": 5.25}
    return Job(**{**values, "request": {"model": "tiny", "seconds": "1"}, **fields})


def test_search_finds_ended_jobs_with_all_words(store):
    def add(prompt, tenant="ada", **fields):
        shot = Shot(id="online-1", prompt=prompt, seed=7, use_hunyuan_style=True, style_prompt="Ink")
        return store.create(new_job(tenant, shot=shot, **{"state": JobState.COMPLETED, **fields}))[0].id

    boat, street = add("A red BOAT, 100% wet"), add("a «STRASSE» in the rain", request={"character": "Eileen"})
    add("a red boat", "bob")
    add("a red boat", state=JobState.QUEUED)
    store.delete(add("a red boat"), "ada")

    def found(*words):
        return [job.id for job in store.list("ada", states=FINAL, words=words).jobs]

    assert found("boat", "red") == found("BOAT") == found("0% w") == found(boat) == [boat]
    assert found("straße") == found("eileen") == [street]
    assert found("ink", "seed:7") == found("date:1970-01-01") == found("date:1970") == [street, boat]
    assert found("red", "rain") == found("0_") == found("prompt") == []
    assert found("7") == found("0") == [], "ids and seeds contain such digits"


def test_job_belongs_to_its_tenant_and_is_hidden_when_it_is_deleted(store):
    job, created = store.create(new_job())
    assert created
    assert (job.state, job.shot.metadata) == (JobState.QUEUED, {"a": [1, None]})
    assert store.get(job.id, "ada") == store.get(job.id, None) == job
    assert store.get(job.id, "bob") is None
    assert store.request_cancel(job.id, "bob") is None
    assert not store.delete(job.id, "bob")
    store.queue.claim("d", 30, 5)
    cursor = store.latest_version()
    assert store.delete(job.id, "ada")
    assert not store.delete(job.id, "ada")
    assert store.get(job.id, "ada") is None
    assert store.list("ada").jobs == []
    assert store.changed_since(cursor, tenant="ada").deleted == [(job.id, "ada")]
    assert store.queue.heartbeat("d", [job.id]) == {job.id}
    assert store.queue.end(job.id, "d", JobState.CANCELLED)


def test_idempotency_key_returns_the_jobs_of_the_first_request(store, clock):
    first, created = store.create_all([new_job(), new_job()], idempotency_key="x", fingerprint="f")
    again, created_again = store.create_all([new_job(), new_job()], idempotency_key="x", fingerprint="f", max_queued=0)
    assert (created, created_again) == (True, False)
    assert again == first
    assert store.create(new_job("bob"), idempotency_key="x", fingerprint="f")[1]
    with pytest.raises(IdempotencyConflict):
        store.create(new_job(), idempotency_key="x", fingerprint="other")
    assert len(store.list("ada").jobs) == 2
    for is_purged in (False, True):
        for job in store.list("ada").jobs:
            store.delete(job.id, "ada")
        if is_purged:
            clock.seconds += PURGE_DELAY_S + 1
            store.purge(lambda key: None, 9)
        new, created = store.create(new_job(), idempotency_key="x", fingerprint="f")
        assert created, "a key whose jobs are deleted can be used again"
        assert store.create(new_job(), idempotency_key="x", fingerprint="f") == (new, False)


def test_concurrent_calls_create_one_job_for_a_key_and_claim_each_job_once(store):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: store.create(new_job(), idempotency_key="x", fingerprint="f"), range(24)))
        assert sum(created for _, created in results) == 1
        assert len({job.id for job, _ in results}) == 1
        store.create_all([new_job() for _ in range(19)])
        claimed = [job.id for jobs in pool.map(lambda n: store.queue.claim(f"d{n}", 30, 4), range(8)) for job in jobs]
    assert len(claimed) == len(set(claimed)) == 20


def test_max_queued_and_max_open_are_enforced(store):
    store.create(new_job(), max_queued=2)
    store.create(new_job("bob"), max_queued=2)
    with pytest.raises(QueueFull):
        store.create(new_job("eve"), max_queued=2)
    with pytest.raises(LimitReached):
        store.create(new_job(), max_open=1)
    # A completed job needs no place in the queue.
    _, created = store.create(new_job(state=JobState.COMPLETED, completed_at=5.0), max_queued=2, max_open=1)
    assert created


def test_list_is_paginated(store):
    ids = [store.create(new_job())[0].id for _ in range(5)]
    store.create(new_job("bob"))
    store.create(new_job(kind=JobKind.IMAGE))
    first = store.list("ada", kinds=[JobKind.VIDEO], limit=2)
    assert ([job.id for job in first.jobs], first.has_more) == ([ids[4], ids[3]], True)
    # The job named by `after` may have been deleted.
    store.delete(ids[3], "ada")
    second = store.list("ada", kinds=[JobKind.VIDEO], limit=3, after=ids[3])
    assert ([job.id for job in second.jobs], second.has_more) == ([ids[2], ids[1], ids[0]], False)
    oldest = store.list("ada", kinds=[JobKind.VIDEO], limit=2, order="asc")
    assert [job.id for job in oldest.jobs] == [ids[0], ids[1]]
    with pytest.raises(UnknownJob):
        store.list("bob", after=ids[0])


def test_claim_takes_turns_between_tenants_and_released_jobs_keep_their_place(store):
    ada = [store.create(new_job("ada"))[0].id for _ in range(4)]
    bob = [store.create(new_job("bob"))[0].id for _ in range(2)]
    claimed = [job.id for job in store.queue.claim("d", 30, 3)]
    assert claimed == [ada[0], bob[0], ada[1]]
    store.queue.release("d", [ada[0]])
    (again,) = store.queue.claim("e", 30, 1)
    assert (again.id, again.claims) == (ada[0], 1)
    # Ada has two jobs in progress, so Bob's next job comes first.
    assert [job.id for job in store.queue.claim("d", 30, 9)] == [bob[1], ada[2], ada[3]]
    low = [store.create(new_job("ada", priority="low"))[0].id for _ in range(3)]
    normal = [store.create(new_job("bob"))[0].id for _ in range(2)]
    assert [job.id for job in store.queue.claim("d", 30, 1, reserved=1)] == normal[:1]
    assert [job.id for job in store.queue.claim("d", 30, 3, reserved=1)] == [normal[1], low[0]]
    assert store.queue.claim("d", 30, 1, reserved=1) == []
    assert [job.id for job in store.queue.claim("d", 30, 1)] == low[1:2]


def test_calls_together_are_stored_or_undone_together(store):
    first, second = (store.create(new_job())[0] for _ in range(2))
    store.queue.claim("d", 30, 1)
    with suppress(KeyError), store.queue.together():
        assert store.queue.end(first.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={})
        assert [job.id for job in store.queue.claim("d", None, 5)] == [second.id]
        raise KeyError
    assert [store.get(job.id, "ada").state for job in (first, second)] == [JobState.IN_PROGRESS, JobState.QUEUED]


def test_expired_lease_can_be_claimed_by_another_director(store, clock, steady):
    """Independent of `clock`, which is set meanwhile."""
    store.create(new_job())
    (job,) = store.queue.claim("d", 30, 5)
    for clock_s in (-10_000, 10_000, 10_000):
        clock.seconds += clock_s
        steady.seconds += 20
        assert store.queue.claim("e", 30, 5) == []
        assert store.queue.heartbeat("d", [job.id]) == set()
    assert store.queue.claim("e", 30, 5) == []
    steady.seconds += 29
    assert store.queue.claim("e", 30, 5) == []
    steady.seconds += 2
    (again,) = store.queue.claim("e", 30, 5)
    assert (again.id, again.claims) == (job.id, 2)
    # Calls of the first owner have no effect.
    assert store.queue.heartbeat("d", [job.id]) == {job.id}
    store.queue.progress("d", [JobProgress(job.id, "flux", 1, 2, 50, 1.0)])
    assert not store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={})
    assert not store.queue.end(job.id, "d", JobState.FAILED)
    assert store.get(job.id, "ada") == again


def test_one_director_claims_jobs_until_it_ends_or_is_silent(store, steady):
    fork, (names, sent) = multiprocessing.get_context("fork"), multiprocessing.Pipe()

    def other_director():
        sent.send(new_owner())
        signal.pause()

    process = fork.Process(target=other_director)
    process.start()
    own, ended, remote = new_owner(), names.recv(), f"elsewhere:{'0' * 16}-7-7:x"
    store.create(new_job())
    assert store.queue.hold(remote, 10) is None
    for _ in range(3):
        steady.seconds += 9
        assert store.queue.hold(own, 10) == store.queue.director(10) == remote
        assert store.queue.claim(own, 10, 1) == store.queue.claim(own, None, 1) == []
        assert store.queue.hold(remote, 10) is None
    store.queue.step_down(own)
    assert store.queue.director(10) == remote
    steady.seconds += 11
    assert store.queue.hold(ended, 10) is None
    assert store.queue.hold(own, 10) == ended
    process.kill()
    process.join()
    assert store.queue.hold(own, 10) is None
    assert len(store.queue.claim(own, None, 1)) == 1
    store.queue.step_down(own)
    assert store.queue.director(10) is None


def test_progress_never_decreases_and_a_completed_job_does_not_change(store, clock):
    store.create(new_job())
    (job,) = store.queue.claim("d", 30, 5)
    store.queue.progress("d", [JobProgress(job.id, "flux", 3, 4, 40, 0.0)])
    store.queue.progress("d", [JobProgress(job.id, "svd", 1, 25, 35, 0.0)])
    current = store.get(job.id, "ada")
    assert (current.progress, current.stage, current.step, current.steps) == (40, "svd", 1, 25)
    assert store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="online-1", stage_seconds={"flux": 1.5})
    completed = store.get(job.id, "ada")
    assert (completed.state, completed.progress, completed.shot_id) == (JobState.COMPLETED, 100, "online-1")
    assert (completed.completed_at, completed.expires_at) == (clock.seconds, clock.seconds + 3600)
    assert completed.stage_seconds == {"flux": 1.5}
    assert not store.queue.end(job.id, "d", JobState.FAILED)
    assert not store.queue.end(job.id, "d", JobState.CANCELLED)
    assert store.request_cancel(job.id, "ada") == completed


def test_cancel_of_a_job_in_progress_is_left_to_its_owner_while_it_has_the_lease(store, steady):
    for _ in range(2):
        store.create(new_job())
    own, lost = store.queue.claim("d", 30, 5)
    for job in (own, lost):
        requested = store.request_cancel(job.id, "ada")
        assert (requested.state, requested.cancel_requested) == (JobState.IN_PROGRESS, True)
    assert store.queue.heartbeat("d", [own.id]) == {own.id}
    assert store.queue.end(own.id, "d", JobState.CANCELLED)
    assert store.queue.claim("e", 30, 5) == []
    steady.seconds += 31
    assert store.queue.claim("e", 30, 5) == []
    assert [store.get(job.id, "ada").state for job in (own, lost)] == [JobState.CANCELLED] * 2


def test_changed_since_returns_each_change_once_and_in_order(store):
    jobs = [store.create(new_job())[0] for _ in range(3)]
    store.create(new_job("bob"))
    first = store.changed_since(0, tenant="ada", limit=2)
    assert [job.id for job in first.jobs] == [jobs[0].id, jobs[1].id]
    rest = store.changed_since(first.cursor, tenant="ada", limit=2)
    assert [job.id for job in rest.jobs] == [jobs[2].id]
    assert store.changed_since(rest.cursor, tenant="ada").jobs == []
    store.queue.claim("d", 30, 9)
    # Jobs changed by one transaction are returned together, even beyond the limit.
    assert len(store.changed_since(rest.cursor, tenant="ada", limit=1).jobs) == 3
    assert store.changed_since(store.latest_version()).jobs == []


def test_changed_since_misses_no_concurrent_change(store):
    seen, cursor, ended = [], 0, False
    with ThreadPoolExecutor(4) as pool:
        created = [pool.submit(store.create, new_job()) for _ in range(40)]
        while not ended:
            ended = all(future.done() for future in created)
            changes = store.changed_since(cursor)
            seen += [job.id for job in changes.jobs]
            cursor = changes.cursor
    assert sorted(seen) == sorted(future.result()[0].id for future in created)


def test_purge_deletes_old_jobs_and_their_unshared_files(store, clock):
    jobs = [store.create(new_job(key=key))[0] for key in ("shared", "shared", "own")]
    for job in store.queue.claim("d", 30, 9):
        store.queue.end(job.id, "d", JobState.COMPLETED, shot_id=job.key, stage_seconds={})
    store.delete(jobs[0].id, "ada")
    store.delete(jobs[2].id, "ada")
    purged = []
    assert store.purge(purged.append, 9) == 0
    clock.seconds += PURGE_DELAY_S + 1

    def fail(key):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.purge(fail, 9)
    assert (store.purge(purged.append, 1), store.purge(purged.append, 1), store.purge(purged.append, 1)) == (1, 1, 0)
    assert purged == ["own"]
    clock.seconds += 3600
    store.purge(purged.append, 9)
    assert store.list("ada").jobs == []
    clock.seconds += PURGE_DELAY_S + 1
    assert store.purge(purged.append, 9) == 1
    assert purged == ["own", "shared"]


def test_completed_job_with_missing_files_is_queued(store):
    completed = new_job(state=JobState.COMPLETED, progress=100, completed_at=5.0, shot_id="online-1")
    (with_files, without_files), _ = store.create_all(
        [completed, completed.model_copy(update={"id": "video_2"})],
        files_exist=lambda job: job.id == completed.id or not job.state.is_final,
    )
    assert (with_files.state, without_files.state, without_files.progress, without_files.shot_id) == (
        JobState.COMPLETED,
        JobState.QUEUED,
        0,
        None,
    )
    assert [job.id for job in store.queue.claim("d", 30, 9)] == ["video_2"]


def test_outbox_has_a_message_for_each_ended_job(store, clock, steady):
    job, _ = store.create(new_job())
    store.queue.claim("d", 30, 1)
    assert store.outbox.claim_due(60) is None
    store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={})
    message = store.outbox.claim_due(60)
    assert (message.event, message.job, message.target, message.tries) == ("video.completed", job.id, "hook", 0)
    assert store.outbox.claim_due(60) is None
    store.outbox.postpone(message.id, 10)
    clock.seconds += 11
    assert store.outbox.claim_due(60) is None
    clock.seconds = 0
    steady.seconds += 11
    again = store.outbox.claim_due(60)
    assert (again.id, again.tries) == (message.id, 1)
    store.outbox.delete(message.id)
    steady.seconds += 100
    assert store.outbox.claim_due(60) is None


def test_stored_jobs_survive_sigkill(store, database_url):
    def create_and_be_killed():
        other = JobStore(database_url)
        other.create(new_job(id="video_1"))
        with other._database.transaction() as transaction:
            other._rows.insert(transaction, new_job())
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=create_and_be_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [job.id for job in store.list("ada").jobs] == ["video_1"]


def test_errors_name_the_database_but_not_its_password(tmp_path):
    for url in ("nonsense", "mysql://a@b/c", "sqlite://", "sqlite:////nowhere/at/all/jobs.db"):
        with pytest.raises(SetupError, match="database"):
            JobStore(url)
    with pytest.raises(SetupError) as error:
        JobStore(f"postgresql://ada:secret@/x?host={tmp_path}")
    assert "secret" not in str(error.value)


def test_store_with_other_tables_is_refused(database_url, monkeypatch):
    other = MetaData()
    for table in TABLES.sorted_tables:
        table.to_metadata(other)
    other.tables["vidgen_outbox"].append_column(Column("added", Integer))
    with monkeypatch.context() as patched:
        patched.setattr(database, "TABLES", other)
        JobStore(database_url).close()
    with pytest.raises(SetupError, match="its tables are those of another version of vidgen-ray"):
        JobStore(database_url)


def test_failed_creation_of_tables_changes_nothing(database_url):
    engine = create_engine(make_url(database_url.replace("postgresql://", "postgresql+psycopg://")))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE vidgen_outbox (id INTEGER)"))
    with pytest.raises(SetupError, match="already exists"):
        JobStore(database_url)
    assert inspect(engine).get_table_names() == ["vidgen_outbox"]
    engine.dispose()


def test_processes_that_open_a_store_at_once_create_the_tables_once(database_url):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)

    def open_at_once():
        start.wait()
        JobStore(database_url)

    processes = [fork.Process(target=open_at_once) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


# Priorities and deadlines: order of the queue, bounded wait.


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
WAITING, RUNNING, CLAIMS = 6, 8, 360


def simulate(store, priority_of):
    """Claim many jobs of tenants that always have queued ones. Return the tenant, the number and the priority of each."""
    draw, created, queued = random.Random(7), Counter(), Counter()
    names, running, claims = {}, [], []
    while len(claims) < CLAIMS:
        for tenant in TENANTS:
            numbers = range(created[tenant], created[tenant] + WAITING - queued[tenant])
            jobs = [new_job(tenant, priority=priority_of(tenant, number)) for number in numbers]
            names |= {job.id: (tenant, number, job.priority) for job, number in zip(jobs, numbers, strict=True)}
            if jobs:
                store.create_all(jobs)
            created[tenant] += len(jobs)
            queued[tenant] = WAITING
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
    assert all(len(numbers) + WAITING > max(numbers) for numbers in started.values())


def test_late_jobs_fail_unless_they_have_started(store, clock):
    at_once, late, in_time, started = (
        store.create(new_job(start_by=clock.seconds + seconds))[0].id for seconds in (0.001, 5, 20, 5)
    )
    store.create(new_job("bob"))
    clock.seconds += 1
    assert claimed(store, 2)[0] == late, "a job that is late is not claimed"
    store.queue.fail_late()
    store.queue.release("d", [late])
    assert store.get(at_once, "ada").state == JobState.FAILED
    clock.seconds += 9
    store.queue.fail_late()
    assert [store.get(each, "ada").state for each in (late, in_time)] == [JobState.QUEUED] * 2
    failed = store.get(started, "ada")
    assert (failed.state, failed.error.code) == (JobState.FAILED, "deadline_exceeded")


# Query plans: no call scans a table.

BUDGETS = [Budget(window="day", gpu_seconds=9), Budget(window="total", cost=9)]
STORED, QUEUED = 2_000, 40

CALLS = {
    "create": lambda store, job: store.create_all([new_job(MAIN_TENANT)], max_queued=1_000, max_open=1_000),
    "create with an old idempotency key": lambda store, job: store.create_all(
        [new_job(MAIN_TENANT)], idempotency_key="old-5", fingerprint="f"
    ),
    "get": lambda store, job: store.get(job.id, MAIN_TENANT),
    "first page": lambda store, job: store.list(MAIN_TENANT, limit=20),
    "page of a kind and a state": lambda store, job: store.list(
        MAIN_TENANT, kinds=[JobKind.IMAGE], states=[JobState.CANCELLED], limit=20
    ),
    "next page": lambda store, job: store.list(MAIN_TENANT, limit=20, after=job.id),
    "search": lambda store, job: store.list(MAIN_TENANT, states=FINAL, words=["lighthouse", "seed:7"], limit=20),
    "changed_since": lambda store, job: store.changed_since(store.latest_version() - 5),
    "changed_since from the start": lambda store, job: store.changed_since(0),
    "changed_since of a tenant": lambda store, job: store.changed_since(store.latest_version() - 5, tenant=MAIN_TENANT),
    "request_cancel": lambda store, job: store.request_cancel(job.id, MAIN_TENANT),
    "delete": lambda store, job: store.delete(store.create(new_job())[0].id, "ada"),
    "purge": lambda store, job: store.purge(lambda key: None, 8),
    "open_counts": lambda store, job: store.open_counts(),
    "queue_order": lambda store, job: store.queue_order(),
    "claim": lambda store, job: store.queue.claim("d", 30, 2),
    "heartbeat": lambda store, job: store.queue.heartbeat("d", [job.id]),
    "progress": lambda store, job: store.queue.progress("d", [JobProgress(job.id, "flux", 1, 2, 50, 0.0)]),
    "completed": lambda store, job: store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={}),
    "release": lambda store, job: store.queue.release("d", [job.id]),
    "uploads": lambda store, job: store.uploads.list(MAIN_TENANT, None, 20, "desc"),
    "usage": lambda store, job: (store.usage.totals(), store.usage.rows("ada", "", "9"), store.usage.states("", BUDGETS)),
    "budgets": lambda store, job: store.usage.over([job.id], lambda key: BUDGETS),
    "webhooks": lambda store, job: store.outbox.claim_due(60),
    "lines of a batch": lambda store, job: store.batches.add(
        store.batches.running()[0],
        [BatchLine(1, 1, "a", new_job(batch="b", estimate=1.0)), BatchLine(2, 2, "b", {})],
        lambda job: True,
        BUDGETS,
    ),
    "state of a batch": lambda store, job: [
        (store.batches.counts(each), store.batches.open_jobs(each), store.batches.lines(each, 0, 9))
        for each in store.batches.list("ada", "b", 9) + store.batches.running()
    ],
    "cancelled batch": lambda store, job: store.batches.cancel(store.batches.get("b", "ada")),
}


def scans(store, statement, parameters):
    """Return the lines of the query plan that read a whole large table, or a whole index other than that of open jobs.

    That of usage is small: a row for each key, model and day.
    """
    with store.engine.begin() as connection:
        if store.engine.dialect.name == "sqlite":
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            return [
                line
                for line in plan
                if re.match(r"SCAN (?!.*by_open|vidgen_director|vidgen_usage)\S+ ?(?!.*CONSTANT)", line) and "vidgen_" in line
            ]
        # Scans of small tables can be cheaper than indexes: without them the plan scans only what no index serves.
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        plan = [row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)]
        return [line for line in plan if "Seq Scan on vidgen_jobs" in line or "Seq Scan on vidgen_idempotency" in line]


def test_no_call_scans_a_table(database_url):
    """The store has many ended jobs, some queued ones, some in progress, and old and new idempotency keys."""
    store, statements = (
        JobStore(database_url, retention_s=10 * time.time(), targets=lambda tenant, event, is_line: ["hook"]),
        [],
    )
    fill(store, STORED, QUEUED)
    names = "key_id", "endpoint", "input_file_id", "completion_window"
    store.uploads.add("ada", "x", "x", 1)
    store.batches.create(Batch(id="b", tenant="ada", metadata={}, created_at=0, expires_at=1, **dict.fromkeys(names, "x")))
    store.queue.claim("d", 3600, 5)

    def record(connection, cursor, statement, parameters, context, executemany):
        statements.append((statement, parameters[0] if executemany else parameters))

    event.listen(store.engine, "before_cursor_execute", record)
    for name, call in CALLS.items():
        (job,) = store.list(MAIN_TENANT, states=[JobState.QUEUED], limit=1).jobs
        statements.clear()
        call(store, job)
        explained = [(s, p) for s, p in statements if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)", s)]
        assert explained, name
        for statement, parameters in explained:
            assert scans(store, statement, parameters) == [], f"{name}: {statement}"
    assert scans(store, "SELECT count(*) FROM vidgen_jobs WHERE stage = 'flux'", ()), "a scan is recognised"
    store.close()
