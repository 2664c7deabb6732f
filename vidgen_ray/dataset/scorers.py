"""Scorers: classes that measure a clip, and the clip that they get. Does not know Ray, and gives no verdicts.

A scorer of another package is named by an entry point of the group `vidgen.scorers`, or by `--scorer module:Class`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import cv2
import numpy as np
import pyarrow
from numpy.typing import NDArray

from vidgen_ray.dataset.tables import CAPTION, DIGEST
from vidgen_ray.errors import MediaError, SetupError, StageError, UsageError
from vidgen_ray.media.decode import open_foreign_video
from vidgen_ray.media.images import read_image
from vidgen_ray.media.media_file import CLIP_SUFFIXES
from vidgen_ray.nets.rife_network import FramePair, Rife, load_rife
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import RECORD
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Frames
from vidgen_ray.stages.instantid import RECOGNISER, FaceModels, InstantIDParams, InstantIDStage, align_face, sampled_frames
from vidgen_ray.stages.rife import image_similarity
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import resolve

WEIGHTS = b"vidgen.weights"
"""Metadata of files with scores: `ScoreTable.digest`."""
GROUP = "vidgen.scorers"
"""Group of entry points, any name -> scorer class."""
REQUIRED, NAME = ("name", "version", "columns", "cpu_s_per_frame", "score"), re.compile("[a-z][a-z0-9_]*")
Need = Literal["frames", "flow", "faces"]
NEED_CPU_S: Mapping[Need, float] = {"frames": 0.015, "flow": 0.13, "faces": 0.05}
"""CPU seconds per frame of what scorers share, measured on one slow core."""
MEASURED_SIDE_PX, MAX_FRAMES_BYTES = 1024, 256 << 20
"""Limits of the frames of a clip in memory. Larger ones are reduced as they are decoded."""
DECODED_AT_ONCE = 8
FLOW_SIDE_PX, RIFE_SIDE_PX, RIFE_SCALE = 512, 256, 0.5
"""Longer sides at which motion is refined, and at which RIFE estimates it, and RIFE's own scale."""
LUMA = np.array([[0.2126, 0.7152, 0.0722]])
"""BT.709."""


class Column(NamedTuple):
    """Column of a scorer."""

    type: pyarrow.DataType
    description: str
    """One sentence with unit and range."""

    def named(self, name: str) -> pyarrow.Field:
        """Return the column of this name, with its description, for files with scores."""
        return pyarrow.field(name, self.type, metadata={"description": self.description})


class Scorer(ABC):
    """Measures clips. One instance measures many clips, in a process of its own."""

    name: ClassVar[str]
    """Lowercase letters, digits and underscores."""
    version: ClassVar[int]
    """Number from 1. Raise it when results change: all clips are measured again."""
    columns: ClassVar[Mapping[str, Column]]
    needs: ClassVar[tuple[Need, ...]] = ("frames",)
    """Parts of a clip that `score` uses. Their networks are loaded before."""
    cpu_s_per_frame: ClassVar[float]
    """CPU seconds of `score` per frame, without those of `needs`. Decides the number of processes and of clips per task."""
    num_gpus: ClassVar[float] = 0
    """GPUs that an instance needs, 0 to 1. If Ray has none, it runs on a CPU: ask `torch.cuda.is_available()`."""

    def __init__(self, weights: Path | None) -> None:
        """`weights`: file or folder of `--weights NAME=PATH`. Scorers that take weights define this method."""
        self.weights = weights

    @abstractmethod
    def score(self, clip: Clip) -> Mapping[str, Any]:
        """Return values of the columns. `None`, or a column that is left out: cannot be said of this clip."""


class Flow(NamedTuple):
    """Motion between neighbouring frames."""

    motion: NDArray[np.float32]
    """(T - 1, h, w, 2): x and y in pixels of the file from each frame to the next. h and w are at most `FLOW_SIDE_PX`."""
    similarity: NDArray[np.float64]
    """(T - 1,): structural similarity after both frames are moved along the motion to the middle, -1 to 1."""


class FoundFace(NamedTuple):
    """A face of a frame."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the frame."""
    score: float
    """Detector score, 0 to 1."""
    embedding: NDArray[np.float32]
    """(512,), of length 1."""


class Networks:
    """Networks that a process loads once for all clips."""

    def __init__(self, needs: Sequence[Need], profile: Profile | None) -> None:
        """`profile` names the face models. Raises SetupError if weights are missing."""
        self.rife: Rife | None = load_rife(resolve("builtin:rife")) if "flow" in needs else None
        self.faces: FaceModels | None = None
        if "faces" in needs and profile is not None:
            params = face_params(profile)
            self.faces, self._stage = FaceModels.shared(params), InstantIDStage(params)
            self._stage.load()

    @lru_cache(maxsize=64)  # noqa: B019  # one instance per process
    def person(self, photos: tuple[tuple[Path, str], ...], face_index: int | None) -> NDArray[np.float32] | None:
        """Return the embedding (512,) of the face in photos with these digests. `None` if they changed, or have no face."""
        with suppress(MediaError, StageError):
            images = [read_image(path, sha256) for path, sha256 in photos]
            embedding = self._stage.features(images, face_index, (RECOGNISER,)).embedding(RECOGNISER)
            return embedding / np.linalg.norm(embedding)
        return None


