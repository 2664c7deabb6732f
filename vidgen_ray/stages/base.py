"""What a stage is: frozen parameters, weights loaded once, items in, artefacts out.

A stage declares what it reads and writes; the graph, the content keys and the docs are derived from that declaration.
Heavy packages (torch, diffusers) are imported in `load`, so that naming a stage costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from vidgen_ray.errors import MissingWeights, StageError
from vidgen_ray.shot import Shot

if TYPE_CHECKING:
    import torch

Image = NDArray[np.uint8]
"""RGB, (H, W, 3), 0 to 255."""
Frames = NDArray[np.uint8]
"""RGB, (T, H, W, 3), 0 to 255."""
REFERENCE_PIXELS, REFERENCE_FRAMES = 1024 * 576, 25
"""Of the shot that a profile's seconds are told for."""


@dataclass(frozen=True, slots=True)
class FaceFeatures:
    """One person, seen in one or several photos. Points and boxes are in pixels of the first of them."""

    embeddings: Mapping[str, NDArray[np.float32]]
    """(512,) each, by the recogniser: `antelopev2` as it is, `ir_se50` of length 1. Of several photos the mean."""
    keypoints: NDArray[np.float32]
    """(5, 2), x and y of left eye, right eye, nose, left and right corner of the mouth, left as seen in the picture."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    score: float
    """Of the detector, 0 to 1."""
    faces_found: int
    """In the first photo, of those that are large enough."""
    photo_size: tuple[int, int]
    """Width, height of the first photo."""
    digest: str
    """sha256 of the photos' pixels."""

    def embedding(self, recogniser: str) -> NDArray[np.float32]:
        """(512,) by that recogniser and no other: to a network trained with one, another's is another person.

        Raises StageError where it was not made.
        """
        if recogniser not in self.embeddings:
            raise StageError(
                f"face: got embeddings by {', '.join(sorted(self.embeddings)) or 'nothing'}, {recogniser} is needed; "
                f"its weights stand in the profile, `extra_weights: {{{recogniser}: ...}}` of actors.instantid"
            )
        return self.embeddings[recogniser]


@dataclass(frozen=True, slots=True)
class Likeness:
    """How much the faces in some pictures are like the reference face. A picture without a face is not one without likeness."""

    similarities: tuple[float | None, ...]
    """One a picture, -1 to 1: the cosine of the face that is most alike; none where no face was found."""

    @property
    def mean(self) -> float | None:
        """Over the pictures with a face; none where there are no such."""
        seen = self._of_faces
        return sum(seen) / len(seen) if seen else None

    @property
    def worst(self) -> float | None:
        """Of the pictures with a face; none where there are no such."""
        return min(self._of_faces, default=None)

    @property
    def without_face(self) -> int:
        """The number of pictures in which no face was found."""
        return len(self.similarities) - len(self._of_faces)

    @property
    def _of_faces(self) -> list[float]:
        return [similarity for similarity in self.similarities if similarity is not None]


class Artefacts(TypedDict, total=False):
    """What travels between stages. Later stages replace `image`."""

    photos: tuple[Image, ...]
    """Of one person, upright."""
    face: FaceFeatures
    image: Image
    image_likeness: Likeness
    frames: Frames
    clip_likeness: Likeness
    hd_frames: Frames


@dataclass(frozen=True, slots=True)
class Item:
    """One shot on its way through the stages."""

    shot: Shot
    artefacts: Artefacts = field(default_factory=lambda: Artefacts())


