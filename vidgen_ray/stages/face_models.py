"""The detector and the recognisers of faces, loaded once a process for all stages that look at faces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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
"""The pack's own, which every profile has."""


class InstantIDParams(StageParams):
    """`weights` is a folder as insightface unpacks antelopev2. `dtype` is that of IR-SE50; the rest is always float32."""

    detector: Literal["pack", "centerface"] = "pack"
    """pack: the SCRFD in `weights`. centerface: trained weights that come with an installed package; of `weights` only
    the recogniser is read then."""
    ir_se50: Path | None = None
    """recognition_arcface_ir_se50.pth, or an ONNX export of it, for the embedding that InfuseNet needs; none: not made."""
    detection_sizes_px: tuple[Annotated[int, Field(ge=32, multiple_of=32)], ...] = Field((640, 320, 160), min_length=1)
    """Tried in turn until a face is found; a smaller size finds a face that fills the photo."""
    min_score: float = Field(0.5, ge=0, le=1)
    min_face_px: int = Field(24, ge=1)
    """The shorter side of the smallest face that counts."""

    def for_key(self) -> dict[str, Any]:
        # Its digest is in the key, as that of all weights is.
        return {name: value for name, value in super().for_key().items() if name != "ir_se50"}


class FaceModels:
    """Use `FaceModels.shared(params)`: stages of one process that name the same weights and options get the same object."""

    _in_this_process: ClassVar[WeakValueDictionary[InstantIDParams, FaceModels]] = WeakValueDictionary()

    @classmethod
    def shared(cls, params: InstantIDParams) -> FaceModels:
        """Raises SetupError where weights are missing or of another kind."""
        models = cls._in_this_process.get(params)
        if models is None:
            models = cls._in_this_process[params] = cls(params)
        return models

    def __init__(self, params: InstantIDParams) -> None:
        from vidgen_ray.nets.centerface import CenterFace
        from vidgen_ray.nets.face_pack import PackDetector, PackRecogniser, open_pack

        on = (params.device, params.threads)
        tasks = ("detection", "recognition") if params.detector == "pack" else ("recognition",)
        pack = open_pack(params.weights, tasks, *on)
        self.min_face_px = params.min_face_px
        self._sizes_px = params.detection_sizes_px
        self._detector: FaceDetector = (
            PackDetector(pack["detection"], params.min_score)
            if params.detector == "pack"
            else CenterFace(params.min_score, *on)
        )
        self.embedders: dict[str, FaceEmbedder] = {RECOGNISER: PackRecogniser(pack["recognition"])}
        """By the name under which FaceFeatures has their embeddings."""
        if params.ir_se50 is not None:
            from vidgen_ray.nets.ir_se50 import IRSE50Embedder

            require_device(params.device)
            self.embedders["ir_se50"] = IRSE50Embedder(params.ir_se50, params.device, torch_dtype(params.dtype), params.threads)

    def detect(self, picture: Image) -> list[DetectedFace]:
        """The faces that are found at the first of the detection sizes at which there are any, the surest first."""
        for size_px in self._sizes_px:
            if faces := self._detector.detect(picture, size_px):
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

    return (params.weights, *((centerface.model_file(),) if params.detector == "centerface" else ()))
