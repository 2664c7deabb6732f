"""Shot: the fields of a script line, their ranges and its seeds. Independent of files, models and stages."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from vidgen_ray.errors import StrictModel, explain, shortened_value
from vidgen_ray.limits import (
    CONTROL_CHARACTERS,
    MAX_EXTENDED_FRAMES,
    MAX_FRAMES,
    MAX_SHOTS_PER_LINE,
    MAX_SIDE_PX,
    MAX_TEXT,
    MIN_FRAMES,
    MIN_SIDE_PX,
)
from vidgen_ray.safety import Consent
from vidgen_ray.trainers import FOR, TARGETS
from vidgen_ray.video_models import (
    AUTO_FRAMES,
    DEFAULT_MODEL,
    MODEL_DEFAULTS,
    VIDEO_MODELS,
    VideoModel,
    VideoModelName,
    frames_of_passes,
    is_per_model,
    with_model_defaults,
)

VARIANT_SUFFIX = 5
"""Characters that a variant suffix such as `-v999` adds to an id."""
ID_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
ID_DIGITS = 16
"""Hexadecimal digits of the hash in a derived id: 64 bits, so that a million lines have different ids in practice."""
MIN_MULTIPLE_PX = 16
"""Width and height are multiples of this, with some video models of more."""
MIN_CROP_PX = 16
"""Smallest width and height in pixels that a clip may be cut to."""
MATRIX = "matrix"
"""Field of a line: field -> list of values. Not a field of a shot, whose metadata has its values under this name."""
NESTED_FIELDS = ("steps", "guidance")
"""Fields with one setting per stage. They may be written flat: `"flux.steps": 4`."""
MODEL_FIELDS = ("image_model", "style_model", "video_model")
"""Fields that choose the model of a slot of the chain."""
IMAGE_FIELDS = ("image", "last_image")
"""Fields with an image file."""
LORA_FIELDS = ("lora", "video_lora")
"""Fields with LoRA files."""
DERIVED_FIELDS = {
    "fast_lora": ("lora", "mode"),
    "klein_lora": ("lora", "image_model"),
    "flux_identity": ("face_image", "identity", "identity_strength"),
}
"""Property that stages read in place of fields -> the fields it is computed from."""
STAGES_WITH_STEPS = ("flux", "klein", "remote_image", "refine", "lora", "hunyuan", "qwen_edit", *VIDEO_MODELS)
"""Stages that have denoising steps and a guidance scale in `steps` and `guidance` of a shot."""
GUIDANCE_SCALES = (*STAGES_WITH_STEPS, "wan_2")
"""Settings of `guidance`: one per stage, and one for the low-noise expert of Wan, `guidance_scale_2` in diffusers."""
PROMPTED_MODELS = tuple(name for name, model in VIDEO_MODELS.items() if model.reads_prompt)
MODELS_WITH_LORAS = tuple(name for name, model in VIDEO_MODELS.items() if model.has_loras)
STEPPED_MODELS = {name: model for name, model in VIDEO_MODELS.items() if model.frame_step > 1}
"""Video models that do not generate every number of frames."""
INSTANTID_SDXL, REFERENCE, NO_IDENTITY = "instantid-sdxl", "reference", "none"
"""Values of `identity` that do not name a FLUX identity method."""

FRAMES_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": MIN_FRAMES, "maximum": MAX_FRAMES},
        {"enum": [AUTO_FRAMES]},
        {"type": "string", "pattern": f"^{FOR}[a-z-]+:[a-z0-9-]+$"},
    ]
}
"""JSON schema of `num_frames`. A shot always has a number: other values are replaced when it is checked."""

Priority = Literal["low", "normal", "high"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
"""All priorities, the lowest first."""
PRIORITY_STEP = 32
"""Later shots that overtake one on a server until it counts as one priority higher."""
Strength = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=200)]
Guidance = Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)]


def booleans_as_text(model: type[BaseModel], data: Any) -> Any:
    """Return the fields with `true` and `false` as text where the model has a number, so that it rejects them.

    pydantic would read `"seed": true` as seed 1.
    """
    if not isinstance(data, dict):
        return data
    booleans = [name for name, value in data.items() if value is True or value is False]
    wrong = number_fields(model).intersection(booleans) if booleans else ()
    return {**data, **{name: str(data[name]).lower() for name in wrong}} if wrong else data


@cache
def number_fields(model: type[BaseModel]) -> frozenset[str]:
    """Return the fields that are numbers."""
    types = {name: set(types_in(field.annotation)) for name, field in model.model_fields.items()}
    return frozenset(name for name, found in types.items() if found & {int, float} and bool not in found)


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield an annotation, and the types and values that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


class _Frozen(StrictModel):
    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, data: Any) -> Any:
        return booleans_as_text(cls, data)


class LoraRef(_Frozen):
    """LoRA file and the weight of its adapter."""

    path: str = Field(min_length=1, description="A .safetensors file, or a `builtin:` name.")
    weight: float = Field(default=1.0, ge=-2, le=2, allow_inf_nan=False, description="Scale of the adapter.")


class VideoLora(LoraRef):
    """LoRA of a video model."""

    expert: Literal["both", "high", "low"] = Field(
        default="both",
        description="Transformer of Wan 2.2 that it is for: high (the noisy steps), low (the last steps), or both. Other "
        "models have one transformer.",
    )


class LocalLora(LoraRef):
    """LoRA file of this machine, with the content that it must have. Not part of a script."""

    sha256: str


class LocalVideoLora(VideoLora, LocalLora):
    """LoRA of a video model on this machine, with the content that it must have. Not part of a script."""


def _guidance_of(stage: str) -> Any:
    """Return the type of a stage's guidance scale."""
    model = VIDEO_MODELS.get(stage)
    return Annotated[float, Field(ge=model.min_guidance, le=30, allow_inf_nan=False)] if model else Guidance


