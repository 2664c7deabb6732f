"""Describe invalid fields of a shot: which field, which value, and what is allowed."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from vidgen_ray.shot import Shot
from vidgen_ray.video_models import MODEL_DEFAULTS, is_per_model

SCHEMA_COMMAND = "`vidgen schema shot`"
MAX_LISTED = 200
"""Longest list of field names in an error message, in characters."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Start of a URL, also after pathlib has removed one of its slashes."""
NOT_A_URL = "must be a file on this machine; URLs are not read, download it first"


def shortened(value: object) -> str:
    """Return the value as an error message shows it, at most 80 characters long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a value that is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def explain(detail: Any, fields: Iterable[str], reference: str = SCHEMA_COMMAND) -> tuple[str | None, str, str]:
    """Return the field, the value and what is allowed, from a pydantic error of a model with these fields.

    `reference` says where all fields are listed.
    """
    # `lora.weight` and `steps.flux`. Only metadata is nested deeper, to any depth.
    field = ".".join([part for part in detail["loc"] if isinstance(part, str)][:2]) or None
    if detail["type"] == "extra_forbidden" and field and "." in field:
        return field, "an unknown field", f"{field.split('.')[0]} has no such field"
    if detail["type"] == "extra_forbidden":
        return field, "an unknown field", known_fields(field or "", fields, reference)
    if detail["type"] == "missing":
        return field, "nothing", "this field is required"
    got = "the line" if field is None else shortened(detail["input"])
    return field, got, allowed_of(detail)


def allowed_of(detail: Any) -> str:
    """Return what a pydantic error says is allowed, as the end of a message."""
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    return str(message[:1].lower() + message[1:])


def known_fields(name: str, fields: Iterable[str], reference: str = SCHEMA_COMMAND) -> str:
    """Say what may stand in place of an unknown field: the most similar name, or all names if these are few."""
    fields = list(fields)
    if similar := get_close_matches(name[:MAX_LISTED].lower(), fields, 1):
        return f"did you mean {similar[0]}?"
    names = ", ".join(fields)
    return f"must be one of {names}" if len(names) <= MAX_LISTED else f"see {reference} for all fields"


def wrong_defaults(fields: Mapping[str, Any], *, strict: bool = False) -> list[tuple[str, str, str]]:
    """Return field, value and what is allowed of each field that would be invalid in every shot that takes these defaults.

    Combinations of fields are not checked, since a shot may set some of them itself.
    """
    if "id" in fields:
        return [("id", shortened(fields["id"]), "must be set by each line, not for all of them")]
    per_model = {name for field in MODEL_DEFAULTS if is_per_model(values := fields.get(field)) for name in values}
    try:
        Shot.model_validate({"prompt": "any", **fields}, strict=strict)
        for name in sorted(per_model):
            Shot.model_validate({"prompt": "any", **fields, "video_model": name}, strict=strict)
    except ValidationError as error:
        explained = (explain(detail, Shot.model_fields) for detail in error.errors(include_url=False))
        return [(field, got, allowed) for field, got, allowed in explained if field is not None]
    except (ValueError, RecursionError) as error:
        return [("defaults", "invalid values", f"must be plain JSON, not nested deeply ({error})")]
    return []
