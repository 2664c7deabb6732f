"""Server-sent events of one job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from sse_starlette import EventSourceResponse, ServerSentEvent

from vidgen_ray.online.api.openapi import ServerDep, TenantDep, error_responses
from vidgen_ray.online.api.response_models import VideoDeleted, video_response
from vidgen_ray.online.api.videos import job_of
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job

EVENTS = {
    "description": "`video.queued` and `video.in_progress` events with the Video after each change. The last event is "
    "`video.completed`, `video.failed`, `video.cancelled` or `video.deleted`.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}

router = APIRouter(tags=["videos"])


@router.get("/v1/videos/{video_id}/events", response_class=EventSourceResponse, responses={**error_responses(404), 200: EVENTS})
async def video_events(
    server: ServerDep,
    tenant: TenantDep,
    video_id: str,
    last_event_id: Annotated[str | None, Header(description="Id of the last event received. It is not sent again.")] = None,
) -> EventSourceResponse:
    """Stream the events of a job until it ends. The stream of an ended job is its last event."""
    job = await job_of(server, tenant, video_id)
    return server.event_streams.respond(tenant, _events(server, job, last_event_id))


async def _events(server: ServerContext, job: Job, last_event_id: str | None) -> AsyncIterator[ServerSentEvent]:
    async for current in server.job_feed.follow(job):
        if current is None:
            yield ServerSentEvent(event="video.deleted", data=VideoDeleted(id=job.id).model_dump_json())
        # The last event is always sent: a browser that missed it would reconnect forever.
        elif current.state.is_final or str(current.version) != last_event_id:
            estimate = await server.queue_estimator.estimate(current)
            data = video_response(current, estimate, server.serving_profile.licences).model_dump_json(exclude_none=True)
            yield ServerSentEvent(data, event=f"video.{current.state}", id=str(current.version))
