"""One shot: what to render. Knows the fields, their ranges and the seeds; does not know files, models or stages."""

import hashlib
import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_validator

VARIANT_SUFFIX = 5
"""Letters that `-v999` adds to an id."""
ID_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
NESTED_FIELDS = ("steps", "guidance")
"""They have a setting for each stage, and may be written flat."""
INSTANTID_SDXL, NO_IDENTITY = "instantid-sdxl", "none"
"""What `identity` may be beside the name of a method that steers FLUX."""

Strength = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=200)]
Guidance = Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraRef(_Frozen):
    """A LoRA file and how strongly its adapter acts."""

    path: str = Field(min_length=1, description="a .safetensors file, or a `builtin:` name")
    weight: float = Field(1.0, ge=-2, le=2, allow_inf_nan=False)


class StageSteps(_Frozen):
    """Denoising steps of each stage; none means the default of the model that the profile names."""

    flux: Steps | None = None
    refine: Steps | None = None
    lora: Steps | None = None
    hunyuan: Steps | None = None
    svd: Steps | None = None


class StageGuidance(_Frozen):
    """Guidance of each stage; none means the default of the model. For svd it is the guidance of the last frame."""

    flux: Guidance | None = None
    refine: Guidance | None = None
    lora: Guidance | None = None
    hunyuan: Guidance | None = None
    svd: Annotated[float, Field(ge=1, le=30, allow_inf_nan=False)] | None = None


