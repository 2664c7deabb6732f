"""InstantID's features of a reference photo: who it is (embedding) and how the face stands (keypoints)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Image, Item, Stage, StageParams

PHOTOS_REMEMBERED = 256
MAX_ASPECT = 8
"""Beyond it the detector's square has no pixel left for the shorter side, or not enough for a face."""


class InstantIDParams(StageParams):
    detection_sizes_px: tuple[Annotated[int, Field(ge=32, multiple_of=32)], ...] = Field((640, 320, 160), min_length=1)
    """Tried in turn until a face is found; a smaller size finds a face that fills the photo."""
    min_score: float = Field(0.5, ge=0, le=1)
    min_face_px: int = Field(24, ge=1)
    """The shorter side of the smallest face taken for a reference."""


class InstantIDStage(Stage[InstantIDParams]):
    """Photo (H, W, 3) -> `face`: embedding (512,), keypoints (5, 2) in photo pixels; `pose`: keypoints drawn at the shot size.

    `weights` is a folder as insightface unpacks antelopev2: a SCRFD detector and an ArcFace recogniser as ONNX. Of several
    faces the largest counts, of equally large ones the surest; no face, and a face smaller than `min_face_px`, fail the shot.
    Source: Wang et al. 2024, InstantID, arXiv:2401.07519; insightface `FaceAnalysis`.
    """

    name: ClassVar[str] = "instantid"
    version: ClassVar[int] = 1
    actor: ClassVar[str] = "instantid"
    reads: ClassVar[tuple[str, ...]] = ("face_image", "width", "height")
    takes: ClassVar[tuple[str, ...]] = ("photo",)
    writes: ClassVar[tuple[str, ...]] = ("face", "pose")
    keeps: ClassVar[str | None] = "face.json"
    Params: ClassVar[type[StageParams]] = InstantIDParams

    @staticmethod
    def applies(shot: Shot) -> bool:
        return shot.face_image is not None

    def load(self) -> None:
        pack = _pack_folder(self.params.weights)
        # First, for it switches off what onnxruntime would report of itself.
        from insightface.app import FaceAnalysis  # isort: skip
        import onnxruntime

        if not hasattr(onnxruntime, "InferenceSession"):
            raise SetupError(
                "onnxruntime-gpu is damaged, as it is when `onnxruntime` was installed or removed beside it; "
                "run `pip install --no-deps --force-reinstall onnxruntime-gpu`"
            )
        wanted = "CUDAExecutionProvider" if self.params.device.startswith("cuda") else "CPUExecutionProvider"
        try:
            self.app = FaceAnalysis(
                name=str(pack),
                allowed_modules=["detection", "recognition"],
                providers=list(dict.fromkeys([wanted, "CPUExecutionProvider"])),
            )
        except AssertionError:
            raise SetupError(f"face pack {pack}: no detection model among its .onnx files") from None
        # Damaged files raise whatever onnxruntime stumbles over.
        except Exception as error:
            raise SetupError(f"face pack {pack}: cannot be loaded: {error}") from error
        if "recognition" not in self.app.models:
            raise SetupError(f"face pack {pack}: no recognition model among its .onnx files; antelopev2 has glintr100.onnx")
        for kind, model in self.app.models.items():
            used = model.session.get_providers()[0]
            if used != wanted:
                raise SetupError(f"the {kind} model runs on {used}, the profile asks for {wanted}; check onnxruntime-gpu")
        self._known: dict[str, FaceFeatures] = {}

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [self._features_and_pose(item) for item in items]

    def _features_and_pose(self, item: Item) -> Artefacts:
        from vidgen_ray.nets.keypoints import TRAINING_AREA_PX, draw_keypoints, onto_canvas

        face = self.features(item.artefacts["photo"])
        width, height = item.shot.width, item.shot.height
        points = onto_canvas(face.keypoints, face.photo_size, (width, height))
        scale = (width * height / TRAINING_AREA_PX) ** 0.5
        return {"face": face, "pose": draw_keypoints(points, width, height, scale)}

    def features(self, photo: Image) -> FaceFeatures:
        """The features of the photo's largest face; the same photo is looked at once."""
        key = hashlib.sha256(repr(photo.shape).encode() + photo.tobytes()).hexdigest()
        if key not in self._known:
            if len(self._known) >= PHOTOS_REMEMBERED:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._detect(photo)
        return self._known[key]

    def _detect(self, photo: Image) -> FaceFeatures:
        height_px, width_px = photo.shape[:2]
        if max(height_px, width_px) > MAX_ASPECT * min(height_px, width_px):
            raise StageError(f"face_image: got {width_px}x{height_px}, one side may be at most {MAX_ASPECT} times the other")
        bgr = np.ascontiguousarray(photo[:, :, ::-1])
        faces: list[Any] = []
        for size_px in self.params.detection_sizes_px:
            # ctx_id below 0 would silently move a CUDA session to the CPU.
            ctx_id = 0 if self.params.device.startswith("cuda") else -1
            self.app.prepare(ctx_id=ctx_id, det_thresh=self.params.min_score, det_size=(size_px, size_px))
            with warnings.catch_warnings():
                # insightface aligns faces by a call that scikit-image is to drop.
                warnings.simplefilter("ignore", FutureWarning)
                faces = self.app.get(bgr)
            if faces:
                break
        if not faces:
            raise StageError("face_image: no face found; give a photo in which the face is upright and well visible")
        face = max(faces, key=lambda f: (round(_shorter_side_px(f.bbox)), f.det_score))
        side_px = _shorter_side_px(face.bbox)
        if side_px < self.params.min_face_px:
            raise StageError(
                f"face_image: the largest face is {side_px:.0f} px, at least {self.params.min_face_px} px are needed; "
                "give a closer photo"
            )
        left, top, right, bottom = (float(v) for v in face.bbox)
        return FaceFeatures(
            embedding=np.asarray(face.embedding, np.float32),
            keypoints=np.asarray(face.kps, np.float32),
            box=(left, top, right, bottom),
            score=float(face.det_score),
            faces_found=len(faces),
            photo_size=(photo.shape[1], photo.shape[0]),
        )


def _shorter_side_px(box: Any) -> float:
    return float(min(box[2] - box[0], box[3] - box[1]))


def _pack_folder(weights: Path) -> Path:
    """The folder that holds the .onnx files: the one given or, as antelopev2.zip unpacks, the one of its name inside it."""
    for folder in (weights, weights / weights.name):
        if any(folder.glob("*.onnx")):
            return folder.absolute()
    raise SetupError(f"face pack {weights}: no .onnx files there; unpack antelopev2 into it (detector and recogniser)")
