"""What every detector and every recogniser of faces promises, so that a stage may have any of them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DetectedFace:
    """One face in a photo, in pixels of that photo. Either may reach beyond its border."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    keypoints: NDArray[np.float32]
    """(5, 2), x and y of left eye, right eye, nose, left and right corner of the mouth, left as seen in the picture."""
    score: float
    """0 to 1."""

    @property
    def side_px(self) -> float:
        """The shorter side of the box."""
        left, top, right, bottom = self.box
        return min(right - left, bottom - top)


class FaceDetector(Protocol):
    def detect(self, photo: NDArray[np.uint8], size_px: int) -> list[DetectedFace]:
        """The faces of an RGB photo (H, W, 3), looked at with its longer side scaled to `size_px`, a multiple of 32."""


class FaceEmbedder(Protocol):
    normalised: bool
    """Whether every embedding has length 1."""

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Aligned faces (B, 112, 112, 3) in BGR, as `norm_crop` gives them -> (B, 512)."""


def mean_embedding(embeddings: NDArray[np.float32], normalised: bool) -> NDArray[np.float32]:
    """(B, 512) of one person -> (512,): their mean, which is brought back to length 1 where each of them has it.

    Raw embeddings are longer the clearer the face is seen, so the clearer photo weighs more.
    """
    if len(embeddings) == 1:
        return np.asarray(embeddings[0])
    mean = embeddings.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean) if normalised else mean, np.float32)


def most_similar(embeddings: NDArray[np.float32], reference: NDArray[np.float32]) -> int:
    """Which of (B, 512) points most nearly where (512,) does."""
    return int(np.argmax(embeddings @ reference / np.linalg.norm(embeddings, axis=1)))
