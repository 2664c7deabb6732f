"""Route that creates a video and responds with its file."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from vidgen_ray.online.api.job_waiting import ClientDisconnected, completed_while_connected
from vidgen_ray.online.api.openapi import ServerDep, TenantDep, error_responses, request_body
from vidgen_ray.online.api.requests import CreateVideo
from vidgen_ray.online.api.video_content import MEDIA_TYPES, file_response
from vidgen_ray.online.api.videos import IdempotencyKey, created_videos

CLIENT_CLOSED_REQUEST = 499
"""Status of a response that no client receives."""

router = APIRouter(tags=["videos"])


@router.post(
    "/v1/videos/sync",
    response_class=Response,
    openapi_extra=request_body(CreateVideo),
    responses={
        **error_responses(404, 408, 409, 413, 415, 504),
        200: {"description": "The file", "content": {kind: {} for kind in MEDIA_TYPES.values()}},
    },
)
async def create_video_sync(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """Create a video, wait for it and return its file, as `GET /v1/videos/{video_id}/content` does.

    The header `X-Request-Id` is the id of the video. Closing the connection cancels it, unless the request has an
    `Idempotency-Key`: then the same request waits for the same video again.
    """
    (job,) = await created_videos(request, server, tenant, idempotency_key, max_results=1)
    try:
        done = await completed_while_connected(server, request, job)
    except (ClientDisconnected, asyncio.CancelledError) as gone:
        # Ray Serve cancels the handler when its proxy loses the connection, perhaps while it cancels the video.
        if idempotency_key is None:
            await asyncio.shield(server.job_service.cancel(tenant, job.id))
        if isinstance(gone, asyncio.CancelledError):
            raise
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    response = await file_response(server, done, "video", request)
    response.headers["X-Request-Id"] = done.id
    response.headers["X-Model"] = str(done.request.get("model"))
    response.headers["X-Inference-Time-S"] = f"{sum(done.stage_seconds.values()):.3f}"
    return response
