"""The language of a declaration: a YAML file that describes one diffusers pipeline, and its JSON schema."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from vidgen_ray.errors import FieldError, ScriptError, StrictModel, explain
from vidgen_ray.limits import MAX_FRAMES, MIN_FRAMES
from vidgen_ray.system.files import StrictLoader, load_yaml

_NAME = r"^[a-z][a-z0-9_]{1,31}$"
_RULE = re.compile(r"(?:([1-9]\d?)k \+ ([1-9]\d?)|any)")
_SCHEMA_COMMAND = "`vidgen pipelines schema`"


class ValueSource(StrEnum):
    """Where the value of an argument of a pipeline comes from."""

    PROMPT = "prompt"
    """The prompt of the shot; for a clip with `motion_prompt` appended."""
    INSTRUCTION = "instruction"
    """The text of `instruction`, for models that edit an image."""
    NEGATIVE_PROMPT = "negative_prompt"
    IMAGE = "image"
    """The image so far, the start image of a clip."""
    LAST_IMAGE = "last_image"
    """The image that the clip ends with."""
    REFERENCES = "references"
    """The photos of the person."""
    IMAGE_AND_REFERENCES = "image_and_references"
    """The image so far, then the photos."""
    VIDEO = "video"
    """The frames so far."""
    PIXELS = "pixels"
    """Product of width and height."""
    WIDTH = "width"
    HEIGHT = "height"
    NUM_FRAMES = "num_frames"
    FPS = "fps"
    STRENGTH = "strength"
    """The strength of the restyle, or that of the identity for `references`."""
    STEPS = "steps"
    GUIDANCE = "guidance"
    TEXT_TOKENS = "text_tokens"


SEEN = frozenset(
    {ValueSource.IMAGE, ValueSource.LAST_IMAGE, ValueSource.REFERENCES, ValueSource.IMAGE_AND_REFERENCES, ValueSource.VIDEO}
)
"""Sources that are images."""
ChainSlot = Literal["image", "restyle", "video", "upscale"]
_NEEDED: Mapping[str, frozenset[ValueSource]] = {
    "image": frozenset({ValueSource.PROMPT}),
    "restyle": frozenset({ValueSource.IMAGE, ValueSource.IMAGE_AND_REFERENCES}),
    "video": frozenset({ValueSource.PROMPT, ValueSource.IMAGE}),
    "upscale": frozenset({ValueSource.VIDEO}),
}
"""Slot -> sources of which a declaration needs at least one."""
_ALLOWED: Mapping[str, frozenset[ValueSource]] = {
    "image": frozenset(ValueSource)
    - {ValueSource.IMAGE, ValueSource.IMAGE_AND_REFERENCES, ValueSource.VIDEO, ValueSource.LAST_IMAGE}
    - {ValueSource.NUM_FRAMES, ValueSource.FPS, ValueSource.INSTRUCTION},
    "restyle": frozenset(ValueSource) - {ValueSource.VIDEO, ValueSource.LAST_IMAGE, ValueSource.NUM_FRAMES, ValueSource.FPS},
    "video": frozenset(ValueSource) - {ValueSource.VIDEO, ValueSource.IMAGE_AND_REFERENCES, ValueSource.INSTRUCTION},
    "upscale": frozenset({ValueSource.VIDEO, ValueSource.PROMPT, ValueSource.STEPS, ValueSource.GUIDANCE, ValueSource.FPS}),
}


class FrameRule(StrictModel):
    """Lengths of the clips that a model makes."""

    rule: str = Field(description="`4k + 1`: all numbers of this form with k >= 1. `any`: all numbers.", pattern=_RULE.pattern)
    most: int = Field(ge=MIN_FRAMES, le=MAX_FRAMES, description="Most frames of a pass.")
    auto: int = Field(ge=MIN_FRAMES, description="Most frames that `num_frames: auto` chooses, such as in the training.")

    @property
    def step(self) -> int:
        """Return the difference between two lengths."""
        found = _RULE.fullmatch(self.rule)
        return int(found[1]) if found and found[1] else 1

    @property
    def rest(self) -> int:
        found = _RULE.fullmatch(self.rule)
        return int(found[2]) if found and found[2] else 1

    def allows(self, frames: int) -> bool:
        """Return whether the model makes clips of this length."""
        is_of_rule = self.step == 1 or (frames > self.rest and (frames - self.rest) % self.step == 0)
        return MIN_FRAMES <= frames <= self.most and is_of_rule

    @model_validator(mode="after")
    def _check(self) -> FrameRule:
        if not any(map(self.allows, range(self.most + 1))):
            raise ValueError(f"no number from {MIN_FRAMES} to most ({self.most}) is {self.rule}")
        if not self.allows(self.auto):
            raise ValueError(f"auto is {self.auto}, must be {self.rule}, at most {self.most}")
        return self


class SizeRule(StrictModel):
    """Sizes of the images that a model makes."""

    multiple: int = Field(ge=1, le=256, description="Width and height are multiples of this.")
    buckets: tuple[tuple[int, int], ...] = Field(
        default=(), description="Pairs of width and height, if the model makes no others."
    )
    most_pixels: int | None = Field(default=None, ge=1, description="Largest product of width and height.")

    @model_validator(mode="after")
    def _check(self) -> SizeRule:
        for width, height in self.buckets:
            if width % self.multiple or height % self.multiple:
                raise ValueError(f"buckets: {width}x{height} is not a multiple of {self.multiple}")
            if self.most_pixels is not None and width * height > self.most_pixels:
                raise ValueError(f"buckets: {width}x{height} has more pixels than most_pixels")
        return self


class GuidanceRule(StrictModel):
    """Guidance scale of a model."""

    default: float = Field(ge=0, le=30)
    off_at: float = Field(
        default=1.0, ge=0, description="Up to this scale there is no second pass, and the negative prompt has no effect."
    )
    one_batch: bool = Field(default=False, description="Both passes of a guided step are one call of the network.")


class PromptRule(StrictModel):
    """How a model reads its prompt. It says before the run which prompts are cut."""

    tokenizer: str = Field(default="tokenizer", description="Component of the pipeline.")
    tokens: int = Field(ge=1, le=4096, description="Tokens that the text encoder reads, with those of the template.")
    template: str = Field(default="{}", description="Text around the prompt. `{}` stands for the prompt.")
    negative: str | None = Field(default=None, description="Negative prompt of shots without one. None: there is none.")


class Returns(StrictModel):
    """What the pipeline returns."""

    images: str = Field(default="frames", description="Attribute of the output with the images or frames.")
    has_alpha: bool = Field(default=False, description="Images have a fourth channel, which is left out.")
    sound: str | None = Field(default=None, description="Attribute with the sound, channels x samples.")
    sound_hz: int | None = Field(default=None, ge=8000, le=192_000, description="Samples per second of the sound.")

    @model_validator(mode="after")
    def _check(self) -> Returns:
        if (self.sound is None) != (self.sound_hz is None):
            raise ValueError("sound and sound_hz belong together")
        return self


ArgumentName = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]*$")]


class Declaration(StrictModel):
    """One diffusers pipeline as a stage."""

    name: str = Field(pattern=_NAME, description="Name of the stage and of the model, such as in `video_model`.")
    label: str = Field(min_length=1, max_length=40, description="Name for people.")
    slot: ChainSlot = Field(description="Place in the chain.")
    pipeline: str = Field(pattern=r"^[A-Z][A-Za-z0-9]*Pipeline$", description="Class of diffusers, standard or modular.")
    folders_of: tuple[str, ...] = Field(
        default=(), description="Further classes whose folders the pipeline loads, such as that for text to video."
    )
    inputs: dict[ArgumentName, ValueSource] = Field(
        min_length=1, description="Argument of the pipeline -> source of its value."
    )
    constants: dict[ArgumentName, JsonValue] = Field(default_factory=dict, description="Argument of the pipeline -> value.")
    instruction: str | None = Field(
        default=None, description="What an editing model is asked. `{style}` stands for the style prompt or the prompt."
    )
    most_references: int = Field(default=1, ge=1, le=16, description="Most photos that the model reads.")
    frames: FrameRule | None = None
    fps: int | None = Field(default=None, ge=1, le=120, description="Frames per second that the model was trained with.")
    size: SizeRule
    steps: int = Field(ge=1, le=200, description="Default denoising steps.")
    guidance: GuidanceRule | None = None
    text: PromptRule | None = None
    scale: float | None = Field(default=None, gt=1, le=8, description="Factor by which an upscaler enlarges each side.")
    float32: tuple[str, ...] = Field(default=(), description="Components that keep float32.")
    has_loras: bool = True
    tiles: bool = Field(default=True, description="The autoencoder can work in tiles.")
    offload: bool = Field(default=True, description="Components can wait in host memory.")
    returns: Returns = Returns()
    progress: bool = Field(default=True, description="The pipeline reports its steps.")
    licence: str = Field(description="Id of the licence in the ledger of licences.")
    sources: tuple[str, ...] = Field(min_length=1, description="Where the facts are from.")
    tiny: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict, description="Component -> config of a small network, for the contract test."
    )

    @field_validator("instruction")
    @classmethod
    def _check_instruction(cls, value: str | None) -> str | None:
        if value is not None and "{style}" not in value:
            raise ValueError("must contain {style}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Declaration:
        for problem in _problems(self):
            raise ValueError(problem)
        return self


def _problems(of: Declaration) -> Iterator[str]:
    """Yield what does not fit together."""
    sources = set(of.inputs.values())
    if twice := sorted(of.inputs.keys() & of.constants.keys()):
        yield f"constants.{twice[0]}: is an input, too"
    if wrong := sorted(sources - _ALLOWED[of.slot]):
        yield f"inputs: {wrong[0]} is no source for the slot {of.slot}, which has {', '.join(sorted(_ALLOWED[of.slot]))}"
    if not sources & _NEEDED[of.slot]:
        yield f"inputs: slot {of.slot} needs {' or '.join(sorted(_NEEDED[of.slot]))}"
    if (of.slot == "video") != (of.frames is not None):
        yield "frames: belongs to the slot video, and only to it"
    if (of.slot == "video") != (of.fps is not None):
        yield "fps: belongs to the slot video, and only to it"
    if (of.slot == "upscale") != (of.scale is not None):
        yield "scale: belongs to the slot upscale, and only to it"
    if (ValueSource.INSTRUCTION in sources) != (of.instruction is not None):
        yield "instruction: belongs to the source instruction"
    if (ValueSource.GUIDANCE in sources) != (of.guidance is not None):
        yield "guidance: belongs to the source guidance"
    reads_text = bool(sources & {ValueSource.PROMPT, ValueSource.INSTRUCTION})
    if reads_text != (of.text is not None):
        yield "text: belongs to the sources prompt and instruction"


def read_declaration(file: Path) -> Declaration:
    """Return the declaration of a file. Raises ScriptError with line and field of each problem."""
    try:
        content = load_yaml(file)
    except (OSError, ValueError) as error:
        raise ScriptError(
            [FieldError(file.name, None, None, f"a file that cannot be read ({error})", "must be YAML")]
        ) from None
    if not isinstance(content, dict):
        raise ScriptError([FieldError(file.name, 1, None, "no mapping", f"must be a declaration, see {_SCHEMA_COMMAND}")])
    try:
        return Declaration.model_validate(content)
    except ValidationError as error:
        lines = lines_of(file)
        raise ScriptError([_field_error(file, lines, detail) for detail in error.errors()]) from None


def _field_error(file: Path, lines: Mapping[tuple[str, ...], int], detail: Any) -> FieldError:
    field, got, allowed = explain(detail, Declaration.model_fields, _SCHEMA_COMMAND)
    place = tuple(str(part) for part in detail["loc"])
    if field is None and (found := re.match(r"([a-z_0-9]+(?:\.[a-z_0-9]+)?): ", allowed)):
        place, field, allowed = tuple(found[1].split(".")), found[1], allowed[found.end() :]
    return FieldError(file.name, line_at(lines, place), field, got, allowed)


def line_at(lines: Mapping[tuple[str, ...], int], place: tuple[str, ...]) -> int | None:
    """Return the line of a field, or of the innermost field around it that the file has. `lines`: see `lines_of`."""
    return next((lines[place[:size]] for size in range(len(place), 0, -1) if place[:size] in lines), None)


def lines_of(file: Path) -> dict[tuple[str, ...], int]:
    """Return path of a field -> its line, from 1, such as `("inputs", "image")`."""
    root = yaml.compose(file.read_text("utf-8-sig"), StrictLoader)
    found: dict[tuple[str, ...], int] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            here = (*path, str(key.value))
            found[here] = key.start_mark.line + 1
            walk(value, here)

    walk(root, ())
    return found


@cache
def shipped() -> Mapping[str, Declaration]:
    """Return the declarations of this package by name."""
    folder = resources.files("vidgen_ray.declared")
    files = sorted(Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    read = [read_declaration(file) for file in files]
    return {declaration.name: declaration for declaration in read}