class StageSettings(_Frozen):
    """One setting for each stage with denoising steps. `None` uses the default of the profile's model."""

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, data: Any) -> Any:
        if not isinstance(data, Mapping | StageSettings):
            raise ValueError('must be a mapping of stages to values, such as {"flux": 3}')
        return data

    if TYPE_CHECKING:

        def __getattr__(self, stage: str) -> Any: ...


if TYPE_CHECKING:
    StageSteps = StageSettings
    StageGuidance = StageSettings
else:
    StageSteps = create_model(
        "StageSteps",
        __base__=StageSettings,
        __module__=__name__,
        __doc__="Denoising steps of each stage. `None` uses the default of the profile's model.",
        **dict.fromkeys(STAGES_WITH_STEPS, (Steps | None, None)),
    )
    StageGuidance = create_model(
        "StageGuidance",
        __base__=StageSettings,
        __module__=__name__,
        __doc__="Guidance scale of each stage. `None` uses the default of the model. For svd: the guidance of the last frame.",
        **{name: (_guidance_of(name) | None, None) for name in STAGES_WITH_STEPS},
        wan_2=(
            Guidance | None,
            Field(
                default=None,
                description="Guidance scale of Wan's low-noise expert, if `wan` is above 1. Default: that of `wan`.",
            ),
        ),
    )


RATIO = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")
MAX_RATIO = 4
"""Longest shape of `aspect`."""
ASPECT_MULTIPLE_PX = 32
"""Sizes that `aspect` chooses for clips are multiples of this: some weights need it."""


