"""The page's live stream: what changed of a tenant's jobs since a place in the order of all changes, as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from vidgen_ray.online.store.jobs import Job
from vidgen_ray.online.store.store import JobStore

POLL_S = 0.4
ALIVE_S = 15
"""Between two signs of life, where nothing else is said: a proxy ends a stream that is silent for long. And between two
questions whether whoever listens still may."""


async def changes(
    store: JobStore,
    tenant: str,
    cursor: int,
    written: Callable[[Job, bool], dict[str, Any]],
    allowed: Callable[[], bool],
) -> AsyncIterator[str]:
    """Endless; `written` says what the browser gets of a job, with its whole card or only how far it is, `allowed` whether
    whoever listens still may.

    All that changed at once is one event, and its id the place to go on from: a browser that comes back misses nothing.
    """
    yield ": open\n\n"
    states: dict[str, str] = {}
    silent_s = asked_s = 0.0
    while True:
        found = await asyncio.to_thread(store.changed_since, cursor, tenant=tenant)
        cursor = found.cursor
        if found.jobs or found.deleted:
            jobs = [written(job, states.get(job.id) != job.state) for job in found.jobs]
            states |= {job.id: job.state for job in found.jobs}
            yield _event("changes", json.dumps({"jobs": jobs, "deleted": found.deleted}), cursor)
            silent_s = 0.0
        elif silent_s >= ALIVE_S:
            silent_s = 0.0
            yield ": alive\n\n"
        await asyncio.sleep(POLL_S)
        silent_s += POLL_S
        asked_s += POLL_S
        if asked_s >= ALIVE_S:
            asked_s = 0.0
            if not await asyncio.to_thread(allowed):
                yield _event("signed-out", "", cursor)
                return


def _event(name: str, data: str, cursor: int) -> str:
    return f"id: {cursor}\nevent: {name}\ndata: {data}\n\n"
