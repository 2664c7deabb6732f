"""Routes that create images and respond with them: OpenAI's Images API."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from math import sqrt
from typing import Any

from fastapi import APIRouter
from PIL import Image as PILImage
from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.errors import VidgenError
from vidgen_ray.graph import STAGE_BY_NAME, file_sizes
from vidgen_ray.limits import MAX_RESULTS
from vidgen_ray.media.images import encode_png
from vidgen_ray.online.api.openapi import EVENT_STREAM, ServerDep, TenantDep, error_responses, request_body
from vidgen_ray.online.api.requests import CreateImages, EditImages
from vidgen_ray.online.api.responses import (
    JSON_OBJECT,
    ErrorBody,
    ImageResult,
    ImagesResponse,
    ImageUsage,
    VideoPage,
    size_text,
)
from vidgen_ray.online.api.video_routes import (
    After,
    IdempotencyKey,
    Limit,
    OrderQuery,
    cancelled_if_abandoned,
    completed_while_connected,
    face_fields,
    require_completed,
    require_existing,
    video_page,
    webhook_of,
)
from vidgen_ray.online.api_error import ApiError, invalid
from vidgen_ray.online.auth import Tenant, is_https
from vidgen_ray.online.delivered_size import nearest_image_side
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job, JobKind, JobState
from vidgen_ray.online.uploads import ReceivedRequest, receive
from vidgen_ray.outputs.records import IMAGE_FILE
from vidgen_ray.provenance.record import metadata_of, with_label
from vidgen_ray.provenance.shot_provenance import provenance_record

EDIT_STRENGTH = {"high": 0.35, "low": 0.6}
"""`input_fidelity` -> image-to-image strength."""
IMAGES: dict[str, Any] = {
    "model": ImagesResponse,
    "description": "The images. With `stream`: server-sent events, `.partial_image` for intermediate images and `.completed` "
    "for each image.",
    "content": EVENT_STREAM,
}

router = APIRouter(tags=["images"])


@router.get("/v1/images", response_model=VideoPage, responses=error_responses(404))
async def list_images(
    server: ServerDep, tenant: TenantDep, after: After = None, limit: Limit = 20, order: OrderQuery = "desc"
) -> VideoPage:
    """List the jobs of images of the tenant, page by page, in the form of videos. `DELETE /v1/videos/{id}` deletes one."""
    return await video_page(server, tenant, (JobKind.IMAGE,), after, limit, order)


@router.post(
    "/v1/images/generations",
    response_class=Response,
    openapi_extra=request_body(CreateImages),
    responses={**error_responses(404, 408, 409, 413, 415, 504), 200: IMAGES},
)
async def create_images(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """Generate images and wait for them. Closing the connection cancels them, unless the request has an `Idempotency-Key`."""
    async with receive(request, server.settings.uploads) as received:
        options = CreateImages.parse(received.fields)
        fields, returned = await image_fields(server, tenant, options)
    return await _respond(request, server, tenant, [fields], returned, options, idempotency_key, received)


@router.post(
    "/v1/images/edits",
    response_class=Response,
    openapi_extra=request_body(EditImages),
    responses={**error_responses(404, 408, 409, 413, 415, 504), 200: IMAGES},
)
async def edit_images(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """Edit images one by one with image-to-image: with the LoRA of the request, or by restyling with the prompt.

    `data` contains `n` results of the first image, then those of the next one.
    """
    async with receive(request, server.settings.uploads) as received:
        if received.fields.get("mask"):
            raise invalid("mask", "is not supported: whole images are edited. Omit it.", "unsupported_parameter")
        options = EditImages.parse(received.fields)
        images = await server.image_references.resolve_all(tenant, options.image, "image")
        if not images:
            raise invalid("image", "got none, send at least one", "missing_required_parameter")
        fields, returned = await image_fields(server, tenant, options)
    fields = {**_edit_fields(options, fields), **fields}
    if fields["mode"] == "fast":
        raise invalid("mode", "fast cannot edit images: it has neither a restyle nor a LoRA stage. Use quality.")
    count = len(options.repeated(fields)) * len(images)
    if count > MAX_RESULTS:
        raise invalid("n", f"got {count} results for {len(images)} images, must be at most {MAX_RESULTS}")
    shots = [{**fields, "image": image, **await _size_like(server, tenant, image, fields)} for image in images]
    return await _respond(request, server, tenant, shots, returned, options, idempotency_key, received)


async def image_fields(server: ServerContext, tenant: Tenant, request: CreateImages) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the shot, and the values that are returned with the job. Raises ApiError."""
    model, base = server.model(request.model, for_images=True)
    fields = {**base, **request.shot_fields({**server.serving_profile.profile.defaults, **base}), **request.size_fields()}
    fields |= await face_fields(server, tenant, request)
    user = request.safety_identifier or request.user
    names, webhook = server.stored_model(model), webhook_of(server, request.webhook)
    return fields, {**names, "user": user, "deadline_s": request.deadline_s, **webhook}


