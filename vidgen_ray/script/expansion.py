"""Expand a line that stands for several shots: choices such as `{sunny|rainy}` in its texts, and a `matrix` of field values.

Each shot gets an id that depends on its own choices only, so that adding a choice changes no other shot.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Any, NamedTuple

from vidgen_ray.invalid_fields import known_fields, shortened
from vidgen_ray.limits import MAX_SHOTS_PER_LINE
from vidgen_ray.script.lines import WrongField
from vidgen_ray.shot import Shot

MATRIX = "matrix"
"""Field of a line: field -> list of values. Not a field of a shot."""
STYLE = "style"
"""Field of a line: name of a style in the header. Not a field of a shot."""
TEXTS = ("prompt", "negative_prompt", "style_prompt", "motion_prompt")
CHOICES = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")
NO_MATRIX_FIELDS = ("id", "variants", "metadata", "consent")
SUFFIX_LETTERS = 24


class Expanded(NamedTuple):
    """The fields of one of the shots of a line."""

    fields: dict[str, Any]
    suffix: str
    """Text to add to the id of the line. Empty for a line that is not expanded."""


def is_expandable(fields: Mapping[str, Any]) -> bool:
    """Return whether the line may stand for several shots. Fast, since few lines do."""
    return MATRIX in fields or any("|" in text for name in TEXTS if isinstance(text := fields.get(name), str))


def expand(fields: Mapping[str, Any]) -> list[Expanded]:
    """Return the shots that a line stands for, in the order of its values and choices.

    Raises WrongField for an invalid matrix, for nested choices, and above MAX_SHOTS_PER_LINE.
    """
    plain = {name: value for name, value in fields.items() if name != MATRIX}
    axes = list(_matrix_axes(fields.get(MATRIX) or {}))
    expanded = []
    for values in product(*axes):
        own = {**plain, **dict(values)}
        suffix = "".join(f"-{_slug(value)}" for _, value in values)
        expanded += [Expanded(chosen.fields, suffix + chosen.suffix) for chosen in _choose(own)]
        if len(expanded) > MAX_SHOTS_PER_LINE:
            raise WrongField(
                MATRIX if axes else "prompt", f"more than {MAX_SHOTS_PER_LINE} shots", f"must be at most {MAX_SHOTS_PER_LINE}"
            )
    return expanded


def _matrix_axes(matrix: Any) -> Iterator[list[tuple[str, Any]]]:
    if not isinstance(matrix, dict):
        raise WrongField(MATRIX, shortened(matrix), "must map fields to lists of values")
    allowed = [*(name for name in Shot.model_fields if name not in NO_MATRIX_FIELDS), STYLE]
    for name, values in matrix.items():
        if name not in allowed and "." not in str(name):
            raise WrongField(f"{MATRIX}.{str(name)[:40]}", "an unknown field", known_fields(str(name), allowed))
        if not isinstance(values, list) or not values:
            raise WrongField(f"{MATRIX}.{name}", shortened(values), "must be a list of values")
        yield [(name, value) for value in values]


def _choose(fields: dict[str, Any]) -> Iterator[Expanded]:
    """Yield the fields with each combination of the choices in their texts."""
    texts = {name: CHOICES.split(text) for name in TEXTS if isinstance(text := fields.get(name), str) and "|" in text}
    choices = {
        (name, number): _options(name, parts[number]) for name, parts in texts.items() for number in range(1, len(parts), 2)
    }
    if (shots := prod(map(len, choices.values()))) > MAX_SHOTS_PER_LINE:
        raise WrongField("prompt", f"choices for {shots:,} shots", f"must be at most {MAX_SHOTS_PER_LINE} per line")
    for chosen in product(*choices.values()):
        parts = {name: list(text) for name, text in texts.items()}
        for (name, number), option in zip(choices, chosen, strict=True):
            parts[name][number] = option
        for name, text in parts.items():
            if CHOICES.search(joined := "".join(text)):
                raise WrongField(name, shortened(joined), "choices such as {a|b} must not contain other choices")
        # A choice may be empty: "a {red |}ball".
        joined_texts = {name: " ".join("".join(text).split()) for name, text in parts.items()} if choices else {}
        yield Expanded({**fields, **joined_texts}, "".join(f"-{_slug(option)}" for option in chosen))


def _options(name: str, text: str) -> list[str]:
    options = text.split("|")
    if len({_slug(option) for option in options}) < len(options):
        raise WrongField(name, shortened("{" + text + "}"), "choices must differ in their first letters or digits")
    return options


def _slug(value: Any) -> str:
    """Return the part of an id that stands for a value."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", str(value)).strip("-")[:SUFFIX_LETTERS].strip("-")
    return slug.lower() or "none"
