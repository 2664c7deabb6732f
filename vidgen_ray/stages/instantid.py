"""InstantID's features of a person's photos: who it is (embeddings) and how the face stands (keypoints)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Image, Item, Stage, StageParams, torch_dtype
from vidgen_ray.stages.identity import injector_class
from vidgen_ray.stages.loading import require_device

if TYPE_CHECKING:
    from vidgen_ray.nets.faces import DetectedFace, FaceDetector, FaceEmbedder

PACK = "antelopev2"
"""The recogniser in `weights`."""
RECOGNISERS = {
    "ir_se50": ("ir_se50", "IRSE50Embedder"),
}
"""Others: name, in the profile's `also`, too, -> (module of nets, class). The class is told weights, device, dtype, threads."""
PEOPLE_REMEMBERED = 256
MAX_ASPECT = 8
"""Beyond it the detector's square has no pixel left for the shorter side, or not enough for a face."""


class InstantIDParams(StageParams):
    """`weights` is a folder as insightface unpacks antelopev2, `also` names those of other recognisers, whose `dtype` it is.

    The pack is always float32.
    """

    detector: Literal["pack", "centerface"] = "pack"
    """pack: the SCRFD in `weights`. centerface: trained weights that come with an installed package; of `weights` only
    the recogniser is read then."""
    detection_sizes_px: tuple[Annotated[int, Field(ge=32, multiple_of=32)], ...] = Field((640, 320, 160), min_length=1)
    """Tried in turn until a face is found; a smaller size finds a face that fills the photo."""
    min_score: float = Field(0.5, ge=0, le=1)
    min_face_px: int = Field(24, ge=1)
    """The shorter side of the smallest face that counts."""