def face_params(profile: Profile) -> InstantIDParams:
    """Return the parameters of the profile's face models, on a CPU. Raises SetupError if the weights are missing."""
    return profile.params(InstantIDStage).model_copy(update={"device": "cpu", "threads": 1, "extra_weights": {}})


class Clip:
    """A finished clip, or the image of a shot without a clip. Everything but the frames is computed when first used."""

    def __init__(self, row: Mapping[str, Any], path: Path, networks: Networks, outputs: OutputFolder) -> None:
        """Decode the file. Raises MediaError."""
        self.row = row
        """Columns of the manifest: `score_folder.COLUMNS` and `clip`, the path in the output folder."""
        self.path = path
        """The file, on this machine."""
        self._networks, self._outputs = networks, outputs
        self.fps: float | None = None
        """Frames per second. `None` for an image."""
        # A copy from an object store has another name.
        if Path(row["clip"]).suffix not in CLIP_SUFFIXES:
            image = read_image(path)
            self.size = image.shape[1], image.shape[0]
            self.frames: Frames = reduced(image[None], MEASURED_SIDE_PX)
            return
        with open_foreign_video(path) as video:
            count = video.frame_count
            self.fps, self.size = float(video.fps), (video.width, video.height)
            """Width and height of the file in pixels."""
            side = (MAX_FRAMES_BYTES / (count * video.width * video.height * 3)) ** 0.5 * max(self.size)
            starts = range(0, count, DECODED_AT_ONCE)
            chunks = (video.frames(start, min(start + DECODED_AT_ONCE, count)) for start in starts)
            self.frames = np.concatenate([reduced(chunk, min(MEASURED_SIDE_PX, int(side))) for chunk in chunks])
            """uint8 (T, H, W, 3), in the size of the file unless that is above `MEASURED_SIDE_PX`. An image: T = 1."""

    @cached_property
    def luma(self) -> NDArray[np.uint8]:
        """BT.709 luma of the frames (T, H, W)."""
        return np.stack([cv2.transform(frame, LUMA) for frame in self.frames]).reshape(self.frames.shape[:3])

    @cached_property
    def flow(self) -> Flow:
        """Motion between neighbouring frames, by RIFE's flow, refined by inverse search, which measures below a pixel.

        RIFE's own flow is about zero for less than two pixels.
        Source: Kroeger et al. 2016, Fast Optical Flow using Dense Inverse Search, arXiv:1603.03590.
        """
        import torch

        rife = self._networks.rife
        if rife is None:
            raise StageError("flow: add it to `needs` of the scorer")
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        luma = reduced(self.luma[..., None], FLOW_SIDE_PX)[..., 0]
        frames = reduced(self.frames, RIFE_SIDE_PX)
        height, width = luma.shape[1:]
        to_luma = np.array([width / frames.shape[2], height / frames.shape[1]], np.float32)
        to_file = np.array([self.size[0] / width, self.size[1] / height], np.float32)
        motion = np.empty((len(luma) - 1, height, width, 2), np.float32)
        likeness = np.empty(len(motion))
        with torch.inference_mode():
            tensors = [torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255 for frame in frames]
            for number in range(len(motion)):
                pair = FramePair(rife, tensors[number], tensors[number + 1], RIFE_SCALE)
                aligned = ((each[0].permute(1, 2, 0) * 255).round().byte().numpy() for each in pair.aligned())
                likeness[number] = image_similarity(*aligned)
                coarse = pair.motion()[0].permute(1, 2, 0).contiguous().numpy() * to_luma
                coarse = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
                motion[number] = search.calc(luma[number], luma[number + 1], coarse) * to_file
        return Flow(motion, likeness)

    @cached_property
    def faces(self) -> list[list[FoundFace]]:
        """Faces of the frames that `sampled_frames` selects, best detected first. Small ones are ignored, as by a run."""
        models = self._networks.faces
        if models is None:
            raise StageError("faces: add it to `needs` of the scorer")
        found: list[list[FoundFace]] = []
        for frame in (self.frames[index] for index in sampled_frames(len(self.frames))):
            faces = [face for face in models.detect(frame) if face.side_px >= models.min_face_px]
            embeddings = models.embed([align_face(frame, face) for face in faces]) if faces else ()
            pairs = zip(faces, embeddings, strict=True)
            found.append([FoundFace(face.box, face.score, each / np.linalg.norm(each)) for face, each in pairs])
        return found

    @cached_property
    def person(self) -> NDArray[np.float32] | None:
        """Embedding (512,) of the shot's face photos, of length 1. `None` without photos, or if they cannot be found."""
        if not self.row["face_image"]:
            return None
        content = self._outputs.storage.read(f"{Path(self.row['clip']).parent.as_posix()}/{RECORD}")
        digests = json.loads(content or b"{}").get("face_photos", ())
        # The photos are in the folder of input files if the output folder was moved.
        places = ((Path(photo), self._outputs.inputs / Path(photo).name) for photo in self.row["face_image"])
        photos = [photo if photo.is_file() else copy for photo, copy in places]
        if len(digests) != len(photos):
            return None
        return self._networks.person(tuple(zip(photos, digests, strict=True)), self.row["face_index"])