def _checked_aspect(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        # YAML reads 9:16 without quotes as a number of minutes and seconds.
        value = f"{value // 60}:{value % 60}"
    match = RATIO.fullmatch(value) if isinstance(value, str) else None
    if match is None or not 1 / MAX_RATIO <= _ratio(value) <= MAX_RATIO:
        raise ValueError(f"must be WIDTH:HEIGHT, such as 9:16, from 1:{MAX_RATIO} to {MAX_RATIO}:1")
    return value


Aspect = Annotated[str, BeforeValidator(_checked_aspect)]


def _ratio(aspect: str) -> float:
    width, _, height = aspect.partition(":")
    return int(width) / int(height)


def _drawn_size(area: int, ratio: float, multiple: int) -> tuple[int, int]:
    """Return width and height in pixels, multiples of `multiple`, that after a crop to `ratio` have about this area.

    Sizes close to the ratio are preferred, since the crop loses less of them.
    """
    width = math.sqrt(area * ratio)
    smallest, largest = -(-MIN_SIDE_PX // multiple), MAX_SIDE_PX // multiple

    def nearest(side: float) -> set[int]:
        return {min(max(count, smallest), largest) * multiple for count in (int(side / multiple), int(side / multiple) + 1)}

    def cost(size: tuple[int, int]) -> float:
        drawn = size[0] / size[1]
        kept = min(drawn, ratio) / max(drawn, ratio)
        return abs(math.log(size[0] * size[1] * kept / area)) - math.log(kept)

    return min(product(sorted(nearest(width)), sorted(nearest(width / ratio))), key=cost)


def _by_model(text: str, models: Mapping[str, VideoModel] = VIDEO_MODELS) -> str:
    """Return the text once for each of these video models, such as "{fps} for {name}"."""
    return ", ".join(text.format(name=name, **asdict(model)) for name, model in models.items())


TEXT: JsonDict = {"pattern": r"^([^\x00-\x08\x0b-\x1f]|\r\n)*$"}
"""JSON schema of prompts: without control characters."""


class Shot(_Frozen):
    """Settings of one shot: a script line with all defaults filled in.

    `width` and `height` are in pixels, before upscaling and cropping. `steps` and `guidance` may also be written flat:
    `"flux.steps": 4`.
    """

    id: str | None = Field(
        default=None, description="Name of the shot, unique in the script. Default: derived from the line's content."
    )
    prompt: str = Field(min_length=1, max_length=MAX_TEXT, description="Text to render.", json_schema_extra=TEXT)
    negative_prompt: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        description="Text to avoid. FLUX then needs two passes per denoising step.",
        json_schema_extra=TEXT,
    )
    mode: Literal["quality", "fast"] = Field(
        default="quality",
        description="quality: run all stages one after another. fast: one FLUX pass with the LoRAs active, no restyle.",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**32, description="Seed of the shot. Default: derived from the run's seed and the id."
    )
    variants: int = Field(
        default=1, ge=1, le=MAX_SHOTS_PER_LINE, description="Number of shots rendered from this line: id-v0, id-v1, ..."
    )

    priority: Priority = Field(
        default="normal",
        exclude=True,  # of a request or a line, not of what is rendered
        description="Shots with a higher priority start first. No effect on files.",
    )

    image_model: Literal["flux", "klein", "remote", "none"] = Field(
        default="flux",
        description="Model of the base image and of `lora`: FLUX.1, FLUX.2 klein (LoRAs are active while it draws), or that of "
        "a server (without LoRAs and identity). none: a server's video model makes the clip from the prompt alone.",
    )
    width: int = Field(
        default=1024,
        description=f"Width in pixels, a multiple of {MIN_MULTIPLE_PX} from {MIN_SIDE_PX} to {MAX_SIDE_PX}; for video of "
        f"{_by_model('{size_multiple_px} with {name}')}.",
    )
    height: int = Field(default=576, description="Height in pixels. Same rules as for width.")
    image: str | None = Field(
        default=None, description="Start image in place of the base image. Scaled and cropped to the shot's size."
    )
    last_image: str | None = Field(
        default=None,
        description="Image that the clip ends with, for video_model wan with I2V-A14B. Scaled and cropped as `image`.",
    )

    continue_from: str | None = Field(
        default=None,
        min_length=1,
        description="Id of an earlier shot whose last frame is the start image, which LoRAs and restyling do not change. "
        "In the API: of a video.",
    )

    face_image: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="Photos of the same face. The keypoints are those of the first photo."
    )
    face_index: int | None = Field(
        default=None,
        ge=0,
        description="Index of the face to use in the first photo, from left to right, from 0. Default: the largest face.",
    )
    consent: Consent | None = Field(
        default=None,
        description="Why the face may be used: {subject, basis, reference}. Required for face_image, except for the photos "
        "that come with vidgen.",
    )
    character: str | None = Field(default=None, description="Name of a character in the header of a YAML script.")
    identity: str = Field(
        default="infusenet",
        description="Identity method: infusenet, or another one of FLUX; instantid-sdxl: SDXL draws the base image; reference: "
        "FLUX.2 klein draws it and sees all photos (default for image_model klein); none.",
    )
    identity_strength: Strength = Field(default=1.0, description="Strength of the identity conditioning. 0 disables it.")
    identity_start: Strength = Field(
        default=0.0, description="Fraction of FLUX's denoising steps before identity conditioning starts."
    )
    identity_end: Strength = Field(
        default=1.0,
        validate_default=True,
        description="Fraction of FLUX's denoising steps after which identity conditioning stops.",
    )
    pose: Literal["photo", "none"] = Field(
        default="photo", description="photo: place the face as in the first photo. none: let the prompt place it."
    )
    refine_strength: Strength = Field(
        default=0.35,
        description="Image-to-image strength of FLUX over the SDXL image, for shots without a LoRA. 0 keeps the SDXL image.",
    )
    min_identity: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        allow_inf_nan=False,
        description="Minimum likeness of the image and the clip to the face (cosine similarity). Default: not checked.",
    )
    max_tries: int = Field(default=1, ge=1, le=11, description="Seeds to try until the likeness reaches min_identity.")
    lora: tuple[LoraRef, ...] = Field(default=(), description="LoRAs: a path, or a list of paths or of {path, weight}.")
    lora_strength: Strength = Field(
        default=0.6, description="Image-to-image strength of the LoRA stage. 0 keeps the base image."
    )

    use_hunyuan_style: bool = Field(default=False, description="Restyle the image with the style model. Ignored in mode fast.")
    style_model: Literal["hunyuan", "qwen-edit"] = Field(
        default="hunyuan",
        description="hunyuan: HunyuanDiT, image to image. qwen-edit: Qwen-Image-Edit, by instruction.",
    )
    style_prompt: str | None = Field(
        default=None, max_length=MAX_TEXT, description="Text appended to the prompt for the restyle.", json_schema_extra=TEXT
    )
    style_strength: Strength = Field(default=0.5, description="Image-to-image strength of the restyle. 0 keeps the image.")

    generate_video: bool = Field(default=True, description="Generate a clip from the image. false: render the image only.")
    video_model: VideoModelName = Field(
        default=DEFAULT_MODEL,
        description=f"Video model. The profile must have it. The prompt is read by {', '.join(PROMPTED_MODELS)}.",
    )
    motion_prompt: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        description="Text appended to the prompt for the video model: what moves, and how.",
        json_schema_extra=TEXT,
    )
    video_lora: tuple[VideoLora, ...] = Field(
        default=(),
        description=f"LoRAs of the video model {' or '.join(MODELS_WITH_LORAS)}: a path, or a list of paths or of {{path, "
        "weight, expert}.",
    )
    num_frames: Annotated[int, WithJsonSchema(FRAMES_SCHEMA)] = Field(
        default=25,
        ge=MIN_FRAMES,
        le=MAX_FRAMES,
        description=f"Number of frames in the clip: {_by_model('{frame_step}k + 1 for {name}', STEPPED_MODELS)}. auto, the "
        f"default of all models but {DEFAULT_MODEL}: the allowed number closest to 5 seconds. {FOR}TRAINER:MODEL, such as "
        f"{FOR}{TARGETS[0]}: the longest clip that a trainer uses as a whole, with fps_out.",
    )
    extend: int = Field(
        default=0,
        ge=0,
        le=15,
        description="Further passes of the video model, each from the last frame of the one before; each adds num_frames - 1 "
        "frames.",
    )
    fps: int = Field(
        default=VIDEO_MODELS[DEFAULT_MODEL].fps,
        ge=1,
        le=60,
        description=f"Frames per second. Default: {_by_model('{fps} for {name}')}.",
    )
    interpolation: Literal[1, 2, 4, 8] = Field(
        default=1, description="Factor of the frame rate by frame interpolation; the clip lasts as long as before."
    )
    fps_out: int | None = Field(
        default=None,
        ge=1,
        le=240,
        description="Frames per second of the finished clip, at least fps, by interpolation. Default: fps x interpolation.",
    )
    motion_bucket_id: int = Field(default=127, ge=1, le=255, description="Amount of motion. Higher values move more.")
    noise_aug_strength: float = Field(
        default=0.02,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Noise added to the start image. Higher values depart further from it.",
    )

    upscale_video: bool = Field(default=True, description="Upscale the clip.")
    scale: Literal[2, 3, 4] = Field(default=4, description="Upscaling factor.")
    upscaler: str = Field(
        default="animevideov3",
        pattern=r"^[A-Za-z0-9._-]+$",
        description="Weights file in the profile's upscaler folder, without its extension.",
    )
    crop_width: int | None = Field(
        default=None,
        ge=MIN_CROP_PX,
        multiple_of=2,
        description="Width in pixels of the middle of the finished clip that is kept; image and clip before upscaling alike.",
    )
    crop_height: int | None = Field(
        default=None, ge=MIN_CROP_PX, multiple_of=2, description="Same as crop_width, for the height."
    )

    aspect: Aspect | None = Field(
        default=None,
        exclude=True,  # width, height and crop are what is rendered
        description="Shape of the finished clip as WIDTH:HEIGHT, such as 9:16: replaces width and height by sizes of about the "
        "same area, and crops.",
    )

    steps: StageSteps = Field(default=StageSteps(), description="Denoising steps of each stage. Default: those of the model.")
    guidance: StageGuidance = Field(
        default=StageGuidance(), description="Guidance scale of each stage. Default: that of the model."
    )
    metadata: dict[str, JsonValue] = Field(default_factory=dict, description="JSON copied to the manifest unchanged.")

    @model_validator(mode="before")
    @classmethod
    def _normalise(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = with_model_defaults(nest_flat_settings(data))
        # FLUX's identity methods do not fit other models.
        return {"identity": REFERENCE, **data} if data.get("image_model") == "klein" else data

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str | None) -> str | None:
        if value is not None and (not ID_PATTERN.fullmatch(value) or value.endswith(".")):
            raise ValueError("must be 1 to 128 characters of A-Z a-z 0-9 . _ -, without a dot at the start or end")
        return value

    @field_validator("width", "height")
    @classmethod
    def _check_size(cls, value: int) -> int:
        if not MIN_SIDE_PX <= value <= MAX_SIDE_PX or value % MIN_MULTIPLE_PX:
            below = value // MIN_MULTIPLE_PX * MIN_MULTIPLE_PX
            nearest = sorted({min(max(size, MIN_SIDE_PX), MAX_SIDE_PX) for size in (below, below + MIN_MULTIPLE_PX)})
            raise ValueError(
                f"must be a multiple of {MIN_MULTIPLE_PX} from {MIN_SIDE_PX} to {MAX_SIDE_PX} "
                f"(nearest: {', '.join(map(str, nearest))})"
            )
        return value

    @field_validator("num_frames")
    @classmethod
    def _check_num_frames(cls, value: int, info: ValidationInfo) -> int:
        model = VIDEO_MODELS.get(info.data.get("video_model", ""))
        if model is not None and not model.allows(value):
            raise ValueError(f"{model.allowed_instead_of(value)}, or {AUTO_FRAMES}")
        return value

    @field_validator("prompt", "negative_prompt", "style_prompt", "motion_prompt")
    @classmethod
    def _check_text(cls, value: str | None) -> str | None:
        if value is None:
            return None
        # Zero-width spaces are neither printable nor whitespace.
        if not any(char.isprintable() and not char.isspace() for char in value):
            raise ValueError("must not be blank")
        if CONTROL_CHARACTERS.search(value):
            raise ValueError("must not contain control characters other than tab and newline")
        return value

    @field_validator("face_image", mode="before")
    @classmethod
    def _face_image_to_tuple(cls, value: Any) -> Any:
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("variants")
    @classmethod
    def _check_variants(cls, value: int, info: ValidationInfo) -> int:
        most = 128 - VARIANT_SUFFIX
        if value > 1 and (letters := len(info.data.get("id") or "")) > most:
            raise ValueError(f"must be 1 with an id of {letters} characters; with variants, ids have at most {most}")
        return value

    @field_validator("continue_from")
    @classmethod
    def _check_continue_from(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value == info.data.get("id"):
            raise ValueError("must name another shot than the line itself")
        return value

    @field_validator("identity_end")
    @classmethod
    def _check_identity_end(cls, value: float, info: ValidationInfo) -> float:
        start = info.data.get("identity_start")
        if start is not None and value <= start:
            raise ValueError(f"must be greater than identity_start ({start})")
        return value

    @field_validator("lora", "video_lora", mode="before")
    @classmethod
    def _lora_to_tuple(cls, value: Any) -> Any:
        if value is None:
            return ()
        if isinstance(value, str | dict | LoraRef):
            value = [value]
        if isinstance(value, list | tuple):
            return tuple({"path": v} if isinstance(v, str) else v for v in value)
        return value

    @model_validator(mode="after")
    def _apply_aspect(self) -> Self:
        if self.aspect is not None:
            if self.crop_width is not None or self.crop_height is not None:
                raise ValueError("aspect is set, must not be together with crop_width or crop_height")
            model = VIDEO_MODELS[self.video_model] if self.generate_video else None
            multiple = MIN_MULTIPLE_PX if model is None else max(ASPECT_MULTIPLE_PX, model.size_multiple_px)
            width, height = _drawn_size(self.width * self.height, _ratio(self.aspect), multiple)
            sized = self.model_copy(update={"width": width, "height": height}).cropped_to_aspect()
            vars(self).update({name: getattr(sized, name) for name in ("width", "height", "crop_width", "crop_height")})
        return self

    def cropped_to_aspect(self) -> Self:
        """Return the shot with the crop to its `aspect`, in pixels of the finished clip. Without an aspect, the shot itself."""
        if self.aspect is None:
            return self
        ratio, scale = _ratio(self.aspect), self.scale if self.generate_video and self.upscale_video else 1
        width, height = self.width * scale, self.height * scale
        crop_width, crop_height = round(height * ratio / 2) * 2, round(width / ratio / 2) * 2
        crop = {
            "crop_width": crop_width if crop_width < width else None,
            "crop_height": crop_height if crop_height < height else None,
        }
        return self.model_copy(update=crop)

    @model_validator(mode="after")
    def _check_field_combinations(self) -> Self:
        if self.image_model == "klein" and self.identity not in (REFERENCE, NO_IDENTITY):
            raise ValueError(f"identity is {self.identity}, must be {REFERENCE} or {NO_IDENTITY} with image_model klein")
        if self.image_model == "remote" and not self.has_start_image:
            if self.face_image and self.identity != NO_IDENTITY:
                raise ValueError(f"identity is {self.identity}, must be {NO_IDENTITY} with image_model remote")
            if self.lora:
                raise ValueError("lora is set, must not be with image_model remote, which has no LoRAs")
        if self.image_model == "none" and not self.has_start_image:
            for name in ("face_image", "lora", "use_hunyuan_style", "extend"):
                if getattr(self, name):
                    raise ValueError(f"{name} is set, must not be with image_model none, which has no image before the clip")
            if self.clip_by != "remote":
                raise ValueError("image_model is none, which needs a clip by video_model remote")
        if self.generate_video:
            multiple = VIDEO_MODELS[self.video_model].size_multiple_px
            for name in ("width", "height"):
                if getattr(self, name) % multiple:
                    got = getattr(self, name)
                    below = got // multiple * multiple
                    nearest = ", ".join(str(side) for side in (below, below + multiple) if MIN_SIDE_PX <= side <= MAX_SIDE_PX)
                    must = f"is not a multiple of {multiple}, which video generation requires (nearest: {nearest})"
                    raise ValueError(f"{name} {got} {must}")
            if self.extend and self.clip_frames > MAX_EXTENDED_FRAMES:
                most = (MAX_EXTENDED_FRAMES - 1) // (self.num_frames - 1) - 1
                raise ValueError(
                    f"extend {self.extend} gives a clip of {self.clip_frames} frames, at most {MAX_EXTENDED_FRAMES} are allowed"
                    f"; set extend to at most {most} with num_frames {self.num_frames}"
                )
        if self.fps_out is not None:
            interpolated = self.fps * self.interpolation
            if self.fps_out < self.fps:
                raise ValueError(f"fps_out {self.fps_out} is lower than fps {self.fps}; set fps_out to at least {self.fps}")
            if self.interpolation > 1 and self.fps_out != interpolated:
                raise ValueError(
                    f"fps_out {self.fps_out} contradicts interpolation {self.interpolation}, which gives {interpolated} frames "
                    "per second; set one of them"
                )
        for name, used in (
            ("lora", bool(self.lora) and self.image_model == "flux"),
            ("refine", self.redrawn_by == "refine"),
        ):
            strength, steps = getattr(self, f"{name}_strength"), getattr(self.steps, name)
            if used and steps and strength and steps * strength < 1:
                raise ValueError(
                    f"{name}_strength {strength} of {steps} steps is less than one step; "
                    f"set steps.{name} to at least {math.ceil(1 / strength)}"
                )
        return self

    @property
    def clip_frames(self) -> int:
        """Number of frames of the generated clip, those of all passes of the video model."""
        return frames_of_passes(self.num_frames, self.extend)

    @property
    def flux_identity(self) -> str | None:
        """Identity method that conditions FLUX. `None` without a face, with strength 0, or with another kind of method."""
        by_flux = self.identity not in (NO_IDENTITY, INSTANTID_SDXL, REFERENCE)
        return self.identity if by_flux and self.face_image and self.identity_strength > 0 else None

    @property
    def has_face(self) -> bool:
        """True if the shot has photos of a face."""
        return bool(self.face_image)

    @property
    def image_by(self) -> str | None:
        """Name of the stage that renders the base image. `None` with a start image, and for a clip from the prompt alone."""
        if self.has_start_image or self.image_model == "none":
            return None
        if self.image_model == "klein" or self.uses_reference_photos:
            return "klein"
        if self.identity == INSTANTID_SDXL and self.has_face:
            return "instantid_sdxl"
        return "remote_image" if self.image_model == "remote" else "flux"

    @property
    def redrawn_by(self) -> str | None:
        """Name of the stage in which FLUX redraws the image: with LoRAs, or after SDXL. `None` without."""
        if not self.lora:
            return "refine" if self.image_by == "instantid_sdxl" else None
        # In mode fast the LoRAs are active in the FLUX stage, if the shot has it.
        in_flux_stage = self.mode == "fast" and self.image_by == "flux"
        return "lora" if self.image_model == "flux" and self.continue_from is None and not in_flux_stage else None

    @property
    def restyled_by(self) -> str | None:
        """Name of the stage that restyles the image. `None` in mode fast, and for the last frame of another shot."""
        restyles = self.use_hunyuan_style and self.mode == "quality" and self.continue_from is None
        return self.style_model.replace("-", "_") if restyles else None

    @property
    def clip_by(self) -> str | None:
        """Name of the stage that generates the clip. `None` for an image."""
        return self.video_model if self.generate_video else None

    @property
    def interpolates(self) -> bool:
        """True if frames are drawn between those of the clip."""
        return self.interpolation > 1 or (self.fps_out or 0) > self.fps

    @property
    def uses_reference_photos(self) -> bool:
        """True if models that take reference images see the photos of the face."""
        return self.identity == REFERENCE and bool(self.face_image) and self.identity_strength > 0

    @property
    def klein_lora(self) -> tuple[LoraRef, ...]:
        """LoRAs that are active in FLUX.2 klein."""
        return self.lora if self.image_model == "klein" else ()

    @property
    def fast_lora(self) -> tuple[LoraRef, ...]:
        """LoRAs that are active in the single FLUX pass of mode fast. Empty in mode quality, which has a LoRA stage."""
        return self.lora if self.mode == "fast" else ()

    @property
    def all_loras(self) -> tuple[LoraRef, ...]:
        """LoRAs of all models."""
        return (*self.lora, *self.video_lora)

    @property
    def has_start_image(self) -> bool:
        """True if no model generates the base image: it is a file, or the last frame of another shot."""
        return self.image is not None or self.continue_from is not None

    def continued(self, last_frame: str) -> "Shot":
        """Return the shot with the file of its start frame, the last frame of the shot that it continues."""
        return self.model_copy(update={"image": last_frame})

    def required_seed(self) -> int:
        """Return the seed. Raises ValueError if the shot has none."""
        if self.seed is None:
            raise ValueError("the shot has no seed; call with_seed first")
        return self.seed

    def derived_seed(self, purpose: str) -> int:
        """Return a seed derived from the shot's seed, such as that of a stage. Raises ValueError if the shot has none."""
        return _seed_from(self.required_seed(), purpose)

    def with_seed(self, run_seed: int) -> "Shot":
        """Return the shot with its seed. A missing seed is derived from the run's seed and the id."""
        if self.seed is not None:
            return self
        if self.id is None:
            raise ValueError("the shot has no id to derive a seed from")
        return self.model_copy(update={"seed": _seed_from(run_seed, self.id)})

    def with_seed_of_try(self, number: int) -> "Shot":
        """Return the shot with the seed of try `number`, derived from its own seed, which is that of try 1."""
        seed = self.required_seed()
        return self.model_copy(update={"seed": _seed_from(seed, "try", number - 1)}) if number > 1 else self

    def seed_instead_of(self, clip: str) -> int:
        """Return a seed for another clip of the same shot. `clip`: digest of the clip that is not wanted."""
        return _seed_from(self.required_seed(), self.id, clip)


def _seed_from(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def nest_flat_settings(data: dict[str, Any]) -> dict[str, Any]:
    """Turn `{"flux.steps": 4}` into `{"steps": {"flux": 4}}`. Other keys are unchanged."""
    flat = [k for k in data if isinstance(k, str) and "." in k]
    if not flat:
        return data
    out = {k: v for k, v in data.items() if k not in flat}
    for key in flat:
        head, tail = key.split(".", 1)
        stage, setting = (tail, head) if head in NESTED_FIELDS else (head, tail)
        if setting in NESTED_FIELDS and stage in STAGES_WITH_STEPS:
            nested = {} if out.get(setting) is None else out[setting]
            # Anything but a dict is left for the validation to reject.
            out[setting] = {**nested, stage: data[key]} if isinstance(nested, dict) else nested
        else:
            out[key] = data[key]
    return out


def derive_id(fields: dict[str, Any]) -> str:
    """Return an id derived from the content of the line, not its position: inserting a line does not change other seeds."""
    # The same line with a consent or a priority is the same shot.
    fields = {name: value for name, value in fields.items() if name not in ("consent", "priority")}
    text = str(fields.get("prompt", ""))
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    digest = hashlib.sha256(repr(sorted(fields.items())).encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS]
    return f"{slug}-{digest}" if slug else digest


def wrong_defaults(fields: Mapping[str, Any], *, strict: bool = False) -> list[tuple[str, str, str]]:
    """Return field, value and what is allowed of each field that would be invalid in every shot that takes these defaults.

    Combinations of fields are not checked, since a shot may set some of them itself.
    """
    if "id" in fields:
        return [("id", shortened_value(fields["id"]), "must be set by each line, not for all of them")]
    per_model = {name for field in MODEL_DEFAULTS if is_per_model(values := fields.get(field)) for name in values}
    try:
        Shot.model_validate({"prompt": "any", **fields}, strict=strict)
        for name in sorted(per_model):
            Shot.model_validate({"prompt": "any", **fields, "video_model": name}, strict=strict)
    except ValidationError as error:
        explained = (explain(detail, Shot.model_fields) for detail in error.errors(include_url=False))
        return [(field, got, allowed) for field, got, allowed in explained if field is not None]
    except (ValueError, RecursionError) as error:
        return [("defaults", "invalid values", f"must be plain JSON, not nested deeply ({error})")]
    return []
