"""A face pack as insightface unpacks it, antelopev2 above all: a SCRFD detector and an ArcFace recogniser as ONNX files.

insightface's classes do the work; here stands how they are found, and what is said where they are not there or not such.
Source: Guo et al. 2021, SCRFD, arXiv:2105.04714; Deng et al. 2019, ArcFace, arXiv:1801.07698; insightface `FaceAnalysis`.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.face_alignment import CROP_PX
from vidgen_ray.nets.faces import DetectedFace
from vidgen_ray.nets.onnx_sessions import import_onnxruntime, require_provider, session_arguments

MODELS = {"detection": "scrfd_10g_bnkps.onnx", "recognition": "glintr100.onnx"}
"""insightface's name of a task -> the file that antelopev2 has for it."""
EMBEDDING = 512
TRIAL_PX = 64


class PackDetector:
    """SCRFD: boxes and five keypoints."""

    def __init__(self, model: Any, min_score: float) -> None:
        self.min_score = min_score
        self._model = model
        with _checking(model, "detection", "a SCRFD detector with five keypoints"):
            if not model.use_kps:
                raise ValueError("it gives no keypoints")
            self.detect(np.zeros((TRIAL_PX, TRIAL_PX, 3), np.uint8), TRIAL_PX)

    def detect(self, photo: NDArray[np.uint8], size_px: int) -> list[DetectedFace]:
        """RGB (H, W, 3) -> its faces, the surest first, as insightface finds them in a square of `size_px`.

        A model that was exported for one size looks at that size.
        """
        bgr = np.ascontiguousarray(photo[:, :, ::-1])
        boxes, keypoints = self._model.detect(bgr, input_size=(size_px, size_px), det_thresh=self.min_score)
        return [
            DetectedFace((left, top, right, bottom), np.asarray(points, np.float32), score)
            for (left, top, right, bottom, score), points in zip(boxes.tolist(), keypoints, strict=True)
        ]


class PackRecogniser:
    """ArcFace: embeddings as insightface's `ArcFaceONNX` gives them, not normalised."""

    normalised = False

    def __init__(self, model: Any) -> None:
        self._model = model
        with _checking(model, "recognition", f"an ArcFace recogniser from {CROP_PX}x{CROP_PX} pixels to {EMBEDDING} numbers"):
            if model.input_size != (CROP_PX, CROP_PX):
                # Which insightface would resize to without a word.
                raise ValueError(f"it takes {model.input_size[0]}x{model.input_size[1]} pixels")
            embeddings = self.embed(np.zeros((1, CROP_PX, CROP_PX, 3), np.uint8))
            if embeddings.shape != (1, EMBEDDING):
                raise ValueError(f"it gives {embeddings[0].size} numbers")

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Aligned faces (B, 112, 112, 3) in BGR -> (B, 512)."""
        # One by one: exports for a single face are about, too.
        return np.concatenate([self._model.get_feat(crop) for crop in crops]).astype(np.float32)


def open_pack(weights: Path, tasks: Collection[str], device: str, threads: int | None) -> dict[str, Any]:
    """insightface's models for tasks among `detection` and `recognition`, by task; of several the first by file name.

    `weights` is the folder of the .onnx files, or the one round it. Nothing is downloaded. Raises SetupError.
    """
    folder = _folder(weights)
    import_onnxruntime()
    from insightface.model_zoo import get_model

    found: dict[str, Any] = {}
    # The two of antelopev2 first: its other models are large, and not needed.
    for file in sorted(folder.glob("*.onnx"), key=lambda file: (file.name not in MODELS.values(), file.name)):
        if found.keys() >= set(tasks):
            break
        try:
            model = get_model(str(file), **session_arguments(device, threads))
        # Damaged files raise whatever onnxruntime stumbles over.
        except Exception as error:
            raise SetupError(f"face pack {file}: cannot be loaded, unpack antelopev2 anew: {error}") from error
        if model is not None and model.taskname in tasks:
            found.setdefault(model.taskname, model)
    for task in tasks:
        if task not in found:
            raise SetupError(
                f"face pack {folder}: no {task} model among its .onnx files; antelopev2 has {MODELS[task]}, unpack all of it"
            )
        require_provider(found[task].session, device, f"the {task} model")
    return found


def _folder(weights: Path) -> Path:
    """The folder that holds the .onnx files: the one given or, as antelopev2.zip unpacks, the one of its name inside it."""
    for folder in (weights, weights / weights.name):
        if any(folder.glob("*.onnx")):
            return folder.absolute()
    raise SetupError(f"face pack {weights}: no .onnx files there; unpack antelopev2 into it (detector and recogniser)")


@contextmanager
def _checking(model: Any, task: str, must_be: str) -> Iterator[None]:
    """Runs a trial of a model; whatever it stumbles over becomes a SetupError."""
    try:
        yield
    except Exception as error:
        raise SetupError(
            f"face pack {model.model_file}: must be {must_be}, as {MODELS[task]} of antelopev2 is: {error}"
        ) from error