class StageParams(BaseModel):
    """What every stage is told by its profile. A subclass adds the stage's own options, all of which may change bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Path
    """A local folder or file. Nothing is ever downloaded by a stage."""
    extra_weights: dict[str, Path] = Field(default_factory=dict)
    """Further weights by name, which some shots need and others do not; those that are on this machine."""
    missing: dict[str, str] = Field(default_factory=dict)
    """Name of further weights that are not -> a sentence that says what to do about it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch; none leaves them alone. The number changes the last bits of a result."""

    def for_key(self) -> dict[str, Any]:
        """What of these changes bytes, beside the weights, which a content key has by their digest."""
        ignored = {"weights", "extra_weights", "missing"}
        return self.model_dump(mode="json", exclude=ignored if self.device == "cpu" else ignored | {"threads"})

    def extra_weights_at(self, name: str) -> Path:
        """Where further weights lie. Raises MissingWeights where they do not."""
        if name not in self.extra_weights:
            why = self.missing.get(name, f"the profile does not name them; add `extra_weights: {{{name}: ...}}` to their actor")
            raise MissingWeights(f"{name}: {why}")
        return self.extra_weights[name]

    def resolved(self) -> Self:
        """The same with whatever depends on the machine made concrete, for the content key and for other machines."""
        return self


P = TypeVar("P", bound=StageParams)


class Stage(ABC, Generic[P]):
    """One step of the chain. Use: `stage.load(); stage([item])`, or `with stage: stage([item])`."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised when the same inputs give other bytes than before."""
    actor: ClassVar[str]
    """Stages that name the same actor share weights and must live in one process."""
    reads: ClassVar[tuple[str, ...]]
    """Fields of the shot."""
    identity_fields: ClassVar[tuple[str, ...]] = ()
    """Fields beside `reads` of a shot that a person steers here; of other shots they are not part of a key."""
    takes: ClassVar[tuple[str, ...]]
    """Artefacts this stage needs."""
    identity_inputs: ClassVar[tuple[str, ...]] = ()
    """Artefacts beside `takes` that it needs for a shot that a person steers here."""
    writes: ClassVar[tuple[str, ...]]
    """Artefacts this stage gives."""
    debug_file: ClassVar[str | None] = None
    """File name under which `--keep stages` shows what this stage gave."""
    Params: ClassVar[type[StageParams]]

    def __init__(self, params: P) -> None:
        self.params = params

    @staticmethod
    @abstractmethod
    def applies(shot: Shot) -> bool:
        """Whether the shot passes through this stage."""

    @staticmethod
    def uses_identity(shot: Shot) -> bool:
        """Whether a person has a say in what this stage does with the shot."""
        return False

    @classmethod
    def needs(cls, shot: Shot) -> tuple[str, ...]:
        """The artefacts that it needs for the shot."""
        return (*cls.takes, *cls.identity_inputs) if cls.uses_identity(shot) else cls.takes

    @classmethod
    def extra_weights(cls) -> Collection[str]:
        """Names of the further weights that a profile may give to this stage's actor."""
        return ()

    @classmethod
    def weight_files(cls, params: P, shot: Shot) -> tuple[Path, ...]:
        """The files or folders whose content decides this stage's result for the shot; its LoRAs are local files."""
        return (params.weights,)

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        """How much of this stage's work the shot is: 1 for the reference shot of 1024x576 pixels, 25 frames, default steps."""
        return 1.0

    @classmethod
    def lower_memory(cls, params: P) -> P | None:
        """Parameters that need less GPU memory and may change bytes, or none where there are no such."""
        return None

    @abstractmethod
    def load(self) -> None:
        """Load the weights from local files. Raises SetupError where they are missing or of another kind."""

    @abstractmethod
    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        """The work itself, on loaded weights; one result an item, in order."""

    def move(self, device: str) -> None:
        """Take the loaded weights to `device`, the host's memory (`cpu`) or back, where stages take turns on a GPU.

        Not for a stage that needs no GPU memory.
        """
        raise NotImplementedError(f"{self.name} cannot take turns on a GPU")

    @property
    def adapter_loads(self) -> int:
        """How many LoRAs were laid on the weights so far."""
        return 0

    def close(self) -> None:
        """Let go of the weights. Safe to call twice, and before `load`."""
        for name in [k for k in vars(self) if k != "params"]:
            delattr(self, name)

    def __call__(self, items: Sequence[Item]) -> list[Artefacts]:
        import torch

        with torch.inference_mode(), torch_threads(self.params.threads):
            return self.run(items)

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run a block with this many intra-op threads."""
    import torch

    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def noise_generator(shot: Shot, stage: str) -> torch.Generator:
    """A CPU generator, so that a seed means the same picture on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(shot.generator_seed(stage))


def to_uint8(pixels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Pixels of any shape, 0 to 1 -> 0 to 255, rounded as diffusers does."""
    return (pixels * 255).round().astype(np.uint8)
