"""Values of the form and their conversion to shot fields. No HTTP."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import JsonValue, ValidationError

from vidgen_ray.graph import file_sizes
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.delivered_size import (
    SCALES,
    SizeRules,
    clip_fields,
    clip_fields_with_hd,
    delivered_artefact,
    image_fields,
)
from vidgen_ray.online.web.form_controls import Control, ControlGroup, text_of
from vidgen_ray.shot import LORA_FIELDS, Shot

STYLES = ("watercolour", "oil painting", "ink drawing", "charcoal sketch", "claymation", "film noir", "pixel art", "woodcut")
"""Suggested style prompts."""
IDEAS = (
    "A large red boat by the sea at sunset",
    "A yellow house on green hills under a rainbow",
    "A person in a blue coat walking in the snow",
)
"""Example prompts, shown while there are no clips."""
CONTROL_OF = {
    "face_image": "photo",
    "input_reference": "image",
    "width": "size",
    "height": "size",
    "crop_width": "size",
    "crop_height": "size",
    "use_hunyuan_style": "style_prompt",
    "upscale_video": "scale",
    "generate_video": "output",
    "n": "count",
    "consent": "consent_basis",
    "consent.subject": "consent_subject",
    "consent.basis": "consent_basis",
    "consent.reference": "consent_reference",
}
"""API field -> control of the form, if the names differ."""
TEXTS = (
    "prompt", "negative_prompt", "style_prompt", "consent_basis", "consent_subject", "consent_reference", "save_as",
    "character", "mode", "output", "size", "num_frames", "fps", "scale", "seed", "count", "continue_from",
)  # fmt: skip
"""Controls of the template with one value."""
MAX_COUNT = 16
"""Most clips of one form."""
MAX_DIGITS = 10
"""Longest number accepted. `int` raises for numbers of thousands of digits."""
BASES = {
    "self": "it is my own face",
    "written": "this person agreed in writing",
    "contract": "a contract or licence covers it",
    "public-domain": "the portrait is in the public domain",
    "synthetic": "it shows no real person",
}
"""Basis of a consent -> the end of a sentence."""
SIZES = {
    "1280x720": "16:9", "1920x1080": "16:9", "832x480": "16:9", "720x1280": "9:16", "1080x1920": "9:16", "480x832": "9:16",
    "1024x1024": "1:1", "1024x768": "4:3",
}  # fmt: skip
"""Common sizes of finished clips and images -> aspect ratio."""
TO_SIZE, NO_UPSCALING = "", "none"
"""Choices of the upscaling control besides the factors of a larger file: only to reach the size, and never."""
SEEDS = 2**32


class FormError(Exception):
    """Invalid form: a message per control, and a message for the whole form."""

    def __init__(self, errors: Mapping[str, str], message: str | None = None, status: int = 422) -> None:
        self.errors, self.message, self.status = dict(errors), message, status
        super().__init__(message or ", ".join(self.errors))


@dataclass(frozen=True, slots=True)
class FormLora:
    """One LoRA of the form: its name and its weight as text."""

    name: str
    weight: str = "1"


@dataclass(frozen=True, slots=True)
class FormValues:
    """Values of the controls, as text."""

    texts: Mapping[str, str] = field(default_factory=dict)
    """Control -> its value, if it has one. Derived controls have the names of their shot fields."""
    loras: tuple[FormLora, ...] = ()
    photo_ids: tuple[str, ...] = ()
    """Ids of uploaded photos of the character."""
    image_ids: tuple[str, ...] = ()
    """Id of the uploaded start image, at most one."""

    def get(self, name: str) -> str:
        return self.texts.get(name, "")

    @staticmethod
    def from_form(form: Mapping[str, Any], groups: Sequence[ControlGroup]) -> "FormValues":
        """Return the values that a browser sent. Ignores unknown names and files."""
        names = (*TEXTS, *(control.name for control in controls_of(groups)))
        # Browsers send line breaks as CRLF.
        texts = {name: text.replace("\r\n", "\n") for name in names if isinstance(text := form.get(name), str)}
        weights = [*texts_of(form.get("lora_weight")), *([""] * MAX_COUNT)]
        loras = tuple(FormLora(name, weight) for name, weight in zip(texts_of(form.get("lora")), weights, strict=False) if name)
        return FormValues(texts, loras, texts_of(form.get("photo_id")), texts_of(form.get("image_id")))

    @staticmethod
    def from_shot(
        shot: Shot, client_fields: Mapping[str, Any], groups: Sequence[ControlGroup], hd_beside: bool = False
    ) -> "FormValues":
        """Return the values for a shot with the same settings and a new seed.

        `client_fields`: the shot's fields with upload ids and LoRA names in place of paths. `hd_beside`: a larger clip was
        asked for beside the one that is delivered.
        """
        width, height = file_sizes(shot)[delivered_artefact(shot, hd_beside)]
        never = shot.generate_video and not shot.upscale_video
        upscaling = NO_UPSCALING if never else str(shot.scale) if hd_beside else TO_SIZE
        texts = {
            "prompt": shot.prompt,
            "negative_prompt": shot.negative_prompt or "",
            "style_prompt": (shot.style_prompt or "") if shot.use_hunyuan_style else "",
            "mode": shot.mode,
            "output": "clip" if shot.generate_video else "image",
            "size": f"{width}x{height}",
            "num_frames": str(shot.num_frames),
            "fps": str(shot.fps),
            "scale": upscaling,
            "continue_from": shot.continue_from or "",
        }
        if shot.consent is not None and shot.consent.basis in BASES:
            texts |= {f"consent_{name}": text_of(value) for name, value in shot.consent}
        for control in controls_of(groups):
            value: Any = shot
            for name in control.name.split("."):
                value = client_fields.get(name) if name in LORA_FIELDS else getattr(value, name)
            if (text := text_of(value)) != control.default:
                texts[control.name] = text
        loras = tuple(FormLora(lora["name"], text_of(lora["scale"])) for lora in client_fields.get("lora", ()))
        image = client_fields.get("image")
        return FormValues(texts, loras, tuple(client_fields.get("face_image", ())), (image,) if image else ())

    def with_text(self, name: str, text: str) -> "FormValues":
        return replace(self, texts={**self.texts, name: text})

    def continuing(self, job_id: str) -> "FormValues":
        """Return the values for a clip that starts where the clip of this job ends."""
        return replace(self.with_text("continue_from", job_id), image_ids=())

    def without_photos(self) -> "FormValues":
        return replace(self, photo_ids=())

    @property
    def asks_for_hd(self) -> bool:
        """True if the form asks for a larger clip, too."""
        return self.get("output") != "image" and self.get("scale") not in (TO_SIZE, NO_UPSCALING)

    def fields(self, groups: Sequence[ControlGroup], rules: SizeRules) -> dict[str, JsonValue]:
        """Return the shot fields, without images. Raises FormError with all invalid numbers, ApiError for a size."""
        errors: dict[str, str] = {}
        if self.get("mode") == "fast" and self.get("style_prompt").strip():
            errors["style_prompt"] = "Fast mode has no restyling. Choose quality mode, or leave this empty."
        clip = self.get("output") != "image"
        fields: dict[str, JsonValue] = {
            "prompt": self.get("prompt"),
            "mode": self.get("mode") or None,
            "generate_video": clip,
            "upscale_video": False,
            "seed": self._number("seed", errors),
        }
        if clip:
            fields |= {name: self._number(name, errors) for name in ("num_frames", "fps")}
            fields["continue_from"] = self.get("continue_from") or None
        if self.get("negative_prompt").strip():
            fields["negative_prompt"] = self.get("negative_prompt")
        if self.get("style_prompt").strip():
            fields |= {"use_hunyuan_style": True, "style_prompt": self.get("style_prompt")}
        if loras := self._loras(errors):
            fields["lora"] = loras
        for control in controls_of(groups):
            if text := self.get(control.name).strip():
                _set_at(fields, control.name, control.parse(text))
        fields |= self._size_fields(rules, errors)
        if errors:
            raise FormError(errors)
        return {name: value for name, value in fields.items() if value is not None}

    def consent(self) -> dict[str, str] | None:
        """Return the fields of the consent to the use of the photos, or `None` if none is filled in. Not checked."""
        texts = {name: self.get(f"consent_{name}").strip() for name in ("subject", "basis", "reference")}
        return {name: text for name, text in texts.items() if text} or None

    def count(self) -> int:
        """Return how many clips the form asks for. Raises FormError."""
        text = self.get("count").strip() or "1"
        if not is_number(text) or not 1 <= int(text) <= MAX_COUNT:
            raise FormError({"count": f"Must be a whole number from 1 to {MAX_COUNT}."})
        return int(text)

    def _size_fields(self, rules: SizeRules, errors: dict[str, str]) -> Mapping[str, int | bool]:
        """Return the fields that make the finished file as large as the form says. Raises ApiError for a size out of reach."""
        sides = self.get("size").split("x")
        if len(sides) != 2 or not all(map(is_number, sides)):
            errors["size"] = "Choose one of the sizes."
            return {}
        width, height = map(int, sides)
        if self.get("output") == "image":
            # Images are not upscaled, so the default size of a clip may be far from what the models draw.
            is_default = (width, height) == rules.default_clip
            return image_fields(*((rules.default_width, rules.default_height) if is_default else (width, height)))
        if not self.asks_for_hd:
            return clip_fields(width, height, rules, may_upscale=self.get("scale") == TO_SIZE)
        if self.get("scale") not in map(str, SCALES):
            errors["scale"] = f"Must be one of {', '.join(map(str, SCALES))}."
            return {}
        return clip_fields_with_hd(width, height, int(self.get("scale")))

    def _number(self, name: str, errors: dict[str, str]) -> int | None:
        text = self.get(name).strip()
        if is_number(text):
            return int(text)
        if text:
            errors[name] = "Must be a whole number."
        return None

    def _loras(self, errors: dict[str, str]) -> list[JsonValue]:
        loras: list[JsonValue] = []
        for lora in self.loras:
            try:
                weight = float(lora.weight or 1)
            except ValueError:
                weight = math.inf
            if not -2 <= weight <= 2:
                errors["lora"] = f"The weight of {lora.name} must be a number from -2 to 2."
            loras.append({"name": lora.name, "scale": weight})
        return loras


def controls_of(groups: Iterable[ControlGroup]) -> Iterator[Control]:
    """Yield the controls of all groups."""
    for group in groups:
        yield from group.controls


def variations(fields: Mapping[str, JsonValue], count: int) -> list[Mapping[str, JsonValue]]:
    """Return the fields of `count` shots. With a seed, the shots have consecutive seeds; without, random ones."""
    seed = fields.get("seed")
    return [{**fields, "seed": (seed + number) % SEEDS} if isinstance(seed, int) else fields for number in range(count)]


def is_number(text: str, max_digits: int = MAX_DIGITS) -> bool:
    """Return whether the text is a whole number of at most `max_digits` digits."""
    return text.isascii() and text.isdecimal() and len(text) <= max_digits


@dataclass(frozen=True, slots=True)
class Size:
    """One choice of the size control."""

    value: str
    label: str


def size_choices(current: str, rules: SizeRules) -> tuple[Size, ...]:
    """Return the default size of a finished clip, the common ones that the server reaches, and `current`."""
    width, height = rules.default_clip
    choices = {f"{width}x{height}": "default"} | {size: ratio for size, ratio in SIZES.items() if _is_reachable(size, rules)}
    if current:
        choices.setdefault(current, "as in that clip")
    return tuple(Size(value, f"{value.replace('x', ' × ')}, {name}") for value, name in choices.items())


def _is_reachable(size: str, rules: SizeRules) -> bool:
    width, height = map(int, size.split("x"))
    try:
        clip_fields(width, height, rules)
    except ApiError:
        return False
    return True


def errors_of(error: ValidationError) -> dict[str, str]:
    """Return a message per control from Pydantic's errors about a shot. Errors without a field go to the prompt."""
    messages: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        name = ".".join(part for part in detail["loc"] if isinstance(part, str)) or _field_in(detail["msg"])
        text = detail["msg"].removeprefix("Value error, ").removeprefix("Input should ")
        text = "required" if detail["type"] in ("missing", "string_too_short") else text
        messages.setdefault(CONTROL_OF.get(name, name), f"{text[0].upper()}{text[1:]}.")
    return messages


def _field_in(message: str, fields: Iterable[str] = ("width", "height", "lora_strength", "refine_strength")) -> str:
    return next((name for name in fields if name in message), "prompt")


def _set_at(fields: dict[str, JsonValue], name: str, value: JsonValue) -> None:
    """Set a field. `steps.flux` sets a nested one."""
    head, _, tail = name.partition(".")
    if not tail:
        fields[head] = value
        return
    nested = fields.setdefault(head, {})
    assert isinstance(nested, dict)
    nested[tail] = value


def texts_of(value: object) -> tuple[str, ...]:
    """Return the texts of a form field that may be repeated."""
    return tuple(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))
