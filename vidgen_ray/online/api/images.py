"""Pictures: made or made over while the client waits."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from fastapi import APIRouter
from PIL import Image as PILImage
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.media import read_image
from vidgen_ray.online.api import response_models
from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.error_responses import error_responses
from vidgen_ray.online.api.request_models import (
    EDIT_FIELDS,
    IMAGE_FIELDS,
    PICTURE_MULTIPLE,
    checked_names,
    nearest_size,
    one_of,
    text,
    video_fields,
    whole_number,
    yes_or_no,
)
from vidgen_ray.online.api.response_models import ImageResult, ImagesResponse, ImageUsage
from vidgen_ray.online.api.videos import IdempotencyKey, person
from vidgen_ray.online.api_error import INVALID, ApiError, invalid
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.uploads import ReceivedRequest, receive
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job, JobKind, JobState
from vidgen_ray.shot import Shot

MOST = 10
"""Pictures of one request."""
FORMATS = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}
KEEPS = {"high": 0.35, "low": 0.6}
"""`input_fidelity` -> strength of image-to-image."""
PING_S = 15
ANSWER: dict[str, Any] = {
    "description": "The pictures; with `stream` events: `.partial_image` while later stages work on, and `.completed` for each",
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/Pictures"}},
        "text/event-stream": {"schema": {"type": "string"}},
    },
}

router = APIRouter(tags=["images"])


@dataclass(frozen=True)
class _ImageOptions:
    """How the client wants its pictures."""

    event: str
    """How the names of events begin."""
    format: str
    quality: int
    as_url: bool
    stream: bool
    partial_images: int


@router.post(
    "/v1/images/generations",
    response_class=Response,
    openapi_extra=response_models.IMAGE_BODY,
    responses={**error_responses(404, 408, 409, 413, 415, 504), 200: ANSWER},
)
async def create_images(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """Make pictures, and wait for them."""
    async with receive(request, server.settings.uploads) as received:
        received.check_files(("face_image",))
        given = checked_names(received.fields, IMAGE_FIELDS)
        fields, about = await _picture(server, tenant, received, given)
    wish = _wish(given, "image_generation")
    count = whole_number(given, "n", 1, 1, MOST)
    return await _answer(request, server, tenant, _copies([fields], count), about, wish, idempotency_key, received)


@router.post(
    "/v1/images/edits",
    response_class=Response,
    openapi_extra=response_models.EDIT_BODY,
    responses={**error_responses(404, 408, 409, 413, 415, 504), 200: ANSWER},
)
async def edit_images(
    request: Request, server: ServerDep, tenant: TenantDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """Make pictures over by image-to-image, each by itself: with a LoRA, or else restyled by the prompt.

    `data` has `n` results of the first picture, then those of the next.
    """
    async with receive(request, server.settings.uploads) as received:
        if received.files("mask") or received.fields.get("mask"):
            raise invalid("mask", "is not supported: pictures are made over as a whole; leave it out", "unsupported_parameter")
        received.check_files(("image", "face_image"))
        given = checked_names(received.fields, EDIT_FIELDS)
        images = await server.image_references.store_files(tenant, received.files("image"), "image")
        if "image" in given:
            images += await server.image_references.resolve_all(tenant, given["image"], "image")
        if not images:
            raise invalid("image", "got none, give at least one", "missing_required_parameter")
        fields, about = await _picture(server, tenant, received, given)
    fields = {**_edit(given, fields), **fields}
    if fields["mode"] == "fast":
        raise invalid("mode", "fast makes nothing over: it has neither a restyle nor a LoRA's own pass; ask for quality")
    wish = _wish(given, "image_edit")
    count = whole_number(given, "n", 1, 1, MOST)
    if count * len(images) > MOST:
        raise invalid("n", f"{count} of each of {len(images)} pictures are more than {MOST}")
    starts = [
        {**fields, "image": image, **await asyncio.to_thread(_size_like, server, tenant, image, fields)} for image in images
    ]
    shots = _copies(starts, count)
    return await _answer(request, server, tenant, shots, about, wish, idempotency_key, received)


async def _picture(
    server: ServerContext, tenant: Tenant, received: ReceivedRequest, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    model, meant = server.model(given.get("model"))
    fields = {**meant, **video_fields(given, {**server.serving_profile.profile.defaults, **meant}, moving=False)}
    fields |= await person(server, tenant, received, given)
    return fields, {"model": model, "user": text(given, "safety_identifier") or text(given, "user")}


def _edit(given: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a shot with a picture an edit of it."""
    strength = given.get("strength", KEEPS[one_of(given, "input_fidelity", "low", KEEPS)])
    if "lora" in fields:
        return {"mode": "quality", "lora_strength": strength}
    return {"mode": "quality", "use_hunyuan_style": True, "style_strength": strength}