def _edit_fields(request: EditImages, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that turn a shot with a start image into an edit of that image."""
    strength = EDIT_STRENGTH[request.input_fidelity] if request.strength is None else request.strength
    if "lora" in fields:
        return {"mode": "quality", "lora_strength": strength}
    return {"mode": "quality", "use_hunyuan_style": True, "style_strength": strength}


async def _size_like(server: ServerContext, tenant: Tenant, image: str, fields: Mapping[str, Any]) -> dict[str, int]:
    """Return the image's aspect ratio at the profile's default area, so that nothing is cropped. Empty if a size is set."""
    path = await asyncio.to_thread(server.job_service.uploads.find, tenant.name, image)
    if path is None or "width" in fields or "height" in fields:
        return {}
    height, width = (await server.job_service.uploads.read(tenant, path)).shape[:2]
    rules = server.size_rules
    scale = sqrt(rules.default_width * rules.default_height / (width * height))
    return {"width": nearest_image_side(width * scale), "height": nearest_image_side(height * scale)}


async def _respond(
    request: Request,
    server: ServerContext,
    tenant: Tenant,
    shots: Sequence[Mapping[str, Any]],
    returned: Mapping[str, Any],
    options: CreateImages,
    idempotency_key: str | None,
    received: ReceivedRequest,
) -> Response:
    """Create the jobs and wait for the images, or stream events."""
    if options.stream:
        server.event_streams.check_room(tenant)
    with nullcontext() if options.stream else server.event_streams.waiting(tenant):
        jobs = await server.job_service.accept(
            tenant,
            JobKind.IMAGE,
            [each for shot in shots for each in options.repeated(shot)],
            returned,
            idempotency_key=idempotency_key,
            fingerprint=f"{options.event} {received.fingerprint}"[:64],
            is_awaited=True,
        )
        if options.stream:
            return server.event_streams.respond(tenant, _events(server, tenant, jobs, options, idempotency_key))
        ended = await completed_while_connected(server, tenant, request, jobs, idempotency_key)
    base_url = _base_url(request) if options.response_format == "url" else None
    data: list[ImageResult] = []
    for job in ended:
        if base_url is not None:
            query = await asyncio.to_thread(server.auth.signed_query, tenant, job.id, "image")
            data.append(ImageResult(id=job.id, url=f"{base_url}/v1/videos/{job.id}/content?{query}"))
        else:
            data.append(ImageResult(id=job.id, b64_json=await asyncio.to_thread(_encode_result, server, job, options)))
    output_format = "png" if options.response_format == "url" else options.output_format
    body = ImagesResponse(created=int(time.time()), data=data, output_format=output_format, size=_size(ended[0]))
    return Response(body.model_dump_json(exclude_none=True), media_type="application/json")


def _base_url(request: Request) -> str:
    scheme = "https" if is_https(request) else request.url.scheme
    return str(request.base_url.replace(scheme=scheme)).rstrip("/")


async def _events(
    server: ServerContext, tenant: Tenant, jobs: Sequence[Job], options: CreateImages, idempotency_key: str | None
) -> AsyncIterator[ServerSentEvent]:
    try:
        async with cancelled_if_abandoned(server, tenant, jobs, idempotency_key), asyncio.timeout(server.settings.wait_s):
            for job in jobs:
                async for event in _events_of(server, job, options):
                    yield event
    except (ApiError, TimeoutError) as raised:
        timeout = ApiError(504, "The image was not ready in time.", code="timeout", type="server_error")
        error = raised if isinstance(raised, ApiError) else timeout
        detail = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        yield ServerSentEvent(event="error", data=ErrorBody.model_validate({"error": detail}).model_dump_json())


async def _events_of(server: ServerContext, job: Job, options: CreateImages) -> AsyncIterator[ServerSentEvent]:
    """Yield an event for each intermediate image, as soon as its stage is done, and one for the result."""
    plan = None
    # An earlier job of the same Idempotency-Key may be of another profile.
    with suppress(VidgenError):
        if options.partial_images:
            plan = await asyncio.to_thread(plan_job, job, server.serving_profile, server.settings)
    # Those of all images of the shot but the last.
    steps = [step for step in plan.steps if "image" in STAGE_BY_NAME[step.stage].writes][:-1] if plan else []
    index, last = 0, job
    async for current in server.job_feed.follow(job):
        last = require_existing(current)
        # A job that is completed sends them, too: their number must not depend on timing.
        while plan and steps and index < options.partial_images and last.state not in (JobState.CANCELLED, JobState.FAILED):
            image = await asyncio.to_thread(_encode_intermediate, server, plan, steps[0], options)
            if image is None:
                break
            steps.pop(0)
            yield _event(options, "partial_image", last, b64_json=image, partial_image_index=index)
            index += 1
    content = await asyncio.to_thread(_encode_result, server, require_completed(last), options)
    yield _event(options, "completed", last, b64_json=content, usage=ImageUsage().model_dump())


def _event(options: CreateImages, name: str, job: Job, **fields: Any) -> ServerSentEvent:
    event = f"{options.event}.{name}"
    data = {
        "type": event,
        "created_at": int(time.time()),
        "size": _size(job),
        "quality": "high",
        "background": "opaque",
        "output_format": options.output_format,
        **fields,
    }
    return ServerSentEvent(event=event, data=JSON_OBJECT.dump_json(data).decode())


def _encode_intermediate(server: ServerContext, plan: ShotPlan, step: Step, options: CreateImages) -> str | None:
    cache = server.outputs.stage_cache
    if not cache.has(step.key):
        return None
    artefacts = cache.get(step.key, ("image",))
    if artefacts is None:
        return None
    settings = server.serving_profile.profile.provenance
    (pixels,) = with_label(artefacts["image"][None], settings)
    record = provenance_record(plan, "image", settings, until=STAGE_BY_NAME[step.stage])
    metadata = metadata_of(record)
    if options.output_format == "png":
        return base64.b64encode(encode_png(pixels, metadata)).decode()
    return _to_base64(PILImage.fromarray(pixels), options, metadata.xmp.encode() if metadata else b"")


def _encode_result(server: ServerContext, job: Job, options: CreateImages) -> str:
    finished = server.outputs.find_by_key(job.key)
    if finished is None:
        raise ApiError(404, f"The files of {job.id} no longer exist.", code="expired")
    content = server.outputs.read(str(finished.shot.id), IMAGE_FILE)
    if options.output_format == "png":
        return base64.b64encode(content).decode()
    image = PILImage.open(io.BytesIO(content))
    return _to_base64(image, options, image.info.get("xmp", b""))


def _to_base64(image: PILImage.Image, options: CreateImages, xmp: bytes) -> str:
    """Encode an image as JPEG or WebP with an XMP packet, which may be empty."""
    buffer = io.BytesIO()
    image.save(buffer, options.output_format.upper(), quality=options.output_compression, xmp=xmp)
    return base64.b64encode(buffer.getvalue()).decode()


def _size(job: Job) -> str:
    return size_text(file_sizes(job.shot)["image"])
