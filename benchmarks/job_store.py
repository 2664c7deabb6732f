"""Benchmark of the job store: duration of its calls with few and with many stored jobs, on SQLite and PostgreSQL.

Most of the stored jobs have ended. The
databases are on the disk of this machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from benchmarks.local_postgres import create_database, is_installed, postgres_server
from benchmarks.machine import machine, write_json
from benchmarks.stored_jobs import MAIN_TENANT, fill
from vidgen_ray.online.store.jobs import Job, JobKind, JobState, new_id
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.shot import Shot

WRITERS = 16
"""Threads that create jobs at once."""
DATABASES = ("sqlite", "postgresql")
LIMITS = {"max_queued": 1_000_000, "max_open": 1_000_000}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="1000,1000000", help="Numbers of stored jobs. Default: %(default)s.")
    parser.add_argument("--queued", type=int, default=256, help="Queued jobs among them. Default: %(default)s.")
    parser.add_argument("--calls", type=int, default=200, help="Calls of each kind. Default: %(default)s.")
    parser.add_argument("--databases", default=",".join(DATABASES), help="Default: %(default)s.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for database in args.databases.split(","):
        for jobs in map(int, args.jobs.split(",")):
            with _empty_database(database) as url:
                rows += [{"database": database, "jobs": jobs, **row} for row in measure(url, jobs, args.queued, args.calls)]
    _print(rows)
    if args.json:
        write_json(args.json, {"machine": machine(("vidgen-ray", "sqlalchemy", "psycopg")), "rows": rows})
    return 0


@contextmanager
def _empty_database(database: str) -> Iterator[str]:
    if database == "sqlite":
        folder = tempfile.mkdtemp(prefix="vidgen-store-")
        try:
            yield f"sqlite:///{folder}/jobs.db"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    elif not is_installed():
        raise SystemExit("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    else:
        with postgres_server(fsync=True) as server:
            yield create_database(server, "benchmark")


def measure(url: str, jobs: int, queued: int, calls: int) -> list[dict[str, Any]]:
    """Fill an empty database and measure the calls. Returns rows with `call`, `p50`, `p95` (ms) and `cpu` (ms per call)."""
    store, director = JobStore(url), JobStore(url)
    fill(store, jobs, queued)
    running = [job.id for job in director.queue.claim("d", 3600, min(8, queued))]
    some_id = store.list(MAIN_TENANT, limit=1).jobs[0].id
    cursor = store.latest_version()
    claimed: list[Job] = []
    cases: dict[str, Callable[[int], object]] = {
        "create": lambda n: store.create(_new_job(), idempotency_key=f"key-{n}", **LIMITS),
        "get": lambda n: store.get(some_id, MAIN_TENANT),
        "first page of 20": lambda n: store.list(MAIN_TENANT, limit=20),
        "page of 20 of a kind and state": lambda n: store.list(
            MAIN_TENANT, kinds=[JobKind.VIDEO], states=[JobState.FAILED], limit=20
        ),
        "changes of all tenants": lambda n: store.changed_since(cursor, limit=20),
        "changes of one tenant": lambda n: store.changed_since(cursor, tenant=MAIN_TENANT, limit=20),
        "counts of open jobs": lambda n: store.open_counts(),
        "order of the queue": lambda n: store.queue_order(),
        "heartbeat of 8 jobs": lambda n: director.queue.heartbeat("d", running),
        "claim of 1 job": lambda n: claimed.extend(director.queue.claim("d", 3600, 1)),
        "completion": lambda n: director.queue.end(claimed.pop().id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={}),
        "purge": lambda n: director.purge(lambda key: None, 8),
    }
    rows = [_timed(name, call, calls) for name, call in cases.items()]
    rows.append(_creates_of_threads(store, calls))
    store.close()
    director.close()
    return rows


def _timed(name: str, call: Callable[[int], object], calls: int) -> dict[str, Any]:
    call(-1)
    milliseconds: list[float] = []
    cpu_s = time.process_time()
    for number in range(calls):
        started = time.perf_counter()
        call(number)
        milliseconds.append(1000 * (time.perf_counter() - started))
    return _row(name, milliseconds, (time.process_time() - cpu_s) / calls)


def _creates_of_threads(store: JobStore, calls: int) -> dict[str, Any]:
    numbers = itertools.count()

    def create(_: int) -> float:
        started = time.perf_counter()
        store.create(_new_job(), idempotency_key=f"thread-{next(numbers)}", **LIMITS)
        return 1000 * (time.perf_counter() - started)

    cpu_s, started = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as pool:
        milliseconds = list(pool.map(create, range(4 * calls)))
    elapsed_s = time.perf_counter() - started
    row = _row(f"create, {WRITERS} threads", milliseconds, (time.process_time() - cpu_s) / len(milliseconds))
    return row | {"per_s": round(len(milliseconds) / elapsed_s)}


def _new_job() -> Job:
    shot = Shot(id="online-1", prompt="a lighthouse", seed=7)
    return Job(id=new_id("video"), tenant=MAIN_TENANT, kind=JobKind.VIDEO, shot=shot, key=new_id("k"), created_at=time.time())


def _row(call: str, milliseconds: list[float], cpu_s: float) -> dict[str, Any]:
    ordered = sorted(milliseconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"call": call, "p50": round(statistics.median(ordered), 2), "p95": round(p95, 2), "cpu": round(1000 * cpu_s, 2)}


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Calls of the job store in ms: p50 / p95 / CPU. Load of the machine: {os.getloadavg()[0]:.1f}")
    columns = list(dict.fromkeys((row["database"], row["jobs"]) for row in rows))
    table.add_column("call")
    for database, jobs in columns:
        table.add_column(f"{database}, {jobs:,} jobs", justify="right")
    for call in dict.fromkeys(row["call"] for row in rows):
        cells = {(row["database"], row["jobs"]): row for row in rows if row["call"] == call}
        texts = [f"{cells[c]['p50']:.2f} / {cells[c]['p95']:.2f} / {cells[c]['cpu']:.2f}" for c in columns]
        table.add_row(
            call,
            *[
                text + (f" ({cells[c]['per_s']}/s)" if "per_s" in cells[c] else "")
                for text, c in zip(texts, columns, strict=True)
            ],
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
