"""Server-sent events of the page: the changes of a tenant's jobs."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request

from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.web.page_context import HEADERS, PageContext, base_path

SESSION_CHECK_S = 15
"""Seconds between checks that the browser is still signed in."""


def event_stream(context: PageContext, request: Request, tenant: Tenant, cursor: int) -> EventSourceResponse:
    """Respond with the changes after `cursor`, until the browser disconnects or its session ends. Raises ApiError 429."""
    return context.server.event_streams.respond(tenant, _events(context, request, tenant, cursor), HEADERS)


async def _events(context: PageContext, request: Request, tenant: Tenant, cursor: int) -> AsyncIterator[ServerSentEvent]:
    """Yield one event for all jobs that changed together. Its id is the cursor from which the browser resumes."""
    # Sends the headers at once, even through proxies that wait for the first bytes of the body.
    yield ServerSentEvent(comment="open")
    base = base_path(request)
    states: dict[str, str] = {}
    checked_at = time.monotonic()
    async with aclosing(context.server.job_feed.follow_tenant(tenant.name, cursor, SESSION_CHECK_S)) as feed:
        async for changes in feed:
            if changes.jobs or changes.deleted:
                # The whole card is sent only when the state changes.
                jobs = [context.job_update(job, base, with_card=states.get(job.id) != job.state) for job in changes.jobs]
                states |= {job.id: job.state for job in changes.jobs}
                data = json.dumps({"jobs": jobs, "deleted": [job.id for job in changes.deleted]})
                yield ServerSentEvent(data, event="changes", id=str(changes.cursor))
            if time.monotonic() - checked_at >= SESSION_CHECK_S:
                checked_at = time.monotonic()
                auth = context.server.auth
                if auth.reads_session(request) and await asyncio.to_thread(auth.session_tenant, request) is None:
                    yield ServerSentEvent("", event="signed-out", id=str(changes.cursor))
                    return
