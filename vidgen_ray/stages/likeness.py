"""How much the picture and the clip of a shot look like the person in the reference photo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Image, Item, Likeness, Stage
from vidgen_ray.stages.face_models import RECOGNISER, FaceModels, InstantIDParams, aligned, detection_files
from vidgen_ray.stages.instantid import InstantIDStage

MAX_SAMPLED_FRAMES = 5
"""Of a clip, at most."""
DECIMALS = 4
"""More of them would differ from machine to machine."""


class _LikenessStage(Stage[InstantIDParams]):
    """Shares detector and recogniser with InstantIDStage."""

    version: ClassVar[int] = 1
    actor: ClassVar[str] = "instantid"
    reads: ClassVar[tuple[str, ...]] = ()
    Params: ClassVar[type[InstantIDParams]] = InstantIDParams

    @classmethod
    def weight_files(cls, params: InstantIDParams, shot: Shot) -> tuple[Path, ...]:
        return detection_files(params)

    def load(self) -> None:
        self._models = FaceModels.shared(self.params)


class ImageLikenessStage(_LikenessStage):
    """`face` and `image` (H, W, 3) -> `image_likeness` of the one picture, whether it was drawn or given."""

    name: ClassVar[str] = "image_likeness"
    label: ClassVar[str] = "Likeness"
    activity: ClassVar[str] = "Comparing the face"
    reference_s: ClassVar[float] = 0.1
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"face_image": ("photo.jpg",)},)
    takes: ClassVar[tuple[str, ...]] = ("face", "image")
    writes: ClassVar[tuple[str, ...]] = ("image_likeness",)

    @staticmethod
    def applies(shot: Shot) -> bool:
        return InstantIDStage.applies(shot)

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [
            {"image_likeness": measure_likeness([item.artefacts["image"]], item.artefacts["face"], self._models)}
            for item in items
        ]


class ClipLikenessStage(_LikenessStage):
    """`face` and `frames` (T, H, W, 3) -> `clip_likeness` of the frames of `sampled_frames`."""

    name: ClassVar[str] = "clip_likeness"
    label: ClassVar[str] = "Clip likeness"
    activity: ClassVar[str] = "Comparing faces in the clip"
    reference_s: ClassVar[float] = 0.5
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"face_image": ("photo.jpg",)},)
    takes: ClassVar[tuple[str, ...]] = ("face", "frames")
    writes: ClassVar[tuple[str, ...]] = ("clip_likeness",)

    @staticmethod
    def applies(shot: Shot) -> bool:
        return shot.generate_video and InstantIDStage.applies(shot)

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return len(sampled_frames(shot.num_frames)) / MAX_SAMPLED_FRAMES

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"clip_likeness": self._of_clip(item.artefacts)} for item in items]

    def _of_clip(self, artefacts: Artefacts) -> Likeness:
        frames = artefacts["frames"]
        return measure_likeness((frames[number] for number in sampled_frames(len(frames))), artefacts["face"], self._models)


def sampled_frames(count: int) -> list[int]:
    """Which of so many frames are looked at: at most MAX_SAMPLED_FRAMES, evenly spread, the first and the last among them."""
    return [round(number) for number in np.linspace(0, count - 1, min(count, MAX_SAMPLED_FRAMES)).tolist()]


def measure_likeness(pictures: Iterable[Image], face: FaceFeatures, models: FaceModels) -> Likeness:
    """The likeness of each picture (H, W, 3) to the reference face.

    Similarity is the cosine between the embeddings by the pack's recogniser; of several faces in a picture the one most
    alike counts, so a stranger beside the person takes nothing away. A face of less than `min_face_px` is none.
    """
    reference = face.embedding(RECOGNISER)
    return Likeness(tuple(_similarity(picture, reference, models) for picture in pictures))


def _similarity(picture: Image, reference: NDArray[np.float32], models: FaceModels) -> float | None:
    crops = [aligned(picture, face) for face in models.detect(picture) if face.side_px >= models.min_face_px]
    if not crops:
        return None
    embeddings = models.embed(crops)
    cosines = embeddings @ reference / (np.linalg.norm(embeddings, axis=1) * np.linalg.norm(reference))
    return round(float(cosines.max()), DECIMALS)
