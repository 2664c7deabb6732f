"""Describe invalid fields of a shot: which field, which value, and what is allowed."""

from collections.abc import Iterable
from typing import Any


def shortened(value: object) -> str:
    """Return the value as an error message shows it, at most 80 characters long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a value that is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def explain(detail: Any, fields: Iterable[str]) -> tuple[str | None, str, str]:
    """Return the field, the value and what is allowed, from a pydantic error of a model with these fields."""
    # `lora.weight` and `steps.flux`. Only metadata is nested deeper, to any depth.
    field = ".".join([part for part in detail["loc"] if isinstance(part, str)][:2]) or None
    if detail["type"] == "extra_forbidden" and field and "." in field:
        return field, "an unknown field", f"{field.split('.')[0]} has no such field"
    if detail["type"] == "extra_forbidden":
        return field, "an unknown field", f"must be one of {', '.join(fields)}"
    if detail["type"] == "missing":
        return field, "nothing", "this field is required"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    got = "the line" if field is None else shortened(detail["input"])
    return field, got, message[:1].lower() + message[1:]
