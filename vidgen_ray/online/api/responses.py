"""Responses of the API: OpenAI's objects with additional fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from vidgen_ray.graph import clip_growth, clip_length, file_sizes
from vidgen_ray.licences import ShotLicences, UsedWeights
from vidgen_ray.online.delivered_size import delivered_artefact_of
from vidgen_ray.online.job_service import stored_licences
from vidgen_ray.online.queue_estimate import JobEstimate
from vidgen_ray.online.store.batches import Batch, BatchFields, Counts
from vidgen_ray.online.store.budgets import BudgetState
from vidgen_ray.online.store.inputs import Purpose, Upload
from vidgen_ray.online.store.jobs import Job, JobError, JobState, Timestamp
from vidgen_ray.safety import Consent
from vidgen_ray.shot import Priority

CANCELLED = JobError(code="cancelled", message="The job was cancelled.", type="invalid_request_error")
"""Error of a cancelled video: clients of OpenAI's API only know `failed`."""
JSON_OBJECT = TypeAdapter(dict[str, JsonValue])


class ErrorDetail(BaseModel):
    """Why a request failed."""

    message: str = Field(description="Human-readable explanation.")
    type: str = Field(description="Kind of error, for example `invalid_request_error`.")
    param: str | None = Field(description="Field that caused the error.")
    code: str = Field(description="Stable code of the error, for example `invalid_value`.")


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorDetail = Field(description="The error.")


class JobProblem(BaseModel):
    """Why a job failed."""

    model_config = ConfigDict(from_attributes=True)

    code: str = Field(description="Stable code of the error, for example `stage_failed`.")
    message: str = Field(description="Human-readable explanation.")
    type: str | None = Field(None, description="Kind of error.")
    param: str | None = Field(None, description="Field that caused the error.")
    stage: str | None = Field(None, description="Stage that failed.")


class _JobStatus(BaseModel):
    """Status of a job. Times are in seconds since 1970."""

    id: str = Field(description="Id of the job.")
    created_at: Timestamp = Field(description="Time of creation.")
    priority: Priority = Field(description="Priority among the jobs of the tenant.")
    progress: int = Field(description="Progress in percent.")
    stage: str | None = Field(description="Stage that is running.")
    step: int = Field(description="Finished steps of this stage: denoising steps, or frames.")
    steps: int = Field(description="Steps of this stage. 0 if unknown.")
    stage_durations: dict[str, float] = Field(
        validation_alias="stage_seconds", description="Stage -> seconds. Without stages whose results were cached."
    )
    completed_at: Timestamp | None = Field(description="Time at which the job ended.")
    expires_at: Timestamp | None = Field(description="Time after which the job and its files are deleted.")
    error: JobProblem | None = Field(description="Why the job failed.")


class Video(_JobStatus):
    """A job as OpenAI's Video, with further fields. Times are in seconds since 1970."""

    status: Literal["queued", "in_progress", "completed", "failed"] = Field(
        description="State of the job. A cancelled job is `failed`, and the code of its `error` is `cancelled`."
    )

    object: Literal["video"] = Field("video", description="Type of this object.")
    model: str = Field(description="Model of the request.")
    seconds: str = Field(description="Length in seconds.")
    size: str = Field(description="WIDTHxHEIGHT of the delivered file in pixels.")
    model_size: str = Field(description="WIDTHxHEIGHT in pixels that the models draw, before upscaling and cropping.")
    scale: int = Field(description="Upscaling factor. 1 without upscaling.")
    hd_size: str | None = Field(description="WIDTHxHEIGHT in pixels of the larger clip, `variant=hd`. Null if there is none.")
    outputs: list[str] | None = Field(description="Ids of all videos of a request with `n`, in order. Null for a single one.")
    prompt: str = Field(description="Prompt of the request.")
    queue_position: int | None = Field(description="Queued jobs that start before this one. Null if it is not queued.")
    eta_s: float | None = Field(description="Estimated seconds until the job ends. Null if it has ended.")
    completed_at: Timestamp | None = Field(description="Time of completion. Null if the job failed or was cancelled.")
    remixed_from_video_id: str | None = Field(description="Id of the video that this one is a remix of.")
    fps: int = Field(description="Frames per second of the delivered clip.")
    num_frames: int = Field(description="Number of frames of the delivered clip. 1 for an image.")
    seed: int = Field(description="Seed of the shot.")
    inference_time_s: float | None = Field(description="Sum of `stage_durations`.")
    cost: float | None = Field(
        description="Seconds of the stages on GPUs at the server's setting `gpu_hour_price`. Null without a price, or if the "
        "video is not completed."
    )
    user: str | None = Field(description="`user` of the request.")
    licences: list[UsedWeights] = Field(description="Weights behind the video and what it continues, with their licences.")