def _size_like(server: ServerContext, tenant: Tenant, image: str, fields: Mapping[str, Any]) -> dict[str, int]:
    """Where no size was asked for: that of the picture in shape, and the profile's in pixels, so that nothing is cut off."""
    path = server.job_service.uploads.find(tenant.name, image)
    if path is None or "width" in fields or "height" in fields:
        return {}
    height, width = read_image(path).shape[:2]
    default = {
        name: server.serving_profile.profile.defaults.get(name, Shot.model_fields[name].default) for name in ("width", "height")
    }
    scale = sqrt(int(default["width"]) * int(default["height"]) / (width * height))
    return dict(
        zip(("width", "height"), nearest_size(round(width * scale), round(height * scale), PICTURE_MULTIPLE), strict=True)
    )


def _wish(given: Mapping[str, Any], event: str) -> _ImageOptions:
    one_of(given, "background", "auto", ("auto", "opaque"))
    for name in ("quality", "moderation"):
        text(given, name)
    return _ImageOptions(
        event,
        format=one_of(given, "output_format", "png", FORMATS),
        quality=whole_number(given, "output_compression", 90, 0, 100),
        as_url=one_of(given, "response_format", "b64_json", ("b64_json", "url")) == "url",
        stream=yes_or_no(given, "stream"),
        partial_images=whole_number(given, "partial_images", 0, 0, 3),
    )


