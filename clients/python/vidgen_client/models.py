"""Answers of the server. Fields that this version does not know are kept as attributes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, AliasChoices, Base64Bytes, BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Priority = Literal["low", "normal", "high"]
Variant = Literal["video", "hd", "sd", "image", "thumbnail", "spritesheet", "preview"]
"""File of a video: the clip, a larger clip, the clip before upscaling, the first image, or a preview."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def checked_id(text: str) -> str:
    """Return an id. No other text of a server becomes part of a URL or of a file name. Raises ValueError for other text."""
    if not _ID.fullmatch(text):
        raise ValueError(f"id: got {text[:100]!r}, must be 1 to 128 letters, digits, - and _, and start with a letter or digit")
    return text


Id = Annotated[str, AfterValidator(checked_id)]
"""Id of a job, a character, a file or a batch."""
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
    seconds: NotNegative | None = None
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
    eta_s: NotNegative | None = None
    """Estimate of the seconds left."""
    inference_time_s: NotNegative | None = None
    """Seconds that the stages took, without stages whose results were cached."""
    stage_durations: dict[str, NotNegative] = {}
    """Stage -> seconds. Without stages whose results were cached."""
    cost: NotNegative | None = None
    """Cost of a completed video. `None` if the server has no price."""
    remixed_from_video_id: str | None = None
    error: JobProblem | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_cancelled(cls, data: Any) -> Any:
        # OpenAI's Video has no status for a cancelled job: servers answer `failed` with this code.
        if not isinstance(data, Mapping) or data.get("status") != "failed":
            return data
        error = data.get("error")
        if isinstance(error, Mapping) and error.get("code") == "cancelled":
            return {**data, "status": "cancelled"}
        return data

    @property
    def is_final(self) -> bool:
        """True if the job has ended."""
        return self.status in ("completed", "failed", "cancelled")


class ShotJob(Answer):
    """Job with the fields of its shot."""

    id: Id
    shot: dict[str, Any]


class Estimate(Answer):
    """Estimate of what a job takes. For a request with `n`, all its results together."""

    render_s: NotNegative
    """Estimated seconds from the start of the job to its end. 0 if it is rendered already."""
    gpu_seconds: NotNegative
    """Estimated seconds of the stages that run on a GPU."""
    queue_position: int
    """Queued jobs that would start before it."""
    queue_wait_s: NotNegative
    """Estimated seconds in the queue."""
    cost: NotNegative | None = None
    """Cost of `gpu_seconds`. `None` if the server has no price."""
    licences: list[dict[str, Any]] | None = None
    """Weights behind the job, with their licences. `None` if the server does not name them."""
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
    seconds: NotNegative | None = None
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
    content: Base64Bytes = Field(repr=False, validation_alias=AliasChoices("b64_json", "content"))
    """Encoded file."""
    format: str = "png"
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

    data: list[GeneratedImage]
    output_format: str = "png"
    size: str | None = None

    @property
    def images(self) -> list[GeneratedImage]:
        """The decoded images."""
        common = {"format": self.output_format, "size": self.size}
        return [each.model_copy(update=common) for each in self.data]


class UploadedFile(Answer):
    """Uploaded image. Requests accept it in place of the image."""

    id: Id
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
    output_file_id: Id | None = None
    """File with the responses of completed lines."""
    error_file_id: Id | None = None
    """File with the errors of all other lines."""
    errors: dict[str, Any] | None = None
    """Why the batch failed, or was cancelled by the server."""

    @property
    def is_final(self) -> bool:
        """True if the batch has ended."""
        return self.status in ("completed", "failed", "expired", "cancelled")


class LineProblem(Answer):
    """Why a line of a batch is not completed."""

    message: str
    code: str | None = None


class LineResponse(Answer):
    """Response to a line of a batch."""

    status_code: int = 200
    body: dict[str, Any]


class BatchLine(Answer):
    """Line of the output file or of the error file of a batch."""

    custom_id: str | None = None
    """`None` if the line that was sent has none."""
    response: LineResponse | None = None
    error: LineProblem | None = None

    @property
    def problem(self) -> LineProblem:
        """Why the line is not completed: its error, or that of its response."""
        if self.error is not None:
            return self.error
        try:
            return LineProblem.model_validate((self.response or LineResponse(body={})).body["error"])
        except (ValueError, LookupError):
            return LineProblem(message="failed without a reason")


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
        default=None,
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