class ShotJob(_JobStatus):
    """A job with all fields of its shot. Times are in seconds since 1970."""

    object: Literal["shot"] = Field("shot", description="Type of this object.")
    status: JobState = Field(validation_alias="state", description="State of the job.")
    kind: str = Field(description="Route that created the job: video, image or shot.")
    started_at: Timestamp | None = Field(description="Time at which rendering started.")
    digest: str = Field(validation_alias="key", description="Content key. Jobs with the same key have identical files.")
    claims: int = Field(description="Number of times rendering was started.")
    shot: dict[str, JsonValue] = Field(description="Fields of the shot. `POST /v1/shots` accepts them.")


class Estimate(BaseModel):
    """Estimate of what a job takes, without creating it. For a request with `n`, all its results together."""

    object: Literal["estimate"] = Field("estimate", description="Type of this object.")
    model: str = Field(description="Model of the request.")
    render_s: float = Field(description="Estimated seconds from the start of the job to its end. 0 if it is rendered already.")
    stage_durations: dict[str, float] = Field(description="Stage -> estimated seconds. The last one writes the files.")
    gpu_seconds: float = Field(description="Estimated seconds of the stages that run on a GPU.")
    queue_position: int = Field(description="Queued jobs that would start before it.")
    queue_wait_s: float = Field(description="Estimated seconds in the queue.")
    cost: float | None = Field(
        description="`gpu_seconds` at the server's setting `gpu_hour_price`. Null if the server has no price."
    )
    is_rendered: bool = Field(description="True if the files exist already, so that the job would be completed at once.")
    results: int = Field(description="Number of results: `n` of the request.")
    licences: list[UsedWeights] = Field(description="Weights behind the job, with their licences.")
    seconds: str = Field(description="Length of the clip in seconds.")
    size: str = Field(description="WIDTHxHEIGHT of the delivered file in pixels.")
    model_size: str = Field(description="WIDTHxHEIGHT in pixels that the models draw, before upscaling and cropping.")
    scale: int = Field(description="Upscaling factor. 1 without upscaling.")
    hd_size: str | None = Field(description="WIDTHxHEIGHT in pixels of the larger clip, `variant=hd`. Null if there is none.")
    fps: int = Field(description="Frames per second of the delivered clip.")
    num_frames: int = Field(description="Number of frames of the delivered clip. 1 for an image.")


class ImageUsage(BaseModel):
    """Token counts that OpenAI's clients expect. Always 0."""

    input_tokens: int = Field(0, description="Always 0.")
    output_tokens: int = Field(0, description="Always 0.")
    total_tokens: int = Field(0, description="Always 0.")
    input_tokens_details: dict[str, int] = Field(
        default_factory=lambda: {"image_tokens": 0, "text_tokens": 0}, description="Always 0."
    )


class ImageResult(BaseModel):
    """One image."""

    id: str = Field(description="Id of its job, for the routes of `/v1/videos/{id}`: status, content, deletion.")
    b64_json: str | None = Field(None, description="File in base64, with response_format b64_json.")
    url: str | None = Field(None, description="URL of the file, with response_format url. Needs no API key for an hour.")
    revised_prompt: None = Field(None, description="Always null: prompts are not revised.")


