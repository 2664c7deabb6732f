"""Settings and measures of a shot in words, for the gallery of a run and for the server's page, and the order of shots."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from vidgen_ray.graph import clip_growth, clip_length, stages_of
from vidgen_ray.script.expansion import MATRIX_NUMBER
from vidgen_ray.shot import LORA_FIELDS, NESTED_FIELDS, Shot

DEFAULTS = {name: field.get_default(call_default_factory=True) for name, field in Shot.model_fields.items()}
IN_OWN_WORDS = {
    "id", "prompt", "mode", "seed", "variants", "width", "height", "image", "last_image", "continue_from", "face_image",
    "character", "use_hunyuan_style", "style_prompt", "negative_prompt", "generate_video", "num_frames", "fps", "extend",
    "video_model", "interpolation", "fps_out", "upscale_video", "scale", "crop_width", "crop_height", "metadata", *LORA_FIELDS,
    *NESTED_FIELDS,
}  # fmt: skip
"""Fields that `settings_text` does not just list."""
_FILE_ENDING = re.compile(r"\.(safetensors|png|jpe?g|webp)$", re.IGNORECASE)


def settings_text(
    shot: Shot, size: tuple[int, int], lora_names: Mapping[str, str], character: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of what made a file of this size. `lora_names`: path -> name."""
    yield "Mode", shot.mode
    yield "Size", dimensions_text(*size)
    if (shot.width, shot.height) != size:
        growth = max((scale for scale, _ in clip_growth(shot).values()), default=1)
        yield "Drawn at", dimensions_text(shot.width, shot.height) + (f", upscaled {growth} times" if growth > 1 else "")
    if shot.generate_video:
        n_frames, fps = clip_length(shot)
        made = "" if n_frames == shot.clip_frames else f", interpolated from {shot.clip_frames}"
        joined = f", in {shot.extend + 1} passes" if shot.extend else ""
        yield "Frames", f"{n_frames} at {fps} per second{made}{joined}"
        yield "Video model", shot.video_model
    yield "Seed", str(shot.seed)
    if character or shot.face_image:
        yield "Character", character or ("from a photo" if len(shot.face_image) == 1 else f"from {len(shot.face_image)} photos")
    for lora in shot.all_loras:
        yield "LoRA", f"{lora_names.get(lora.path, 'no longer available')}, weight {lora.weight:g}"
    if shot.use_hunyuan_style and shot.mode == "quality":
        yield "Style", shot.style_prompt or "as in the prompt"
    if shot.has_start_image:
        yield "Start image", "last frame of another clip" if shot.continue_from else "yes"
    if shot.last_image:
        yield "Last image", "yes"
    if shot.negative_prompt:
        yield "Negative prompt", shot.negative_prompt
    for name in NESTED_FIELDS:
        values = getattr(shot, name).model_dump(exclude_none=True)
        used = [f"{stage.label} {values[stage.name]:g}" for stage in stages_of(shot) if stage.name in values]
        if used:
            yield name.capitalize(), ", ".join(used)
    for name, default in DEFAULTS.items():
        if name not in IN_OWN_WORDS and (value := getattr(shot, name)) != default:
            yield name.replace("_", " ").capitalize().replace("Lora", "LoRA"), value_text(value)


def value_text(value: Any) -> str:
    """Return the value of a field in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return ", ".join(map(value_text, value)) if isinstance(value, list | tuple) else "none" if value is None else str(value)


def short_names(texts: Collection[str]) -> dict[str, str]:
    """Return a short name for each text: that of a file without its ending, with the folders that tell equal names apart."""
    parts = {text: _FILE_ENDING.sub("", text).split("/") for text in texts}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {text: "/".join(each[-length:]) for text, each in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {text: text for text in texts}


def dimensions_text(width: int, height: int) -> str:
    return f"{width} × {height}"


def length_text(seconds: float) -> str:
    return f"{round(seconds, 1):g} s"


def place_in_script(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a key that sorts manifest rows by script, line and place in its matrix. Their metadata is a mapping."""
    number = row["metadata"].get(MATRIX_NUMBER)
    # Numbers in ids are sorted by their value.
    parts = [(part.isdecimal(), float(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", row["id"])]
    return row["script"], row["line"] or 0, number if isinstance(number, int) else 0, parts
