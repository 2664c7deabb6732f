"""The form of the page: its choices, its values and their conversion to shot fields. No HTTP."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import JsonValue, ValidationError

from vidgen_ray.shot import LoraRef, Shot

STYLES = ("watercolour", "oil painting", "ink drawing", "charcoal sketch", "claymation", "film noir", "pixel art", "woodcut")
"""Suggested style prompts."""
IDEAS = (
    "A large red boat by the sea at sunset",
    "A yellow house on green hills under a rainbow",
    "A person in a blue coat walking in the snow",
)
"""Example prompts, shown while there are no clips."""
MORE_FIELDS = frozenset({"size", "num_frames", "fps", "scale", "motion_bucket_id", "seed", "negative_prompt"})
"""Controls under "More settings", which is closed at first."""
CONTROL_OF = {
    "face_image": "photo",
    "input_reference": "photo",
    "width": "size",
    "height": "size",
    "use_hunyuan_style": "style_prompt",
    "upscale_video": "scale",
}
"""API field -> control of the form, if the names differ."""
MAX_DIGITS = 10
"""Longest number accepted. `int` raises for numbers of thousands of digits."""
LATENT_PX = 64
"""Width and height are multiples of this."""


class FormError(Exception):
    """Invalid form: a message per control, and a message for the whole form."""

    def __init__(self, errors: Mapping[str, str], message: str | None = None, status: int = 422) -> None:
        self.errors, self.message, self.status = dict(errors), message, status
        super().__init__(message or ", ".join(self.errors))


@dataclass(frozen=True, slots=True)
class FormValues:
    """Values of the controls, as text."""

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
    def from_form(form: Mapping[str, Any]) -> "FormValues":
        """Return the values that a browser sent. Ignores unknown names and files."""
        texts = {name: form.get(name) for name in FormValues.__slots__}
        # Browsers send line breaks as CRLF.
        return FormValues(**{name: text.replace("\r\n", "\n") for name, text in texts.items() if isinstance(text, str)})

    @staticmethod
    def from_shot(shot: Shot, lora_names: Mapping[str, str]) -> "FormValues":
        """Return the values for a shot with the same settings and a new seed. `lora_names` maps paths to names."""
        lora = shot.lora[0] if shot.lora else LoraRef(path="-")
        return FormValues(
            prompt=shot.prompt,
            lora=lora_names.get(lora.path, ""),
            lora_weight=f"{lora.weight:g}",
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
        """Return the shot fields, without photos and LoRA. Raises FormError with all fields that are not numbers."""
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
            errors["style_prompt"] = "Fast mode has no restyling. Choose quality mode, or leave this empty."
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

    def lora_ref(self) -> LoraRef | None:
        """Return the chosen LoRA, with its name as path. Raises FormError for an invalid weight."""
        if not self.lora:
            return None
        try:
            return LoraRef(path=self.lora, weight=float(self.lora_weight))
        except ValueError:
            raise FormError({"lora_weight": "Must be a number between -2 and 2."}) from None


def is_number(text: str, max_digits: int = MAX_DIGITS) -> bool:
    """Return whether the text is a whole number of at most `max_digits` digits."""
    return text.isascii() and text.isdecimal() and len(text) <= max_digits


@dataclass(frozen=True, slots=True)
class Size:
    """One choice of the size control."""

    value: str
    label: str


def size_choices(width: int, height: int, current: str = "") -> tuple[Size, ...]:
    """Return a landscape, a portrait and a square size with about as many pixels, and `current` ("WIDTHxHEIGHT")."""
    side = max(LATENT_PX, round(math.sqrt(width * height) / LATENT_PX) * LATENT_PX)
    long, short = max(width, height), min(width, height)
    shapes = {f"{long}x{short}": "Landscape", f"{short}x{long}": "Portrait", f"{side}x{side}": "Square"}
    if current:
        shapes.setdefault(current, "As in that clip")
    return tuple(Size(value, f"{name}, {value.replace('x', ' × ')}") for value, name in shapes.items())


def errors_of(error: ValidationError) -> dict[str, str]:
    """Return a message per control from Pydantic's errors about a shot. Errors without a field go to the prompt."""
    messages: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        name = str(detail["loc"][0]) if detail["loc"] else _field_in(detail["msg"])
        text = detail["msg"].removeprefix("Value error, ").removeprefix("Input should ")
        text = "required" if detail["type"] in ("missing", "string_too_short") else text
        messages.setdefault(CONTROL_OF.get(name, name), f"{text[0].upper()}{text[1:]}.")
    return messages


def _field_in(message: str, fields: Iterable[str] = ("width", "height", "lora_strength")) -> str:
    return next((name for name in fields if name in message), "prompt")
