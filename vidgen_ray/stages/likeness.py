"""Likeness: similarity of the faces in a shot's image and clip to the face in the reference photo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Image, Item, Likeness
from vidgen_ray.stages.instantid import RECOGNISER, FaceModels, FaceStage, align_face

MAX_SAMPLED_FRAMES = 5
"""Maximum number of frames of a clip that are compared."""
DECIMALS = 4
"""Decimals of a similarity. Further decimals depend on the machine."""


class ImageLikenessStage(FaceStage):
    """`face` and `image` (H, W, 3) -> `image_likeness` of the image, generated or given by the shot."""

    name: ClassVar[str] = "image_likeness"
    label: ClassVar[str] = "Likeness"
    activity: ClassVar[str] = "Comparing the face"
    version: ClassVar[int] = 1
    reference_s: ClassVar[float] = 0.1
    reads: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ("face", "image")
    writes: ClassVar[tuple[str, ...]] = ("image_likeness",)

    def run(self, item: Item) -> Artefacts:
        return {"image_likeness": measure_likeness([item.artefacts["image"]], item.artefacts["face"], self._models)}


class ClipLikenessStage(FaceStage):
    """`face` and `frames` (T, H, W, 3) -> `clip_likeness` of the frames that `sampled_frames` selects."""

    name: ClassVar[str] = "clip_likeness"
    label: ClassVar[str] = "Clip likeness"
    activity: ClassVar[str] = "Comparing faces in the clip"
    version: ClassVar[int] = 1
    reference_s: ClassVar[float] = 0.5
    reads: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ("face", "frames")
    writes: ClassVar[tuple[str, ...]] = ("clip_likeness",)

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return min(shot.clip_frames, MAX_SAMPLED_FRAMES) / MAX_SAMPLED_FRAMES

    def run(self, item: Item) -> Artefacts:
        frames = item.artefacts["frames"]
        sampled = (frames[index] for index in sampled_frames(len(frames)))
        return {"clip_likeness": measure_likeness(sampled, item.artefacts["face"], self._models)}


def sampled_frames(count: int) -> list[int]:
    """Return the indices of at most MAX_SAMPLED_FRAMES evenly spaced frames of `count`, including the first and the last."""
    return [round(index) for index in np.linspace(0, count - 1, min(count, MAX_SAMPLED_FRAMES)).tolist()]


def measure_likeness(images: Iterable[Image], face: FaceFeatures, models: FaceModels) -> Likeness:
    """Return the likeness of each image (H, W, 3) to the reference face.

    Similarity is the cosine of the embeddings by the pack's recogniser. In an image with several faces, the most similar one
    counts, so other people do not lower the similarity. Faces below `min_face_px` are ignored.
    """
    reference = face.embedding(RECOGNISER)
    return Likeness(tuple(_similarity(image, reference, models) for image in images))


def _similarity(image: Image, reference: NDArray[np.float32], models: FaceModels) -> float | None:
    """Return the highest cosine of the faces in the image, or `None` if there is no face."""
    crops = [align_face(image, face) for face in models.detect(image) if face.side_px >= models.min_face_px]
    if not crops:
        return None
    embeddings = models.embed(crops)
    cosines = embeddings @ reference / (np.linalg.norm(embeddings, axis=1) * np.linalg.norm(reference))
    return round(float(cosines.max()), DECIMALS)
