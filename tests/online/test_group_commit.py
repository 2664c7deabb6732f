"""Writes of several threads that share one transaction, on SQLite and PostgreSQL."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from tests.online.test_store import new_job
from vidgen_ray.online.store import database
from vidgen_ray.online.store.store import JobStore, LimitReached


@pytest.fixture
def store(database_url):
    store = JobStore(database_url)
    yield store
    store.close()


@pytest.fixture
def commits(store):
    commits = []
    event.listen(store.engine, "commit", lambda connection: commits.append(1))
    return commits


def at_once(store, calls):
    """Run the calls in threads that all wait for the write lock. Return their futures, which are done."""
    with ThreadPoolExecutor(len(calls)) as pool, store._database._writing:
        futures = [pool.submit(call) for call in calls]
        until = time.monotonic() + 60
        while len(store._database._pending) < len(calls) and time.monotonic() < until:
            time.sleep(0.001)
    return futures


def test_writes_that_wait_share_one_commit(store, commits):
    futures = at_once(store, [lambda: store.create(new_job())[0]] * 8)
    assert len(commits) == 1
    created = [future.result() for future in futures]
    assert len({job.version for job in created}) == 8
    assert {job.id for job in store.list("ada").jobs} == {job.id for job in created}


def test_writes_beyond_the_limit_of_a_group_are_run_too(store, commits, monkeypatch):
    monkeypatch.setattr(database, "MAX_GROUP", 3)
    futures = at_once(store, [lambda: store.create(new_job())[0]] * 8)
    assert len(commits) == 3
    assert {future.result().id for future in futures} == {job.id for job in store.list("ada").jobs}


def test_refused_write_undoes_only_its_own_changes(store, commits):
    store.create(new_job("bob"))
    commits.clear()
    refused = [lambda: store.create_all([new_job("bob"), new_job("bob")], idempotency_key="x", max_open=1)]
    create = [lambda: store.create(new_job())[0]] * 3
    first, failed, *others = at_once(store, [create[0], *refused, *create[1:]])
    with pytest.raises(LimitReached):
        failed.result()
    assert len(commits) == 1
    assert {job.id for job in store.list("ada").jobs} == {future.result().id for future in (first, *others)}
    assert len(store.list("bob").jobs) == 1
    assert store.find_created("bob", "x", "") == []


def test_lost_transaction_fails_every_write_of_the_group(store):
    def disconnect(transaction):
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    futures = at_once(store, [lambda: store.create(new_job()), lambda: store._database.write(disconnect)])
    for future in futures:
        with pytest.raises(OperationalError, match="disk is full"):
            future.result()
    assert store.list("ada").jobs == []
    # The next write has a new transaction.
    store.create(new_job())
    assert len(store.list("ada").jobs) == 1


def test_write_is_rolled_back_if_its_commit_fails(store):
    def fail(connection):
        raise OperationalError("COMMIT", {}, Exception("disk I/O error"))

    event.listen(store.engine, "commit", fail, once=True)
    with pytest.raises(OperationalError, match="disk I/O"):
        store.create(new_job())
    assert store.list("ada").jobs == []
