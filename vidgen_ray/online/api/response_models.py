"""The answers, as OpenAI's clients read them, with what is ours beside it; and the shapes of requests for the document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, JsonValue, TypeAdapter

from vidgen_ray.online.api.request_models import (
    EDIT_FIELDS,
    IMAGE_FIELDS,
    PATH_FIELDS,
    SHOT_FIELDS,
    VIDEO_FIELDS,
)
from vidgen_ray.online.store.characters import Character
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.online.store.upload_records import Upload
from vidgen_ray.shot import Shot

JSON = TypeAdapter(dict[str, JsonValue])


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: ErrorDetail


class JobProblem(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    type: str | None = None
    param: str | None = None
    stage: str | None = None


class Video(BaseModel):
    """A clip that was asked for: OpenAI's Video, and how far it is in our stages. Times are seconds since 1970."""

    id: str
    object: Literal["video"] = "video"
    created_at: int
    status: JobState
    progress: int = Field(description="percent")
    model: str
    seconds: str
    size: str = Field(description="WIDTHxHEIGHT in pixels, before upscaling")
    prompt: str
    completed_at: int | None = None
    expires_at: int | None = None
    remixed_from_video_id: str | None = None
    error: JobProblem | None = None
    output_size: str = Field(description="WIDTHxHEIGHT of the file")
    fps: int
    num_frames: int
    seed: int
    stage: str | None = Field(None, description="the stage that is at work")
    step: int = Field(0, description="steps of this stage that are done: of denoising, or frames")
    steps: int = 0
    stage_durations: dict[str, float] = Field(description="stage -> seconds; empty for what was rendered before")
    inference_time_s: float | None = None
    user: str | None = None


class VideoPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ShotJob(BaseModel):
    """A job with the whole shot, as it may be sent again."""

    id: str
    object: Literal["shot"] = "shot"
    kind: str
    created_at: int
    status: JobState
    progress: int
    stage: str | None
    step: int
    steps: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    error: JobProblem | None
    digest: str = Field(description="the content key: the same one means the same bytes")
    attempts: int
    stage_durations: dict[str, float]
    shot: dict[str, JsonValue]


class ImageUsage(BaseModel):
    """Nothing is counted in tokens here; clients expect the numbers."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: dict[str, int] = Field(default_factory=lambda: {"image_tokens": 0, "text_tokens": 0})


class ImageResult(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: None = None


class ImagesResponse(BaseModel):
    """OpenAI's ImagesResponse."""

    created: int
    data: list[ImageResult]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "webp", "jpeg"]
    quality: Literal["high"] = "high"
    size: str
    usage: ImageUsage = ImageUsage()


class CharacterResponse(BaseModel):
    """A person who can be named in requests."""

    id: str
    object: Literal["character"] = "character"
    name: str
    created_at: int
    photos: list[str] = Field(description="ids of the uploaded files")


class CharacterPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[CharacterResponse]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False


class CharacterDeleted(BaseModel):
    id: str
    object: Literal["character.deleted"] = "character.deleted"
    deleted: Literal[True] = True


class UploadedFile(BaseModel):
    """A picture that was uploaded. Its id can stand wherever a picture is asked for."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["vision"] = "vision"
    status: Literal["processed"] = "processed"


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vidgen-ray"


class ModelPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def video_of(job: Job) -> Video:
    shot = job.shot
    scale = shot.scale if shot.generate_video and shot.upscale_video else 1
    frames = shot.num_frames if shot.generate_video else 1
    return Video(
        id=job.id,
        created_at=int(job.created_at),
        status=job.state,
        progress=job.progress,
        model=str(job.request.get("model")),
        seconds=f"{frames / shot.fps:g}",
        size=f"{shot.width}x{shot.height}",
        prompt=shot.prompt,
        completed_at=_whole(job.completed_at if job.state == JobState.COMPLETED else None),
        expires_at=_whole(job.expires_at),
        remixed_from_video_id=_text(job.request.get("remixed_from")),
        error=problem_of(job),
        output_size=f"{shot.width * scale}x{shot.height * scale}",
        fps=shot.fps,
        num_frames=frames,
        seed=shot.seed or 0,
        stage=None if job.state.is_final else job.stage,
        step=job.step,
        steps=job.steps,
        stage_durations=job.stage_seconds,
        inference_time_s=round(sum(job.stage_seconds.values()), 3) if job.stage_seconds else None,
        user=_text(job.request.get("user")),
    )


def shot_of(job: Job, shot: dict[str, JsonValue]) -> ShotJob:
    return ShotJob(
        id=job.id,
        kind=job.kind,
        created_at=int(job.created_at),
        status=job.state,
        progress=job.progress,
        stage=None if job.state.is_final else job.stage,
        step=job.step,
        steps=job.steps,
        started_at=_whole(job.started_at),
        completed_at=_whole(job.completed_at),
        expires_at=_whole(job.expires_at),
        error=problem_of(job),
        digest=job.key,
        attempts=job.attempts,
        stage_durations=job.stage_seconds,
        shot=shot,
    )


def problem_of(job: Job) -> JobProblem | None:
    return None if job.error is None else JobProblem.model_validate(job.error.model_dump())


def person_of(character: Character) -> CharacterResponse:
    return CharacterResponse(
        id=character.id, name=character.name, created_at=int(character.created_at), photos=list(character.photos)
    )


def file_of(upload: Upload) -> UploadedFile:
    return UploadedFile(id=upload.id, bytes=upload.bytes, created_at=int(upload.created_at), filename=upload.id)


def body_of(fields: dict[str, Any], files: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    """A request's body for the document: JSON, or a form that may bring files, too."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _object(fields, required)},
                "multipart/form-data": {"schema": _object({**fields, **files}, required)},
            },
        }
    }


