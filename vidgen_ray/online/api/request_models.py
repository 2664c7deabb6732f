"""Request bodies of the API, one pydantic model each.

Validation, defaults and the OpenAPI document follow from these models. The fields of a `Shot` are copied from `Shot`, so that a
new one needs no change here. Field names are OpenAI's, else vLLM-Omni's, else those of a `Shot`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from starlette.datastructures import UploadFile

from vidgen_ray.graph import BASE_IMAGE_STAGES, CLIP_ONLY_FIELDS, stages_with_setting
from vidgen_ray.online.api_error import ApiError, invalid, validation_failed
from vidgen_ray.shot import Guidance, Shot, Steps, Strength, booleans_as_text, nest_flat_settings

SIDES = ("width", "height")
MIN_SIDE_PX, MAX_SIDE_PX = 64, 2048
MAX_IMAGES = 10
"""Images of one request."""
SIZE = re.compile(r"[0-9]{1,5}x[0-9]{1,5}|auto")
OPENAI_STYLES = ("vivid", "natural")
"""Values of `style` in OpenAI's API. They have no effect."""
REFERENCE_FIELDS = ("image", "face_image", "lora", "character")
"""Fields of a `Shot` that name files. In the API they are ids of uploads and names of the server."""
PLAIN_FIELDS = tuple(name for name in Shot.model_fields if name not in ("id", "variants", *REFERENCE_FIELDS))
"""Fields of a `Shot` that mean the same in the API."""
NUM_FRAMES = Shot.model_json_schema()["properties"]["num_frames"]
M = TypeVar("M", bound="RequestBody")


class ImageReference(BaseModel):
    """Image, by one of these."""

    model_config = ConfigDict(extra="forbid")

    file_id: str | None = Field(None, description="Id of an uploaded file.")
    image_url: str | None = Field(None, description="A `data:` URL, or an http(s) URL if the server allows its host.")


