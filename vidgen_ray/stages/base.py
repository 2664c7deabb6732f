"""Stage interface: frozen parameters, weights loaded once, an item in, artefacts out.

A stage declares everything that the rest of the project needs to know about it. Graph, content keys, planner, API, page and
docs are derived from that declaration. Heavy packages (torch, diffusers) are imported in `load`, so importing a stage is
cheap.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from math import ceil, log2
from pathlib import Path
from threading import get_ident
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    ForwardRef,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
)

from pydantic import Field, JsonValue

from vidgen_ray.errors import MissingWeights, StageError, StrictModel
from vidgen_ray.nets.weight_files import NOT_FINITE, is_finite
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.context_parallel import DOUBLING_GAIN
from vidgen_ray.stages.memory_table import ShotWork, StageMemory
from vidgen_ray.system.model_files import check_pipeline_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Pixels: TypeAlias = NDArray[np.uint8]
else:
    # Without the import of numpy. Supports `Image | None` in code that runs.
    Pixels = ForwardRef("NDArray[np.uint8]")

Image: TypeAlias = Pixels
"""RGB, (H, W, 3), 0 to 255."""
Frames: TypeAlias = Pixels
"""RGB, (T, H, W, 3), 0 to 255."""
REFERENCE_PIXELS, REFERENCE_FRAMES = 1024 * 576, 25
"""Size of the reference shot, for which seconds are stated: 1024x576 pixels, 25 frames, default steps."""


@dataclass(frozen=True, slots=True)
class FaceFeatures:
    """One person, seen in one or several photos. Points and boxes are in pixels of the first photo."""

    # Not shown: what a message or a log contains must not describe a face.
    embeddings: Mapping[str, NDArray[np.float32]] = field(repr=False)
    """Recogniser -> embedding (512,): `antelopev2` unnormalised, `ir_se50` of length 1. The mean over several photos."""
    keypoints: NDArray[np.float32] = field(repr=False)
    """(5, 2): x and y of left eye, right eye, nose, left and right mouth corner, left as seen in the image."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    score: float
    """Detector score, 0 to 1."""
    faces_found: int
    """Number of faces in the first photo that are large enough."""
    photo_size: tuple[int, int]
    """Width and height of the first photo."""
    digest: str
    """sha256 of the photos' pixels."""

    def embedding(self, recogniser: str) -> NDArray[np.float32]:
        """Return the embedding (512,) of this recogniser. Embeddings of different recognisers are not interchangeable.

        Raises StageError if it was not computed.
        """
        if recogniser not in self.embeddings:
            raise StageError(
                f"face: got embeddings by {', '.join(sorted(self.embeddings)) or 'no recogniser'}, {recogniser} is needed; "
                f"add its weights to the profile: `extra_weights: {{{recogniser}: ...}}` of actors.instantid"
            )
        return self.embeddings[recogniser]


@dataclass(frozen=True, slots=True)
class Likeness:
    """Similarity of the faces in some images to the reference face. An image without a face has no similarity."""

    similarities: tuple[float | None, ...]
    """Per image: cosine of the most similar face, -1 to 1. `None` if no face was found."""

    @property
    def mean(self) -> float | None:
        """Mean over the images with a face. `None` without such images."""
        values = self._with_face
        return sum(values) / len(values) if values else None

    @property
    def worst(self) -> float | None:
        """Minimum over the images with a face. `None` without such images."""
        return min(self._with_face, default=None)

    @property
    def without_face(self) -> int:
        """Number of images in which no face was found."""
        return len(self.similarities) - len(self._with_face)

    @property
    def _with_face(self) -> list[float]:
        return [similarity for similarity in self.similarities if similarity is not None]


