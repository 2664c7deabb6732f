"""Interfaces of face detectors and face recognisers."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DetectedFace:
    """One face in a photo. Box and keypoints are in pixels of the photo and may lie outside of it."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    keypoints: NDArray[np.float32]
    """(5, 2), x and y of left eye, right eye, nose, left and right corner of the mouth. Left means left in the image."""
    score: float
    """Detection score, 0 to 1."""

    @property
    def side_px(self) -> float:
        """Shorter side of the box, in pixels."""
        left, top, right, bottom = self.box
        return min(right - left, bottom - top)


class FaceDetector(Protocol):
    def detect(self, photo: NDArray[np.uint8], size_px: int) -> list[DetectedFace]:
        """Return the faces of an RGB photo (H, W, 3). Its longer side is scaled to `size_px`, a multiple of 32."""


class FaceEmbedder(Protocol):
    normalised: bool
    """True if every embedding has length 1."""

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return embeddings (B, 512) of aligned faces (B, 112, 112, 3) in BGR, cropped by `norm_crop`."""


def mean_embedding(embeddings: NDArray[np.float32], normalised: bool) -> NDArray[np.float32]:
    """Return the mean (512,) of embeddings (B, 512) of one face. If `normalised`, scale the mean to length 1.

    Embeddings that are not normalised are longer for clearer faces, so clearer photos have more weight.
    """
    if len(embeddings) == 1:
        return np.asarray(embeddings[0])
    mean = embeddings.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean) if normalised else mean, np.float32)


def most_similar(embeddings: NDArray[np.float32], reference: NDArray[np.float32]) -> int:
    """Return the index of the embedding in (B, 512) with the highest cosine similarity to the reference (512,)."""
    return int(np.argmax(embeddings @ reference / np.linalg.norm(embeddings, axis=1)))
