"""Find settings of a line that have no effect on its shot, such as a `style_prompt` without the restyle."""

from collections.abc import Iterator, Mapping
from typing import Any

from vidgen_ray.graph import STAGES, stages_of
from vidgen_ray.shot import NESTED_FIELDS, Shot, nest_flat_settings
from vidgen_ray.stages.base import Stage

ADVICE = {
    "style_prompt": "set use_hunyuan_style to true, in mode quality",
    "style_strength": "set use_hunyuan_style to true, in mode quality",
    "lora_strength": "set lora, in mode quality",
    "last_image": "set video_model to wan",
    "motion_prompt": "set video_model to wan or ltx",
    "video_lora": "set video_model to wan or ltx",
    "min_identity": "set face_image",
    "retries": "set min_identity",
}
"""Field -> what to do."""
OF_THE_IMAGE = frozenset(("style_prompt", "style_strength", "lora_strength"))
"""Fields that a continued shot does not read."""
LORAS_OF_MODELS = ("fast_lora", "klein_lora")
"""Properties with the shot's LoRAs, which stages read in place of `lora`."""
WITHOUT_NOTE = frozenset(("prompt", "negative_prompt", "seed", "width", "height"))
"""Fields that stages read in nearly every shot, or that concern what the chain starts from."""
READERS: dict[str, list[type[Stage[Any]]]] = {}
for _stage in STAGES:
    for _field in (*_stage.reads, *_stage.identity_fields):
        READERS.setdefault(_field, []).append(_stage)
DEFAULTS = {name: field.default for name, field in Shot.model_fields.items()}
CHECKED = frozenset(READERS) - WITHOUT_NOTE | {"min_identity", "retries", *NESTED_FIELDS}


def ignored_settings(own: Mapping[str, Any], shot: Shot) -> Iterator[tuple[str, str]]:
    """Yield field and advice for each field that the line sets to another value than the default, but its shot does not use."""
    if not any(name in CHECKED or "." in name for name in own):
        return
    passed = stages_of(shot)
    read = frozenset[str]().union(*(stage.reads for stage in passed))
    for name in _set_fields(own):
        if name in READERS and name not in read and not any(_reads(stage, name, shot) for stage in passed):
            if shot.continue_from is not None and name in OF_THE_IMAGE:
                yield name, "the shot starts from the last frame of another one, which is not changed"
                continue
            labels = ", ".join(dict.fromkeys(stage.label for stage in READERS[name]))
            yield name, ADVICE.get(name, f"only these stages read it, and the shot passes none of them: {labels}")
    if own.get("min_identity") is not None and not shot.face_image:
        yield "min_identity", ADVICE["min_identity"]
    if own.get("retries") and shot.min_identity is None:
        yield "retries", ADVICE["retries"]


def _set_fields(own: Mapping[str, Any]) -> Iterator[str]:
    for name, value in nest_flat_settings(dict(own)).items():
        if name in NESTED_FIELDS and isinstance(value, dict):
            yield from (f"{name}.{stage}" for stage, setting in value.items() if setting is not None)
        elif value is not None and name in DEFAULTS and value != DEFAULTS[name]:
            yield name


def _reads(stage: type[Stage[Any]], field: str, shot: Shot) -> bool:
    if field == "lora" and any(getattr(shot, name) for name in LORAS_OF_MODELS if name in stage.reads):
        return True
    return field in stage.reads or (field in stage.identity_fields and stage.uses_identity(shot))