class Artefacts(TypedDict, total=False):
    """Data passed between stages. Later stages replace `image` and `frames`."""

    photos: tuple[Image, ...]
    """Photos of one person, upright."""
    face: FaceFeatures
    image: Image
    last_image: Image
    """Image that the clip ends with."""
    image_likeness: Likeness
    frames: Frames
    clip_likeness: Likeness
    hd_frames: Frames
    lower_memory: bool
    """True if a stage made one of these with lower-memory settings. Results that depend on it must not be cached."""
    chunk: tuple[int, int]
    """First frame of the finished clip of which these are a chunk, and the one after its last frame."""
    made_by: dict[str, str]
    """Name of another artefact -> key of the step that made it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One shot on its way through the stages. A stage reads the artefacts that it declares as `image`, `frames` and so on."""

    shot: Shot
    artefacts: Artefacts = field(default_factory=lambda: Artefacts())
    key: str = ""
    """Content key of the step that is run. Empty if it is not known."""

    @property
    def photos(self) -> tuple[Image, ...]:
        return self.artefacts["photos"]

    @property
    def face(self) -> FaceFeatures:
        return self.artefacts["face"]

    @property
    def image(self) -> Image:
        return self.artefacts["image"]

    @property
    def last_image(self) -> Image:
        return self.artefacts["last_image"]

    @property
    def frames(self) -> Frames:
        return self.artefacts["frames"]


class ReadText(NamedTuple):
    """A text that a stage reads."""

    text: str
    tokenizer: Path
    """Folder of the tokenizer."""
    tokens: int
    """Tokens that the text encoder reads. Further ones are cut."""


class JobRecords(Protocol):
    """Small records by name, such as a `dict`."""

    def get(self, name: str, /) -> bytes | None: ...

    def __setitem__(self, name: str, content: bytes, /) -> None: ...


NOT_IN_KEY = "not in key"
"""Mark of an option that does not change bytes: `option: Annotated[bool, NOT_IN_KEY] = False`. Others are part of content
keys."""
IN_KEY_IF_CHANGED = "in key if changed"
"""Mark of an option that changes bytes unless it has its default, with which it is not part of content keys."""


class StageParams(StrictModel):
    """Parameters that a profile gives to a stage. Subclasses add options of their own, and mark those that do not
    change bytes as `NOT_IN_KEY`."""

    weights: Annotated[Path, NOT_IN_KEY]
    """Local folder or file. A stage never downloads anything. Its digest is part of the key."""
    extra_weights: Annotated[dict[str, Path], NOT_IN_KEY] = Field(default_factory=dict)
    """Name -> local path of further weights that only some shots need. The digests of those that a shot needs are part of its
    keys."""
    missing: Annotated[dict[str, str], NOT_IN_KEY] = Field(default_factory=dict)
    """Name -> error message for extra weights that are not on this machine."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch. `None` keeps the current number. It changes the last bits of a result."""
    timeout_s: Annotated[float, NOT_IN_KEY] = 1800.0
    """Timeout of one attempt."""

    def for_key(self) -> dict[str, Any]:
        """Return the options that change bytes. Weights are part of a content key by their digest instead."""
        fields = type(self).model_fields
        ignored = {name for name, option in fields.items() if NOT_IN_KEY in option.metadata}
        if_changed = {name: option.default for name, option in fields.items() if IN_KEY_IF_CHANGED in option.metadata}
        ignored |= {name for name, default in if_changed.items() if getattr(self, name) == default}
        return self.model_dump(mode="json", exclude=ignored if self.device == "cpu" else ignored | {"threads"})

    def names_extra_weights(self, name: str) -> bool:
        """Return whether the profile names these extra weights, on this machine or not."""
        return name in self.extra_weights or name in self.missing

    def extra_weights_at(self, name: str) -> Path:
        """Return the path of extra weights. Raises MissingWeights if they are not on this machine."""
        if name not in self.extra_weights:
            why = self.missing.get(name, f"not in the profile; add `extra_weights: {{{name}: ...}}` to their actor")
            raise MissingWeights(f"{name}: {why}")
        return self.extra_weights[name]

    def pins(self) -> dict[str, JsonValue]:
        """Return options that name what is not on this machine, such as the model of a server. Raises SetupError."""
        return {}

    def check_shot(self, shot: Shot, stage: str) -> None:
        """Raise StageError for a shot whose settings of this stage these parameters do not allow at any size."""

    def notes(self) -> Iterator[str]:
        """Yield notes for the user about the parameters and the files of the weights."""
        yield from ()

    def resolved(self) -> Self:
        """Return a copy with machine-dependent values made concrete, for content keys and for other machines."""
        return self


