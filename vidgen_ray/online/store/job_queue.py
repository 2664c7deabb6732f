"""Order of the queued jobs.

The oldest job of every tenant comes first, then the second of every tenant, and so on. Jobs in progress count as if they were
ahead of the tenant's queued jobs.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, select

from vidgen_ray.online.store.job_rows import IS_OPEN
from vidgen_ray.online.store.jobs import JobState
from vidgen_ray.online.store.schema import JOBS


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
