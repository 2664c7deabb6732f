"""What clients may ask for, and how their words become the fields of a Shot.

Names are OpenAI's where it has them, vLLM-Omni's where that has them, and a Shot's for everything else. A form has only text:
`"7"` and `"true"` are what they look like, and what is no text is JSON in a field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vidgen_ray.graph import BASE_IMAGE_STAGES, CLIP_ONLY_FIELDS, stages_with_setting
from vidgen_ray.online.api_error import ApiError, invalid
from vidgen_ray.shot import Shot

PATH_FIELDS = ("image", "face_image", "lora", "character")
"""Fields of a Shot that a client gives otherwise than a script does."""
SHOT_FIELDS = tuple(name for name in Shot.model_fields if name not in (*PATH_FIELDS, "id", "variants"))
JSON_FIELDS = ("steps", "guidance", "metadata", "extra_params", "face_image", "loras", "image_reference", "input_reference")
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
SMALLEST, LARGEST = 64, 2048
FRAMES = (2, 256)
CLIP_MULTIPLE, PICTURE_MULTIPLE = 64, 16

STEERING = ("num_inference_steps", "guidance_scale", "style", "upscale", "extra_params", "loras")
OPENAI_VIDEO = ("prompt", "model", "seconds", "size", "input_reference", "image_reference", "user")
OPENAI_IMAGE = (
    "prompt",
    "model",
    "n",
    "size",
    "response_format",
    "output_format",
    "output_compression",
    "background",
    "stream",
    "partial_images",
    "quality",
    "moderation",
    "style",
    "user",
    "safety_identifier",
)
VIDEO_FIELDS = frozenset({*OPENAI_VIDEO, *STEERING, *SHOT_FIELDS, *PATH_FIELDS} - {"image"})
IMAGE_FIELDS = frozenset({*OPENAI_IMAGE, *STEERING, *SHOT_FIELDS, *PATH_FIELDS} - {"image", *CLIP_ONLY_FIELDS, "upscale"})
EDIT_FIELDS = frozenset({*IMAGE_FIELDS, "input_fidelity", "strength", "image"})


def checked_names(given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The fields that were given a value. Raises ApiError 400 for one of another name."""
    names = frozenset(known)
    for name in given:
        if name not in names:
            allowed = f"an unknown field; the fields are {', '.join(sorted(names))}"
            raise ApiError(400, f"{name[:100]}: {allowed}", code="unknown_parameter", param=name[:100])
    # An empty field of a form is one that was left out.
    return {
        name: _parsed(name, value) for name, value in given.items() if value is not None and (value != "" or name == "prompt")
    }


def video_fields(given: Mapping[str, Any], defaults: Mapping[str, Any], *, moving: bool = True) -> dict[str, Any]:
    """Fields of a shot, out of checked names without those that name files. `defaults` hold where they say nothing.

    With `moving` it is a clip, else a picture. Raises ApiError 400 for what does not go together.
    """
    fields = {**_extra(given.get("extra_params")), **{name: given[name] for name in SHOT_FIELDS if name in given}}
    fields["prompt"] = given.get("prompt")
    _size(given, fields, CLIP_MULTIPLE if moving else PICTURE_MULTIPLE)
    if moving:
        _length(given, fields, defaults)
        if "upscale" in given:
            fields.setdefault("upscale_video", given["upscale"])
    else:
        fields = {name: value for name, value in fields.items() if name not in CLIP_ONLY_FIELDS}
        fields |= {"generate_video": False, "upscale_video": False}
    if (steps := given.get("num_inference_steps")) is not None:
        stages = [stage for stage in stages_with_setting("steps") if moving or stage in BASE_IMAGE_STAGES]
        fields["steps"] = {**dict.fromkeys(stages, steps), **_settings("steps", fields.get("steps"))}
    if (guidance := given.get("guidance_scale")) is not None:
        fields["guidance"] = {
            **dict.fromkeys(stages_with_setting("guidance"), guidance),
            **_settings("guidance", fields.get("guidance")),
        }
    # OpenAI's own `style` of a picture, of which there were two, is no prompt.
    if (style := given.get("style")) is not None and style not in ("vivid", "natural"):
        if fields.get("mode", defaults.get("mode")) == "fast":
            raise invalid("style", "mode fast has no restyle; ask for quality, or leave it out")
        fields |= {"use_hunyuan_style": True, "style_prompt": style}
    loras = given.get("lora", given.get("loras"))
    return fields if loras is None else {**fields, "lora": _as_registered(loras)}


def nearest_size(width: int, height: int, multiple: int) -> tuple[int, int]:
    """The allowed size that is closest."""
    return _nearest(width, multiple), _nearest(height, multiple)


