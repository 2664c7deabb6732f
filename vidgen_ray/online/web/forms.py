"""The form: what it offers, what was filled in, and what that means as fields of a shot. Knows no HTTP."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import JsonValue, ValidationError

from vidgen_ray.shot import LoraRef, Shot

STYLES = ("watercolour", "oil painting", "ink drawing", "charcoal sketch", "claymation", "film noir", "pixel art", "woodcut")
"""Suggestions; any words will do."""
IDEAS = (
    "A large red boat by the sea at sunset",
    "A yellow house on green hills under a rainbow",
    "A person in a blue coat walking in the snow",
)
"""Prompts to start from, where there is no clip yet."""
MORE_FIELDS = frozenset({"size", "num_frames", "fps", "scale", "motion_bucket_id", "seed", "negative_prompt"})
"""The controls that are folded away at first."""
CONTROL_OF = {
    "face_image": "photo",
    "input_reference": "photo",
    "width": "size",
    "height": "size",
    "use_hunyuan_style": "style_prompt",
    "upscale_video": "scale",
}
"""Field of the API -> the control that stands for it, where the names differ."""
DIGITS = 10
"""Of any number that makes sense here; Python refuses to read thousands."""
LATENT_PX = 64
"""Sides of a clip are multiples of it."""


class FormError(Exception):
    """What is wrong: control -> sentence, and what belongs to no control."""

    def __init__(self, errors: Mapping[str, str], message: str | None = None, status: int = 422) -> None:
        self.errors, self.message, self.status = dict(errors), message, status
        super().__init__(message or ", ".join(self.errors))


@dataclass(frozen=True, slots=True)
class FormValues:
    """What stands in the controls, as text."""

    prompt: str = ""
    save_as: str = ""
    character: str = ""
    lora: str = ""
    lora_weight: str = "1"
    style_prompt: str = ""
    mode: str = "quality"
    size: str = ""
    num_frames: str = ""
    fps: str = ""
    scale: str = ""
    motion_bucket_id: str = ""
    seed: str = ""
    negative_prompt: str = ""
    same_photo: str = ""

    @staticmethod
    def of_form(form: Mapping[str, Any]) -> "FormValues":
        """Of what a browser sent. Unknown names are left out, files too."""
        texts = {name: form.get(name) for name in FormValues.__slots__}
        # A form ends its lines as HTTP does, which is not what was typed.
        return FormValues(**{name: text.replace("\r\n", "\n") for name, text in texts.items() if isinstance(text, str)})

    @staticmethod
    def of_shot(shot: Shot, lora_names: Mapping[str, str]) -> "FormValues":
        """The form that would ask for a shot like this one, with a new seed. `lora_names`: path -> name."""
        worn = shot.lora[0] if shot.lora else LoraRef(path="-")
        return FormValues(
            prompt=shot.prompt,
            lora=lora_names.get(worn.path, ""),
            lora_weight=f"{worn.weight:g}",
            style_prompt=(shot.style_prompt or "") if shot.use_hunyuan_style else "",
            mode=shot.mode,
            size=f"{shot.width}x{shot.height}",
            num_frames=str(shot.num_frames),
            fps=str(shot.fps),
            scale=str(shot.scale) if shot.upscale_video else "",
            motion_bucket_id=str(shot.motion_bucket_id),
            negative_prompt=shot.negative_prompt or "",
            same_photo="yes" if shot.face_image else "",
        )

    def with_prompt(self, prompt: str) -> "FormValues":
        return replace(self, prompt=prompt)

    def fields(self) -> dict[str, JsonValue]:
        """As fields of a shot, without photos and LoRA. Raises FormError for text that is no number, each field at once."""
        errors: dict[str, str] = {}

        def number(name: str) -> int | None:
            text = getattr(self, name).strip()
            if is_number(text):
                return int(text)
            if text:
                errors[name] = "Must be a whole number."
            return None

        width, _, height = self.size.partition("x")
        if not (is_number(width) and is_number(height)):
            errors["size"] = "Choose one of the sizes."
        if self.mode == "fast" and self.style_prompt.strip():
            errors["style_prompt"] = "Mode fast has no restyle. Choose quality, or leave this empty."
        fields: dict[str, JsonValue] = {
            "prompt": self.prompt,
            "mode": self.mode,
            "width": int(width) if is_number(width) else None,
            "height": int(height) if is_number(height) else None,
            "upscale_video": bool(self.scale),
            **{name: number(name) for name in ("num_frames", "fps", "motion_bucket_id", "scale", "seed")},
        }
        if self.negative_prompt.strip():
            fields["negative_prompt"] = self.negative_prompt
        if self.style_prompt.strip():
            fields |= {"use_hunyuan_style": True, "style_prompt": self.style_prompt}
        if errors:
            raise FormError(errors)
        return {name: value for name, value in fields.items() if value is not None}

    def worn(self) -> LoraRef | None:
        """The LoRA by its name. Raises FormError for a weight that is none."""
        if not self.lora:
            return None
        try:
            return LoraRef(path=self.lora, weight=float(self.lora_weight))
        except ValueError:
            raise FormError({"lora_weight": "Must be a number between -2 and 2."}) from None


def is_number(text: str, most: int = DIGITS) -> bool:
    """Whether it is a whole number of at most so many digits."""
    return text.isascii() and text.isdecimal() and len(text) <= most


@dataclass(frozen=True, slots=True)
class Size:
    value: str
    label: str


def sizes_like(width: int, height: int, extra_weights: str = "") -> tuple[Size, ...]:
    """The profile's own size, the same upright and as a square of about as many pixels, and `also`."""
    side = max(LATENT_PX, round(math.sqrt(width * height) / LATENT_PX) * LATENT_PX)
    long, short = max(width, height), min(width, height)
    shapes = {f"{long}x{short}": "Landscape", f"{short}x{long}": "Portrait", f"{side}x{side}": "Square"}
    if extra_weights:
        shapes.setdefault(extra_weights, "As in that clip")
    return tuple(Size(value, f"{name}, {value.replace('x', ' × ')}") for value, name in shapes.items())


def errors_of(error: ValidationError) -> dict[str, str]:
    """Pydantic's findings about a shot -> control -> sentence. A finding about fields together goes to the prompt."""
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        name = str(detail["loc"][0]) if detail["loc"] else _named_in(detail["msg"])
        text = detail["msg"].removeprefix("Value error, ").removeprefix("Input should ")
        text = "needed" if detail["type"] in ("missing", "string_too_short") else text
        found.setdefault(CONTROL_OF.get(name, name), f"{text[0].upper()}{text[1:]}.")
    return found


def _named_in(message: str, fields: Iterable[str] = ("width", "height", "lora_strength")) -> str:
    return next((name for name in fields if name in message), "prompt")
