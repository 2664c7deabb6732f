"""What is written down about a shot: the content of shot.json, and why a line failed."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts


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
    recovered: str | None = None
    """What let the step end after the GPU's memory had run out: `memory freed`, or the leaner settings it ran with."""
    adapter_loads: int = 0
    """LoRAs that had to be laid on the weights for it."""


class FileRecord(_Record):
    sha256: str
    bytes: int


class LikenessRecord(_Record):
    """How much a shot with a face came to look like it, -1 to 1. None is no face found, or no clip."""

    image: float | None
    clip_mean: float | None
    clip_worst: float | None
    frames_without_face: int
    """Of the frames of the clip that were looked at; without a clip of the one picture."""

    @staticmethod
    def of(artefacts: Artefacts) -> "LikenessRecord | None":
        """None where nothing was measured: the shot has no face."""
        image, clip = artefacts.get("image_likeness"), artefacts.get("clip_likeness")
        if image is None:
            return None
        return LikenessRecord(
            image=image.mean,
            clip_mean=clip.mean if clip else None,
            clip_worst=clip.worst if clip else None,
            frames_without_face=(clip or image).without_face,
        )


class ShotRecord(_Record):
    """The content of shot.json."""

    key: str
    shot: Shot
    """With the seed that was used, which is another one than the script's after further tries."""
    tries: int
    likeness: LikenessRecord | None
    seeds: dict[str, int]
    """The seed of each stage's noise, so that a stage can be repeated by itself."""
    stages: tuple[StepRecord, ...]
    files: dict[str, FileRecord]
    software: dict[str, str]

    @property
    def summary(self) -> "ShotSummary":
        return ShotSummary(
            key=self.key,
            seed=self.shot.seed,
            likeness=self.likeness.model_dump() if self.likeness else None,
            sha256={name: file.sha256 for name, file in self.files.items()},
            seconds=sum(step.seconds for step in self.stages),
            gpu_seconds=sum(step.gpu_seconds for step in self.stages),
            lora_loads=sum(step.adapter_loads for step in self.stages),
        )


class ShotSummary(NamedTuple):
    """What the manifest says of a shot that is done."""

    key: str
    seed: int | None
    likeness: dict[str, float | None] | None
    """As LikenessRecord names them."""
    sha256: dict[str, str]
    """File name -> digest."""
    seconds: float
    """Of all stages together."""
    gpu_seconds: float
    lora_loads: int


class DoneShot(NamedTuple):
    """A shot that was found done. Its record is checked when somebody asks for it: a run finds thousands of them."""

    summary: ShotSummary
    text: bytes
    """The content of shot.json."""

    def record(self) -> ShotRecord:
        return ShotRecord.model_validate_json(self.text)


class Failure(_Record):
    """Why a line is not done."""

    stage: str
    """The stage's name, or `script` for a line that was refused."""
    error: str
    """Class of the error."""
    message: str
    attempts: int
    worker: str
