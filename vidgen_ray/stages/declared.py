"""The generic stages: a shot through any diffusers pipeline that a declaration describes.

`stage_of` makes a stage from a declaration. It calls the pipeline once per pass, with the values that the declaration names.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from vidgen_ray.declared.declaration import Declaration, ValueSource
from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    NOT_IN_KEY,
    Artefacts,
    Frames,
    Item,
    ReadText,
    diffusers_step_callback,
    noise_generator,
    pixels_to_uint8,
    torch_dtype,
)
from vidgen_ray.stages.first_block_cache import FirstBlockCacheParams, FirstBlockCaches
from vidgen_ray.stages.loading import (
    ImageParams,
    ImageStage,
    OffloadedParams,
    OffloadedStage,
    diffusers_classes,
    load_pipeline,
    set_vae_tiles,
    speed_up_transformers,
)
from vidgen_ray.stages.lora import LoraAdapters
from vidgen_ray.stages.schedules import ScheduleParams
from vidgen_ray.stages.speed import Fp8Params, is_in_fp8
from vidgen_ray.stages.video import VideoStage, prompt_of

if TYPE_CHECKING:
    import torch
    from PIL import Image as PILImage

RULES_VERSION = 1
"""Raised when the same declaration gives other bytes than before."""
_READ: Mapping[ValueSource, tuple[str, ...]] = {
    ValueSource.PROMPT: ("prompt",),
    ValueSource.INSTRUCTION: ("prompt", "style_prompt"),
    ValueSource.NEGATIVE_PROMPT: ("negative_prompt",),
    ValueSource.LAST_IMAGE: ("last_image",),
    ValueSource.PIXELS: ("width", "height"),
    ValueSource.WIDTH: ("width",),
    ValueSource.HEIGHT: ("height",),
    ValueSource.NUM_FRAMES: ("num_frames",),
    ValueSource.FPS: ("fps",),
}
"""Source of a value -> shot fields that it depends on."""


class _DeclaredOptions(FirstBlockCacheParams, Fp8Params, ScheduleParams):
    """Options of every declared pipeline."""

    text_tokens: int | None = Field(default=None, ge=1, le=4096)
    """Tokens of the prompt that the text encoder reads. `None`: those of the declaration."""
    adapters_kept: Annotated[int, NOT_IN_KEY] = Field(default=4, ge=1)
    """LoRAs that stay loaded, and the maximum per shot. The least recently used one is unloaded first."""
    declaration: str = ""
    """Digest of the declaration, set by its stage."""


class DeclaredClipParams(OffloadedParams, _DeclaredOptions):
    vae_tiling: bool = False
    """Encode and decode in overlapping tiles, which needs less memory and may show seams."""


class DeclaredImageParams(ImageParams, _DeclaredOptions):
    pass


class _DeclaredPipeline(OffloadedStage[Any]):
    """What the stages of all slots have in common: loading, the arguments of the call, checks of what it returns."""

    declaration: ClassVar[Declaration]

    def load(self) -> None:
        declaration = self.declaration
        (pipeline_class,) = diffusers_classes(self.params, declaration.pipeline)
        self.pipe = load_pipeline(
            pipeline_class,
            self.params,
            accepted_classes=declaration.folders_of,
            float32_parts=declaration.float32,
            cpu_offload=self.params.cpu_offload,
        )
        speed_up_transformers(self.pipe, self.params)
        self.caches = FirstBlockCaches(self.pipe, self.params)
        self.adapters = LoraAdapters(
            self.pipe,
            self.params.adapters_kept,
            declaration.label,
            self.lora_field or "lora",
            dtype=torch_dtype(self.params.dtype) if is_in_fp8(self.params) else None,
            is_compiled=self.params.compile,
        )

    @property
    def adapter_loads(self) -> int:
        return self.adapters.loads

    @classmethod
    def texts(cls, params: Any, shot: Shot) -> Iterator[ReadText]:
        rule = cls.declaration.text
        if rule is not None:
            text = rule.template.replace("{}", cls._text(shot))
            yield ReadText(text, params.weights / rule.tokenizer, params.text_tokens or rule.tokens)

    @classmethod
    def check_shot(cls, params: Any, shot: Shot) -> None:
        size, frames = cls.declaration.size, cls.declaration.frames
        got = f"{shot.width}x{shot.height}"
        if shot.width % size.multiple or shot.height % size.multiple:
            raise StageError(f"width and height: got {got}, must be multiples of {size.multiple} with {cls.label}")
        if size.buckets and (shot.width, shot.height) not in size.buckets:
            allowed = ", ".join(f"{width}x{height}" for width, height in size.buckets)
            raise StageError(f"width and height: got {got}, must be one of {allowed} with {cls.label}")
        if size.most_pixels is not None and shot.width * shot.height > size.most_pixels:
            raise StageError(f"width and height: got {got}, must have at most {size.most_pixels:,} pixels with {cls.label}")
        if frames is not None and not frames.allows(shot.num_frames):
            most = f"at most {frames.most}" if frames.rule == "any" else f"{frames.rule}, at most {frames.most}"
            raise StageError(f"num_frames: got {shot.num_frames}, must be {most}, with {cls.label}")

    def call(self, item: Item) -> torch.Tensor:
        """Return the images or frames of one call (N, 3, H, W), 0 to 1."""
        declaration = self.declaration
        arguments = dict(declaration.constants)
        for argument, source in declaration.inputs.items():
            value = self._value(source, item)
            if value is not None:
                arguments[argument] = value
        report = diffusers_step_callback(self.name) if declaration.progress else {}
        separate = self.is_guided(item.shot) and not (declaration.guidance and declaration.guidance.one_batch)
        with self.adapters.active(self.active_loras(item.shot)), self.caches.steps(guided=separate):
            self.note(*self.adapters.take_notes())
            result = self.pipe(
                **arguments, **report, generator=noise_generator(self.generator_seed(item.shot)), output_type="pt"
            )
        found: torch.Tensor = getattr(result, declaration.returns.images)
        frames = found[0] if found.ndim == 5 else found
        return frames[:, :3] if declaration.returns.has_alpha else frames

    def checked(self, pixels: torch.Tensor, count: int, shot: Shot) -> Frames:
        """Return pixels (N, 3, H, W), 0 to 1, as uint8 (N, H, W, 3). Raises StageError for another number or size."""
        levels = pixels_to_uint8(pixels)
        wanted = (count, shot.height, shot.width, 3)
        if levels.shape != wanted:
            got, expected = ("x".join(map(str, shape)) for shape in (levels.shape, wanted))
            raise StageError(f"{self.label}: returned {got} (frames, height, width, channels), must be {expected}")
        if levels.min() == levels.max():
            self.note(f"{self.label}: everything has a single colour")
        return levels

    @classmethod
    def is_guided(cls, shot: Shot) -> bool:
        """Return whether each step has a second pass, in which the negative prompt has an effect."""
        rule = cls.declaration.guidance
        return rule is None or cls._guidance(shot) > rule.off_at

    @classmethod
    def _guidance(cls, shot: Shot) -> float:
        rule = cls.declaration.guidance
        own: float | None = getattr(shot.guidance, cls.name)
        if own is None:
            return rule.default if rule is not None else 0.0
        return own

    @classmethod
    def _text(cls, shot: Shot) -> str:
        declaration = cls.declaration
        if declaration.instruction is not None:
            return declaration.instruction.replace("{style}", shot.style_prompt or shot.prompt)
        return prompt_of(shot) if declaration.slot == "video" else shot.prompt

    def _value(self, source: ValueSource, item: Item) -> Any:
        """Return the value of an argument. `None` leaves it out."""
        shot, declaration = item.shot, self.declaration
        match source:
            case ValueSource.PROMPT | ValueSource.INSTRUCTION:
                return self._text(shot)
            case ValueSource.NEGATIVE_PROMPT:
                return self._negative_prompt(shot)
            case ValueSource.IMAGE:
                return _as_pil(item.image)
            case ValueSource.LAST_IMAGE:
                return _as_pil(item.last_image) if shot.last_image is not None else None
            case ValueSource.REFERENCES:
                return self._photos(item) or None
            case ValueSource.IMAGE_AND_REFERENCES:
                return [_as_pil(item.image), *self._photos(item)]
            case ValueSource.VIDEO:
                return [_as_pil(frame) for frame in item.frames]
            case ValueSource.PIXELS:
                return shot.width * shot.height
            case ValueSource.STEPS:
                return getattr(shot.steps, self.name) or declaration.steps
            case ValueSource.GUIDANCE:
                return self._guidance(shot)
            case ValueSource.STRENGTH:
                return shot.style_strength if declaration.slot == "restyle" else shot.identity_strength
            case ValueSource.TEXT_TOKENS:
                return self.params.text_tokens or (declaration.text.tokens if declaration.text else None)
            case _:
                return getattr(shot, source.value)

    def _negative_prompt(self, shot: Shot) -> str | None:
        if not self.is_guided(shot):
            return None
        rule = self.declaration.text
        own: str | None = self.params.negative_prompt_of(shot)
        return own or (rule.negative if rule is not None else None)

    def _photos(self, item: Item) -> list[PILImage.Image]:
        photos = item.photos if self.uses_identity(item.shot) else ()
        return [_as_pil(photo) for photo in photos[: self.declaration.most_references]]


class DeclaredVideoStage(_DeclaredPipeline, VideoStage[Any]):
    """`image` (H, W, 3) or photos -> `frames` (clip_frames, H, W, 3), by a declared pipeline."""

    @classmethod
    def lower_memory(cls, params: DeclaredClipParams) -> DeclaredClipParams | None:
        """Return parameters with tiles in the autoencoder."""
        has_tiles = cls.declaration.tiles and not params.vae_tiling
        return params.model_copy(update={"vae_tiling": True}) if has_tiles else None

    @classmethod
    def needs(cls, shot: Shot) -> tuple[str, ...]:
        return (*super().needs(shot), *(("last_image",) if shot.last_image else ()))

    def generate(self, item: Item) -> Frames:
        if self.declaration.tiles:
            self.pipe.vae.use_tiling = self.params.vae_tiling
        return self.checked(self.call(item), item.shot.num_frames, item.shot)


class DeclaredImageStage(_DeclaredPipeline, ImageStage[Any]):
    """Prompt, photos and perhaps `image` (H, W, 3) -> `image` (height, width, 3), by a declared pipeline."""

    def run(self, item: Item) -> Artefacts:
        if self.declaration.tiles:
            set_vae_tiles(self.pipe.vae, self.params.vae_tile_px)
        (image,) = self.checked(self.call(item), 1, item.shot)
        return {"image": image}


_ACTIVITIES = {"image": "Generating the base image", "restyle": "Restyling the image", "video": "Generating the clip"}
_CHOSEN_BY = {"image": "image_by", "restyle": "restyled_by", "video": "clip_by"}
_DEBUG_FILES = {"image": "base.png", "restyle": "style.png", "video": None}


def stage_of(declaration: Declaration) -> type[_DeclaredPipeline]:
    """Return the stage of a declaration."""
    slot, sources = declaration.slot, set(declaration.inputs.values())
    is_video = slot == "video"
    base: type[_DeclaredPipeline] = DeclaredVideoStage if is_video else DeclaredImageStage
    options = DeclaredClipParams if is_video else DeclaredImageParams
    sees_photos = not sources.isdisjoint({ValueSource.REFERENCES, ValueSource.IMAGE_AND_REFERENCES})
    fields = {
        "__doc__": f"{declaration.label}: diffusers `{declaration.pipeline}`.",
        "__module__": __name__,
        "declaration": declaration,
        "name": declaration.name,
        "label": declaration.label,
        "activity": _ACTIVITIES[slot],
        "chosen_by": _CHOSEN_BY[slot],
        "debug_file": _DEBUG_FILES[slot],
        "pipelines": (declaration.pipeline, *declaration.folders_of),
        "reads": _fields_read(declaration),
        "takes": ("image",) if sources & {ValueSource.IMAGE, ValueSource.IMAGE_AND_REFERENCES} else (),
        "lora_field": "video_lora" if is_video and declaration.has_loras else "",
        "identity_field": "uses_reference_photos" if sees_photos else "",
        "identity_fields": ("face_image",) if sees_photos else (),
        "identity_inputs": ("photos",) if sees_photos else (),
        "uses_shot_seed": slot == "image",
        "Params": _params_of(declaration, options),
    }
    made: type[_DeclaredPipeline] = types.new_class(
        f"Declared_{declaration.name}", (base,), exec_body=lambda body: body.update(fields)
    )
    return made


def _params_of(declaration: Declaration, options: type[_DeclaredOptions]) -> type[_DeclaredOptions]:
    """Return the parameters of a stage, with the digest of its declaration, so that another one has other keys."""
    facts = declaration.model_dump_json(exclude={"label", "licence", "sources", "tiny"})
    digest = hashlib.sha256(f"{RULES_VERSION} {facts}".encode()).hexdigest()
    fields = {
        "__module__": __name__,
        "__annotations__": {"declaration": str, "schedule_actor": ClassVar[str]},
        "declaration": digest,
        "schedule_actor": declaration.name,
    }
    return types.new_class(f"Params_{declaration.name}", (options,), exec_body=lambda body: body.update(fields))


def _fields_read(declaration: Declaration) -> tuple[str, ...]:
    sources = declaration.inputs.values()
    own = {ValueSource.STEPS: (f"steps.{declaration.name}",), ValueSource.GUIDANCE: (f"guidance.{declaration.name}",)}
    strength = "style_strength" if declaration.slot == "restyle" else "identity_strength"
    found = ["seed"]
    for source in sources:
        found += [strength] if source is ValueSource.STRENGTH else own.get(source, _READ.get(source, ()))
    if declaration.slot == "video":
        # Fields of every clip: the frame rate is that of the file.
        found += ["motion_prompt", "num_frames", "extend", "fps", "width", "height"]
        found += ["video_lora"] if declaration.has_loras else []
    return tuple(dict.fromkeys(found))


def _as_pil(pixels: Any) -> PILImage.Image:
    from PIL import Image

    return Image.fromarray(pixels)
