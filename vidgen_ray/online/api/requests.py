"""Request bodies of the API, one pydantic model each.

Validation, defaults and the OpenAPI document follow from these models. The fields of a `Shot` are copied from `Shot`, so
that a new one needs no change here. Field names are OpenAI's, else vLLM-Omni's, else those of a `Shot`. Fields of peers that
have no meaning here are in `PEER_FIELDS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from starlette.datastructures import UploadFile

from vidgen_ray.errors import StrictModel
from vidgen_ray.graph import (
    BASE_IMAGE_STAGES,
    CLIP_ONLY_FIELDS,
    WITHOUT_CHUNKED_STAGES,
    WITHOUT_CLIP,
    WITHOUT_UPSCALING,
    stages_with_setting,
)
from vidgen_ray.limits import MAX_FRAMES, MAX_RESULTS, MIN_FRAMES
from vidgen_ray.online.api_error import ApiError, invalid, validation_failed
from vidgen_ray.online.delivered_size import SizeRules, clip_fields, clip_fields_with_hd, image_size_fields
from vidgen_ray.online.store.database import MAX_URL
from vidgen_ray.online.store.inputs import UploadDetails
from vidgen_ray.safety import Consent
from vidgen_ray.shot import (
    FRAMES_SCHEMA,
    IMAGE_FIELDS,
    LORA_FIELDS,
    TEXT,
    Guidance,
    Priority,
    Shot,
    Steps,
    Strength,
    booleans_as_text,
    nest_flat_settings,
)
from vidgen_ray.trainers import FOR, TARGETS
from vidgen_ray.video_models import AUTO_FRAMES, frames_of_passes, model_of, of_model, without_other_models_defaults

_B = TypeVar("_B")
OMNI, SGLANG, BOTH = "vLLM-Omni", "SGLang", "vLLM-Omni, SGLang"
OPENAI = "OpenAI"
ANY = None
"""Value of `PeerField.neutral` that accepts everything."""
START_IMAGE = "a clip starts from an image: send input_reference"
NO_SOUND = "clips have no sound"


@dataclass(frozen=True)
class PeerField:
    """Field that is accepted if its value asks for nothing that this server does not do."""

    name: str
    type: Any
    sent_by: str
    neutral: tuple[object, ...] | None
    """Accepted values. `ANY` accepts all values of the type; an empty tuple accepts none but `null` and empty text."""
    why: str
    """Why the field has no effect, and what to send instead."""
    for_images: bool = True
    """The field is also accepted by the routes of images."""

    @property
    def description(self) -> str:
        """Description of the field in the API's documents."""
        if self.neutral is ANY:
            return f"Of {self.sent_by}. Accepted, without effect: {self.why}."
        if not self.neutral:
            return f"Of {self.sent_by}. Not supported: {self.why}."
        return f"Of {self.sent_by}. Must be {_one_of(self.neutral)}: {self.why}."

    def check(self, value: Any) -> Any:
        """Return an accepted value. Raises ValueError for a value that cannot be honoured."""
        if self.neutral is ANY or value in self.neutral:
            return value
        must = f"must be {_one_of(self.neutral)}" if self.neutral else "is not supported"
        raise ValueError(f"{must}: {self.why}")


