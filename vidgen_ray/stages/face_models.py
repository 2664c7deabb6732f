"""The detector and the recognisers of faces, loaded once a process for all stages that look at faces."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal
from weakref import WeakValueDictionary

import numpy as np
from pydantic import Field

from vidgen_ray.stages.base import Image, StageParams, torch_dtype
from vidgen_ray.stages.loading import require_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidgen_ray.nets.faces import DetectedFace, FaceDetector, FaceEmbedder

RECOGNISER = "antelopev2"
"""The pack's own, which every profile has."""
RECOGNISERS = {
    "ir_se50": ("ir_se50", "IRSE50Embedder"),
}
"""Further recognisers: name in the profile's `extra_weights` -> (module in nets, class)."""

DetectorName = Literal["pack", "centerface"]


class InstantIDParams(StageParams):
    """`weights` is a folder as insightface unpacks antelopev2; `extra_weights` names further recognisers, which use `dtype`.

    The pack is always float32.
    """

    detector: DetectorName | Annotated[tuple[DetectorName, ...], Field(min_length=1)] = "pack"
    """pack: the SCRFD in `weights`. centerface: trained weights that come with an installed package. Several are tried in turn,
    each at all sizes, until one finds a face. Without `pack` among them only the recogniser of `weights` is read."""
    detection_sizes_px: tuple[Annotated[int, Field(ge=32, multiple_of=32)], ...] = Field((640, 320, 160), min_length=1)
    """Tried in turn until a face is found; a smaller size finds a face that fills the photo."""
    min_score: float = Field(0.5, ge=0, le=1)
    min_face_px: int = Field(24, ge=1)
    """The shorter side of the smallest face that counts."""

    @property
    def detectors(self) -> tuple[DetectorName, ...]:
        """In the order in which they are tried."""
        return (self.detector,) if isinstance(self.detector, str) else self.detector


class FaceModels:
    """Use `FaceModels.shared(params)`: stages of one process that name the same weights and options get the same object."""

    _in_this_process: ClassVar[WeakValueDictionary[str, FaceModels]] = WeakValueDictionary()

    @classmethod
    def shared(cls, params: InstantIDParams) -> FaceModels:
        """Raises SetupError where weights are missing or of another kind."""
        key = params.model_dump_json()
        models = cls._in_this_process.get(key)
        if models is None:
            models = cls._in_this_process[key] = cls(params)
        return models

    def __init__(self, params: InstantIDParams) -> None:
        from vidgen_ray.nets.centerface import CenterFace
        from vidgen_ray.nets.face_pack import PackDetector, PackRecogniser, open_pack

        on = (params.device, params.threads)
        tasks = ("detection", "recognition") if "pack" in params.detectors else ("recognition",)
        pack = open_pack(params.weights, tasks, *on)
        self.min_face_px = params.min_face_px
        self._sizes_px = params.detection_sizes_px
        self._detectors: list[FaceDetector] = [
            PackDetector(pack["detection"], params.min_score) if name == "pack" else CenterFace(params.min_score, *on)
            for name in params.detectors
        ]
        self.embedders: dict[str, FaceEmbedder] = {RECOGNISER: PackRecogniser(pack["recognition"])}
        """By the name under which FaceFeatures has their embeddings."""
        self._params = params
        for name in RECOGNISERS:
            if name in params.extra_weights:
                self.embedder(name)

    def embedder(self, name: str) -> FaceEmbedder:
        """The recogniser of that name. Raises MissingWeights, or SetupError where they are of another kind."""
        if name not in self.embedders:
            params, (module, class_name) = self._params, RECOGNISERS[name]
            weights = params.extra_weights_at(name)
            require_device(params.device)
            made = getattr(import_module(f"vidgen_ray.nets.{module}"), class_name)
            self.embedders[name] = made(weights, params.device, torch_dtype(params.dtype), params.threads)
        return self.embedders[name]

    def detect(self, picture: Image) -> list[DetectedFace]:
        """The faces that the first detector finds which finds any, at the first size at which it does, the surest first."""
        for detector in self._detectors:
            for size_px in self._sizes_px:
                if faces := detector.detect(picture, size_px):
                    return faces
        return []

    def embed(self, crops: Sequence[Image]) -> NDArray[np.float32]:
        """Faces as `aligned` gives them -> (B, 512) by the pack's recogniser, not normalised."""
        return self.embedders[RECOGNISER].embed(np.stack(crops))


def aligned(picture: Image, face: DetectedFace) -> Image:
    """The aligned face (112, 112, 3) in BGR, as recognisers are given it."""
    from vidgen_ray.nets.face_alignment import norm_crop

    return norm_crop(picture, face.keypoints)[:, :, ::-1]


def detection_files(params: InstantIDParams) -> tuple[Path, ...]:
    """What decides which faces are found and how the pack's recogniser sees them."""
    from vidgen_ray.nets import centerface

    return (params.weights, *((centerface.model_file(),) if "centerface" in params.detectors else ()))
