"""Routes of batches: OpenAI's Batch API."""

from __future__ import annotations

import asyncio
import hashlib
import time

from fastapi import APIRouter
from starlette.requests import Request

from vidgen_ray.online.api.openapi import JSON, ServerDep, TenantDep, error_responses, request_body
from vidgen_ray.online.api.requests import CreateBatch
from vidgen_ray.online.api.responses import BatchPage, BatchResponse, batch_response
from vidgen_ray.online.api.video_routes import After, IdempotencyKey, Limit
from vidgen_ray.online.api_error import found, invalid
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.job_service import key_reused
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.batches import Batch, OtherBatch
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.inputs import PREFIXES
from vidgen_ray.online.store.jobs import new_id
from vidgen_ray.online.uploads import receive_json

router = APIRouter(tags=["batches"])


@router.post(
    "/v1/batches",
    response_model=BatchResponse,
    openapi_extra=request_body(CreateBatch, JSON),
    responses=error_responses(404, 408, 409, 413, 415),
)
async def create_batch(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> BatchResponse:
    """Create a batch from a file of requests. Its lines become jobs of low priority, a few at a time."""
    received = await receive_json(request, server.settings.uploads)
    body = CreateBatch.parse(received.fields)
    file = body.input_file_id
    is_batch = file.startswith(PREFIXES["batch"]) and "\0" not in file
    if not is_batch or await in_write_thread(server.job_service.uploads.use, tenant.name, file) is None:
        message = "must be the id of a file that you have uploaded with the purpose batch"
        raise invalid("input_file_id", message, "file_not_found")
    digest = hashlib.sha256(f"{tenant.name}\n{idempotency_key}".encode()).hexdigest()[:32]
    now = time.time()
    batch = Batch(
        id=new_id("batch") if idempotency_key is None else f"batch_{digest}",
        tenant=tenant.name,
        key_id=tenant.key_id,
        endpoint=body.endpoint,
        input_file_id=file,
        completion_window=body.completion_window,
        metadata=body.metadata,
        created_at=now,
        expires_at=now + body.window_s,
    )
    try:
        stored = await in_write_thread(server.store.batches.create, batch)
    except OtherBatch:
        raise key_reused() from None
    return await _response(server, stored)


@router.get("/v1/batches", response_model=BatchPage, responses=error_responses())
async def list_batches(server: ServerDep, tenant: TenantDep, after: After = None, limit: Limit = 20) -> BatchPage:
    """List the batches of the tenant, page by page."""
    listed = await asyncio.to_thread(server.store.batches.list, tenant.name, after, limit + 1)
    data = [await _response(server, batch) for batch in listed[:limit]]
    ids = [batch.id for batch in data]
    has_more = len(listed) > limit
    return BatchPage(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)


@router.get("/v1/batches/{batch_id}", response_model=BatchResponse, responses=error_responses(404))
async def get_batch(server: ServerDep, tenant: TenantDep, batch_id: str) -> BatchResponse:
    """Return the state of a batch."""
    return await _response(server, await _batch_of(server, tenant, batch_id))


@router.post("/v1/batches/{batch_id}/cancel", response_model=BatchResponse, responses=error_responses(404))
async def cancel_batch(server: ServerDep, tenant: TenantDep, batch_id: str) -> BatchResponse:
    """Cancel a batch. Lines that are not completed get an error. Has no effect on a batch that has ended."""
    await in_write_thread(server.store.batches.cancel, await _batch_of(server, tenant, batch_id))
    server.job_service.jobs_changed(has_cancels=True)
    return await _response(server, await _batch_of(server, tenant, batch_id))


async def _batch_of(server: ServerContext, tenant: Tenant, batch_id: str) -> Batch:
    return found(await asyncio.to_thread(server.store.batches.get, batch_id, tenant.name), "batch", batch_id)


async def _response(server: ServerContext, batch: Batch) -> BatchResponse:
    return batch_response(batch, await asyncio.to_thread(server.store.batches.counts, batch))