P = TypeVar("P", bound=StageParams)
PROMPT_FIELDS = ("prompt", "negative_prompt", "width", "height", "seed")
"""Shot fields that a stage reads if it makes an image or a clip of the shot's size from a prompt."""


class Stage(ABC, Generic[P]):
    """One step of the chain. Use: `stage.load(); stage(item)`, or `with stage: stage(item)`."""

    name: ClassVar[str]
    label: ClassVar[str]
    """Name shown to people, e.g. "Upscale"."""
    activity: ClassVar[str]
    """Activity shown to people while the stage runs, e.g. "Upscaling"."""
    progress_unit: ClassVar[str] = "steps"
    """Plural noun of one unit of reported progress."""
    version: ClassVar[int] = 1
    """Raised when the same inputs give other bytes than before."""
    actor: ClassVar[str] = ""
    """Stages with the same actor share weights and live in one process. Default: the name of the stage."""
    reference_s: ClassVar[float] = 1.0
    """Seconds for the reference shot, for profiles that state none and stages without `work`."""
    compute_share: ClassVar[float] = 0.5
    """Fraction of a card's peak that matrix products, convolutions and attention of `work` are assumed to reach."""
    card_factors: ClassVar[Mapping[str, float]] = {}
    """Card -> published seconds divided by those that are computed from `work`. 1 for the others."""
    reference: ClassVar[Mapping[str, Any]] = {}
    """Fields of the reference shot, beside the size, without which the stage has no work."""
    follows: ClassVar[str] = ""
    """Name of the stage that it comes after in the chain. Only for stages of other packages."""
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Fields of shots that pass this stage, beside the prompt. A server is laid out for these."""

    chosen_by: ClassVar[str]
    """Shot field or property that decides whether a shot passes this stage: it is true, or the name of the stage. An image
    never passes a stage that takes `frames`."""
    reads: ClassVar[tuple[str, ...]]
    """Shot fields that change the result. `steps.svd` names a setting of one stage."""
    identity_field: ClassVar[str] = ""
    """Shot field or property that is set when this stage is conditioned on the shot's face. Empty if it never is."""
    identity_fields: ClassVar[tuple[str, ...]] = ()
    """Further shot fields that change the result when `uses_identity(shot)`."""
    clip_only_fields: ClassVar[tuple[str, ...]] = ()
    """Shot fields of this stage that have no meaning for a still image, switches included."""
    common_settings: ClassVar[tuple[str, ...]] = ()
    """Settings of this stage that the API's `num_inference_steps` ("steps") and `guidance_scale` ("guidance") set."""
    lora_field: ClassVar[str] = ""
    """Shot field or property with the LoRAs that are active in this stage. Empty if there are none."""
    weight_fields: ClassVar[tuple[str, ...]] = ()
    """Shot fields by which `weight_files` chooses."""
    takes: ClassVar[tuple[str, ...]]
    """Artefacts this stage needs."""
    identity_inputs: ClassVar[tuple[str, ...]] = ()
    """Further artefacts that it needs when `uses_identity(shot)`."""
    writes: ClassVar[tuple[str, ...]]
    """Artefacts this stage returns."""
    debug_file: ClassVar[str | None] = None
    """File name for `--keep stages`. `None` keeps nothing."""
    shared: ClassVar[bool] = False
    """True if executors keep the result in memory for other shots with the same inputs. Only for small results."""
    uses_shot_seed: ClassVar[bool] = False
    """True if the noise comes from the shot's seed itself, not from a seed derived for the stage. Only for a stage that makes
    the first image: a refinement with the noise that produced its input would amplify it."""
    has_weights: ClassVar[bool] = True
    """False for a stage whose entry in a profile needs no `weights`."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """Classes of diffusers pipelines that its weights may be the folder of. Empty for weights in other formats."""
    extra_weights: ClassVar[tuple[str, ...]] = ()
    """Names of extra weights that a profile may give to this stage's actor."""
    Params: ClassVar[type[StageParams]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls) and not cls.actor:
            cls.actor = cls.name

    def __init__(self, params: P) -> None:
        self.params = params
        self.jobs: JobRecords = {}
        """Records of the jobs of servers. Executors store them in the output folder."""
        self._notes: dict[int, tuple[str, ...]] = {}
        """Thread -> notes of its current call."""
        self._has_noted_params = False

    @classmethod
    def applies(cls, shot: Shot) -> bool:
        """Return whether the shot passes this stage."""
        is_chosen = getattr(shot, cls.chosen_by) in (True, cls.name)
        return is_chosen and (shot.generate_video or "frames" not in cls.takes)

    @classmethod
    def uses_identity(cls, shot: Shot) -> bool:
        """Return whether this stage is conditioned on the shot's face."""
        return bool(cls.identity_field and getattr(shot, cls.identity_field))

    @classmethod
    def active_loras(cls, shot: Shot) -> tuple[LoraRef, ...]:
        """Return the LoRAs that are active in this stage."""
        return getattr(shot, cls.lora_field) if cls.lora_field else ()

    @classmethod
    def needs(cls, shot: Shot) -> tuple[str, ...]:
        """Return the artefacts that this stage needs for the shot."""
        return (*cls.takes, *cls.identity_inputs) if cls.uses_identity(shot) else cls.takes

    @classmethod
    def used_extra_weights(cls, shot: Shot) -> Collection[str]:
        """Return the names of the extra weights that this shot uses, if the profile has them."""
        return cls.extra_weights

    @classmethod
    def packaged_weights(cls, options: Mapping[str, Any]) -> Collection[str]:
        """Return references (`package:PACKAGE/FILE`) of the weights that come from installed packages. `options` are those of
        the profile's actor."""
        return ()

    @classmethod
    def weight_files(cls, params: P, shot: Shot) -> tuple[Path, ...]:
        """Return the files or folders whose content decides the result. The shot's LoRAs are local files and come last."""
        return (params.weights, *(Path(lora.path) for lora in cls.active_loras(shot)))

    @classmethod
    def check_weights(cls, params: P) -> None:
        """Raise SetupError for weights of another kind, as far as their index tells, so that no process starts for them."""
        if cls.pipelines:
            check_pipeline_folder(params.weights, cls.pipelines)

    @classmethod
    def check_shot(cls, params: P, shot: Shot) -> None:
        """Raise StageError for a shot that cannot be rendered with these parameters."""

    @classmethod
    def places(cls, params: P) -> Mapping[str, int]:
        """Return server -> shots that it has at once, for a stage that servers compute. Each server gets a worker."""
        return {}

    @classmethod
    def billed(cls, shot: Shot) -> float:
        """Return the units for which a server charges a shot: seconds of a clip, or images."""
        return 0.0

    @classmethod
    def price(cls, params: P, billed: float) -> float | None:
        """Return the price of units that a server has charged. `None` if it is unknown."""
        return None

    @property
    def origin(self) -> str | None:
        """Source of the results, if not this process."""
        return None

    @classmethod
    def texts(cls, params: P, shot: Shot) -> Iterator[ReadText]:
        """Yield the texts that the stage reads and would cut if they are too long."""
        yield from ()

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        """Return the shot's duration in this stage relative to the reference shot, without `relative_fixed_cost`.

        Override it in stages without `work`.
        """
        relative = cls.relative_work(shot)
        return 1.0 if relative is None else relative[0]

    @classmethod
    def relative_fixed_cost(cls, shot: Shot) -> float:
        """Return the duration of the part that does not depend on the number of steps, relative to the reference shot."""
        relative = cls.relative_work(shot)
        return cls.relative_cost(shot) if relative is None else relative[1]

    @classmethod
    def relative_work(cls, shot: Shot) -> tuple[float, float] | None:
        """Return both costs by the work of the shot. `None` if it is unknown."""
        own, reference = cls._default_work(shot), reference_work(cls)
        if own is None or reference is None:
            return None
        steps = own.steps.operations / reference.steps.operations
        return steps, own.fixed.operations / reference.fixed.operations if reference.fixed.operations else steps

    @classmethod
    def fixed_share(cls) -> float:
        """Return the assumed fraction of the reference shot's seconds that does not depend on the number of steps."""
        reference = reference_work(cls)
        return reference.fixed.operations / reference.total.operations if reference else 0.0

    @classmethod
    def passes(cls, shot: Shot) -> int:
        """Return how many times the model runs for the shot. The timeout of a call counts for each."""
        return 1

    @classmethod
    def divided(cls, params: P) -> P | None:
        """Return the parameters with which several GPUs divide the work of a shot, see `stages/context_parallel.py`.

        They change the last bits at most. `None` if that is impossible.
        """
        return None

    @classmethod
    def gain(cls, params: P, gpus: int) -> float:
        """Return the factor by which so many GPUs compute a step faster, if they divide its tokens."""
        return float(DOUBLING_GAIN ** log2(gpus))

    @classmethod
    def variant(cls, shot: Shot) -> str:
        """Return the name of the network that processes the shot, if shots choose between several. Empty otherwise."""
        return ""

    @classmethod
    def lower_memory(cls, params: P) -> P | None:
        """Return parameters that need less GPU memory for most sizes and may change bytes, or `None` if there are none."""
        return None

    @classmethod
    def lower_memory_steps(cls, params: P, shot: Shot) -> Iterator[P]:
        """Yield the parameters, and then those of `lower_memory` in turn, without any that need more memory for this shot."""
        yield params
        least = cls.memory(params, shot)
        lower = cls.lower_memory(params)
        while lower is not None:
            memory = cls.memory(lower, shot)
            if memory is None or least is None or memory.total <= least.total:
                least = memory
                yield lower
            lower = cls.lower_memory(lower)

    @classmethod
    def memory(cls, params: P, shot: Shot) -> StageMemory | None:
        """Return the memory that the shot needs with the published weights. `None` if unknown: the profile must state it."""
        return None

    @classmethod
    def work(cls, params: P, shot: Shot) -> ShotWork | None:
        """Return the work of a shot with the published weights. `None` if unknown: `reference_s` and `relative_cost` count."""
        return None

    @classmethod
    def _default_work(cls, shot: Shot) -> ShotWork | None:
        """Return the work of a shot with the default parameters."""
        if cls.work.__func__ is Stage.work.__func__:  # type: ignore[attr-defined]  # of a bound method
            return None
        return cls.work(_default_params(cls), shot)

    @abstractmethod
    def load(self) -> None:
        """Load the weights from local files. Raises SetupError if they are missing or of another kind."""

    @abstractmethod
    def run(self, item: Item) -> Artefacts:
        """Process the item with loaded weights."""

    @classmethod
    def generator_seed(cls, shot: Shot) -> int:
        """Return the seed of the stage's noise. Raises ValueError if the shot has no seed."""
        return shot.required_seed() if cls.uses_shot_seed else shot.derived_seed(cls.name)

    def move(self, device: str) -> None:
        """Move the loaded weights to `device` ("cpu" is host memory), for weight swapping.

        Not implemented by stages that need no GPU memory.
        """
        raise NotImplementedError(f"{self.name} does not support weight swapping")

    @property
    def adapter_loads(self) -> int:
        """Number of LoRAs that were loaded so far."""
        return 0

    def note(self, *notes: str) -> None:
        """Add notes for the user about the inputs of the current call."""
        self._notes[get_ident()] = (*self._notes.get(get_ident(), ()), *notes)

    def take_notes(self) -> tuple[str, ...]:
        """Return the notes of this thread since the last call."""
        return self._notes.pop(get_ident(), ())

    def close(self) -> None:
        """Delete what a new stage does not have, such as weights. Safe to call twice, and before `load`."""
        for name in vars(self).keys() - vars(type(self)(self.params)).keys():
            delattr(self, name)

    def __call__(self, item: Item) -> Artefacts:
        import torch

        self._note_params()
        self._note_dark_start(item)
        with torch.inference_mode(), torch_threads(self.params.threads):
            raise_recompile_limit()
            result = self.run(item)
        _require_finite(result)
        return result

    def _note_params(self) -> None:
        if not self._has_noted_params:
            self._has_noted_params = True
            self.note(*self.params.notes())

    def _note_dark_start(self, item: Item) -> None:
        """Note a start image that is black, or nearly so."""
        image = item.artefacts.get("image")
        if image is None or "image" in item.artefacts.get("made_by", {}) or {"image", "frames"}.isdisjoint(self.writes):
            return
        if image.max() < DARK:
            self.note("image: the start image is black")

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def _default_params(stage: type[Stage[Any]]) -> Any:
    return stage.Params(weights=Path())


