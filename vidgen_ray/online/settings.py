"""What a server is told when it starts: where things are kept, who may ask for what, and how much."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.storage import URL

MB = 1_000_000
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Section):
    """What one API key may do."""

    open_jobs: int = Field(32, ge=1, description="jobs that are queued or in progress at the same time")
    pixel_frames: int = Field(
        1024 * 1024 * 128, ge=1, description="width x height x frames of one job, before upscaling; a picture is one frame"
    )
    requests_per_minute: int = Field(600, ge=1, description="of each replica of the API")


class UploadCaps(_Section):
    """How large what a client sends may be. Enforced while it arrives, whatever its headers say."""

    image_bytes: int = Field(25 * MB, ge=1)
    video_bytes: int = Field(100 * MB, ge=1)
    json_bytes: int = Field(40 * MB, ge=1, description="a body of JSON, which may hold pictures as data: URLs")
    files: int = Field(16, ge=1, description="in one request")
    seconds: float = Field(120, gt=0, description="within which a body must have arrived")

    @property
    def body_bytes(self) -> int:
        """Of any request: the largest file, and room for its fields."""
        return max(self.video_bytes, self.image_bytes * self.files, self.json_bytes) + MB


class UrlInputs(_Section):
    """Pictures that a client names by URL, fetched by the server. Off unless it is switched on."""

    enabled: bool = False
    allow_hosts: tuple[str, ...] = Field(
        (), description="host names; `*.example.com` allows all below it. Without any, nothing is fetched"
    )
    timeout_s: float = Field(10, gt=0)
    redirects: int = Field(3, ge=0, le=10)


class Webhook(_Section):
    """Who is told that a job has ended."""

    name: Name
    url: str
    secret: SecretStr = Field(description="`whsec_` and base64, as Standard Webhooks has it")
    tenant: str | None = Field(None, description="whose jobs; none: everybody's")

    @field_validator("secret")
    @classmethod
    def _secret_signs(cls, value: SecretStr) -> SecretStr:
        from standardwebhooks import Webhook as Signer

        try:
            Signer(value.get_secret_value())
        except Exception:
            raise ValueError("must be `whsec_` and base64 of at least one byte") from None
        return value


class Webhooks(_Section):
    """Off unless there are targets."""

    targets: tuple[Webhook, ...] = ()
    allow_private: bool = Field(False, description="also targets on this machine and in private networks")
    timeout_s: float = Field(10, gt=0)
    tries: int = Field(8, ge=1, description="then a message is given up")

    def names_for(self, tenant: str) -> list[str]:
        return [target.name for target in self.targets if target.tenant in (None, tenant)]

    def named(self, name: str) -> Webhook | None:
        return next((target for target in self.targets if target.name == name), None)


class OnlineSettings(_Section):
    """A server. Times are in seconds."""

    profile: str = "demo"
    layout: Literal["auto", "fused", "colocated", "staged"] | None = Field(
        None, description="in place of the profile's own; staged gives every model a deployment that grows by itself"
    )
    gpus: str | None = Field(None, description="what to lay out for, as 8x80GB; none: the GPUs that are there at the start")
    data: str = Field("out", validate_default=True, description="the output folder, as a batch run has it, or its URL")
    database: str | None = Field(None, description="sqlite:///FILE or postgresql://...; none: jobs.db in `data`")
    keys_file: Path | None = Field(None, description="API keys; see `vidgen keys`")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    limits: Limits = Limits()
    uploads: UploadCaps = UploadCaps()
    in_progress: int | None = Field(None, ge=1, description="jobs that are led at once; none: as the layout says")
    max_queued: int = Field(256, ge=1, description="jobs of all tenants that may wait")
    url_inputs: UrlInputs = UrlInputs()
    webhooks: Webhooks = Webhooks()
    loras: dict[Name, str] = Field(
        default_factory=dict, description="name -> file; clients can ask for these, and for no file by its path"
    )
    models: dict[str, str] = Field(
        default_factory=dict, description="further names of models, for clients that cannot change theirs -> ours"
    )
    retention_s: float | None = Field(None, gt=0, description="after which a job that has ended is forgotten, with its files")
    wait_s: float = Field(
        540,
        gt=0,
        description="how long a request for pictures waits for them; OpenAI's client asks again after 600",
    )
    poll_s: float = Field(0.25, gt=0, description="between two looks at jobs that somebody follows")
    poll_after_s: float = Field(1.0, gt=0, description="what clients that poll are told to wait")
    docs: bool = Field(True, description="whether /openapi.json is served")

    @field_validator("data")
    @classmethod
    def _data_is_one_place_for_all_processes(cls, value: str) -> str:
        # They do not share a working directory.
        return value if URL.match(value) else os.path.abspath(os.path.expanduser(value))

    @model_validator(mode="after")
    def _names_are_not_taken_twice(self) -> Self:
        names = [target.name for target in self.webhooks.targets]
        if len(names) != len(set(names)):
            raise ValueError("webhooks.targets: each needs a name of its own")
        return self

    @field_validator("loras")
    @classmethod
    def _files_have_one_name(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: path if path.startswith("builtin:") else os.path.abspath(path) for name, path in value.items()}

    @property
    def database_url(self) -> str:
        """Raises SetupError where the jobs have no place."""
        if self.database is not None:
            return self.database
        if URL.match(self.data) and not self.data.startswith("file://"):
            raise SetupError(f"database: must be given where data is an object store ({self.data})")
        folder = Path(self.data.removeprefix("file://")).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{folder / 'jobs.db'}"
