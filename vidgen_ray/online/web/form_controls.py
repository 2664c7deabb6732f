"""Controls and choices of the form, derived from the served stages and the fields of `Shot` that they read. No HTTP.

The form sends the body of `POST /v1/videos`, so most controls have the name of a field. Fields with a place of their own in the
template are in `PLACED`. All others become a control in the group of the first stage that reads them, so a new stage or field
needs no change here.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any, Literal

from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.delivered_size import SizeRules, clip_fields
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.shot import DERIVED_FIELDS, INSTANTID_SDXL, NO_IDENTITY, REFERENCE, Shot
from vidgen_ray.stages.base import Stage
from vidgen_ray.video_models import MODEL_DEFAULTS, VIDEO_MODELS, with_model_defaults, without_other_models_defaults

PLACED = frozenset(
    {
        "prompt", "negative_prompt", "mode", "seed", "width", "height", "image", "face_image", "lora", "fast_lora",
        "last_image", "style_prompt", "use_hunyuan_style", "generate_video", "num_frames", "fps", "upscale_video", "scale",
    }
)  # fmt: skip
"""Fields that stages read and that the template places, and `last_image`, which the page does not offer."""
RULES = {"image_likeness": ("min_identity", "max_tries"), "qwen_edit": ("style_model",)}
"""Stage -> fields that decide about its result without changing it."""
MODEL_STAGES = {
    "image_model": {"flux": "flux", "klein": "klein", "remote": "remote_image"},
    "style_model": {"hunyuan": "hunyuan", "qwen-edit": "qwen_edit"},
    "video_model": {name: name for name in VIDEO_MODELS},
}
"""Field that chooses a model -> its value -> the stage that must be served."""
_LABELS = {
    "extend": "Further passes",
    "guidance": "Guidance (CFG)",
    "guidance.wan_2": "Guidance (CFG) of the low-noise expert",
    "identity": "Identity method",
    "lora_strength": "Denoise strength",
    "min_identity": "Minimum likeness",
    "motion_bucket_id": "Motion",
    "motion_prompt": "What moves",
    "noise_aug_strength": "Noise augmentation",
    "refine_strength": "Denoise strength",
    "style_model": "Restyling model",
    "style_strength": "Denoise strength",
}
"""Field -> label, if it is not the name of the field."""
STYLES = ("watercolour", "oil painting", "ink drawing", "charcoal sketch", "claymation", "film noir", "pixel art", "woodcut")
"""Suggested style prompts."""
IDEAS = (
    "A large red boat by the sea at sunset",
    "A yellow house on green hills under a rainbow",
    "A person in a blue coat walking in the snow",
)
"""Example prompts, shown while there are no clips."""
BASES = {
    "self": "it is my own face",
    "written": "this person agreed in writing",
    "contract": "a contract or licence covers it",
    "public-domain": "the portrait is in the public domain",
    "synthetic": "it shows no real person",
}
"""Basis of a consent -> the end of a sentence."""
_SIZES = {
    "1280x720": "16:9", "1920x1080": "16:9", "832x480": "16:9", "720x1280": "9:16", "1080x1920": "9:16", "480x832": "9:16",
    "1024x1024": "1:1", "1024x768": "4:3",
}  # fmt: skip
"""Common sizes of finished clips and images -> aspect ratio."""
_Kind = Literal["checkbox", "select", "number", "text"]


@dataclass(frozen=True, slots=True)
class Control:
    """Control of one field of a shot. An empty value means the default."""

    name: str
    """Field of `Shot`. `steps.flux` names a nested one."""
    label: str
    kind: _Kind
    hint: str
    default: str
    choices: tuple[str, ...] = ()
    minimum: str = ""
    maximum: str = ""
    step: str = "any"


def control_groups(serving_profile: ServingProfile) -> list[tuple[str, list[Control]]]:
    """Return the label and the controls of all served stages, in the order of the stages."""
    schema = Shot.model_json_schema()
    defaults = Shot.model_validate({"prompt": "-", **serving_profile.profile.defaults}).model_dump(mode="json")
    groups = []
    for label, fields in _fields_by_stage(serving_profile.stages):
        controls = []
        for field in fields:
            choices, default = _choices(field, serving_profile), reduce(getitem, field.split("."), defaults)
            # A slot with one served model has nothing to choose.
            if field not in MODEL_STAGES or len(choices) > 1:
                controls.append(_control(field, _schema_of(field, schema), default, choices))
        groups.append((label, controls))
    return groups


def clip_defaults(serving_profile: ServingProfile) -> dict[str, dict[str, int]]:
    """Return the defaults of `num_frames` and `fps` for each choice of `video_model`. The empty choice is the default model."""
    defaults = serving_profile.profile.defaults
    by_choice = {"": defaults} | {
        model: {**without_other_models_defaults(defaults, {"video_model": model}), "video_model": model}
        for model in _choices("video_model", serving_profile)
    }
    shots = {choice: with_model_defaults(fields) for choice, fields in by_choice.items()}
    return {
        field: {choice: fields.get(field, Shot.model_fields[field].default) for choice, fields in shots.items()}
        for field in MODEL_DEFAULTS
    }


def size_choices(rules: SizeRules) -> dict[str, str]:
    """Return value -> label: the default size of a finished clip, then the common ones that the server reaches."""
    width, height = rules.default_clip
    choices = {f"{width}x{height}": "default"} | {size: ratio for size, ratio in _SIZES.items() if _is_reachable(size, rules)}
    return {value: f"{value.replace('x', ' × ')}, {name}" for value, name in choices.items()}


def _is_reachable(size: str, rules: SizeRules) -> bool:
    width, height = map(int, size.split("x"))
    try:
        clip_fields(width, height, rules)
    except ApiError:
        return False
    return True


def _fields_by_stage(stages: Collection[type[Stage[Any]]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the label of each stage and the fields that no earlier stage has. Identity fields belong to the face stage."""
    seen = set(PLACED)
    identity = [field for stage in stages for field in stage.identity_fields]
    for stage in stages:
        own = [*stage.reads, *stage.clip_only_fields, *RULES.get(stage.name, ())]
        names = [*own, *identity] if "face" in stage.writes else [name for name in own if name not in identity]
        names = [field for name in names for field in DERIVED_FIELDS.get(name, (name,))]
        fields = [field for field in dict.fromkeys(names) if field not in seen]
        seen.update(fields)
        if fields:
            yield stage.label, fields