def _copies(shots: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` of each, with other seeds; of a given seed the next ones."""
    out = []
    for shot in shots:
        for number in range(count):
            seed = shot.get("seed")
            if seed is None or number == 0:
                out.append(shot)
                continue
            try:
                out.append({**shot, "seed": (int(seed) + number) % 2**32})
            except (TypeError, ValueError, OverflowError):
                out.append(shot)  # the shot's own check says what is wrong with it
    return out


async def _answer(
    request: Request,
    server: ServerContext,
    tenant: Tenant,
    shots: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    wish: _ImageOptions,
    idempotency_key: str | None,
    received: ReceivedRequest,
) -> Response:
    jobs = await server.job_service.accept(
        tenant,
        JobKind.IMAGE,
        shots,
        about,
        idempotency_key=idempotency_key,
        fingerprint=f"{wish.event} {received.fingerprint}"[:64],
    )
    if wish.stream:
        return EventSourceResponse(_events(server, jobs, wish), ping=PING_S, headers={"X-Accel-Buffering": "no"})
    try:
        async with asyncio.timeout(server.settings.wait_s):
            ended = [await server.job_feed.ended(job) for job in jobs]
    except TimeoutError:
        raise ApiError(
            504,
            f"The pictures took longer than {server.settings.wait_s:g} s; they go on being made, see /v1/shots/{jobs[0].id}",
            code="timeout",
            type="server_error",
            headers={"x-should-retry": "false"},
        ) from None
    done = [_completed(job) for job in ended]
    data = [
        ImageResult(url=f"{str(request.base_url).rstrip('/')}/v1/videos/{job.id}/content?variant=image")
        if wish.as_url
        else ImageResult(b64_json=await asyncio.to_thread(_encoded, server, job, wish))
        for job in done
    ]
    answer = ImagesResponse(created=int(time.time()), data=data, output_format=_format(wish), size=_size(done[0]))
    return JSONResponse(answer.model_dump(mode="json", exclude_none=True))


async def _events(server: ServerContext, jobs: Sequence[Job], wish: _ImageOptions) -> AsyncIterator[ServerSentEvent]:
    try:
        async with asyncio.timeout(server.settings.wait_s):
            for job in jobs:
                async for event in _events_of(server, job, wish):
                    yield event
    except (ApiError, TimeoutError) as error:
        known = error if isinstance(error, ApiError) else ApiError(504, "It took too long", code="timeout", type="server_error")
        detail = {"message": known.message, "type": known.type, "param": known.param, "code": known.code}
        yield ServerSentEvent(event="error", data=response_models.ErrorBody.model_validate({"error": detail}).model_dump_json())


async def _events_of(server: ServerContext, job: Job, wish: _ImageOptions) -> AsyncIterator[ServerSentEvent]:
    """What is known of the picture on its way: what stages before the last have made of it."""
    earlier = _drafts(await asyncio.to_thread(server.serving_profile.plan, job.shot)) if wish.partial_images else []
    shown, last = 0, job
    async for now in server.job_feed.follow(job):
        last = _there(now)
        # Those of a job that is done by now, too: how many there are is not to hang on how often somebody looks.
        while earlier and shown < wish.partial_images and last.state not in (JobState.CANCELLED, JobState.FAILED):
            draft = await asyncio.to_thread(_draft, server, earlier[0], wish)
            if draft is None:
                break
            earlier.pop(0)
            yield _event(wish, "partial_image", last, b64_json=draft, partial_image_index=shown)
            shown += 1
    content = await asyncio.to_thread(_encoded, server, _completed(last), wish)
    yield _event(wish, "completed", last, b64_json=content, usage=ImageUsage().model_dump())


def _event(wish: _ImageOptions, name: str, job: Job, **more: Any) -> ServerSentEvent:
    kind = f"{wish.event}.{name}"
    content = {
        "type": kind,
        "created_at": int(time.time()),
        "size": _size(job),
        "quality": "high",
        "background": "opaque",
        "output_format": _format(wish),
        **more,
    }
    return ServerSentEvent(event=kind, data=response_models.JSON.dump_json(content).decode())


def _drafts(plan: ShotPlan) -> list[str]:
    """Keys of the pictures that the shot's stages make, but for the last one."""
    return [step.key for step in plan.steps if "image" in STAGE_BY_NAME[step.stage].writes][:-1]


def _draft(server: ServerContext, key: str, wish: _ImageOptions) -> str | None:
    cache = server.outputs.stage_cache
    if not cache.has(key):
        return None
    found = cache.get(key, ("image",))
    return None if found is None else _as_text(PILImage.fromarray(found["image"]), wish)


def _encoded(server: ServerContext, job: Job, wish: _ImageOptions) -> str:
    done = server.outputs.find_by_key(job.key)
    if done is None:
        raise ApiError(404, f"The files of {job.id} are not there any more", code="expired")
    content = server.outputs.read(str(done.record().shot.id), "image.png")
    if wish.format == "png":
        return base64.b64encode(content).decode()
    return _as_text(PILImage.open(io.BytesIO(content)), wish)


def _as_text(picture: PILImage.Image, wish: _ImageOptions) -> str:
    buffer = io.BytesIO()
    options = {} if wish.format == "png" else {"quality": wish.quality}
    picture.save(buffer, FORMATS[wish.format], **options)
    return base64.b64encode(buffer.getvalue()).decode()


def _there(job: Job | None) -> Job:
    if job is None:
        raise ApiError(404, "The picture was deleted meanwhile", code="deleted")
    return job


def _completed(job: Job | None) -> Job:
    """Raises ApiError where it has ended otherwise."""
    job = _there(job)
    if job.state == JobState.CANCELLED:
        raise ApiError(409, f"{job.id} was cancelled", code="cancelled", headers={"x-should-retry": "false"})
    if job.state == JobState.FAILED:
        assert job.error is not None
        error = job.error
        # The same again would fail again.
        status, headers = 400 if error.type == INVALID else 500, {"x-should-retry": "false"}
        raise ApiError(status, error.message, code=error.code, param=error.param, type=error.type, headers=headers)
    return job


def _format(wish: _ImageOptions) -> Any:
    return wish.format


def _size(job: Job) -> str:
    return f"{job.shot.width}x{job.shot.height}"