class ImagesResponse(BaseModel):
    """OpenAI's ImagesResponse."""

    created: int = Field(description="Time of the response in seconds since 1970.")
    data: list[ImageResult] = Field(description="The images.")
    background: Literal["opaque"] = Field("opaque", description="Always opaque.")
    output_format: Literal["png", "webp", "jpeg"] = Field(description="File format.")
    quality: Literal["high"] = Field("high", description="Always high.")
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    usage: ImageUsage = Field(ImageUsage(), description="Token counts.")


class CharacterResponse(BaseModel):
    """A named face that requests can refer to."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(description="Id of the character.")
    object: Literal["character"] = Field("character", description="Type of this object.")
    name: str = Field(description="Name, unique per tenant.")
    created_at: Timestamp = Field(description="Time of creation in seconds since 1970.")
    photos: list[str] = Field(description="Ids of the uploaded photos.")
    consent: Consent | None = Field(description="Why the face may be used. Null if the server does not require it.")


class UploadedFile(BaseModel):
    """An uploaded image, or a file of a batch. Requests refer to it by its id."""

    id: str = Field(description="Id of the file, derived from its content.")
    object: Literal["file"] = Field("file", description="Type of this object.")
    bytes: int = Field(description="Size in bytes.")
    created_at: Timestamp = Field(description="Time of the upload in seconds since 1970.")
    filename: str = Field(description="Name that the client gave at its last upload, else the `id`.")
    purpose: Purpose = Field(description="vision for images.")
    status: Literal["processed"] = Field("processed", description="Always processed.")
    expires_at: Timestamp | None = Field(
        None, description="Time after which it is deleted. Null: when it was unused for a time."
    )


class BatchProblem(BaseModel):
    """Why a batch failed."""

    code: str = Field(description="Stable code of the error, for example `empty_file`.")
    message: str = Field(description="Human-readable explanation.")
    param: str | None = Field(None, description="Always null.")
    line: int | None = Field(None, description="Always null.")


class BatchUsage(BaseModel):
    """Token counts that OpenAI's clients expect. Always 0."""

    input_tokens: int = Field(0, description="Always 0.")
    input_tokens_details: dict[str, int] = Field(default_factory=lambda: {"cached_tokens": 0}, description="Always 0.")
    output_tokens: int = Field(0, description="Always 0.")
    output_tokens_details: dict[str, int] = Field(default_factory=lambda: {"reasoning_tokens": 0}, description="Always 0.")
    total_tokens: int = Field(0, description="Always 0.")


class RequestCounts(BaseModel):
    """Lines of a batch."""

    total: int = Field(description="Lines of the input file that are not blank. 0 until they are counted.")
    completed: int = Field(description="Lines that are completed.")
    failed: int = Field(description="Lines that are invalid, failed or were cancelled.")


class BatchResponse(BatchFields):
    """OpenAI's Batch. Times are in seconds since 1970."""

    object: Literal["batch"] = Field("batch", description="Type of this object.")
    errors: BatchProblems | None = Field(description="Why the batch failed.")
    completed_at: Timestamp | None = Field(None, description="Time at which all lines had ended.")
    failed_at: Timestamp | None = Field(None, description="Time at which it failed.")
    expired_at: Timestamp | None = Field(None, description="Time at which it ended after `expires_at`.")
    cancelled_at: Timestamp | None = Field(None, description="Time at which a cancelled batch ended.")
    request_counts: RequestCounts = Field(description="Lines by state.")
    usage: BatchUsage = Field(BatchUsage(), description="Token counts.")


class UsageRow(BaseModel):
    """Jobs of a key that have ended on a day."""

    model_config = ConfigDict(from_attributes=True)

    day: str = Field(description="UTC day, YYYY-MM-DD.")
    key_id: str = Field(description="First 12 digits of the sha256 of the key.")
    model: str = Field(description="Model of the requests, by its name in `GET /v1/models`, whatever alias they sent.")
    jobs: int = Field(description="Jobs that completed, failed or were cancelled.")
    gpu_seconds: float = Field(description="Measured GPU-seconds.")
    cost: float = Field(description="Their cost at the price of the server at that time. 0 without a price.")


