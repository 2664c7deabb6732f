"""Settings of a server: profile, storage, API keys, limits, webhooks."""

from __future__ import annotations

import os
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator

from vidgen_ray.errors import SetupError, StrictModel, UsageError
from vidgen_ray.licences import Requirement
from vidgen_ray.outputs.storage import URL
from vidgen_ray.profile import AUTO, ProvenanceSettings
from vidgen_ray.shot import Priority
from vidgen_ray.system.files import load_yaml, private_folder

MB = 1_000_000
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def read_settings_file(file: Path, name: str) -> Any:
    """Return the content of a YAML file. Raises UsageError that starts with `name`."""
    try:
        return load_yaml(file)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{name}: not YAML: {error}") from None


class Numbers(StrictModel):
    """Settings in which a text or true is not a number."""

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_other_types(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        types = set(get_args(annotation)) or {annotation}
        if isinstance(value, bool | str) and types <= {int, float, NoneType}:
            raise ValueError("must be a number, without quotes")
        return value


class Budget(Numbers):
    """What the jobs of a key may spend in a window: GPU-seconds or money."""

    window: Literal["day", "month", "total"] = Field(description="UTC day, UTC month, or the whole time.")
    gpu_seconds: float | None = Field(None, ge=0, description="GPU-seconds. Either these or `cost`.")
    cost: float | None = Field(None, ge=0, description="Money, by the setting `gpu_hour_price`.")

    @model_validator(mode="after")
    def _check_unit(self) -> Self:
        if (self.gpu_seconds is None) == (self.cost is None):
            raise ValueError("must have either gpu_seconds or cost")
        return self

    @property
    def amount(self) -> float:
        return self.gpu_seconds if self.gpu_seconds is not None else self.cost or 0.0

    @property
    def unit(self) -> Literal["gpu_seconds", "cost"]:
        return "cost" if self.gpu_seconds is None else "gpu_seconds"


class Limits(Numbers):
    """Limits of one API key. The keys file may override them for a key."""

    open_jobs: int = Field(32, ge=1, description="Most jobs that may be queued or in progress at once.")
    pixel_frames: int = Field(
        1024 * 1024 * 128,
        ge=1,
        description="Largest width x height x frames of a job, before upscaling. An image counts as one frame.",
    )
    stored_bytes: int = Field(
        10_000 * MB,
        ge=0,
        description="Most bytes of uploads and files of batches that a tenant may store. Each counts as at least 4096 bytes.",
    )
    open_batches: int = Field(32, ge=1, description="Most batches of a tenant that may run at once.")
    requests_per_minute: int = Field(600, ge=1, description="Requests per minute, counted by each replica of the API.")
    max_priority: Priority = Field(
        "high", description="Highest priority that requests may have. Those without one get at most this."
    )
    receiving_bytes: int = Field(
        200 * MB,
        ge=1,
        description="Most bytes of request bodies that may arrive at once, counted by each replica of the API.",
    )
    budgets: tuple[Budget, ...] = Field((), description="What the jobs of the key may spend. Default: no limit.")
    streams: int = Field(32, ge=1, description="Most event streams that may be open at once. An open page has one.")


LARGE_IMAGES = 4
"""Images of the largest size in one request. Ray Serve holds its body in memory."""


class UploadCaps(Numbers):
    """Size limits of requests, enforced while the body arrives."""

    image_bytes: int = Field(25 * MB, ge=1, description="Bytes of an image.")
    video_bytes: int = Field(100 * MB, ge=1, description="Bytes of a video.")
    batch_bytes: int = Field(100 * MB, ge=1, description="Bytes of the input file of a batch.")
    json_bytes: int = Field(40 * MB, ge=1, description="Bytes of a JSON body, which may contain images as data: URLs.")
    unused_s: float | None = Field(
        30 * 24 * 3600.0,
        ge=24 * 3600,
        description="Seconds after its last use in a request when an upload is deleted, unless it is a photo of a character or "
        "an unfinished job needs it. null: never.",
    )
    files: int = Field(16, ge=1, description="Files in one request.")
    receiving_bytes: int = Field(
        800 * MB,
        ge=1,
        description="Most bytes of request bodies of all keys that may arrive at once at each replica of the API.",
    )
    seconds: float = Field(120, gt=0, description="Seconds within which the body must arrive.")

    @property
    def body_bytes(self) -> int:
        """Bytes of the largest body: a video, a batch, JSON, or four images of the largest size, and 1 MB for its fields."""
        return max(self.video_bytes, self.batch_bytes, self.image_bytes * LARGE_IMAGES, self.json_bytes) + MB


class UrlInputs(StrictModel):
    """Images that clients reference by URL and the server fetches."""

    allow_hosts: tuple[str, ...] = Field(
        (),
        description="Host names to fetch from. `*.example.com` allows all its subdomains. An empty list allows none.",
    )


WebhookEvent = Literal[
    "video.completed",
    "video.failed",
    "video.cancelled",
    "image.completed",
    "image.failed",
    "image.cancelled",
    "shot.completed",
    "shot.failed",
    "shot.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
]
"""Events of webhooks."""


class Webhook(StrictModel):
    """Receiver of a message when a job has ended."""

    name: Name = Field(description="Unique name of this webhook.")
    url: str = Field(description="http or https URL that messages are posted to.")
    secret: SecretStr = Field(description="Secret that signs the messages, `whsec_` and base64, as in Standard Webhooks.")
    tenant: str | None = Field(None, description="Tenant whose jobs are reported. Default: all tenants.")
    events: tuple[WebhookEvent, ...] | None = Field(None, min_length=1, description="Events that are sent. Default: all.")
    batch_lines: bool = Field(False, description="Also send the events of jobs that are lines of batches.")

    @field_validator("secret")
    @classmethod
    def _check_secret(cls, value: SecretStr) -> SecretStr:
        from standardwebhooks import Webhook as Signer

        try:
            Signer(value.get_secret_value())
        except Exception:
            raise ValueError("must be `whsec_` and base64 of at least one byte") from None
        return value


class Webhooks(StrictModel):
    """Webhooks and how their messages are delivered."""

    targets: tuple[Webhook, ...] = Field((), description="Receivers. Default: none.")
    allow_private: bool = Field(
        False,
        description="Allow receivers on this machine and in private networks, and other ports: those of `targets`, and hosts "
        "that `allow_hosts` names without a wildcard.",
    )
    allow_hosts: tuple[str, ...] = Field(
        (),
        description="Host names of the receivers that requests may name as `webhook`. `*.example.com` allows all its "
        "subdomains. An empty list allows none.",
    )

    def names_for(self, tenant: str, event: str, is_line: bool) -> list[str]:
        """Return the names of the webhooks that receive an event of a tenant. `is_line`: about a line of a batch."""
        names = []
        for target in self.targets:
            is_chosen = target.events is None or event in target.events
            if target.tenant in (None, tenant) and is_chosen and (target.batch_lines or not is_line):
                names.append(target.name)
        return names

    def target(self, name: str) -> Webhook | None:
        """Return the webhook of this name."""
        return next((target for target in self.targets if target.name == name), None)


class OnlineSettings(Numbers):
    """Settings of a server. Times are in seconds."""

    profile: str = Field(AUTO, description="Name or file of the profile: models, devices and defaults. `auto`: by the GPUs.")
    gpus: str | None = Field(None, description="GPUs to plan for, for example 8x80GB. Default: detect GPUs at the start.")
    max_queue_s: float | None = Field(
        None,
        gt=0,
        description="Estimated seconds until the last queued job starts above which the GPUs of `gpus` are requested once more "
        "from Ray's autoscaler. They are given back after 10 minutes in which fewer would have done. Default: never.",
    )
    shots_at_once: int | None = Field(
        None,
        ge=1,
        description="Shots that usually run at the same time. If there are fewer than GPUs, several GPUs of a node divide each "
        "shot where that makes it shorter. Default: as many as GPUs.",
    )
    provenance: ProvenanceSettings | None = Field(
        None, description="How files are marked as AI-generated, labelled and signed. Default: that of the profile."
    )
    data: str = Field(
        "out", validate_default=True, description="Output folder or its URL (s3://...). May be shared with batch runs."
    )
    database: str | None = Field(
        None, description="Database of the jobs, sqlite:///FILE or postgresql://... Default: jobs.db in `data`."
    )
    keys_file: Path | None = Field(
        None,
        description="YAML file of API keys, written by `vidgen keys`. Without API keys only this machine may send requests.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    root_path: str = Field(
        "", pattern=r"^(/[\w.~-]+)*$", description="Path of the server behind a proxy, for example /vidgen. Default: none."
    )
    limits: Limits = Field(Limits(), description="Limits of API keys that set none of their own.")
    uploads: UploadCaps = Field(UploadCaps(), description="Size limits of requests.")
    max_queued: int = Field(256, ge=1, description="Most queued jobs of all tenants. Further requests get status 429.")
    url_inputs: UrlInputs = Field(UrlInputs(), description="Images that clients reference by URL.")
    webhooks: Webhooks = Field(Webhooks(), description="Webhooks for finished jobs.")
    loras: dict[Name, str] = Field(
        default_factory=dict, description="Name -> file of each LoRA that clients may use. They cannot use other files."
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Alias -> model name, for clients whose model name is fixed.",
    )
    require_licence: Requirement | None = Field(
        None,
        description="Refuse requests that need weights which may not be used commercially (`commercial`), or only under a "
        "condition (`unconditional`). Default: no requirement.",
    )
    retention_s: float | None = Field(
        None, gt=0, description="Seconds after which a finished job, with its files, or batch is deleted. Default: never."
    )
    wait_s: float = Field(
        540,
        gt=0,
        description="Seconds that a request for images waits for them. OpenAI's client times out after 600.",
    )
    gpu_hour_price: float | None = Field(
        None, gt=0, description="Price of a GPU-hour, for the cost in estimates. Default: estimates have no cost."
    )
    share_results_between_tenants: bool = Field(
        False,
        description="Let tenants use results that others, or batch runs, have rendered. A shot that is answered at once then "
        "reveals that it was rendered before. A server without API keys always uses such results.",
    )

    @field_validator("data")
    @classmethod
    def _make_data_absolute(cls, value: str) -> str:
        # The processes of a server do not share a working directory.
        return value if URL.match(value) else os.path.abspath(os.path.expanduser(value))

    @model_validator(mode="after")
    def _check_gpus_and_webhook_names(self) -> Self:
        if self.max_queue_s is not None and self.gpus is None:
            raise ValueError("max_queue_s: needs gpus, the GPUs to request at a time")
        names = [target.name for target in self.webhooks.targets]
        if len(names) != len(set(names)):
            raise ValueError("webhooks.targets: names must be unique")
        return self

    @field_validator("loras")
    @classmethod
    def _make_lora_paths_absolute(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: path if path.startswith("builtin:") else os.path.abspath(path) for name, path in value.items()}

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database. Raises SetupError if `data` is an object store and `database` is not set."""
        if self.database is not None:
            return self.database
        if URL.match(self.data) and not self.data.startswith("file://"):
            raise SetupError(f"database: must be set if data is an object store ({self.data})")
        folder = private_folder(Path(self.data.removeprefix("file://")).absolute())
        return f"sqlite:///{folder / 'jobs.db'}"
