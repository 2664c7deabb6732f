"""Answers of the server. Fields that this version does not know are kept as attributes."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Priority = Literal["low", "normal", "high"]
Variant = Literal["video", "hd", "sd", "image", "thumbnail", "spritesheet", "preview"]
"""File of a video: the clip, a larger clip, the clip before upscaling, the first image, or a preview."""
ID = r"[A-Za-z0-9_-]{1,64}"
Id = Annotated[str, Field(pattern=f"^{ID}$")]
"""Id of a job or a character. It becomes part of URLs and of file names."""


class Answer(BaseModel):
    """Base of all answers. Immutable."""

    model_config = ConfigDict(extra="allow", frozen=True)


A = TypeVar("A", bound=Answer)


class JobProblem(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None
    stage: str | None = None
    """Stage that failed."""


class Video(Answer):
    """Job of a video, or of an image. Times are in seconds since 1970."""

    id: Id
    status: Status
    priority: Priority = "normal"
    progress: int = 0
    """Progress in percent."""
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    """Time after which the job and its files are deleted."""
    model: str | None = None
    prompt: str = ""
    size: str | None = None
    """WIDTHxHEIGHT in pixels."""
    seconds: float | None = None
    fps: int | None = None
    num_frames: int | None = None
    seed: int | None = None
    stage: str | None = None
    """Stage that is running."""
    step: int = 0
    """Finished steps of this stage: denoising steps, or frames."""
    steps: int = 0
    """Steps of this stage. 0 if unknown."""
    queue_position: int | None = None
    """Queued jobs before this one."""
    eta_s: float | None = None
    """Estimate of the seconds left."""
    inference_time_s: float | None = None
    """Seconds that the stages took, without stages whose results were cached."""
    cost: float | None = None
    """Cost of a completed video. `None` if the server has no price."""
    remixed_from_video_id: str | None = None
    error: JobProblem | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_cancelled(cls, data: Any) -> Any:
        # OpenAI's Video has no status for a cancelled job: servers answer `failed` with this code.
        if (
            isinstance(data, Mapping)
            and data.get("status") == "failed"
            and (data.get("error") or {}).get("code") == "cancelled"
        ):
            return {**data, "status": "cancelled"}
        return data

    @property
    def is_final(self) -> bool:
        """True if the job has ended."""
        return self.status in ("completed", "failed", "cancelled")


class Estimate(Answer):
    """Estimate of what a job takes. For a request with `n`, all its results together."""

    render_s: float
    """Estimated seconds from the start of the job to its end. 0 if it is rendered already."""
    gpu_seconds: float
    """Estimated seconds of the stages that run on a GPU."""
    queue_position: int
    """Queued jobs that would start before it."""
    queue_wait_s: float
    """Estimated seconds in the queue."""
    cost: float | None = None
    """Cost of `gpu_seconds`. `None` if the server has no price."""
    is_rendered: bool = False
    """True if the files exist already, so that the job would be completed at once."""
    results: int = 1
    model: str | None = None
    size: str
    """WIDTHxHEIGHT of the delivered file in pixels."""
    model_size: str
    """WIDTHxHEIGHT in pixels that the models draw, before upscaling and cropping."""
    scale: int = 1
    """Upscaling factor."""
    hd_size: str | None = None
    """WIDTHxHEIGHT in pixels of the larger clip. `None` if there is none."""
    seconds: float | None = None
    """Length of the clip."""
    fps: int | None = None
    num_frames: int | None = None


class VideoPage(Answer):
    """One page of videos."""

    data: list[Video]
    last_id: str | None = None
    """Id of the last video. Pass it as `after` to get the next page."""
    has_more: bool = False


class GeneratedImage(Answer):
    """Image of `create_images` or `edit_images`."""

    id: Id | None = None
    """Id of its job, for `get_video` and `delete_video`."""
    content: bytes = Field(repr=False)
    """Encoded file."""
    format: str
    """png, webp or jpeg."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels."""

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the file and return its path. The name should end as `format` does."""
        target = Path(path)
        target.write_bytes(self.content)
        return target


class ImagesAnswer(Answer):
    """Answer of the image routes."""

    data: list[dict[str, Any]]
    output_format: str = "png"
    size: str | None = None

    @property
    def images(self) -> list[GeneratedImage]:
        """The decoded images."""
        return [
            GeneratedImage(id=each.get("id"), content=b64decode(each["b64_json"]), format=self.output_format, size=self.size)
            for each in self.data
        ]


class UploadedFile(Answer):
    """Uploaded image. Requests accept it in place of the image."""

    id: str
    bytes: int


class BatchCounts(Answer):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(Answer):
    """Many requests as one file. Times are in seconds since 1970."""

    id: Id
    endpoint: str
    status: str
    """validating, in_progress, cancelling, completed, failed, expired or cancelled."""
    request_counts: BatchCounts = BatchCounts()
    output_file_id: str | None = None
    """File with the responses of completed lines."""
    error_file_id: str | None = None
    """File with the errors of all other lines."""
    errors: dict[str, Any] | None = None
    """Why the batch failed, or was cancelled by the server."""

    @property
    def is_final(self) -> bool:
        """True if the batch has ended."""
        return self.status in ("completed", "failed", "expired", "cancelled")


PRINTABLE: JsonDict = {"pattern": r"^[^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$"}


class Consent(BaseModel):
    """Why a person's face may be used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str = Field(
        min_length=1, max_length=200, description="Name of the person in the photos.", json_schema_extra=PRINTABLE
    )
    basis: Literal["self", "written", "contract", "public-domain", "synthetic", "demo"] = Field(
        description="self: my own face. written: written consent of the person, or of a guardian. contract: a contract or "
        "licence covers this use. public-domain: a portrait that anyone may use this way. synthetic: nobody, the face is drawn "
        "or generated. demo: a photo that comes with vidgen, set automatically."
    )
    reference: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="Where it is documented, such as a file name or a URL.",
        json_schema_extra=PRINTABLE,
    )


class Character(Answer):
    """Named face. Requests refer to it by its name or id."""

    id: Id
    name: str
    created_at: int
    photos: list[str]
    """Ids of the uploaded photos."""
    consent: dict[str, str | None] | None = None
    """Why the face may be used: subject, basis and reference."""


class ErasedCharacter(Answer):
    """Files that `erase_character` deleted, and shots that were made with the character."""

    id: str
    characters: list[str]
    """Ids of the deleted characters: this one, and others that share a photo with it."""
    photos: list[str]
    """Ids of the deleted photos."""
    videos: list[str]
    """Ids of the videos and images that were made with the photos."""
    videos_deleted: bool


class Model(Answer):
    """Name that requests can set `model` to."""

    id: str


class Listing(Answer, Generic[A]):
    """All characters, or all models."""

    data: list[A]