def _schema_of(field: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a field, without the option `null`, with the description of the field."""
    found: Mapping[str, Any] = schema
    description = ""
    for name in field.split("."):
        reference = str(found.get("$ref", "")).rpartition("/")[2]
        found = (schema["$defs"][reference] if reference else found)["properties"][name]
        description = found.get("description", description)
    options = [option for option in found.get("anyOf", ()) if option.get("type") != "null"]
    return {**(options[0] if options else found), "description": description}


def _choices(field: str, serving_profile: ServingProfile) -> tuple[str, ...]:
    """Return the names that a text field accepts on this server. Empty if these are those of the schema, or any text."""
    if stages := MODEL_STAGES.get(field):
        return tuple(value for value, stage in stages.items() if stage in serving_profile.params)
    if field != "identity":
        return ()
    flux = serving_profile.params.get("flux")
    by_base = {"instantid_sdxl": INSTANTID_SDXL, "klein": REFERENCE}
    others = (identity for stage, identity in by_base.items() if stage in serving_profile.params)
    return (*(flux.extra_weights if flux else ()), *others, NO_IDENTITY)


def _control(name: str, schema: Mapping[str, Any], default: Any, choices: tuple[str, ...]) -> Control:
    kind: _Kind = "text"
    choices = choices or tuple(map(str, schema.get("enum", ())))
    if schema.get("type") == "boolean":
        kind, choices = "checkbox", ("yes", "no")
    elif choices:
        kind = "select"
    elif schema.get("type") in ("integer", "number"):
        kind = "number"
    first = name.partition(".")[0]
    maximum = schema.get("maximum", schema.get("exclusiveMaximum", ""))
    return Control(
        name=name,
        label=_LABELS.get(name) or _LABELS.get(first, first.replace("_", " ").capitalize()),
        kind=kind,
        hint=schema["description"],
        default=_text_of(default),
        choices=choices,
        minimum=str(schema.get("minimum", "")),
        maximum=str(maximum),
        step="1" if schema.get("type") == "integer" else "any",
    )


def _text_of(value: Any) -> str:
    """Return the text of a field's value in the form: `yes` and `no` for booleans, JSON for lists, empty for no value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return json.dumps(value) if value else ""
    return "" if value is None else str(value)