def reduced(frames: Frames, side_px: int) -> Frames:
    """Return the frames (T, H, W, C) with a longer side of at most `side_px`."""
    height, width = frames.shape[1:3]
    factor = side_px / max(height, width)
    if factor >= 1:
        return frames
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], -1) for frame in frames])


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one kind, a row per clip."""

    name: str
    version: int
    columns: Mapping[str, Column]
    digest: str
    """What decides the results beside the version, such as a digest of weights and options."""

    @property
    def folder(self) -> str:
        """Folder of its files in `scores/`."""
        return f"{self.name}@{self.version}"

    @property
    def schema(self) -> pyarrow.Schema:
        columns = [column.named(name) for name, column in self.columns.items()]
        return pyarrow.schema([(DIGEST, pyarrow.string()), *columns], {WEIGHTS: self.digest})


@dataclass(frozen=True)
class ChosenScorer(ScoreTable):
    """A scorer with its weights."""

    kind: type[Scorer]
    weights: Path | None


def choose_scorers(
    builtin: Sequence[type[Scorer]], named: Sequence[str], weights: Sequence[str], profile: Profile | None
) -> list[ChosenScorer]:
    """Return the built-in scorers, those of entry points and those of `--scorer`, checked. `weights`: NAME=PATH.

    Without a profile, those that need faces are left out. Raises UsageError for options that are wrong, and SetupError for a
    scorer of a package that cannot be used.
    """
    kinds: list[type[Scorer]] = list(builtin)
    for found in entry_points(group=GROUP):
        try:
            kinds.append(_checked(found.load(), found.value))
        except (ImportError, AttributeError, UsageError) as error:
            raise SetupError(f"scorer {found.value} of an installed package: {error}") from None
    kinds += [load_scorer(name) for name in dict.fromkeys(named)]
    kinds = [kind for kind in kinds if profile is not None or "faces" not in kind.needs]
    owners = {f"scorer {CAPTION}": "vidgen caption"}
    for kind in kinds:
        for column in (f"scorer {kind.name}", *kind.columns):
            if column in owners:
                raise UsageError(f"--scorer {kind.__name__}: {column} is already that of {owners[column]}; rename it")
            owners[column] = kind.__name__
    takes_weights = [kind.name for kind in kinds if kind.__init__ is not Scorer.__init__]
    paths: dict[str, Path] = {}
    for pair in weights:
        name, equals, path = pair.partition("=")
        if not equals or name not in takes_weights:
            known = f"must be NAME=PATH with a scorer that takes weights: {', '.join(takes_weights) or 'none'}"
            raise UsageError(f"--weights: got {pair!r}, {known}")
        paths[name] = resolve(path)
    digests = {kind.name: digest(paths[kind.name]) if kind.name in paths else "" for kind in kinds}
    if profile is not None:
        params = face_params(profile)
        for kind in kinds:
            if "faces" in kind.needs:
                digests[kind.name] += f"{digest(params.weights)} {json.dumps(params.for_key(), sort_keys=True)}"
    return [
        ChosenScorer(kind.name, kind.version, kind.columns, digests[kind.name], kind, paths.get(kind.name)) for kind in kinds
    ]


def load_scorer(name: str) -> type[Scorer]:
    """Return the class that `module:Class` names. Modules are also found in the current folder. Raises UsageError."""
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name):
        raise UsageError(f"--scorer: got {name!r}, must be module:Class, such as clip_scorer:ClipScorer")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything
        raise UsageError(f"--scorer {name}: {module_name} cannot be imported ({type(error).__name__}: {error})") from None
    if not hasattr(module, class_name):
        raise UsageError(f"--scorer {name}: the module {module_name} has no {class_name}")
    return _checked(getattr(module, class_name), name)


def _checked(kind: Any, name: str) -> type[Scorer]:
    """Return the class if it is a scorer that can be used. Raises UsageError."""
    problem = None
    if not (isinstance(kind, type) and issubclass(kind, Scorer)):
        problem = "must be a subclass of vidgen_ray.dataset.scorers.Scorer"
    elif missing := sorted(each for each in REQUIRED if not hasattr(kind, each) or each in kind.__abstractmethods__):
        problem = f"must define {', '.join(missing)}"
    elif wrong := [each for each in (kind.name, *kind.columns) if not NAME.fullmatch(each)]:
        problem = f"got the name {wrong[0]!r}, must be lowercase letters, digits and underscores"
    elif not all(isinstance(column, Column) for column in kind.columns.values()) or not isinstance(kind.version, int):
        problem = "columns must be Column(type, description), and version a number"
    elif unknown := set(kind.needs) - NEED_CPU_S.keys():
        problem = f"needs {', '.join(sorted(unknown))}, allowed are {', '.join(NEED_CPU_S)}"
    if problem is not None:
        raise UsageError(f"--scorer {name}: {problem}")
    return kind  # type: ignore[no-any-return]  # checked above