class InstantIDStage(Stage[InstantIDParams]):
    """Photos (H, W, 3) of one person -> `face`: embeddings (512,), keypoints (5, 2) in pixels of the first photo.

    Embeddings: `antelopev2`, the pack's recogniser, not normalised; and that which steers FLUX, as `ir_se50`, of length 1.
    No face, and none of at least `min_face_px`, fail the shot. Which face counts, and how several photos of one person
    become one, see `features`. The size of the shot does not matter, so that shots of all sizes share a person's features.
    Source: Wang et al. 2024, InstantID, arXiv:2401.07519; Jiang et al. 2025, InfiniteYou, arXiv:2503.16418.
    """

    name: ClassVar[str] = "instantid"
    version: ClassVar[int] = 2
    actor: ClassVar[str] = "instantid"
    reads: ClassVar[tuple[str, ...]] = ("face_image", "face_index", "flux_identity")
    takes: ClassVar[tuple[str, ...]] = ("photos",)
    writes: ClassVar[tuple[str, ...]] = ("face",)
    keeps: ClassVar[str | None] = "face.json"
    Params: ClassVar[type[StageParams]] = InstantIDParams

    @staticmethod
    def applies(shot: Shot) -> bool:
        return bool(shot.face_image)

    @classmethod
    def also(cls) -> Collection[str]:
        return RECOGNISERS

    @classmethod
    def weight_files(cls, params: InstantIDParams, shot: Shot) -> tuple[Path, ...]:
        from vidgen_ray.nets import centerface

        detector = (centerface.model_file(),) if params.detector == "centerface" else ()
        return (params.weights, *detector, *(params.also_at(name) for name in _recognisers(shot) if name != PACK))

    def load(self) -> None:
        from vidgen_ray.nets.centerface import CenterFace
        from vidgen_ray.nets.face_pack import PackDetector, PackRecogniser, open_pack

        params = self.params
        on = (params.device, params.threads)
        tasks = ("detection", "recognition") if params.detector == "pack" else ("recognition",)
        pack = open_pack(params.weights, tasks, *on)
        self._detector: FaceDetector = (
            PackDetector(pack["detection"], params.min_score)
            if params.detector == "pack"
            else CenterFace(params.min_score, *on)
        )
        self._recogniser: FaceEmbedder = PackRecogniser(pack["recognition"])
        self._embedders: dict[str, FaceEmbedder] = {PACK: self._recogniser}
        for name in RECOGNISERS:
            if name in params.also:
                self._embedders[name] = self._other_recogniser(name)
        self._known: dict[tuple[str, int | None, tuple[str, ...]], FaceFeatures] = {}

    def _other_recogniser(self, name: str) -> FaceEmbedder:
        """Raises MissingWeights, or SetupError where they are of another kind."""
        params, (module, class_name) = self.params, RECOGNISERS[name]
        weights = params.also_at(name)
        require_device(params.device)
        made: FaceEmbedder = getattr(import_module(f"vidgen_ray.nets.{module}"), class_name)(
            weights, params.device, torch_dtype(params.dtype), params.threads
        )
        return made

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"face": self._features_for(item)} for item in items]

    def _features_for(self, item: Item) -> FaceFeatures:
        recognisers = _recognisers(item.shot)
        for name in recognisers:
            if name not in self._embedders:
                self._embedders[name] = self._other_recogniser(name)
        return self.features(item.artefacts["photos"], item.shot.face_index, recognisers)

    def features(
        self, photos: Sequence[Image], face_index: int | None = None, recognisers: Sequence[str] | None = None
    ) -> FaceFeatures:
        """The features of one person in one or several photos; the same photos are looked at once.

        The embeddings are those of `recognisers`, by default of all whose weights are here.
        In the first photo the largest face counts (of equally large ones the surest), or the `face_index`-th from the
        left, counted from 0 among those of at least `min_face_px`; box, keypoints, score and size are of that photo. In
        each further photo the face counts that the pack's recogniser finds most like it. The embeddings are the mean.
        """
        digest, names = _digest(photos), tuple(self._embedders if recognisers is None else recognisers)
        key = (digest, face_index, names)
        if key not in self._known:
            if len(self._known) >= PEOPLE_REMEMBERED:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._look(photos, face_index, digest, names)
        return self._known[key]

    def _look(self, photos: Sequence[Image], face_index: int | None, digest: str, recognisers: Sequence[str]) -> FaceFeatures:
        from vidgen_ray.nets.faces import mean_embedding

        if not photos:
            raise StageError("face_image: got no photo, at least one is needed")
        names = [f"face_image {i} of {len(photos)}" if len(photos) > 1 else "face_image" for i in range(1, len(photos) + 1)]
        found = [self._detect(photo, name) for photo, name in zip(photos, names, strict=True)]
        face = _chosen(found[0], face_index, self.params.min_face_px)
        first = _crop(photos[0], face)
        others = (self._most_alike(first, photo, faces) for photo, faces in zip(photos[1:], found[1:], strict=True))
        crops = np.stack([first, *others])
        embedders = {name: self._embedders[name] for name in recognisers}
        return FaceFeatures(
            embeddings={
                name: mean_embedding(embedder.embed(crops), embedder.normalised) for name, embedder in embedders.items()
            },
            keypoints=face.keypoints,
            box=face.box,
            score=face.score,
            faces_found=len(found[0]),
            photo_size=(photos[0].shape[1], photos[0].shape[0]),
            digest=digest,
        )

    def _most_alike(self, crop: Image, photo: Image, faces: Sequence[DetectedFace]) -> Image:
        """Of the faces of another photo, cropped, the one most like `crop`."""
        from vidgen_ray.nets.faces import most_alike

        candidates = [_crop(photo, face) for face in faces]
        if len(candidates) == 1:
            return candidates[0]
        embeddings = self._recogniser.embed(np.stack([crop, *candidates]))
        return candidates[most_alike(embeddings[1:], embeddings[0])]

    def _detect(self, photo: Image, name: str) -> list[DetectedFace]:
        """The faces of at least `min_face_px`, at least one. `name` is how the photo is called in a StageError."""
        height_px, width_px = photo.shape[:2]
        if max(height_px, width_px) > MAX_ASPECT * min(height_px, width_px):
            raise StageError(f"{name}: got {width_px}x{height_px}, one side may be at most {MAX_ASPECT} times the other")
        faces: list[DetectedFace] = []
        for size_px in self.params.detection_sizes_px:
            faces = self._detector.detect(photo, size_px)
            if faces:
                break
        if not faces:
            raise StageError(f"{name}: no face found; give a photo in which the face is upright and well visible")
        large = [face for face in faces if face.side_px >= self.params.min_face_px]
        if not large:
            raise StageError(
                f"{name}: the largest face is {max(face.side_px for face in faces):.0f} px, "
                f"at least {self.params.min_face_px} px are needed; give a closer photo"
            )
        return large


def _recognisers(shot: Shot) -> tuple[str, ...]:
    """Those whose embeddings the shot needs: the pack's, by which people are compared, and the injector's."""
    steering = () if shot.flux_identity is None else (injector_class(shot.flux_identity).embedding,)
    return tuple(dict.fromkeys((PACK, *steering)))


def _crop(photo: Image, face: DetectedFace) -> Image:
    """The aligned face (112, 112, 3) in BGR, as recognisers are given it."""
    from vidgen_ray.nets.face_alignment import norm_crop

    return norm_crop(photo, face.keypoints)[:, :, ::-1]


def _chosen(faces: Sequence[DetectedFace], index: int | None, min_face_px: int) -> DetectedFace:
    """The largest face, or the one of that number from the left."""
    if index is None:
        return max(faces, key=lambda face: (round(face.side_px), face.score))
    if not 0 <= index < len(faces):
        raise StageError(
            f"face_index: got {index}, must be from 0 to {len(faces) - 1}: "
            f"{len(faces)} faces of at least {min_face_px} px were found, counted from the left"
        )
    return sorted(faces, key=lambda face: (face.box[0] + face.box[2], face.box[1] + face.box[3]))[index]


def _digest(photos: Sequence[Image]) -> str:
    content = hashlib.sha256()
    for photo in photos:
        content.update(repr(photo.shape).encode() + photo.tobytes())
    return content.hexdigest()
