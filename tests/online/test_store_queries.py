"""Query plans of the job store: no call scans a table, on SQLite and PostgreSQL."""

import re
import time
from contextlib import contextmanager
from itertools import count

import pytest
from sqlalchemy import event

from benchmarks.local_postgres import create_database
from benchmarks.stored_jobs import MAIN_TENANT, fill
from tests.online.conftest import DATABASES
from tests.online.test_store import new_job
from vidgen_ray.online.store.jobs import FINAL, JobKind, JobProgress, JobState
from vidgen_ray.online.store.store import JobStore

STORED, QUEUED = 2_000, 40
numbers = count()

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
    "progress": lambda store, job: store.queue.progress("d", [JobProgress(job.id, "flux", 1, 2, 50)]),
    "completed": lambda store, job: store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={}),
    "release": lambda store, job: store.queue.release("d", [job.id]),
    "webhooks": lambda store, job: store.outbox.claim_due(60),
}


@pytest.fixture(scope="module", params=DATABASES)
def store(request, tmp_path_factory):
    """Store with many ended jobs, some queued ones, some in progress, and old and new idempotency keys."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('store')}/jobs.db"
    else:
        url = create_database(request.getfixturevalue("postgres"), "queries")
    store = JobStore(url, retention_s=10 * time.time(), targets=lambda tenant: ["hook"])
    fill(store, STORED, QUEUED)
    store.queue.claim("d", 3600, 5)
    yield store
    store.close()


@contextmanager
def recorded(store):
    """Yield a list of the statements that the store executes, with their parameters."""
    statements = []

    def record(connection, cursor, statement, parameters, context, executemany):
        statements.append((statement, parameters))

    event.listen(store.engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(store.engine, "before_cursor_execute", record)


def scans(store, statement, parameters):
    """Return the lines of the query plan that read a whole table, or a whole index other than that of open jobs."""
    with store.engine.begin() as connection:
        if store.engine.dialect.name == "sqlite":
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            return [line for line in plan if re.match(r"SCAN (?!.*by_open)\S+ ?(?!.*CONSTANT)", line) and "vidgen_" in line]
        # Scans of small tables can be cheaper than indexes: without them the plan scans only what no index serves.
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        plan = [row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)]
        return [line for line in plan if "Seq Scan on vidgen_jobs" in line or "Seq Scan on vidgen_idempotency" in line]


def test_no_call_scans_a_table(store):
    for name, call in CALLS.items():
        (job,) = store.list(MAIN_TENANT, states=[JobState.QUEUED], limit=1).jobs
        with recorded(store) as statements:
            call(store, job)
        explained = [(s, p) for s, p in statements if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)", s)]
        assert explained, name
        for statement, parameters in explained:
            assert scans(store, statement, parameters) == [], f"{name}: {statement}"
    assert scans(store, "SELECT count(*) FROM vidgen_jobs WHERE stage = 'flux'", ()), "a scan is recognised"
