"""Order of the queued jobs.

The oldest job of every tenant comes first, then the second of every tenant, and so on. Jobs in progress count as if they were
ahead of the tenant's queued jobs.
"""

from __future__ import annotations

import heapq
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, select, text

from vidgen_ray.online.store.job_rows import IS_OPEN
from vidgen_ray.online.store.jobs import JobState
from vidgen_ray.online.store.schema import JOBS

# The recursion jumps from tenant to tenant in the index, instead of reading all queued jobs.
TENANTS = text(
    """
    WITH RECURSIVE tenants(tenant) AS (
        SELECT min(tenant) FROM vidgen_jobs WHERE completed_at IS NULL AND state = 'queued'
        UNION ALL
        SELECT (
            SELECT min(jobs.tenant) FROM vidgen_jobs AS jobs
            WHERE jobs.completed_at IS NULL AND jobs.state = 'queued' AND jobs.tenant > tenants.tenant
        )
        FROM tenants WHERE tenants.tenant IS NOT NULL
    )
    SELECT
        tenant,
        (
            SELECT min(seq) FROM vidgen_jobs AS jobs
            WHERE jobs.completed_at IS NULL AND jobs.state = 'queued' AND jobs.tenant = tenants.tenant
        ) AS first,
        (
            SELECT count(*) FROM vidgen_jobs AS jobs
            WHERE jobs.completed_at IS NULL AND jobs.state = 'in_progress' AND jobs.tenant = tenants.tenant
        ) AS busy
    FROM tenants WHERE tenant IS NOT NULL
    """
)
"""Tenants with queued jobs: `seq` of the oldest one, and the number of jobs in progress."""

QUEUED_OF_TENANT = (
    select(JOBS.c.seq, JOBS.c.id)
    .where(IS_OPEN, JOBS.c.state == JobState.QUEUED, JOBS.c.tenant == bindparam("owner"))
    .order_by(JOBS.c.seq)
    .limit(bindparam("most"))
)


def next_queued(connection: Connection, limit: int) -> list[str]:
    """Return the ids of the next `limit` queued jobs, in order."""
    if limit <= 0:
        return []
    turns = [(busy, first, tenant) for tenant, first, busy in connection.execute(TENANTS)]
    heapq.heapify(turns)
    ids: list[str] = []
    queued: dict[str, list[tuple[int, str]]] = {}
    while turns and len(ids) < limit:
        busy, _, tenant = heapq.heappop(turns)
        if tenant not in queued:
            rows = connection.execute(QUEUED_OF_TENANT, {"owner": tenant, "most": limit - len(ids)})
            queued[tenant] = [(seq, job_id) for seq, job_id in rows][::-1]
        ids.append(queued[tenant].pop()[1])
        if queued[tenant]:
            heapq.heappush(turns, (busy + 1, queued[tenant][-1][0], tenant))
    return ids


def _all_queued() -> Select[Any]:
    busy = (
        select(JOBS.c.tenant, func.count().label("jobs"))
        .where(IS_OPEN, JOBS.c.state == JobState.IN_PROGRESS)
        .group_by(JOBS.c.tenant)
        .subquery()
    )
    turn = func.row_number().over(partition_by=JOBS.c.tenant, order_by=JOBS.c.seq) + func.coalesce(busy.c.jobs, 0)
    return (
        select(JOBS.c.id)
        .select_from(JOBS.outerjoin(busy, JOBS.c.tenant == busy.c.tenant))
        .where(IS_OPEN, JOBS.c.state == JobState.QUEUED)
        .order_by(turn, JOBS.c.seq)
    )


ALL_QUEUED = _all_queued()
"""Ids of all queued jobs, in order."""
