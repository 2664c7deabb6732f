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
from vidgen_ray.online.api_error import found, invalid, too_many_requests
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.job_service import key_reused
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.batches import Batch, OtherBatch, TooManyBatches
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.inputs import PREFIXES, StorageFull, UploadMissing
from vidgen_ray.online.store.jobs import new_id
from vidgen_ray.online.uploads import receive_json, storage_full

OPEN_BATCHES_RETRY_S = 60

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
    digest = hashlib.sha256(f"{tenant.name}\n{idempotency_key}".encode()).hexdigest()[:32]
    now = time.time()
    batch = Batch(
        id=new_id("batch") if idempotency_key is None else f"batch_{digest}",
        tenant=tenant.name,
        key_id=tenant.key_id,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        metadata=body.metadata,
        created_at=now,
        expires_at=now + body.window_s,
        output_expires_s=body.output_expires_after and body.output_expires_after.seconds,
    )
    try:
        if not batch.input_file_id.startswith(PREFIXES["batch"]) or "\0" in batch.input_file_id:
            raise UploadMissing(batch.input_file_id)
        limits = tenant.limits
        stored = await in_write_thread(server.store.batches.create, batch, limits.open_batches, limits.stored_bytes)
    except UploadMissing:
        message = "must be the id of a file that you have uploaded with the purpose batch"
        raise invalid("input_file_id", message, "file_not_found") from None
    except OtherBatch:
        raise key_reused() from None
    except TooManyBatches as error:
        raise too_many_requests(str(error), "too_many_batches", OPEN_BATCHES_RETRY_S) from None
    except StorageFull as error:
        raise storage_full(error) from None
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