class Shot(_Frozen):
    """One line of a script, with every default filled in.

    Sizes are in pixels, before upscaling. `steps` and `guidance` may also be written flat: `"flux.steps": 4`.
    """

    id: str | None = Field(None, description="unique in the script; derived from the line's content where it is missing")
    prompt: str = Field(min_length=1, max_length=10_000)
    negative_prompt: str | None = Field(None, max_length=10_000)
    mode: Literal["quality", "fast"] = Field(
        "quality", description="quality: every stage in turn; fast: one FLUX pass with the LoRA active, no restyle"
    )
    seed: int | None = Field(None, ge=0, lt=2**32, description="none: derived from the run's seed and the id")
    variants: int = Field(1, ge=1, le=1000, description="one line becomes this many shots: id-v0, id-v1, ...")

    width: int = 1024
    height: int = 576
    image: str | None = Field(None, description="start from this picture instead of FLUX; cropped to cover the size")

    face_image: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="a photo of the person, or several of the same one; of the first also the keypoints"
    )
    face_index: int | None = Field(
        None, ge=0, description="which face of the first photo, from the left, counted from 0; none: the largest"
    )
    character: str | None = Field(None, description="a name from the header of a YAML script")
    identity: str = Field(
        "infusenet",
        description="by what the face steers the picture: the name of a method for FLUX, instantid-sdxl, or none",
    )
    identity_strength: Strength = Field(1.0, description="how strongly the face steers the picture; 0 is as without a face")
    identity_start: Strength = Field(0.0, description="share of FLUX's steps before which the face has no say")
    identity_end: Strength = Field(
        1.0, validate_default=True, description="share of FLUX's steps after which the face has no say"
    )
    pose: Literal["photo", "none"] = Field(
        "photo", description="photo: the face stands where it stands in the first photo; none: where the prompt puts it"
    )
    refine_strength: Strength = Field(
        0.35, description="image-to-image strength of FLUX after SDXL, for a shot without LoRA: 0 keeps SDXL's picture"
    )
    min_identity: float | None = Field(
        None, ge=-1, le=1, allow_inf_nan=False, description="least likeness of the picture and of the clip to the face"
    )
    retries: int = Field(0, ge=0, le=10, description="further tries with other seeds while the likeness is below min_identity")
    lora: tuple[LoraRef, ...] = ()
    lora_strength: Strength = Field(0.6, description="image-to-image strength of the LoRA stage: 0 keeps the base image")

    use_hunyuan_style: bool = Field(False, description="restyle by HunyuanDiT; mode fast has no restyle")
    style_prompt: str | None = Field(None, max_length=10_000, description="added to the prompt for the restyle")
    style_strength: Strength = 0.5

    generate_video: bool = True
    num_frames: int = Field(25, ge=2, le=256)
    fps: int = Field(5, ge=1, le=60)
    motion_bucket_id: int = Field(127, ge=1, le=255)
    noise_aug_strength: float = Field(0.02, ge=0, le=1, allow_inf_nan=False)

    upscale_video: bool = True
    scale: Literal[2, 3, 4] = 4
    upscaler: str = Field(
        "animevideov3",
        pattern=r"^[A-Za-z0-9._-]+$",
        description="file name, without ending, in the profile's upscaler folder",
    )

    steps: StageSteps = StageSteps()
    guidance: StageGuidance = StageGuidance()
    metadata: dict[str, JsonValue] = Field(default_factory=dict, description="carried to the manifest untouched")

    @model_validator(mode="before")
    @classmethod
    def _nest_flat_settings(cls, data: Any) -> Any:
        return nest_flat_settings(data) if isinstance(data, dict) else data

    @field_validator("id")
    @classmethod
    def _id_is_a_file_name(cls, value: str | None) -> str | None:
        if value is not None and (not ID_PATTERN.fullmatch(value) or value.endswith(".")):
            raise ValueError("must be 1 to 128 of A-Z a-z 0-9 . _ - and neither begin nor end with a dot")
        return value

    @field_validator("width", "height")
    @classmethod
    def _size_fits_the_latents(cls, value: int) -> int:
        if not 64 <= value <= 2048 or value % 16:
            raise ValueError("must be a multiple of 16 between 64 and 2048")
        return value

    @field_validator("prompt", "negative_prompt", "style_prompt")
    @classmethod
    def _text_is_text(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.strip():
            raise ValueError("must not be blank")
        if "\0" in value:
            raise ValueError("must be text without NUL")
        return value

    @field_validator("face_image", mode="before")
    @classmethod
    def _face_image_may_be_one_path(cls, value: Any) -> Any:
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("identity_end")
    @classmethod
    def _ends_after_it_starts(cls, value: float, info: ValidationInfo) -> float:
        start = info.data.get("identity_start")
        if start is not None and value <= start:
            raise ValueError(f"must be more than identity_start, which is {start}")
        return value

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_may_be_one_path(cls, value: Any) -> Any:
        if value is None:
            return ()
        if isinstance(value, str | dict | LoraRef):
            value = [value]
        if isinstance(value, list | tuple):
            return tuple({"path": v} if isinstance(v, str) else v for v in value)
        return value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.variants > 1 and self.id and len(self.id) > 128 - VARIANT_SUFFIX:
            raise ValueError(f"id of {len(self.id)} letters, with variants at most {128 - VARIANT_SUFFIX}")
        if self.generate_video:
            for name in ("width", "height"):
                if getattr(self, name) % 64:
                    raise ValueError(
                        f"{name} {getattr(self, name)} is not a multiple of 64, as a clip needs (its latents are halved thrice)"
                    )
        for name, used in (("lora", bool(self.lora)), ("refine", self.uses_sdxl_base and not self.lora)):
            strength, steps = getattr(self, f"{name}_strength"), getattr(self.steps, name)
            if used and steps and strength and steps * strength < 1:
                raise ValueError(
                    f"{name}_strength {strength} of {steps} steps is less than one step; "
                    f"use steps.{name} of at least {math.ceil(1 / strength)}"
                )
        return self

    @property
    def flux_identity(self) -> str | None:
        """The method by which the shot's person steers FLUX; none where there is nobody, or who is there does not."""
        by_flux = self.identity not in (NO_IDENTITY, INSTANTID_SDXL)
        return self.identity if by_flux and self.face_image and self.identity_strength > 0 else None

    @property
    def uses_sdxl_base(self) -> bool:
        """Whether SDXL draws the base picture, with the person in it, and not FLUX."""
        return self.identity == INSTANTID_SDXL and bool(self.face_image) and self.image is None

    @property
    def fast_lora(self) -> tuple[LoraRef, ...]:
        """The LoRAs that act in the one FLUX pass of mode fast; in mode quality they have a stage of their own."""
        return self.lora if self.mode == "fast" else ()

    def generator_seed(self, stage: str) -> int:
        """The seed of one stage's noise: the shot's own for FLUX, one derived from it for each other stage.

        A refinement that drew the very noise its input was made from would reinforce it, so stages do not share noise.
        """
        if self.seed is None:
            raise ValueError("the shot has no seed yet; use with_seed")
        return self.seed if stage == "flux" else _seed_from(self.seed, stage)

    def with_seed(self, run_seed: int) -> "Shot":
        """The same shot with its seed filled in from the run's seed and its id."""
        if self.seed is not None:
            return self
        if self.id is None:
            raise ValueError("the shot has no id yet, so no seed can be derived")
        return self.model_copy(update={"seed": _seed_from(run_seed, self.id)})

    def with_retry_seed(self, number: int) -> "Shot":
        """The same shot with the seed of its `number`-th further try, which follows from its own; the 0th is its own."""
        if self.seed is None:
            raise ValueError("the shot has no seed yet; use with_seed")
        return self.model_copy(update={"seed": _seed_from(self.seed, "try", number)}) if number else self


def _seed_from(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def nest_flat_settings(data: dict[str, Any]) -> dict[str, Any]:
    """`{"flux.steps": 4}` -> `{"steps": {"flux": 4}}`; other keys stay as they are."""
    flat = [k for k in data if isinstance(k, str) and "." in k]
    if not flat:
        return data
    out = {k: v for k, v in data.items() if k not in flat}
    for key in flat:
        head, tail = key.split(".", 1)
        stage, setting = (tail, head) if head in NESTED_FIELDS else (head, tail)
        if setting in NESTED_FIELDS and stage in StageSteps.model_fields:
            beside = {} if out.get(setting) is None else out[setting]
            # Beside something that is no set of fields, that something is refused.
            out[setting] = {**beside, stage: data[key]} if isinstance(beside, dict) else beside
        else:
            out[key] = data[key]
    return out


def derive_id(fields: dict[str, Any]) -> str:
    """An id from what the line says, not from where it stands: a line put before others changes nobody's seed."""
    text = str(fields.get("prompt", ""))
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    digest = hashlib.sha256(repr(sorted(fields.items())).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{slug}-{digest}" if slug else digest
