"""Compare a declaration with its class in the installed diffusers: arguments, their types, components. Loads no weights."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any, NamedTuple

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from vidgen_ray.declared.declaration import Declaration, line_at
from vidgen_ray.errors import FieldError, allowed_of, in_json

GENERATOR, CALLBACK = "generator", "callback_on_step_end"
GIVEN = (GENERATOR, CALLBACK, "callback_on_step_end_tensor_inputs", "output_type", "return_dict")
"""Arguments that the stage gives to every pipeline."""
MODULAR = "ModularPipeline"
LOOSE = (tuple[int], tuple[float], tuple[str])
"""Type hints by which diffusers means tuples of any length."""


class Argument(NamedTuple):
    """An argument of a pipeline's call."""

    annotation: Any
    is_required: bool


class Interface(NamedTuple):
    """What a pipeline class takes."""

    arguments: Mapping[str, Argument]
    components: Mapping[str, Any]
    """Component -> class in the type hint of the constructor."""


def interface_of(pipeline_class: Any) -> Interface:
    """Return arguments and components of a class of diffusers, standard or modular."""
    if pipeline_class.__name__.endswith(MODULAR):
        blocks = pipeline_class().blocks
        arguments = {each.name: Argument(each.type_hint, each.required) for each in blocks.inputs if each.name}
        return Interface(arguments, {each.name: each.type_hint for each in blocks.expected_components})
    call, made = (_parameters(function) for function in (pipeline_class.__call__, pipeline_class.__init__))
    arguments = {name: Argument(hint, is_required) for name, (hint, is_required) in call.items()}
    return Interface(arguments, {name: hint for name, (hint, _) in made.items()})


def _parameters(function: Any) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(function)
    kept = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: (hints.get(name, Any), each.default is each.empty)
        for name, each in inspect.signature(function).parameters.items()
        if name != "self" and each.kind in kept
    }


_LORAS = "load_lora_weights"


def problems_of(declaration: Declaration, source: str, lines: Mapping[tuple[str, ...], int]) -> list[FieldError]:
    """Return what the installed diffusers says against a declaration. `source`: name of the file. `lines`: see `lines_of`."""
    found = _class_problem(declaration)
    if not found:
        pipeline_class = class_of(declaration)
        found = [*_problems(declaration, interface_of(pipeline_class))]
        if declaration.has_loras and not hasattr(pipeline_class, _LORAS):
            found.append((("has_loras",), "true", f"must be false: {declaration.pipeline} loads no LoRAs"))
    return [FieldError(source, line_at(lines, place), ".".join(place), got, allowed) for place, got, allowed in found]


def class_of(declaration: Declaration) -> Any:
    """Return the class of the pipeline. Raises AttributeError if the installed diffusers has none of this name."""
    import diffusers

    return getattr(diffusers, declaration.pipeline)


Problem = tuple[tuple[str, ...], str, str]
"""Path of a field, what was found, what is allowed."""


def _class_problem(declaration: Declaration) -> list[Problem]:
    import diffusers

    if hasattr(diffusers, declaration.pipeline):
        return []
    known = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    close = get_close_matches(declaration.pipeline, known, 1)
    advice = f"did you mean {close[0]}?" if close else "must be a class of diffusers"
    got = f"{declaration.pipeline}, which diffusers {version('diffusers')} does not have"
    return [(("pipeline",), got, f"{advice} A newer diffusers may have it")]


def _problems(declaration: Declaration, interface: Interface) -> Iterator[Problem]:
    arguments, name = interface.arguments, declaration.pipeline
    for section in ("inputs", "constants"):
        for argument in getattr(declaration, section):
            if argument in GIVEN:
                yield (section, argument), argument, "is given by the stage, leave it out"
            elif argument not in arguments:
                close = get_close_matches(argument, arguments, 1)
                yield (section, argument), argument, f"{name} has no such argument{_meant(close)}"
    for argument, value in declaration.constants.items():
        if argument in arguments and (allowed := _refused(arguments[argument].annotation, value)):
            yield ("constants", argument), in_json(value), allowed
    sourced = {*declaration.inputs, *declaration.constants, *GIVEN}
    for argument, (_, is_required) in arguments.items():
        if is_required and argument not in sourced:
            yield ("inputs",), f"no source of {argument}", f"{name} cannot be called without it"
    if GENERATOR not in arguments:
        yield ("pipeline",), f"{name}, which takes no generator", "must take one: seeds would have no effect"
    if declaration.progress and CALLBACK not in arguments:
        yield ("progress",), "true", f"must be false: {name} does not report its steps"
    named: dict[tuple[str, ...], tuple[str, ...]] = {("float32",): declaration.float32, ("tiny",): tuple(declaration.tiny)}
    named |= {("text", "tokenizer"): (declaration.text.tokenizer,)} if declaration.text else {}
    for place, components in named.items():
        for component in components:
            if component not in interface.components:
                yield place, component, f"{name} has the components {', '.join(interface.components)}"


def _meant(close: list[str]) -> str:
    return f"; did you mean {close[0]}?" if close else ""


def _refused(annotation: Any, value: Any) -> str:
    """Return why a value is not of a type. Empty if it is, or if the type is not one of JSON."""
    if annotation in LOOSE:
        return ""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return ""
    try:
        # In JSON, a whole number is a float, too, and a list is a tuple.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return allowed_of(error.errors()[0])
    return ""
