"""Fill a job store with many jobs, of which most have ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import insert, select, text, update

from vidgen_ray.online.store.database import IDEMPOTENCY, JOBS, META
from vidgen_ray.online.store.jobs import Job, JobKind, JobState, row_of
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.shot import Shot

MAIN_TENANT = "local"
"""Owner of half of the jobs, and the tenant of a server without API keys."""
OTHER_TENANTS = 10
BATCH = 10_000
"""Rows of one INSERT."""
KINDS = [*JobKind]
ENDED = [JobState.COMPLETED] * 18 + [JobState.FAILED, JobState.CANCELLED]


def fill(store: JobStore, count: int, queued: int = 0) -> None:
    """Store `count` jobs more. The last `queued` are queued, and the others have ended."""
    with store.engine.begin() as connection:
        first = connection.execute(select(META.c.value).where(META.c.name == "changes")).scalar_one() + 1
        rows: list[dict[str, Any]] = []
        for row in _rows(first, count, queued):
            rows.append(row)
            if len(rows) == BATCH:
                connection.execute(insert(JOBS), rows)
                rows = []
        if rows:
            connection.execute(insert(JOBS), rows)
        keys = [
            {"tenant": MAIN_TENANT, "key": f"old-{n}", "fingerprint": "f", "jobs": [], "created_at": float(n)}
            for n in range(count)
        ]
        for start in range(0, count, BATCH):
            connection.execute(insert(IDEMPOTENCY), keys[start : start + BATCH])
        connection.execute(update(META).where(META.c.name == "changes").values(value=first + count))
    if store.engine.dialect.name == "postgresql":
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
            # Otherwise the server writes the new rows to the disk for minutes, while calls are measured.
            connection.execute(text("CHECKPOINT"))


def _rows(first: int, count: int, queued: int) -> Iterator[dict[str, Any]]:
    shot = Shot(id="online-0", prompt="a lighthouse in a storm, waves, dramatic light", seed=7)
    job = Job(id="", tenant="", kind=JobKind.VIDEO, shot=shot, key="", created_at=0, request={"model": "tiny", "seconds": "1"})
    template = row_of(job)
    for number in range(first, first + count):
        ended = number < first + count - queued
        yield {
            **template,
            "id": f"video_{number:032x}",
            "tenant": MAIN_TENANT if number % 2 else f"tenant-{number // 2 % OTHER_TENANTS}",
            "kind": KINDS[number % len(KINDS)],
            "state": ENDED[number % len(ENDED)] if ended else JobState.QUEUED,
            "key": f"{number:064x}",
            "seq": number,
            "place": number,
            "version": number,
            "progress": 100 if ended else 0,
            "created_at": float(number),
            "completed_at": float(number) if ended else None,
            "shot_id": f"online-{number:032x}" if ended else None,
        }
