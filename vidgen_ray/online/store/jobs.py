"""Job model: one shot of one tenant and its progress. Independent of storage."""

from __future__ import annotations

import re
import secrets
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from vidgen_ray.shot import Shot

JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Form of ids of jobs. PostgreSQL refuses texts with a NUL."""


class JobState(StrEnum):
    """State of a job. The values appear in the API."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in FINAL


FINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})
"""States in which a job has ended."""


class JobKind(StrEnum):
    """Part of the API that a job belongs to. Also the prefix of its id."""

    VIDEO = "video"
    IMAGE = "image"
    SHOT = "shot"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobError(_Frozen):
    """Reason why a job failed, shown to the client. Contains no internals of the server."""

    code: str
    message: str
    stage: str | None = None
    type: str = "server_error"
    param: str | None = None


class Job(_Frozen):
    """One shot of one tenant. Times are seconds since 1970."""

    id: str
    tenant: str
    kind: JobKind
    state: JobState = JobState.QUEUED
    shot: Shot
    """Checked shot with its seed. Its id is the name of its folder in the output folder."""
    key: str
    """Content key of the shot. Shots with the same key have the same bytes."""
    attempts: int = 0
    """Number of times that a director has claimed the job."""
    progress: int = Field(0, ge=0, le=100)
    """Percent."""
    stage: str | None = None
    step: int = 0
    """Finished denoising steps or frames of the current stage."""
    steps: int = 0
    """All steps of the current stage. 0 if not known yet."""
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    """Time at which the job ended, in any final state."""
    expires_at: float | None = None
    """Time after which the job and its files are deleted. `None` keeps them."""
    error: JobError | None = None
    shot_id: str | None = None
    """Folder of the files of a completed job, in the output folder."""
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> seconds that it took. Stages with a cached result took none."""
    request: dict[str, JsonValue] = Field(default_factory=dict)
    """Request fields returned to the client: model, seconds, size, prompt, remixed_from, ..."""
    cancel_requested: bool = False
    """A cancel was requested while the job was in progress. Its director carries it out."""
    version: int = 0
    """Number of the last change of the job. Later changes of any job have larger numbers."""

    def queued(self) -> Job:
        """Return a queued copy without progress or result."""
        reset = {"state": JobState.QUEUED, "progress": 0, "started_at": None, "completed_at": None, "shot_id": None}
        return self.model_copy(update=reset)


def shot_id_of(key: str) -> str:
    """Return the name of the folder in which a server stores the shot with this content key."""
    return f"online-{key[:32]}"


def new_id(prefix: str) -> str:
    """Return a random id: the prefix, an underscore and 32 hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(16)}"
