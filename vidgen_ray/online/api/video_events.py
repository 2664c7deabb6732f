"""What happens to a job, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from sse_starlette import EventSourceResponse, ServerSentEvent

from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.error_responses import error_responses
from vidgen_ray.online.api.response_models import VideoDeleted, video_of
from vidgen_ray.online.api.videos import job_of
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job

PING_S = 15
EVENTS = {
    "description": "`video.queued` and `video.in_progress` with a Video whenever it has changed; the last one is "
    "`video.completed`, `video.failed`, `video.cancelled` or `video.deleted`",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}

router = APIRouter(tags=["videos"])


@router.get("/v1/videos/{video_id}/events", response_class=EventSourceResponse, responses={**error_responses(404), 200: EVENTS})
async def video_events(
    server: ServerDep,
    tenant: TenantDep,
    video_id: str,
    last_event_id: Annotated[str | None, Header(description="the last event that was seen: it is not told again")] = None,
) -> EventSourceResponse:
    """Follow a clip until it has ended. The stream of one that has ended is its last event."""
    job = await job_of(server, tenant, video_id)
    return EventSourceResponse(_events(server, job, last_event_id), ping=PING_S)


async def _events(server: ServerContext, job: Job, last_event_id: str | None) -> AsyncIterator[ServerSentEvent]:
    async for now in server.job_feed.follow(job):
        if now is None:
            yield ServerSentEvent(event="video.deleted", data=VideoDeleted(id=job.id).model_dump_json())
        # The end is always told: a browser that has missed it would ask for ever.
        elif now.state.is_final or str(now.version) != last_event_id:
            yield ServerSentEvent(
                event=f"video.{now.state}", id=str(now.version), data=video_of(now).model_dump_json(exclude_none=True)
            )