class LoraReference(BaseModel):
    """LoRA of the server."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of the LoRA.")
    scale: float = Field(1.0, ge=-2, le=2, description="Scale of the adapter.")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _require_file(value: Any) -> UploadFile:
    if not isinstance(value, UploadFile):
        raise ValueError("must be a file")
    return value


def _any(documented: Any) -> PlainValidator:
    """Accept any value, documented as this type. ImageReferences and JobService check references: they know the names."""
    return PlainValidator(lambda value: value, json_schema_input_type=documented)


Image = Annotated[Any, _any(UploadFile | str | ImageReference)]
Images = Annotated[Any, _any(list[UploadFile | str | ImageReference] | UploadFile | str | ImageReference)]
Loras = Annotated[Any, _any(list[str | LoraReference] | str | LoraReference)]
FileIds = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=list[str] | str)]
File = Annotated[UploadFile, BeforeValidator(_require_file)]
Files = Annotated[list[File], BeforeValidator(_as_list)]
ShortText = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]


class RequestBody(BaseModel):
    """Base of all request bodies. Unknown fields are rejected. `null` and empty text count as omitted."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

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
            raise validation_failed(error.errors(include_url=False), cls.model_fields) from None

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
    types = (field.annotation, *get_args(field.annotation))
    if str in [getattr(each, "__origin__", each) for each in types]:
        return text
    if not text.lstrip().startswith(("{", "[")):
        return next((choice for choice in types if not isinstance(choice, type) and str(choice) == text), text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise invalid(name, "must be valid JSON", "invalid_json") from None


def with_shot_fields(without: tuple[str, ...] = ()) -> Callable[[type[M]], type[M]]:
    """Return a class decorator that adds the plain fields of a `Shot`."""

    def add_fields(model: type[M]) -> type[M]:
        fields: dict[str, Any] = {
            name: (Shot.model_fields[name].annotation, Shot.model_fields[name]) for name in PLAIN_FIELDS if name not in without
        }
        return create_model(model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields)

    return add_fields


class _Generation(RequestBody):
    """Fields of videos and images besides those of a `Shot`."""

    side_multiple: ClassVar[int]
    step_stages: ClassVar[tuple[str, ...]] = stages_with_setting("steps")

    model: str | None = Field(None, description="One of `GET /v1/models`. Default: the first.")
    size: str | None = Field(
        None, description="`WIDTHxHEIGHT` in pixels before upscaling, or `auto`. Multiples of 64 for videos, of 16 for images."
    )
    character: str | None = Field(None, description="Id or name of a character, instead of `face_image`.")
    face_image: Images = Field(None, description="Photos of one face: files, or references to images.")
    lora: Loras = Field(None, description="LoRA by name, or a list of LoRAs. In a form: a name, or JSON.")
    loras: Loras = Field(None, description="Same as `lora`.")
    num_inference_steps: Steps | None = Field(None, description="Denoising steps of the base image and the video model.")
    guidance_scale: Guidance | None = Field(None, description="Guidance scale of the base image.")
    style: str | None = Field(None, description="Restyle with this prompt: sets `use_hunyuan_style` and `style_prompt`.")
    extra_params: dict[str, JsonValue] | None = Field(None, description="More fields of a shot. In a form: JSON.")
    user: ShortText | None = Field(None, description="Id of the end user. Returned with the video.")

    @field_validator("size")
    @classmethod
    def _check_size(cls, value: str) -> str:
        if not SIZE.fullmatch(value):
            raise ValueError("must be WIDTHxHEIGHT in pixels, for example 1024x576, or auto")
        return value

    @classmethod
    def normalise(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        normalised = super().normalise(fields)
        extra = normalised.get("extra_params")
        if not isinstance(extra, dict):
            return normalised
        if unknown := [name for name in extra if name not in PLAIN_FIELDS]:
            message = f"extra_params: got an unknown field {unknown[0][:100]!r}, must be one of {', '.join(PLAIN_FIELDS)}"
            raise ApiError(400, message, code="unknown_parameter", param="extra_params")
        # Image requests ignore the fields of clips in extra_params.
        return super().normalise({name: extra[name] for name in extra if name in cls.model_fields}) | normalised

    def shot_fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the shot that the request sets, except images and characters.

        `defaults` are the values of fields that it omits. Raises ApiError 400 if fields contradict each other.
        """
        fields = self.model_dump(include=set(PLAIN_FIELDS), exclude_unset=True)
        self._set_size(fields)
        if self.num_inference_steps is not None:
            fields["steps"] = dict.fromkeys(self.step_stages, self.num_inference_steps) | fields.get("steps", {})
        if self.guidance_scale is not None:
            guidance = dict.fromkeys(stages_with_setting("guidance"), self.guidance_scale)
            fields["guidance"] = guidance | fields.get("guidance", {})
        if self.style is not None and self.style not in OPENAI_STYLES:
            if fields.get("mode", defaults.get("mode")) == "fast":
                raise invalid("style", "mode fast has no restyle. Use mode quality, or omit style.")
            fields |= {"use_hunyuan_style": True, "style_prompt": self.style}
        loras = self.loras if self.lora is None else self.lora
        return fields if loras is None else {**fields, "lora": loras}

    def _set_size(self, fields: dict[str, Any]) -> None:
        size = None if self.size == "auto" else self.size
        if size is not None:
            for name, side in zip(SIDES, map(int, size.split("x")), strict=True):
                if fields.setdefault(name, side) != side:
                    raise invalid(name, f"got {fields[name]}, but size says {side}")
        sides = {name: fields[name] for name in SIDES if name in fields}
        nearest = {name: nearest_side(side, self.side_multiple) for name, side in sides.items()}
        if wrong := [name for name in sides if sides[name] != nearest[name]]:
            got, allowed = ("x".join(str(each.get(name, "?")) for name in SIDES) for each in (sides, nearest))
            must = f"must be multiples of {self.side_multiple} from {MIN_SIDE_PX} to {MAX_SIDE_PX}"
            message = f"got {got}, width and height {must} (nearest: {allowed})"
            raise invalid("size" if size else wrong[0], message, "invalid_size")


@with_shot_fields()
class CreateVideo(_Generation):
    """Body of `POST /v1/videos`."""

    side_multiple: ClassVar[int] = 64

    seconds: float | None = Field(
        None, ge=0, le=NUM_FRAMES["maximum"], allow_inf_nan=False, description="Length: sets `num_frames` to seconds x `fps`."
    )
    input_reference: Image = Field(None, description="Image to start from: a file, or a reference to an image.")
    image_reference: Image = Field(None, description="Same as `input_reference`.")
    upscale: bool | None = Field(None, description="Same as `upscale_video`.")

    def shot_fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().shot_fields(defaults)
        if self.upscale is not None:
            fields.setdefault("upscale_video", self.upscale)
        if self.seconds is None:
            return fields
        fps = int({"fps": Shot.model_fields["fps"].default, **defaults, **fields}["fps"])
        frames, shortest, longest = round(self.seconds * fps), NUM_FRAMES["minimum"], NUM_FRAMES["maximum"]
        if not shortest <= frames <= longest:
            allowed = f"must be from {shortest / fps:g} to {longest / fps:g} at {fps} frames per second"
            raise invalid("seconds", f"got {self.seconds:g}, {allowed}")
        if fields.setdefault("num_frames", frames) != frames:
            got = fields["num_frames"]
            raise invalid("num_frames", f"got {got}, but seconds says {frames} at {fps} frames per second")
        return fields


class RemixVideo(CreateVideo):
    """Body of `POST /v1/videos/{video_id}/remix`. Omitted fields keep the values of the video."""

    prompt: str | None = Field(None, description="Text to render.")


@with_shot_fields(without=CLIP_ONLY_FIELDS)
class CreateImages(_Generation):
    """Body of `POST /v1/images/generations`."""

    side_multiple: ClassVar[int] = 16
    step_stages: ClassVar[tuple[str, ...]] = tuple(
        stage for stage in stages_with_setting("steps") if stage in BASE_IMAGE_STAGES
    )
    event: ClassVar[str] = "image_generation"
    """Prefix of the names of server-sent events."""

    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Number of images.")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="Return files in base64, or URLs.")
    output_format: Literal["png", "webp", "jpeg"] = Field("png", description="File format.")
    output_compression: int = Field(90, ge=0, le=100, description="Quality of webp and jpeg.")
    background: Literal["auto", "opaque"] = Field("auto", description="Accepted, without effect: images are opaque.")
    stream: bool = Field(False, description="Respond with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="Number of intermediate images to stream.")
    quality: ShortText | None = Field(None, description="Accepted, without effect.")
    moderation: ShortText | None = Field(None, description="Accepted, without effect.")
    safety_identifier: ShortText | None = Field(None, description="Same as `user`.")

    def shot_fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().shot_fields(defaults), "generate_video": False, "upscale_video": False}


class EditImages(CreateImages):
    """Body of `POST /v1/images/edits`."""

    event: ClassVar[str] = "image_edit"

    image: Images = Field(description="Images to edit: files, or references to images.")
    input_fidelity: Literal["high", "low"] = Field("low", description="high: strength 0.35. low: strength 0.6.")
    strength: Strength | None = Field(
        None, description="Image-to-image strength, instead of `input_fidelity`. 0 keeps the image."
    )


@with_shot_fields()
class CreateShot(RequestBody):
    """Body of `POST /v1/shots`: a line of a script."""

    image: str | None = Field(None, description="Id of an uploaded file: the image to start from.")
    face_image: FileIds = Field([], description="Ids of uploaded photos of one face.")
    character: str | None = Field(None, description="Id or name of a character, instead of `face_image`.")
    lora: Loras = Field(None, description="LoRA by name, or a list of LoRAs.")

    @classmethod
    def normalise(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return super().normalise(nest_flat_settings(dict(fields)))


class CreateCharacter(RequestBody):
    """Body of `POST /v1/videos/characters`, with either `image` or `video`."""

    name: str = Field(min_length=1, max_length=128, description="Name, unique per tenant.")
    image: Files = Field([], description="Photos of one face.")
    video: File | None = Field(None, description="Video. Its first frame with a face becomes the photo.")

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not value.strip() or not value.isprintable():
            raise ValueError("must be printable and not blank")
        return value


class CreateFile(RequestBody):
    """Body of `POST /v1/files`."""

    file: File = Field(description="Image to upload.")
    purpose: ShortText | None = Field(None, description="Accepted, without effect.")


def nearest_side(side: int, multiple: int) -> int:
    """Return the allowed width or height in pixels that is closest to `side`."""
    return round(min(MAX_SIDE_PX, max(MIN_SIDE_PX, side)) / multiple) * multiple