class BudgetResponse(BaseModel):
    """Budget of the key of the request, in its present window."""

    window: Literal["day", "month", "total"] = Field(description="UTC day, UTC month, or the whole time.")
    unit: Literal["gpu_seconds", "cost"] = Field(description="Unit of the amounts.")
    amount: float = Field(description="What the jobs of the window may spend.")
    spent: float = Field(description="Measured until now.")
    reserved: float = Field(description="Estimated rest of open jobs.")
    left: float = Field(description="What new jobs may reserve.")
    resets_at: Timestamp | None = Field(description="End of the window. Null for the whole time.")


class Model(BaseModel):
    """A name that requests can set `model` to."""

    id: str = Field(description="Name of the model.")
    object: Literal["model"] = Field("model", description="Type of this object.")
    created: int = Field(description="Start of the server in seconds since 1970.")
    owned_by: str = Field("vidgen-ray", description="Always vidgen-ray.")
    revision: str = Field(description="Digest of weights, options, defaults and compression. Another one may give other bytes.")


class _List(BaseModel):
    """A list of objects."""

    object: Literal["list"] = Field("list", description="Type of this object.")


class _Page(_List):
    """One page of a list."""

    first_id: str | None = Field(description="Id of the first object of the page.")
    last_id: str | None = Field(description="Id of the last object of the page. Pass it as `after` to get the next page.")
    has_more: bool = Field(False, description="True if there is a next page.")


class BatchProblems(_List):
    """Errors of a batch."""

    data: list[BatchProblem] = Field(description="The errors.")


class BatchPage(_Page):
    """One page of batches."""

    data: list[BatchResponse] = Field(description="The batches, the newest first.")


class UsagePage(_Page):
    """One page of the usage of a tenant, and the budgets of the key."""

    data: list[UsageRow] = Field(description="Usage by day, key and model.")
    budgets: list[BudgetResponse] = Field(description="Budgets of the key of the request.")


class VideoPage(_Page):
    """One page of videos."""

    data: list[Video] = Field(description="The videos.")


class CharacterPage(_Page):
    """All characters of a tenant, in one page."""

    data: list[CharacterResponse] = Field(description="The characters.")


class FilePage(_Page):
    """One page of uploads."""

    data: list[UploadedFile] = Field(description="The uploads.")


class ModelPage(_List):
    """All models of the server."""

    data: list[Model] = Field(description="The models.")


class Lora(BaseModel):
    """A LoRA that requests can set `lora` to."""

    id: str = Field(description="Name of the LoRA.")
    object: Literal["lora"] = Field("lora", description="Type of this object.")


class LoraPage(_List):
    """All LoRAs of the server."""

    data: list[Lora] = Field(description="The LoRAs.")


class LoadedLora(BaseModel):
    """A LoRA as SGLang describes it."""

    nickname: str = Field(description="Name of the LoRA.")
    path: str = Field(description="Same as `nickname`. Paths of the server are not shown.")


class LoadedLoras(BaseModel):
    """All LoRAs of the server, in SGLang's format."""

    loaded_adapters: list[LoadedLora] = Field(description="The LoRAs.")
    active: dict[str, JsonValue] = Field(description="Always empty: each request names its LoRAs.")


class _Deleted(BaseModel):
    """Confirmation of a deletion."""

    id: str = Field(description="Id of the deleted object.")
    deleted: Literal[True] = Field(True, description="Always true.")


class VideoDeleted(_Deleted):
    """Confirmation that a video was deleted."""

    object: Literal["video.deleted"] = Field("video.deleted", description="Type of this object.")


class CharacterDeleted(_Deleted):
    """Confirmation that a character was deleted."""

    object: Literal["character.deleted"] = Field("character.deleted", description="Type of this object.")


class CharacterErased(_Deleted):
    """Confirmation that a character was erased, with what was made with it."""

    object: Literal["character.erased"] = Field("character.erased", description="Type of this object.")
    characters: list[str] = Field(description="Ids of the deleted characters: this one, and others that share a photo with it.")
    photos: list[str] = Field(description="Ids of the deleted photos.")
    cached_steps: int = Field(description="Deleted results of stages, such as face features.")
    videos: list[str] = Field(description="Ids of the videos and images that were made with the photos.")
    videos_deleted: bool = Field(description="True if these were deleted, too.")