PEER_FIELDS: tuple[PeerField, ...] = (
    PeerField("vae_use_slicing", bool, OMNI, ANY, "the profile says how memory is saved"),
    PeerField("vae_use_tiling", bool, OMNI, ANY, "the profile says how memory is saved"),
    PeerField("generator_device", str, BOTH, ANY, "noise is drawn on the CPU, so that it is the same on all devices"),
    PeerField("return_stage_metrics", bool, OMNI, ANY, "responses always have stage_durations"),
    PeerField("quality", str, f"{OPENAI}, {OMNI}", ANY, "set steps instead", for_images=False),
    PeerField("frame_interpolation_scale", float, BOTH, ANY, "the profile's flow_scale does this", for_images=False),
    PeerField("frame_interpolation_model_path", str, BOTH, (), "the profile names the weights", for_images=False),
    PeerField("true_cfg_scale", float, BOTH, (0, 1), "set guidance_scale; a negative_prompt is always used with true CFG"),
    PeerField("boundary_ratio", float, OMNI, (0, 1), "the split between Wan's two transformers is fixed", for_images=False),
    PeerField("flow_shift", float, BOTH, (), "the schedule of each model is fixed"),
    PeerField("max_sequence_length", int, SGLANG, (), "the profile sets the length of prompts"),
    PeerField("enable_teacache", bool, SGLANG, (False,), "every step is computed"),
    PeerField("diffusers_kwargs", dict[str, Any], SGLANG, ({},), "stages have no other settings than the fields of a shot"),
    PeerField("rollout", bool, SGLANG, (False,), "this server does not train models"),
    PeerField("generate_sound", bool, OMNI, (False,), NO_SOUND, for_images=False),
    PeerField("sound_duration", float, OMNI, (), NO_SOUND, for_images=False),
    PeerField("audio_reference", object, OMNI, (), NO_SOUND, for_images=False),
    PeerField("video_reference", object, BOTH, (), START_IMAGE, for_images=False),
    PeerField("video_url", str, SGLANG, (), START_IMAGE, for_images=False),
    PeerField("video_path", str, SGLANG, (), START_IMAGE, for_images=False),
    PeerField("control_reference", object, OMNI, (), START_IMAGE, for_images=False),
    PeerField("control_type", str, OMNI, (), START_IMAGE, for_images=False),
    PeerField("start_time_seconds", float, OMNI, (0,), START_IMAGE, for_images=False),
    PeerField("aspect_ratio", str, OMNI, (), "send size"),
    PeerField("short_edge", int, OMNI, (), "send size"),
    PeerField("upscaling_model_path", str, SGLANG, (), "send upscaler, the name of one of the server's upscalers"),
    PeerField("output_quality", str, SGLANG, ("default",), "the profile sets the compression of clips"),
    PeerField("output_compression", int, SGLANG, (), "the profile sets the compression of clips", for_images=False),
    PeerField("output_path", str, SGLANG, (), "download the file instead"),
    PeerField("perf_dump_path", str, SGLANG, (), "responses have stage_durations"),
)
"""All such fields. A peer's field that is neither here nor in a request model is rejected as unknown."""
PEER_FIELD_NAMES = frozenset(field.name for field in PEER_FIELDS)


def with_peer_fields(*, images: bool) -> Callable[[type[_B]], type[_B]]:
    """Return a class decorator that adds the peers' fields to a request model, which may define its own instead."""

    def add_fields(model: type[Any]) -> type[Any]:
        fields: dict[str, Any] = {
            peer.name: (_annotation(peer), Field(None, description=peer.description))
            for peer in PEER_FIELDS
            if peer.name not in model.model_fields and (peer.for_images or not images)
        }
        return create_model(model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields)

    return add_fields


def _annotation(peer: PeerField) -> Any:
    if peer.neutral == ():
        # Values of all types are refused with the same sentence.
        return Annotated[Any, PlainValidator(peer.check, json_schema_input_type=None)]
    documented = [] if peer.neutral is ANY else [WithJsonSchema({"enum": list(peer.neutral)})]
    return Annotated[(peer.type, AfterValidator(peer.check), *documented)] | None


def _one_of(values: tuple[object, ...]) -> str:
    return " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


SIDES = ("width", "height")
CROPS = ("crop_width", "crop_height", "aspect")
MAX_SEED = 2**32 - 1
RANDOM_SEED = -1
"""Seed with which peers ask for a random one."""
_BLOCKS = ("extra_body", "extra_json")
"""Fields whose content replaces the other fields of the body. OpenAI's client merges `extra_body` itself; others send it."""
_SIZE = re.compile(r"[0-9]{1,5}x[0-9]{1,5}|auto")
OPENAI_STYLES = ("vivid", "natural")
"""Values of `style` in OpenAI's API. They have no effect."""
REFERENCE_FIELDS = (*IMAGE_FIELDS, "face_image", *LORA_FIELDS, "character")
"""Fields of a `Shot` that name files. In the API they are ids of uploads and names of the server."""
PLAIN_FIELDS = tuple(name for name in Shot.model_fields if name not in ("id", "variants", *REFERENCE_FIELDS))
"""Fields of a `Shot` that mean the same in `POST /v1/shots`."""
_OWN_FIELDS = (*SIDES, *CROPS, "upscale_video", "scale", "seed")
"""Plain fields that videos and images define differently: sizes are those of the delivered file, a seed may be a list."""


