"""What is written down about a shot: the content of shot.json, and why a line failed."""

from pydantic import BaseModel, ConfigDict

from vidgen_ray.shot import Shot


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepRecord(_Record):
    """What one stage did for one shot."""

    stage: str
    key: str
    weights: tuple[str, ...]
    seconds: float
    gpu_seconds: float
    """Seconds times the share of a GPU that the stage holds."""
    cached: bool


class FileRecord(_Record):
    sha256: str
    bytes: int


class ShotRecord(_Record):
    """The content of shot.json."""

    key: str
    shot: Shot
    seeds: dict[str, int]
    """The seed of each stage's noise, so that a stage can be repeated by itself."""
    stages: tuple[StepRecord, ...]
    files: dict[str, FileRecord]
    software: dict[str, str]


class Failure(_Record):
    """Why a line is not done."""

    stage: str
    """The stage's name, or `script` for a line that was refused."""
    error: str
    """Class of the error."""
    message: str
    attempts: int
    worker: str
