"""Wait for the jobs of a request that is answered with their results."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request

from vidgen_ray.online.api_error import INVALID, ApiError
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job, JobState


class ClientDisconnected(Exception):
    """The client closed the connection before the results were ready."""


async def completed_jobs(server: ServerContext, jobs: Sequence[Job]) -> list[Job]:
    """Wait until all jobs are completed and return them. Raises ApiError if one fails, and 504 after `wait_s` seconds."""
    try:
        async with asyncio.timeout(server.settings.wait_s):
            return [require_completed(await server.job_feed.ended(job)) for job in jobs]
    except TimeoutError:
        raise ApiError(
            504,
            f"The result took longer than {server.settings.wait_s:g} s. Its job continues, see /v1/shots/{jobs[0].id}",
            code="timeout",
            type="server_error",
            headers={"x-should-retry": "false"},
        ) from None


async def completed_while_connected(server: ServerContext, request: Request, job: Job) -> Job:
    """Wait as `completed_jobs` for one job. Raises ClientDisconnected if the client closes the connection."""
    waiting = asyncio.create_task(completed_jobs(server, [job]))
    connection = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((waiting, connection), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnected
        return waiting.result()[0]
    finally:
        waiting.cancel()
        connection.cancel()


async def _disconnected(request: Request) -> None:
    """Return when the client closes the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def require_existing(job: Job | None) -> Job:
    """Raise ApiError if the job was deleted."""
    if job is None:
        raise ApiError(404, "The result was deleted while it was rendered.", code="deleted")
    return job


def require_completed(job: Job | None) -> Job:
    """Raise ApiError if the job was deleted, cancelled or failed."""
    job = require_existing(job)
    # Retrying the request would give the same result.
    headers = {"x-should-retry": "false"}
    if job.state == JobState.CANCELLED:
        raise ApiError(409, f"{job.id} was cancelled.", code="cancelled", headers=headers)
    if job.error is not None:
        error, status = job.error, 400 if job.error.type == INVALID else 500
        raise ApiError(status, error.message, code=error.code, param=error.param, type=error.type, headers=headers)
    return job