CHOSEN_FRAMES = (AUTO_FRAMES, *(f"{FOR}{target}" for target in TARGETS))
"""Values of `num_frames` that the shot replaces, since it knows the video model."""
_Frames = Annotated[
    int,
    Field(ge=MIN_FRAMES, le=MAX_FRAMES),
    WrapValidator(lambda value, check: value if value in CHOSEN_FRAMES else check(value)),
    PlainSerializer(lambda value: value, return_type=Any),
    WithJsonSchema(FRAMES_SCHEMA),
]
ANNOTATIONS: dict[str, Any] = {"num_frames": _Frames, "priority": Priority}
"""Fields of a `Shot` that requests declare otherwise: `num_frames` has more values, `priority` is part of a dump."""
_M = TypeVar("_M", bound="RequestBody")


class ImageReference(StrictModel):
    """Image, by one of these."""

    file_id: str | None = Field(None, description="Id of an uploaded file.")
    image_url: str | None = Field(None, description="A `data:` URL, or an http(s) URL if the server allows its host.")


class LoraReference(StrictModel):
    """LoRA of the server."""

    name: str = Field(description="Name of the LoRA.")
    scale: float = Field(1.0, ge=-2, le=2, description="Scale of the adapter.")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _require_file(value: Any) -> UploadFile:
    if not isinstance(value, UploadFile):
        raise ValueError("must be a file")
    return value


def _reject_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _any(documented: Any) -> PlainValidator:
    """Accept any value, documented as this type. ImageReferences and JobService check references: they know the names."""
    return PlainValidator(lambda value: value, json_schema_input_type=documented)


_Image = Annotated[Any, _any(UploadFile | str | ImageReference)]
Images = Annotated[Any, _any(list[UploadFile | str | ImageReference] | UploadFile | str | ImageReference)]
Loras = Annotated[Any, _any(list[str | LoraReference] | str | LoraReference)]
FileIds = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=list[str] | str)]
File = Annotated[UploadFile, BeforeValidator(_require_file)]
Seed = Annotated[int, Field(ge=RANDOM_SEED, le=MAX_SEED), BeforeValidator(_reject_bool)]
_SEED = TypeAdapter(Seed)


def _parse_seeds(value: Any) -> int | list[int]:
    each = value if isinstance(value, list) else [value]
    try:
        seeds = [_SEED.validate_python(seed) for seed in each]
    except ValidationError:
        raise ValueError(f"must be a whole number from {RANDOM_SEED} to {MAX_SEED}, or a list of them") from None
    if not 1 <= len(seeds) <= MAX_RESULTS:
        raise ValueError(f"must be a seed, or a list of 1 to {MAX_RESULTS} seeds")
    return seeds if isinstance(value, list) else seeds[0]


_Seeds = Annotated[int | list[int], PlainValidator(_parse_seeds, json_schema_input_type=Seed | list[Seed])]
Scale: TypeAlias = Literal[2, 3, 4]
Side = Annotated[
    int, Field(ge=1, le=16_384), WithJsonSchema({"type": "integer", "minimum": 64, "maximum": 8192, "multipleOf": 2})
]
ShortText = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]


class VideoParams(StrictModel):
    """vLLM-Omni's block of video settings. Fields of the same name outside of it take precedence."""

    width: Side | None = Field(None, description="Same as `width`.")
    height: Side | None = Field(None, description="Same as `height`.")
    num_frames: int | None = Field(None, description="Same as `num_frames`.")
    fps: int | None = Field(None, description="Same as `fps`.")


