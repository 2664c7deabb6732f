"""Face packs in insightface's layout, such as antelopev2: a SCRFD detector and an ArcFace recogniser as ONNX files.

insightface's classes run the models. This module finds and checks the files.
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
"""insightface's task name -> file name in antelopev2."""
EMBEDDING = 512
TRIAL_PX = 64
"""Side of the black image for the detector's trial run, in pixels."""


class PackDetector:
    """SCRFD detector: boxes and five keypoints."""

    def __init__(self, model: Any, min_score: float) -> None:
        self.min_score = min_score
        self._model = model
        with _checked_model(model, "detection", "a SCRFD detector with five keypoints"):
            if not model.use_kps:
                raise ValueError("it returns no keypoints")
            self.detect(np.zeros((TRIAL_PX, TRIAL_PX, 3), np.uint8), TRIAL_PX)

    def detect(self, photo: NDArray[np.uint8], size_px: int) -> list[DetectedFace]:
        """Return the faces of an RGB photo (H, W, 3), highest score first.

        insightface fits the photo into a square of `size_px`. A model exported for a fixed size uses that size instead.
        """
        bgr = np.ascontiguousarray(photo[:, :, ::-1])
        boxes, keypoints = self._model.detect(bgr, input_size=(size_px, size_px), det_thresh=self.min_score)
        return [
            DetectedFace((left, top, right, bottom), np.asarray(points, np.float32), score)
            for (left, top, right, bottom, score), points in zip(boxes.tolist(), keypoints, strict=True)
        ]


class PackRecogniser:
    """ArcFace recogniser: the embeddings of insightface's `ArcFaceONNX`, not normalised."""

    normalised = False

    def __init__(self, model: Any) -> None:
        self._model = model
        expected = f"an ArcFace recogniser from {CROP_PX}x{CROP_PX} pixels to {EMBEDDING} numbers"
        with _checked_model(model, "recognition", expected):
            if model.input_size != (CROP_PX, CROP_PX):
                # insightface would silently resize to this size.
                raise ValueError(f"it takes {model.input_size[0]}x{model.input_size[1]} pixels")
            embeddings = self.embed(np.zeros((1, CROP_PX, CROP_PX, 3), np.uint8))
            if embeddings.shape != (1, EMBEDDING):
                raise ValueError(f"it returns {embeddings[0].size} numbers")

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return embeddings (B, 512) of aligned faces (B, 112, 112, 3) in BGR."""
        # One at a time: some exports have a fixed batch size of 1.
        return np.concatenate([self._model.get_feat(crop) for crop in crops]).astype(np.float32)


def open_pack(weights: Path, tasks: Collection[str], device: str, threads: int | None) -> dict[str, Any]:
    """Return insightface's models by task. `tasks` contains `detection`, `recognition` or both.

    If several files serve a task, antelopev2's file comes first, then the first by name. `weights` is the folder of the .onnx
    files, or its parent. Nothing is downloaded. Raises SetupError.
    """
    folder = pack_folder(weights)
    import_onnxruntime()
    from insightface.model_zoo import get_model

    models: dict[str, Any] = {}
    # antelopev2's detector and recogniser first: its other models are large and not needed.
    for file in sorted(folder.glob("*.onnx"), key=lambda file: (file.name not in MODELS.values(), file.name)):
        if models.keys() >= set(tasks):
            break
        try:
            model = get_model(str(file), **session_arguments(device, threads))
        # onnxruntime raises many exception types for damaged files.
        except Exception as error:
            raise SetupError(f"face pack {file}: cannot be loaded, unpack antelopev2 again: {error}") from error
        if model is not None and model.taskname in tasks:
            models.setdefault(model.taskname, model)
    for task in tasks:
        if task not in models:
            raise SetupError(
                f"face pack {folder}: no {task} model among its .onnx files; antelopev2 has {MODELS[task]}, unpack all of it"
            )
        require_provider(models[task].session, device, f"the {task} model")
    return models


def pack_folder(weights: Path) -> Path:
    """Return the folder with the .onnx files: `weights`, or the folder of the same name inside it (antelopev2.zip has one).

    Raises SetupError if there are none.
    """
    for folder in (weights, weights / weights.name):
        if any(folder.glob("*.onnx")):
            return folder.absolute()
    raise SetupError(f"face pack {weights}: no .onnx files in this folder; unpack antelopev2 into it (detector and recogniser)")


@contextmanager
def _checked_model(model: Any, task: str, must_be: str) -> Iterator[None]:
    """Turn every exception from a trial run of the model into a SetupError."""
    try:
        yield
    except Exception as error:
        raise SetupError(
            f"face pack {model.model_file}: must be {must_be}, such as {MODELS[task]} of antelopev2: {error}"
        ) from error