def whole_number(given: Mapping[str, Any], name: str, default: int, lowest: int, highest: int) -> int:
    """Raises ApiError 400 where it is no whole number of that range."""
    value = given.get(name, default)
    try:
        number = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or not lowest <= number <= highest:
        raise invalid(name, f"got {str(value)[:50]!r}, must be a whole number from {lowest} to {highest}")
    return number


def yes_or_no(given: Mapping[str, Any], name: str) -> bool:
    """False where it is missing. Raises ApiError 400 where it is neither."""
    value = given.get(name, False)
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    raise invalid(name, f"got {str(value)[:50]!r}, must be true or false")


def one_of(given: Mapping[str, Any], name: str, default: str, allowed: Iterable[str]) -> str:
    """Raises ApiError 400 where it is none of those."""
    value = given.get(name, default)
    known = tuple(allowed)
    if value not in known:
        raise invalid(name, f"got {str(value)[:50]!r}, must be one of {', '.join(known)}")
    return str(value)


def text(given: Mapping[str, Any], name: str, longest: int = 512) -> str | None:
    """Raises ApiError 400 where it is no text, or too long."""
    value = given.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > longest or "\0" in value):
        raise invalid(name, f"must be text of at most {longest} letters")
    return value


def _parsed(name: str, value: Any) -> Any:
    """JSON in a field of a form, where only JSON can be meant."""
    if name in JSON_FIELDS and isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise invalid(name, "is no JSON", "invalid_json") from None
    return value


def _extra(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise invalid("extra_params", "must be a JSON object of further fields")
    for name in given:
        if name not in SHOT_FIELDS:
            raise ApiError(
                400,
                f"extra_params.{str(name)[:100]}: an unknown field; the fields are {', '.join(SHOT_FIELDS)}",
                code="unknown_parameter",
                param="extra_params",
            )
    return given


def _settings(name: str, given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise invalid(name, "must be a JSON object, stage -> value")
    return given


def _as_registered(loras: Any) -> Any:
    """vLLM-Omni's `path` would be one of the server's."""
    for lora in loras if isinstance(loras, list) else [loras]:
        if isinstance(lora, dict) and "path" in lora:
            raise invalid("lora", "goes by its name on this server; a path cannot be given", "unknown_parameter")
    return loras


def _size(given: Mapping[str, Any], fields: dict[str, Any], multiple: int) -> None:
    size = given.get("size")
    if size is not None and size != "auto":
        match = SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None:
            raise invalid("size", f"got {str(size)[:50]!r}, must be WIDTHxHEIGHT in pixels, as 1024x576, or auto")
        for name, side in zip(("width", "height"), map(int, match.groups()), strict=True):
            if str(fields.get(name, side)) != str(side):
                raise invalid(name, f"got {str(fields[name])[:50]}, but size says {side}")
            fields[name] = side
    sides = [_whole(fields.get(name)) for name in ("width", "height")]
    wrong = [side for side in sides if side is not None and (side % multiple or not SMALLEST <= side <= LARGEST)]
    if wrong:
        param = "size" if size is not None and size != "auto" else "width" if sides[0] in wrong else "height"
        shown = "x".join("?" if side is None else str(side) for side in sides)
        near = "x".join("?" if side is None else str(_nearest(side, multiple)) for side in sides)
        raise invalid(
            param,
            f"got {shown}, both sides must be multiples of {multiple} from {SMALLEST} to {LARGEST}; the nearest is {near}",
            "invalid_size",
        )


def _length(given: Mapping[str, Any], fields: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """`seconds` as frames."""
    seconds = given.get("seconds")
    if seconds is None:
        return
    try:
        length = float(seconds) if isinstance(seconds, str | int | float) and not isinstance(seconds, bool) else math.nan
    except (ValueError, OverflowError):
        length = math.nan
    fps = _whole(fields.get("fps", defaults.get("fps", Shot.model_fields["fps"].default)))
    if fps is None or not 1 <= fps <= 60:
        return  # the shot's own check says what is wrong with it
    if not math.isfinite(length) or not FRAMES[0] <= round(length * fps) <= FRAMES[1]:
        between = f"from {FRAMES[0] / fps:g} to {FRAMES[1] / fps:g} at {fps} frames a second"
        raise invalid("seconds", f"got {str(seconds)[:50]!r}, must be a number {between}")
    frames = round(length * fps)
    if str(fields.get("num_frames", frames)) != str(frames):
        raise invalid("num_frames", f"got {str(fields['num_frames'])[:50]}, but seconds says {frames} at {fps} frames a second")
    fields["num_frames"] = frames


def _whole(value: Any) -> int | None:
    """None for what a Shot would not take for a whole number, too."""
    try:
        return int(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    except ValueError:
        return None


def _nearest(side: int, multiple: int) -> int:
    return round(min(LARGEST, max(SMALLEST, side)) / multiple) * multiple