class RequestBody(StrictModel):
    """Base of all request bodies. Unknown fields are rejected. `null` and empty text count as omitted."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, data: Any) -> Any:
        return booleans_as_text(cls, data)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Validate the fields of a JSON body or a form. Raises ApiError 400 that names the wrong fields."""
        try:
            return cls.model_validate(cls.normalise(fields))
        except ValidationError as error:
            own_fields = [name for name in cls.model_fields if name not in PEER_FIELD_NAMES]
            raise validation_failed(error.errors(include_url=False), own_fields) from None

    @classmethod
    def normalise(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields without omitted ones, with the text of forms converted where pydantic does not convert it."""
        return {
            name: _from_text(name, value, cls.model_fields[name])
            if isinstance(value, str) and name in cls.model_fields
            else value
            for name, value in fields.items()
            # An empty prompt is rejected, not omitted.
            if value is not None and (value != "" or name == "prompt")
        }


def _from_text(name: str, text: str, field: FieldInfo) -> Any:
    """Decode JSON in a field that is not text, and find the number that a field with a choice of numbers means."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    types = (field.annotation, *(get_args(field.annotation) if is_union else ()))
    if str in [getattr(each, "__origin__", each) for each in types]:
        return text
    if not text.lstrip().startswith(("{", "[")):
        choices = (choice for each in (field.annotation, *types) for choice in get_args(each))
        return next((choice for choice in choices if isinstance(choice, int) and str(choice) == text), text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise invalid(name, "must be valid JSON", "invalid_json") from None


def with_shot_fields(without: tuple[str, ...] = ()) -> Callable[[type[_M]], type[_M]]:
    """Return a class decorator that adds the plain fields of a `Shot`."""

    def add_fields(model: type[_M]) -> type[_M]:
        shot = {name: field for name, field in Shot.model_fields.items() if name in PLAIN_FIELDS and name not in without}
        fields: dict[str, Any] = {name: (field.annotation, field) for name, field in shot.items()}
        for name, annotation in ANNOTATIONS.items():
            if name in shot:
                fields[name] = annotation, Field(shot[name].default, description=shot[name].description)
        return create_model(model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields)

    return add_fields


DEADLINE = Field(
    None,
    gt=0,
    allow_inf_nan=False,
    description="Seconds within which the job must start, or it fails with the code `deadline_exceeded`. Default: none.",
)


WEBHOOK = Field(
    None,
    max_length=MAX_URL,
    description="URL that gets a message when the job has ended, of a host that the server allows. Its signature: "
    "`GET /v1/webhooks/default/secret`.",
)


class _Generation(RequestBody):
    """Fields of videos and images besides those of a `Shot`."""

    step_stages: ClassVar[tuple[str, ...]] = stages_with_setting("steps")

    model: str | None = Field(None, description="One of `GET /v1/models`. Default: the first.")
    n: int = Field(1, ge=1, le=MAX_RESULTS, description="Number of results, with consecutive seeds.")
    num_outputs_per_prompt: int | None = Field(None, ge=1, le=MAX_RESULTS, description="Same as `n`.")
    seed: _Seeds | None = Field(
        None, description="Seed, or a list with the seed of each result. Default, and for -1: drawn by the server."
    )
    size: str | None = Field(
        None,
        description="`WIDTHxHEIGHT` of the delivered file in pixels, even numbers from 64, or `auto`.",
        json_schema_extra={"pattern": f"^({_SIZE.pattern})$"},
    )
    width: Side | None = Field(None, description="Width of the delivered file in pixels. Needs `height`. Same as `size`.")
    height: Side | None = Field(None, description="Height of the delivered file in pixels. Needs `width`.")
    character: str | None = Field(None, description="Id or name of a character, instead of `face_image`.")
    face_image: Images = Field(None, description="Photos of one face: files, or references to images.")
    lora: Loras = Field(None, description="LoRA by name, or a list of LoRAs. In a form: a name, or JSON.")
    loras: Loras = Field(None, description="Same as `lora`.")
    num_inference_steps: Steps | None = Field(None, description="Denoising steps of the base image and the video model.")
    guidance_scale: Guidance | None = Field(None, description="Guidance scale of the base image.")
    guidance_scale_2: Guidance | None = Field(
        None, description="Of vLLM-Omni, SGLang. Must be equal to `guidance_scale`; set `guidance` for the experts of Wan."
    )
    style: str | None = Field(None, description="Restyle with this prompt: sets `use_hunyuan_style` and `style_prompt`.")
    extra_params: dict[str, JsonValue] | None = Field(None, description="More fields of a shot. In a form: JSON.")
    extra_body: dict[str, Any] | None = Field(
        None, description="More fields of this body, which replace those outside. In a form: JSON."
    )
    extra_json: dict[str, Any] | None = Field(None, description="Same as `extra_body`.")
    deadline_s: float | None = DEADLINE
    webhook: str | None = WEBHOOK
    user: ShortText | None = Field(None, description="Id of the end user. Returned with the video.")

    @field_validator("size")
    @classmethod
    def _check_size(cls, value: str) -> str:
        if not _SIZE.fullmatch(value):
            raise ValueError("must be WIDTHxHEIGHT in pixels, for example 1024x576, or auto")
        return value

    @classmethod
    def normalise(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        normalised = super().normalise(fields)
        for name in _BLOCKS:
            if isinstance(block := normalised.get(name), dict):
                if nested := [each for each in _BLOCKS if each in block]:
                    raise invalid(name, f"must not contain {nested[0]}")
                normalised = {**normalised, **super().normalise(block)}
        extra = normalised.get("extra_params")
        if not isinstance(extra, dict):
            return normalised
        allowed = [name for name in PLAIN_FIELDS if name not in CROPS]
        if unknown := [name for name in extra if name not in allowed]:
            message = f"extra_params: got an unknown field {unknown[0][:100]!r}, must be one of {', '.join(allowed)}"
            raise ApiError(400, message, code="unknown_parameter", param="extra_params")
        # Image requests ignore the fields of clips in extra_params.
        return super().normalise({name: extra[name] for name in extra if name in cls.model_fields}) | normalised

    def shot_fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the shot that the request sets, except its size, seed, images and character.

        `defaults` are the values of fields that it omits. Raises ApiError 400 if fields contradict each other.
        """
        fields = self.model_dump(include=set(PLAIN_FIELDS) - set(_OWN_FIELDS), exclude_unset=True)
        if self.num_inference_steps is not None:
            fields["steps"] = dict.fromkeys(self.step_stages, self.num_inference_steps) | fields.get("steps", {})
        if self.guidance_scale_2 not in (None, self.guidance_scale):
            raise invalid(
                "guidance_scale_2",
                "must be equal to guidance_scale; set guidance.wan and guidance.wan_2 for the experts of Wan",
            )
        if self.guidance_scale is not None:
            guidance = dict.fromkeys(stages_with_setting("guidance"), self.guidance_scale)
            fields["guidance"] = guidance | fields.get("guidance", {})
        if self.style is not None and self.style not in OPENAI_STYLES:
            if fields.get("mode", defaults.get("mode")) == "fast":
                raise invalid("style", "mode fast has no restyle. Use mode quality, or omit style.")
            fields |= {"use_hunyuan_style": True, "style_prompt": self.style}
        loras = self.loras if self.lora is None else self.lora
        return fields if loras is None else {**fields, "lora": loras}

    def requested_size(self) -> tuple[int, int] | None:
        """Return the width and height that the request asks for, or `None`. Raises ApiError 400."""
        sides = tuple(map(int, self.size.split("x"))) if self.size and self.size != "auto" else None
        for name, side, other in zip(SIDES, sides or (None, None), reversed(SIDES), strict=True):
            own = getattr(self, name)
            if own is None:
                continue
            if side is not None and own != side:
                raise invalid(name, f"got {own}, but size says {side}")
            if side is None and getattr(self, other) is None:
                raise invalid(other, f"is required together with {name}", "missing_required_parameter")
        if sides is not None:
            return sides[0], sides[1]
        return None if self.width is None or self.height is None else (self.width, self.height)

    def repeated(self, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the fields of each result: `n` times the fields of a shot, with their seeds. `None` draws a seed.

        Raises ApiError 400 if the number of seeds contradicts `n`.
        """
        count = self.num_outputs_per_prompt or self.n
        if isinstance(self.seed, list):
            seeds = self.seed
            if count != len(seeds) and self.model_fields_set & {"n", "num_outputs_per_prompt"}:
                raise invalid("seed", f"got {len(seeds)} seeds for {count} results: send one for each, or a single seed")
        elif self.seed == RANDOM_SEED or (first := fields.get("seed") if self.seed is None else self.seed) is None:
            seeds = [RANDOM_SEED] * count
        else:
            seeds = [(first + number) % (MAX_SEED + 1) for number in range(count)]
        return [{**fields, "seed": None if seed == RANDOM_SEED else seed} for seed in seeds]


@with_peer_fields(images=False)
@with_shot_fields(without=_OWN_FIELDS)
class CreateVideo(_Generation):
    """Body of `POST /v1/videos`."""

    seconds: float | None = Field(
        None,
        ge=0,
        le=MAX_FRAMES,
        allow_inf_nan=False,
        description="Length of the clip: sets `num_frames` to seconds x `fps`, or the nearest number that the video model "
        "makes. Without effect if `num_frames` is sent. With `extend`, all passes together have this length.",
    )
    video_lora: Loras = Field(None, description="LoRA of the video model, as in `lora`, with an `expert` for wan.")
    last_image: _Image = Field(None, description="Image that the clip ends with, for wan: a file, or a reference to an image.")
    input_reference: _Image = Field(None, description="Image to start from: a file, or a reference to an image.")
    image_reference: _Image = Field(None, description="Same as `input_reference`.")
    reference_url: str | None = Field(None, description="URL of the image to start from.")
    input_references: Images = Field(
        None, description="Photos of the person in the clip: files, or references to images. Same as `face_image`."
    )
    upscale: bool | None = Field(
        None,
        description="true: also make a clip that is `scale` times larger, `variant=hd`. false: never upscale to reach `size`.",
    )
    upscale_video: bool | None = Field(None, description="Same as `upscale`.")
    enable_upscaling: bool | None = Field(None, description="Same as `upscale`.")
    scale: Scale | None = Field(None, description="Factor of the larger clip. Sets `upscale`. Default: that of the profile.")
    upscaling_scale: Scale | None = Field(
        None, description="Same as `scale`. Without effect unless `enable_upscaling` is true."
    )
    enable_frame_interpolation: bool | None = Field(
        None,
        description="Of vLLM-Omni, SGLang. true: `interpolation` 2, 4 or 8, by `frame_interpolation_exp`. false: off.",
    )
    frame_interpolation_exp: int = Field(
        1,
        ge=1,
        le=3,
        description="Of vLLM-Omni, SGLang. Exponent of the factor: 2 means 4. Without effect unless "
        "`enable_frame_interpolation` is true.",
    )
    video_params: VideoParams | None = Field(
        None, description="`width`, `height`, `num_frames` and `fps`, if they are not set outside. In a form: JSON."
    )

    @classmethod
    def normalise(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        normalised = super().normalise(fields)
        block = normalised.get("video_params")
        known = {name: block[name] for name in VideoParams.model_fields if name in block} if isinstance(block, dict) else {}
        return super().normalise(known) | normalised

    def shot_fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().shot_fields(defaults)
        if self.video_lora is not None:
            fields["video_lora"] = self.video_lora
        if self.enable_frame_interpolation is not None:
            factor = 2**self.frame_interpolation_exp if self.enable_frame_interpolation else 1
            if fields.setdefault("interpolation", factor) != factor:
                got = fields["interpolation"]
                raise invalid("interpolation", f"got {got}, but enable_frame_interpolation and its exponent say {factor}")
            # The profile's own rate would contradict the factor.
            fields.setdefault("fps_out", None)
        if self.seconds is None or fields.get("num_frames", AUTO_FRAMES) != AUTO_FRAMES:
            return fields
        values = of_model({**without_other_models_defaults(defaults, fields), **fields})
        model = model_of(values)
        fps, extend = int(values.get("fps", model.fps)), int(values.get("extend") or 0)
        # Frames of each pass: a further pass does not repeat the last frame of the one before.
        wanted = (self.seconds * fps + extend) / (extend + 1)
        frames = round(wanted)
        if not MIN_FRAMES <= frames <= MAX_FRAMES:
            shortest, longest = (frames_of_passes(limit, extend) / fps for limit in (MIN_FRAMES, MAX_FRAMES))
            passes = f" in {extend + 1} passes" if extend else ""
            allowed = f"must be from {shortest:g} to {longest:g} at {fps} frames per second{passes}"
            raise invalid("seconds", f"got {self.seconds:g}, {allowed}")
        return {**fields, "num_frames": model.nearest_frames(wanted) if model.frame_step > 1 else frames}

    def size_fields(
        self, fields: Mapping[str, Any], rules: SizeRules, original: tuple[int, int] | None = None
    ) -> tuple[dict[str, Any], bool | None]:
        """Return the fields of the shot that give the size, and whether a larger clip is made beside the delivered one.

        `fields` are those of the shot and the profile's defaults; `original` is the delivered size of a video that is changed.
        The second value is `None` if the request says nothing about sizes. Raises ApiError 400 for a size out of reach.
        """
        size, upscale = self.requested_size(), self._upscale()
        if size is None and upscale is None:
            return {}, None
        whole: dict[str, Any] = dict.fromkeys(CROPS)
        if not fields.get("generate_video", True):
            return ({**whole, **image_size_fields(*size)} if size else {}), False
        if upscale:
            asked = self.scale or (self.upscaling_scale if self.enable_upscaling else None)
            scale = asked or int(fields.get("scale", Shot.model_fields["scale"].default))
            width, height = size or original or (rules.default_width, rules.default_height)
            return {**whole, **clip_fields_with_hd(width, height, scale)}, True
        wanted = size or original
        if wanted is None:
            return dict(WITHOUT_UPSCALING), False
        width, height = wanted
        return {**whole, **clip_fields(width, height, rules, may_upscale=upscale is None)}, False

    def _upscale(self) -> bool | None:
        """Return whether a larger clip is asked for. `None`: the size decides about upscaling."""
        asked = (self.upscale, self.upscale_video, self.enable_upscaling, None if self.scale is None else True)
        return next((value for value in asked if value is not None), None)


class RemixVideo(CreateVideo):
    """Body of `POST /v1/videos/{video_id}/remix`. Omitted fields keep the values of the video."""

    prompt: str | None = Field(None, description="Text to render.", json_schema_extra=TEXT)


@with_peer_fields(images=True)
@with_shot_fields(without=(*CLIP_ONLY_FIELDS, *_OWN_FIELDS, "continue_from"))
class CreateImages(_Generation):
    """Body of `POST /v1/images/generations`."""

    step_stages: ClassVar[tuple[str, ...]] = tuple(
        stage for stage in stages_with_setting("steps") if stage in BASE_IMAGE_STAGES
    )
    event: ClassVar[str] = "image_generation"
    """Prefix of the names of server-sent events."""

    response_format: Literal["b64_json", "url"] = Field("b64_json", description="Return files in base64, or URLs.")
    output_format: Literal["png", "webp", "jpeg"] = Field("png", description="File format of b64_json. URLs are of PNG files.")
    output_compression: int = Field(90, ge=0, le=100, description="Quality of webp and jpeg.")
    background: Literal["auto", "opaque"] = Field("auto", description="Accepted, without effect: images are opaque.")
    stream: bool = Field(False, description="Respond with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="Number of intermediate images to stream.")
    num_frames: Literal[1] | None = Field(None, description="Of SGLang. Must be 1: an image has one frame.")
    quality: ShortText | None = Field(None, description="Accepted, without effect.")
    moderation: ShortText | None = Field(None, description="Accepted, without effect.")
    safety_identifier: ShortText | None = Field(None, description="Same as `user`.")

    def shot_fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().shot_fields(defaults)
        fields.pop("num_frames", None)
        return {**fields, **WITHOUT_CLIP, **WITHOUT_CHUNKED_STAGES}

    def size_fields(self) -> dict[str, Any]:
        """Return the fields of the shot that give the size. Empty without a size. Raises ApiError 400."""
        size = self.requested_size()
        return dict(image_size_fields(*size)) if size else {}


class EditImages(CreateImages):
    """Body of `POST /v1/images/edits`."""

    event: ClassVar[str] = "image_edit"

    image: Images = Field(description="Images to edit: files, or references to images.")
    url: Images = Field(None, description="Of SGLang. Same as `image`.")
    input_fidelity: Literal["high", "low"] = Field("low", description="high: strength 0.35. low: strength 0.6.")
    strength: Strength | None = Field(
        None, description="Image-to-image strength, instead of `input_fidelity`. 0 keeps the image."
    )

    @classmethod
    def normalise(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        normalised = super().normalise(fields)
        return {"image": normalised["url"], **normalised} if "url" in normalised else normalised


@with_shot_fields()
class CreateShot(RequestBody):
    """Body of `POST /v1/shots`: a line of a script."""

    image: str | None = Field(None, description="Id of an uploaded file: the image to start from.")
    last_image: str | None = Field(None, description="Id of an uploaded file: the image that the clip ends with, for wan.")
    face_image: FileIds = Field([], description="Ids of uploaded photos of one face.")
    character: str | None = Field(None, description="Id or name of a character, instead of `face_image`.")
    lora: Loras = Field(None, description="LoRA by name, or a list of LoRAs.")
    video_lora: Loras = Field(None, description="LoRA of the video model, as in `lora`, with an `expert` for wan.")
    deadline_s: float | None = DEADLINE
    webhook: str | None = WEBHOOK

    @classmethod
    def normalise(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return super().normalise(nest_flat_settings(dict(fields)))


class CreateCharacter(RequestBody):
    """Body of `POST /v1/videos/characters`, with either `image` or `video`."""

    name: str = Field(min_length=1, max_length=128, description="Name, unique per tenant.")
    image: Images = Field([], description="Photos of one face: files, or references to images.")
    video: File | None = Field(None, description="Video. Its first frame with a face becomes the photo.")
    consent: Consent | None = Field(
        None,
        description="Why the face may be used: JSON, or `subject=NAME,basis=written,reference=FILE`. Required, except for the "
        "photos that come with vidgen. Requests with the character need none.",
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not value.strip() or not value.isprintable():
            raise ValueError("must be printable and not blank")
        return value


class ExpiresAfter(StrictModel):
    """When a file expires: it is deleted within the hour after that."""

    anchor: Literal["created_at"] = Field(description="Always created_at: the creation of the file.")
    seconds: int = Field(ge=3600, le=2_592_000, description="Seconds after it, from an hour to 30 days.")


class CreateFile(RequestBody):
    """Body of `POST /v1/files`."""

    file: File = Field(description="Image, or input file of a batch.")
    purpose: ShortText | None = Field(None, description="`batch` for the input file of a batch. Others: an image.")
    expires_after: ExpiresAfter | None = Field(None, description="When it expires. Default: when it was unused for a time.")

    @property
    def details(self) -> UploadDetails:
        """Name and expiry of the file."""
        name = (self.file.filename or "").replace("\0", "").encode(errors="replace").decode()
        return UploadDetails(name[-255:] or None, None if self.expires_after is None else self.expires_after.seconds)


_WINDOW = r"^[1-9][0-9]{0,3}[mhd]$"


def _as_window(text: str) -> str:
    if re.fullmatch(_WINDOW, text) is None:
        raise ValueError("must be a number of minutes, hours or days from 1 to 9999, such as 90m, 24h or 7d")
    return text


class CreateBatch(RequestBody):
    """Body of `POST /v1/batches`."""

    input_file_id: str = Field(description="Id of a file with purpose `batch`: JSON objects, one a line.")
    endpoint: Literal["/v1/videos", "/v1/images/generations", "/v1/shots"] = Field(description="Route of all lines.")
    completion_window: Annotated[str, AfterValidator(_as_window)] = Field(
        json_schema_extra={"pattern": _WINDOW},
        description="Minutes, hours or days within which lines start, for example 24h. Later ones get an error.",
    )
    metadata: dict[Annotated[str, Field(max_length=64)], ShortText] = Field(
        {}, max_length=16, description="Up to 16 texts, which are returned with the batch."
    )
    output_expires_after: ExpiresAfter | None = Field(
        None, description="When its output files expire. Default: when they were unused for a time."
    )

    @property
    def window_s(self) -> float:
        """Completion window in seconds."""
        return int(self.completion_window[:-1]) * {"m": 60.0, "h": 3600.0, "d": 86_400.0}[self.completion_window[-1]]


class BatchRequest(RequestBody):
    """Line of the input file of a batch."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00]*$")]
    method: Literal["POST"] = "POST"
    url: str
    body: dict[str, Any]