class FileDeleted(_Deleted):
    """Confirmation that a file was deleted."""

    object: Literal["file"] = Field("file", description="Type of this object.")


class WebhookSecret(BaseModel):
    """Secret of the messages to receivers that requests name."""

    key: str = Field(description="`whsec_` and base64, as in Standard Webhooks.")


class Health(BaseModel):
    """The server responds."""

    status: Literal["ok"] = Field("ok", description="Always ok.")


class Readiness(BaseModel):
    """Jobs can be stored."""

    status: Literal["ok", "waiting"] = Field(description="ok, or waiting if jobs are stored but cannot run yet.")
    missing: str | None = Field(
        None, description="With status waiting: the stages without a worker, and what the server waits for."
    )


def outputs_of(job: Job) -> list[str]:
    """Return the ids of all jobs of the request that created this one, in order."""
    outputs = job.request.get("outputs")
    return [str(each) for each in outputs] if isinstance(outputs, list) else [job.id]


def video_response(job: Job, estimate: JobEstimate, licences: ShotLicences, cost: float | None) -> Video:
    """Return a job as OpenAI's Video. `cost`: of its stages."""
    shot = job.shot
    growth, sizes, delivered = clip_growth(shot), file_sizes(shot), delivered_artefact_of(job)
    frames, fps = clip_length(shot) if shot.generate_video else (1, shot.fps)
    finished = list(sizes)[-1]
    cancelled = job.state == JobState.CANCELLED
    return Video.model_validate(
        {
            **_status(job),
            "status": "failed" if cancelled else job.state,
            "error": CANCELLED if cancelled else job.error,
            "model": str(job.request.get("model")),
            "seconds": f"{frames / fps:g}",
            "size": size_text(sizes[delivered]),
            "model_size": size_text((shot.width, shot.height)),
            "scale": max((scale for scale, _ in growth.values()), default=1),
            "hd_size": None if finished == delivered else size_text(sizes[finished]),
            "outputs": job.request.get("outputs"),
            "prompt": shot.prompt,
            "queue_position": estimate.queue_position,
            "eta_s": estimate.eta_s,
            "completed_at": job.completed_at if job.state == JobState.COMPLETED else None,
            "remixed_from_video_id": job.request.get("remixed_from"),
            "fps": fps,
            "num_frames": frames,
            "seed": shot.seed or 0,
            "inference_time_s": round(sum(job.stage_seconds.values()), 3) if job.stage_seconds else None,
            "cost": cost,
            "user": job.request.get("user"),
            "licences": stored_licences(job) or licences(shot),
        }
    )


def size_text(size: tuple[int, int]) -> str:
    """Return `WIDTHxHEIGHT`."""
    return f"{size[0]}x{size[1]}"


def shot_response(job: Job, shot: dict[str, JsonValue]) -> ShotJob:
    """Return a job with the fields of its shot, as its client may send them again."""
    return ShotJob.model_validate({**_status(job), "shot": shot})


def _status(job: Job) -> dict[str, Any]:
    return {**vars(job), "stage": None if job.state.is_final else job.stage}


def file_response(upload: Upload) -> UploadedFile:
    """Return an upload as OpenAI's file."""
    return UploadedFile.model_validate({**vars(upload), "filename": upload.filename or upload.id, "purpose": upload.purpose})


def budget_response(state: BudgetState) -> BudgetResponse:
    """Return the state of a budget."""
    budget = state.budget
    amounts = {**state._asdict(), "left": state.left, "unit": budget.unit, "amount": budget.amount, "window": budget.window}
    return BudgetResponse.model_validate(amounts)


def batch_response(batch: Batch, counts: Counts) -> BatchResponse:
    """Return a batch as OpenAI's."""
    ended = {} if batch.ended_at is None else {f"{batch.status}_at": batch.ended_at}
    errors = batch.error and {"data": [batch.error]}
    return BatchResponse.model_validate({**vars(batch), **ended, "errors": errors, "request_counts": counts._asdict()})