@cache
def reference_work(stage: type[Stage[Any]]) -> ShotWork | None:
    """Return the work of the reference shot with the default parameters. `None` if it is unknown."""
    return stage._default_work(Shot(prompt="reference", **stage.reference))


DARK = 16
"""Value of a pixel below which it is black."""
ChunkPart = tuple[int, int]
"""Number, from 0, and count of the parts of a chunk that are made at the same time, with equally many calls if possible."""
_CHUNKS_GAIN = 0.875
"""Share of a group's GPUs that make chunks at a time: 25 frames in chunks of 4 are 7 chunks on 2, 4 or 8 GPUs."""


class ChunkedStage(Stage[P]):
    """A stage that makes a clip in chunks of frames. Executors distribute the chunks over workers.

    Chunked stages are the last stages of the chain. Only the first one may change the number of frames, or make a frame from
    other frames than the one at its place. Results are streamed to the encoder and never cached.
    """

    progress_unit: ClassVar[str] = "frames"
    switch_off: ClassVar[Mapping[str, Any]]
    """Shot fields with which no shot passes this stage."""

    @classmethod
    def divided(cls, params: P) -> P | None:
        return params

    @classmethod
    def gain(cls, params: P, gpus: int) -> float:
        return _CHUNKS_GAIN * gpus if gpus > 1 else 1.0

    @classmethod
    @abstractmethod
    def chunk_frames(cls, params: P) -> int:
        """Return the number of frames in one call of `process_chunk`. Clips are cut at its multiples only."""

    @staticmethod
    def scale_factor(shot: Shot) -> int:
        """Return the factor by which width and height grow."""
        return 1

    @staticmethod
    def frame_factor(shot: Shot) -> Fraction:
        """Return the factor by which the frame rate grows, at least 1. n frames become `frames_after(n, factor)`."""
        return Fraction(1)

    @staticmethod
    def source_frames(shot: Shot, chunk: slice) -> slice:
        """Return the range of input frames from which a range of output frames is made. It may end after the clip."""
        return chunk

    def first_chunk(self, shot: Shot, frames: Frames) -> tuple[Frames, slice]:
        """Return the input frames of the first chunk of a clip, and its range of output frames. `frames`: those of the clip."""
        n_output = frames_after(len(frames), self.frame_factor(shot))
        chunk = slice(0, min(self.chunk_frames(self.params), n_output))
        return frames[self.source_frames(shot, chunk)], chunk

    @abstractmethod
    def process_chunk(self, shot: Shot, frames: Frames, chunk: slice) -> Frames:
        """Return the output frames `chunk`, at most `chunk_frames` of them: (n, H * scale_factor, W * scale_factor, 3).

        `frames` are the input frames `source_frames(shot, chunk)`, fewer at the end of the clip.
        """

    def start_chunk(self, shot: Shot, frames: Frames, chunk: slice, output: Frames) -> Callable[[], None]:
        """Start `process_chunk`. Return a function that waits until its frames are in `output`.

        At most one more chunk starts before that.
        """
        output[:] = self.process_chunk(shot, frames, chunk)
        return lambda: None

    def run(self, item: Item) -> Artefacts:
        (source,), (result,) = self.takes, self.writes
        return Artefacts(**{result: self._run_clip(item.shot, item.artefacts[source], None)})  # type: ignore[misc]

    def run_chunk(
        self, shot: Shot, frames: Frames, chunk: slice | None = None, output: Frames | None = None, share: ChunkPart = (0, 1)
    ) -> Frames:
        """Make the output frames `chunk` from the input frames `source_frames(shot, chunk)`. `None`: a whole clip.

        Cut at multiples of `chunk_frames`, any division of a clip gives the same bytes.
        `output`: array to write to. `share`: the part of the chunk to make.
        """
        import torch

        with torch.inference_mode(), torch_threads(self.params.threads):
            raise_recompile_limit()
            return self._run_clip(shot, frames, chunk, output, share)

    def output_shape(self, shot: Shot, frames: Frames, chunk: slice | None) -> tuple[int, int, int, int]:
        """Return the shape of the result of `run_chunk`."""
        n_frames, height, width, _ = frames.shape
        n_output = frames_after(n_frames, self.frame_factor(shot)) if chunk is None else chunk.stop - chunk.start
        return n_output, height * self.scale_factor(shot), width * self.scale_factor(shot), 3

    def _run_clip(
        self, shot: Shot, frames: Frames, chunk: slice | None, output: Frames | None = None, share: ChunkPart = (0, 1)
    ) -> Frames:
        import numpy as np

        if output is None:
            output = np.empty(self.output_shape(shot, frames, chunk), np.uint8)
        n_output, begin = len(output), 0 if chunk is None else chunk.start
        first = self.source_frames(shot, slice(begin, begin + n_output)).start
        finished, finish = 0, None
        parts, (number, shares) = frame_chunks(n_output, self.chunk_frames(self.params)), share
        # Neighbours: frames that are drawn and frames that are copied may take turns.
        parts = parts[len(parts) * number // shares : len(parts) * (number + 1) // shares]
        for part in parts:
            made = slice(begin + part.start, begin + part.stop)
            source = self.source_frames(shot, made)
            started = self.start_chunk(shot, frames[source.start - first : source.stop - first], made, output[part])
            if finish is not None:
                finish()
                report_progress(self.name, finished, n_output)
            finished = n_output * (part.stop - parts[0].start) // (parts[-1].stop - parts[0].start)
            finish = started
        if finish is not None:
            finish()
            report_progress(self.name, finished, n_output)
        return output


def frames_after(n_frames: int, factor: Fraction) -> int:
    """Return how many frames a clip has after its frame rate has grown by a factor: all that begin before the clip ends."""
    return ceil(n_frames * factor)


def frame_chunks(n_frames: int, chunk_frames: int) -> list[slice]:
    """Cut a clip into chunks: half-open ranges of frames, in order."""
    return [slice(begin, min(begin + chunk_frames, n_frames)) for begin in range(0, n_frames, chunk_frames)]


ProgressCallback = Callable[[str, int, int], None]
"""Called with the stage's name, its finished steps and its total steps. Both counts are 0 when the stage starts.

A step is a denoising step or a frame. The callback belongs to the current context, so stages need no extra argument. It may
raise Cancelled to end the stage.
"""

_current_callback: ContextVar[ProgressCallback | None] = ContextVar("progress_callback", default=None)


@contextmanager
def progress_callback(callback: ProgressCallback) -> Iterator[None]:
    """Send the progress of the stages that run in this block to `callback`, in the thread that runs them."""
    token = _current_callback.set(callback)
    try:
        yield
    finally:
        _current_callback.reset(token)


@contextmanager
def part_of_progress(number: int, parts: int) -> Iterator[None]:
    """Report the progress of this block as that of part `number`, from 0, of `parts` parts with equally many steps."""
    callback = _current_callback.get()
    if callback is None:
        yield
        return

    def on_part(stage: str, done: int, steps: int) -> None:
        callback(stage, number * steps + done, parts * steps)

    with progress_callback(on_part):
        yield


def report_progress(stage: str, done: int, steps: int) -> None:
    """Report that `done` of the stage's `steps` are finished. Raises what the callback raises."""
    callback = _current_callback.get()
    if callback is not None:
        callback(stage, done, steps)


def progress_reporter() -> ProgressCallback:
    """Return `report_progress` with the callback of this context, for other threads."""
    return _current_callback.get() or (lambda stage, done, steps: None)


def diffusers_step_callback(stage: str) -> dict[str, Any]:
    """Return the arguments that make a diffusers pipeline report each denoising step as a step of the stage."""
    return {"callback_on_step_end": partial(_on_step_end, stage)}


def _on_step_end(stage: str, pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    report_progress(stage, index + 1, pipe.num_timesteps)
    # Only after the last step, because reading a result waits for the GPU. A later clamp of the pixels would hide infinity.
    if index + 1 == pipe.num_timesteps and not is_finite(tensors["latents"]):
        raise StageError(NOT_FINITE)
    return tensors


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run a block with this many intra-op threads of torch. `None` changes nothing."""
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


RECOMPILE_LIMIT = 64
"""Compiled variants of one function. torch's default of 8 is reached by two image sizes, LoRAs and InfuseNet together. Above
the limit torch runs the function without compilation."""


def raise_recompile_limit() -> None:
    """Set torch's limit of compiled variants for this thread, if anything was compiled: torch has one limit per thread."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, RECOMPILE_LIMIT)


def adds_by_address() -> bool:
    """Return whether the product of two matrices on the CPU depends on their addresses, as with MKL without MKL_CBWR.

    False before torch is imported: then MKL has not read the variable yet.
    """
    if "torch" not in sys.modules:
        return False
    import torch

    side = 64
    numbers, memory = torch.arange(side * side).sin(), torch.empty(side * side + side)
    matrices = (memory[start:][: side * side].copy_(numbers).view(side, side) for start in range(side))
    first, *others = (matrix @ numbers[:side] for matrix in matrices)
    return not all(torch.equal(first, other) for other in others)


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def noise_generator(seed: int) -> torch.Generator:
    """Return a seeded CPU generator: a seed gives the same noise on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def _require_finite(artefacts: Artefacts) -> None:
    """Raise StageError for NaN and infinity in face features and likenesses. Images are checked by `pixels_to_uint8`."""

    import numpy as np

    arrays: list[NDArray[np.floating]] = []
    if "face" in artefacts:
        arrays += [artefacts["face"].keypoints, *artefacts["face"].embeddings.values()]
    for likeness in (artefacts.get("image_likeness"), artefacts.get("clip_likeness")):
        if likeness is not None:
            arrays.append(np.array([value for value in likeness.similarities if value is not None]))
    if not all(np.isfinite(array).all() for array in arrays):
        raise StageError(NOT_FINITE)


def pixels_to_uint8(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """Convert (..., 3, H, W), 0 to 1, to RGB levels (..., H, W, 3), 0 to 255, rounded as diffusers does.

    The levels are a quarter of the bytes of float32 pixels. Pinned host memory makes copying them several times faster.
    Raises StageError for NaN and infinity.
    """
    import torch

    # The sum is finite only if all pixels are. It needs no tensor of its own.
    if not pixels.sum(dtype=torch.float64).isfinite():
        raise StageError(NOT_FINITE)
    levels = (pixels.float() * 255).round_().to(torch.uint8).movedim(-3, -1).contiguous()
    if levels.device.type == "cuda":
        pinned = torch.empty(levels.shape, dtype=levels.dtype, pin_memory=True)
        pinned.copy_(levels, non_blocking=True)
        torch.cuda.current_stream(levels.device).synchronize()
        levels = pinned
    array: NDArray[np.uint8] = levels.numpy()
    return array
