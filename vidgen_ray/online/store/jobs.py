"""What a server has accepted and not forgotten: a job is one shot for one tenant, and how far it is. Knows no storage."""

from __future__ import annotations

import secrets
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from vidgen_ray.shot import Shot


class JobState(StrEnum):
    """As the API says them."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in FINAL


FINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})
"""States that no job leaves again."""


class JobKind(StrEnum):
    """Which part of the API a job came through, and shows itself in. Also how its id begins."""

    VIDEO = "video"
    IMAGE = "image"
    SHOT = "shot"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobError(_Frozen):
    """Why a job failed, for whoever asked for it: nothing of the server's inside."""

    code: str
    message: str
    stage: str | None = None
    type: str = "server_error"
    param: str | None = None


class Job(_Frozen):
    """One shot for one tenant. Times are seconds since 1970."""

    id: str
    tenant: str
    kind: JobKind
    state: JobState = JobState.QUEUED
    shot: Shot
    """Checked, with its seed; its id is the name of its folder in the output folder."""
    key: str
    """The content key: shots with the same one have the same bytes."""
    attempts: int = 0
    """How often a director took it in hand."""
    progress: int = Field(0, ge=0, le=100)
    """Percent."""
    stage: str | None = None
    step: int = 0
    """Steps of the stage that are done: of denoising, or frames."""
    steps: int = 0
    """0 where that is not known yet."""
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    """When it ended, however it ended."""
    expires_at: float | None = None
    error: JobError | None = None
    shot_id: str | None = None
    """Where its files are, once it is completed."""
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> seconds that it took; a result that was there already took none."""
    request: dict[str, JsonValue] = Field(default_factory=dict)
    """What the client must get back: model, seconds, size, prompt, remixed_from, ..."""
    cancel_requested: bool = False
    version: int = 0
    """Rises with every change of any job of the store, so that it is a place in the order of all changes."""

    def queued(self) -> Job:
        """The same as if nothing had been done for it."""
        begin = {"state": JobState.QUEUED, "progress": 0, "started_at": None, "completed_at": None, "shot_id": None}
        return self.model_copy(update=begin)


def shot_id_of(key: str) -> str:
    """The name of the folder that a server makes for a shot with this content key."""
    return f"online-{key[:32]}"


def new_id(prefix: str) -> str:
    """An id that nobody can guess: the prefix, an underscore and 32 hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(16)}"