def form_of(fields: dict[str, Any], files: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    """A body that is a form."""
    schema = _object({**fields, **files}, required)
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def json_of(fields: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    """A body that is JSON."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _object(fields, required)}}}}


def _object(fields: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    properties = dict(sorted(fields.items()))
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _text(value: JsonValue) -> str | None:
    return None if value is None else str(value)


FILE = {"type": "string", "contentMediaType": "application/octet-stream", "contentEncoding": "binary"}
FILES = {"type": "array", "items": FILE, "maxItems": 16}
_REFERENCE = {
    "description": "a picture: the id of an uploaded file, {file_id: ...}, or {image_url: a data: URL, or a URL where the "
    "server allows that}; in a form as JSON, or a file",
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"file_id": {"type": "string"}, "image_url": {"type": "string"}},
            "additionalProperties": False,
        },
    ],
}
_LORA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "scale": {"type": "number"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    ]
}
_TEXT = {"type": "string", "maxLength": 512}


def _shot_schemas() -> dict[str, Any]:
    """The fields of a Shot, each with its range, none of them required."""
    schema = Shot.model_json_schema(ref_template="#/components/schemas/{model}")
    return {name: schema["properties"][name] for name in SHOT_FIELDS}


SHOT_PARTS: dict[str, Any] = Shot.model_json_schema(ref_template="#/components/schemas/{model}")["$defs"]
"""Schemas that those of the shot's fields refer to."""
_KNOWN: dict[str, Any] = {
    **_shot_schemas(),
    "model": {"type": "string", "description": "one of GET /v1/models; none: the first"},
    "seconds": {"description": "length; num_frames = seconds x fps", "anyOf": [{"type": "string"}, {"type": "number"}]},
    "size": {"type": "string", "description": "WIDTHxHEIGHT in pixels, or auto; of a clip in multiples of 64, else of 16"},
    "input_reference": {**_REFERENCE, "description": f"the picture to start from. {_REFERENCE['description']}"},
    "image_reference": {**_REFERENCE, "description": "the same as input_reference, as vLLM-Omni calls it"},
    "face_image": {
        "description": "ids of uploaded photos of the person; in a form also files",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    },
    "character": {"type": "string", "description": "id or name of one of GET /v1/videos/characters"},
    "lora": {
        "description": "a LoRA of the server by its name, {name, scale}, or several; in a form as JSON",
        "anyOf": [*_LORA["anyOf"], {"type": "array", "items": _LORA}],
    },
    "loras": {"type": "array", "items": _LORA, "description": "the same as lora"},
    "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 200, "description": "of FLUX, and of the clip's model"},
    "guidance_scale": {"type": "number", "minimum": 0, "maximum": 30, "description": "of FLUX"},
    "style": {"type": "string", "description": "restyle towards these words: style_prompt, and use_hunyuan_style"},
    "upscale": {"type": "boolean", "description": "the same as upscale_video"},
    "extra_params": {"type": "object", "description": "further fields of a shot; in a form as JSON"},
    "n": {"type": "integer", "minimum": 1, "maximum": 10, "description": "how many pictures"},
    "response_format": {"type": "string", "enum": ["b64_json", "url"]},
    "output_format": {"type": "string", "enum": ["png", "webp", "jpeg"]},
    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100, "description": "quality of webp and jpeg"},
    "background": {"type": "string", "enum": ["auto", "opaque"]},
    "stream": {"type": "boolean", "description": "answer with events"},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
    "quality": {**_TEXT, "description": "has no effect: the profile says how well"},
    "moderation": {**_TEXT, "description": "has no effect"},
    "user": _TEXT,
    "safety_identifier": _TEXT,
    "input_fidelity": {"type": "string", "enum": ["high", "low"], "description": "high keeps more of the picture"},
    "strength": {"type": "number", "minimum": 0, "maximum": 1, "description": "0 keeps the picture; 1 keeps nothing"},
    "image": {
        "description": "ids of uploaded pictures; in a form files",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    },
}


def schemas_of(names: frozenset[str]) -> dict[str, Any]:
    return {name: _KNOWN[name] for name in names}


VIDEO_BODY = body_of(
    schemas_of(VIDEO_FIELDS), {"input_reference": FILE, "image_reference": FILE, "face_image": FILES}, ("prompt",)
)
IMAGE_BODY = json_of(schemas_of(IMAGE_FIELDS), ("prompt",))
EDIT_BODY = body_of(schemas_of(EDIT_FIELDS), {"image": FILES, "face_image": FILES}, ("prompt",))
REMIX_BODY = body_of(schemas_of(VIDEO_FIELDS), {}, ())
SHOT_BODY = json_of(
    {
        **_shot_schemas(),
        **schemas_of(frozenset(PATH_FIELDS)),
        "image": {"type": "string", "description": "id of an uploaded file"},
    },
    ("prompt",),
)
CHARACTER_BODY = form_of(
    {"name": {"type": "string", "minLength": 1, "maxLength": 128}}, {"image": FILES, "video": FILE}, ("name",)
)
FILE_BODY = form_of({"purpose": _TEXT}, {"file": FILE}, ("file",))
