"""InstantID's features of a person's photos: who it is (embeddings) and how the face stands (keypoints)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Image, Item, Stage, StageParams
from vidgen_ray.stages.face_models import RECOGNISER, RECOGNISERS, FaceModels, InstantIDParams, aligned, detection_files
from vidgen_ray.stages.identity import injector_class

if TYPE_CHECKING:
    from vidgen_ray.nets.faces import DetectedFace

CACHED_FACES = 256
MAX_ASPECT = 8
"""Beyond it the detector's square has no pixel left for the shorter side, or not enough for a face."""


class DetectedPhoto(NamedTuple):
    """What is found in one photo of a person."""

    faces: Sequence[DetectedFace]
    """Those that are large enough, from the left."""
    chosen: DetectedFace
    crop: Image
    """The chosen face, aligned: (112, 112, 3) in BGR."""


class InstantIDStage(Stage[InstantIDParams]):
    """Photos (H, W, 3) of one person -> `face`: embeddings (512,), keypoints (5, 2) in pixels of the first photo.

    Embeddings: `antelopev2`, the pack's recogniser, not normalised; and that which steers FLUX, as `ir_se50`, of length 1.
    No face, and none of at least `min_face_px`, fail the shot. Which face counts, and how several photos of one person
    become one, see `features`. The size of the shot does not matter, so that shots of all sizes share a person's features.
    Source: Wang et al. 2024, InstantID, arXiv:2401.07519; Jiang et al. 2025, InfiniteYou, arXiv:2503.16418.
    """

    name: ClassVar[str] = "instantid"
    label: ClassVar[str] = "Face"
    activity: ClassVar[str] = "Reading the face"
    reference_s: ClassVar[float] = 0.1
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"face_image": ("photo.jpg",)},)
    shared: ClassVar[bool] = True
    version: ClassVar[int] = 2
    actor: ClassVar[str] = "instantid"
    reads: ClassVar[tuple[str, ...]] = ("face_image", "face_index", "flux_identity")
    takes: ClassVar[tuple[str, ...]] = ("photos",)
    writes: ClassVar[tuple[str, ...]] = ("face",)
    debug_file: ClassVar[str | None] = "face.json"
    Params: ClassVar[type[StageParams]] = InstantIDParams

    @staticmethod
    def applies(shot: Shot) -> bool:
        return bool(shot.face_image)

    @classmethod
    def extra_weights(cls) -> Collection[str]:
        return RECOGNISERS

    @classmethod
    def weight_files(cls, params: InstantIDParams, shot: Shot) -> tuple[Path, ...]:
        return (*detection_files(params), *(params.extra_weights_at(name) for name in _recognisers(shot) if name != RECOGNISER))

    def load(self) -> None:
        self._models = FaceModels.shared(self.params)
        self._known: dict[tuple[str, int | None, tuple[str, ...]], FaceFeatures] = {}

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"face": self._features_for(item)} for item in items]

    def _features_for(self, item: Item) -> FaceFeatures:
        return self.features(item.artefacts["photos"], item.shot.face_index, _recognisers(item.shot))

    def features(
        self, photos: Sequence[Image], face_index: int | None = None, recognisers: Sequence[str] | None = None
    ) -> FaceFeatures:
        """The features of one person in one or several photos; the same photos are looked at once.

        The embeddings are those of `recognisers`, by default of all whose weights are here.
        In the first photo the largest face counts (of equally large ones the surest), or the `face_index`-th from the
        left, counted from 0 among those of at least `min_face_px`; box, keypoints, score and size are of that photo. In
        each further photo the face counts that the pack's recogniser finds most like it. The embeddings are the mean.
        """
        digest, names = _digest(photos), tuple(self._models.embedders if recognisers is None else recognisers)
        key = (digest, face_index, names)
        if key not in self._known:
            if len(self._known) >= CACHED_FACES:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._look(photos, face_index, digest, names)
        return self._known[key]

    def _look(self, photos: Sequence[Image], face_index: int | None, digest: str, recognisers: Sequence[str]) -> FaceFeatures:
        from vidgen_ray.nets.faces import mean_embedding

        seen = self.detect_faces(photos, face_index)
        face, crops = seen[0].chosen, np.stack([one.crop for one in seen])
        return FaceFeatures(
            embeddings={
                name: mean_embedding(embedder.embed(crops), embedder.normalised)
                for name, embedder in ((name, self._models.embedder(name)) for name in recognisers)
            },
            keypoints=face.keypoints,
            box=face.box,
            score=face.score,
            faces_found=len(seen[0].faces),
            photo_size=(photos[0].shape[1], photos[0].shape[0]),
            digest=digest,
        )

    def detect_faces(self, photos: Sequence[Image], face_index: int | None = None) -> list[DetectedPhoto]:
        """What is found in each photo, and which face counts there; see `features`."""
        if not photos:
            raise StageError("face_image: got no photo, at least one is needed")
        names = [f"face_image {i} of {len(photos)}" if len(photos) > 1 else "face_image" for i in range(1, len(photos) + 1)]
        found = [self._detect(photo, name) for photo, name in zip(photos, names, strict=True)]
        face = _chosen(found[0], face_index, self.params.min_face_px)
        first = DetectedPhoto(found[0], face, aligned(photos[0], face))
        further = zip(photos[1:], found[1:], strict=True)
        return [first, *(self._most_similar_face(first.crop, photo, faces) for photo, faces in further)]

    def _most_similar_face(self, crop: Image, photo: Image, faces: Sequence[DetectedFace]) -> DetectedPhoto:
        """Of the faces of another photo the one most like `crop` counts."""
        from vidgen_ray.nets.faces import most_similar

        crops = [aligned(photo, face) for face in faces]
        number = 0
        if len(faces) > 1:
            embeddings = self._models.embed([crop, *crops])
            number = most_similar(embeddings[1:], embeddings[0])
        return DetectedPhoto(faces, faces[number], crops[number])

    def _detect(self, photo: Image, name: str) -> list[DetectedFace]:
        """One or more faces of at least `min_face_px`, from the left. `name` is how the photo is called in a StageError."""
        height_px, width_px = photo.shape[:2]
        if max(height_px, width_px) > MAX_ASPECT * min(height_px, width_px):
            raise StageError(f"{name}: got {width_px}x{height_px}, must have an aspect ratio of at most {MAX_ASPECT}:1")
        faces = self._models.detect(photo)
        if not faces:
            raise StageError(f"{name}: no face found; use a photo with an upright, clearly visible face")
        large = [face for face in faces if face.side_px >= self.params.min_face_px]
        if not large:
            raise StageError(
                f"{name}: the largest face is {max(face.side_px for face in faces):.0f} px, "
                f"must be at least {self.params.min_face_px} px; use a closer photo"
            )
        return sorted(large, key=lambda face: (face.box[0] + face.box[2], face.box[1] + face.box[3]))


def _recognisers(shot: Shot) -> tuple[str, ...]:
    """Those whose embeddings the shot needs: the pack's, by which people are compared, and the injector's."""
    steering = () if shot.flux_identity is None else (injector_class(shot.flux_identity).embedding,)
    return tuple(dict.fromkeys((RECOGNISER, *steering)))


def _chosen(faces: Sequence[DetectedFace], index: int | None, min_face_px: int) -> DetectedFace:
    """The largest face, or the one of that number from the left."""
    if index is None:
        return max(faces, key=lambda face: (round(face.side_px), face.score))
    if not 0 <= index < len(faces):
        raise StageError(
            f"face_index: got {index}, must be from 0 to {len(faces) - 1}: "
            f"{len(faces)} faces of at least {min_face_px} px were found, counted from the left"
        )
    return faces[index]


def _digest(photos: Sequence[Image]) -> str:
    content = hashlib.sha256()
    for photo in photos:
        content.update(repr(photo.shape).encode() + photo.tobytes())
    return content.hexdigest()
