"""Record types of shots, failures and their files, and the paths of shots and keys in an output folder."""

import hashlib
import os
import re
from typing import Self

from pydantic import Field

from vidgen_ray.content_keys import CutText
from vidgen_ray.errors import StrictModel
from vidgen_ray.licences import UsedWeights
from vidgen_ray.profile import Detail
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts

RECORD = "shot.json"
SHOTS = "shots"
KEYS = "keys"
SCORES = "scores"
"""Folder with one folder per scorer and version, `NAME@VERSION`, whose Parquet files have a row per scored clip."""
IMAGE_FILE, VIDEO_FILE, HD_FILE = "image.png", "video.mp4", "hd.mp4"
"""Files of a shot: its image, its clip, and its upscaled clip."""
CLIP_FILES = {"frames": VIDEO_FILE, "hd_frames": HD_FILE}
"""Artefact -> file name of the clip made from it."""
SHARD = re.compile(r"[0-9a-f]{2}")
"""Name of a shard."""


def shot_path(shot_id: str) -> str:
    """Return the folder to which a shot is written: `shots/<2 hexadecimal digits>/<id>`."""
    return f"{SHOTS}/{hashlib.sha256(shot_id.encode()).hexdigest()[:2]}/{shot_id}"


def key_path(key: str) -> str:
    """Return the path of the file that holds the id of the shot with this content key."""
    return f"{KEYS}/{key[:2]}/{key}"


class StepRecord(StrictModel):
    """One stage run of one shot."""

    stage: str
    key: str
    """Content key of the step."""
    weights: tuple[str, ...]
    """Digests of the weights used."""
    seconds: float
    gpu_seconds: float
    """Seconds times the share of a GPU, or the number of GPUs, that the worker has."""
    cached: bool
    """The result came from the stage cache."""
    recovered: str | None = None
    """OOM fallback that was needed: `memory freed`, or the lower-memory settings used. `None` if memory sufficed."""
    adapter_loads: int = 0
    """LoRAs that were loaded onto the weights for this step."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the inputs, such as layers of a LoRA that are ignored."""
    origin: str | None = None
    """Source of the result, if a server computed it."""
    price: float | None = None
    """Price of the step beside that of GPU-hours, in the currency of the profile."""


class FileRecord(StrictModel):
    sha256: str
    """Digest before the file was signed: signatures differ each time, all other bytes do not."""
    bytes: int
    """Size of the file, with its signature."""
    signed_sha256: str | None = None
    """Digest of the signed file. `None` if it is not signed."""


class ProvenanceNote(StrictModel):
    """Marking of the files of a shot."""

    metadata: Detail
    label: str | None
    """Text drawn into the pixels."""


class LikenessRecord(StrictModel):
    """Likeness of a shot to its face photo, -1 to 1. `None` if no face was found, or there is no clip."""

    image: float | None
    clip_mean: float | None
    clip_worst: float | None
    frames_without_face: int
    """Checked frames of the clip without a face. Without a clip: 1 if the image shows no face, else 0."""

    @staticmethod
    def of(artefacts: Artefacts) -> "LikenessRecord | None":
        """Return the record, or `None` if the likeness was not measured because the shot has no face photo."""
        image, clip = artefacts.get("image_likeness"), artefacts.get("clip_likeness")
        if image is None:
            return None
        return LikenessRecord(
            image=image.mean,
            clip_mean=clip.mean if clip else None,
            clip_worst=clip.worst if clip else None,
            frames_without_face=(clip or image).without_face,
        )


class ShotRecord(StrictModel):
    """The content of shot.json."""

    key: str
    shot: Shot
    """The shot with the seed that was used. After several tries it differs from the seed in the script."""
    tries: int
    """Number of the try that was kept, counted from 1."""
    likeness: LikenessRecord | None
    seeds: dict[str, int]
    """Stage -> seed of its noise, so that a single stage can be repeated."""
    stages: tuple[StepRecord, ...]
    files: dict[str, FileRecord]
    software: dict[str, str]
    """Package -> version."""
    cut_texts: tuple[CutText, ...] = ()
    """Prompts of which text encoders read the beginning only."""
    licences: tuple[UsedWeights, ...] = ()
    """Weights behind the shot and the shots that it continues, with their licences."""
    safety: str | None = None
    """Safety checker that has passed the shot, with its version. `None` without one."""
    face_photos: tuple[str, ...] = ()
    """sha256 of each face photo, by which `vidgen identity remove` finds the shot."""
    provenance: ProvenanceNote | None = None
    """Marking of the files. `None` if they are not marked."""
    committed_at: float | None = None
    """Modification time of shot.json, in seconds since 1970. Not part of the file. `None` in an object store."""
    encode_s: float | None = Field(default=None, exclude=True)
    """CPU seconds of the encoder. Not part of the file. `None` if another process has rendered the shot, or no encoder."""

    @property
    def folder(self) -> str:
        """Folder of the shot, relative to the output folder."""
        return shot_path(self.shot.id or "")


class Failure(StrictModel):
    """Reason why a line failed."""

    stage: str
    """Name of the stage, or `script` for a rejected line."""
    error: str
    """Class name of the error."""
    message: str
    attempts: int
    worker: str

    @classmethod
    def of(cls, stage: str, error: Exception) -> Self:
        """Return the failure of a first attempt in this process."""
        worker = f"{os.uname().nodename}:{os.getpid()}"
        return cls(stage=stage, error=type(error).__name__, message=str(error), attempts=1, worker=worker)
