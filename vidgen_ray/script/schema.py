"""JSON schema of a .yaml script, for the completion and the checks of editors."""

from collections.abc import Sequence
from typing import Any

from vidgen_ray.film.settings import FilmSettings
from vidgen_ray.script.expansion import MATRIX, NO_MATRIX_FIELDS, STYLE
from vidgen_ray.script.named_fields import CHARACTER_FIELDS, CHARACTER_TEXTS, STYLE_FIELDS, STYLE_TEXTS
from vidgen_ray.shot import LORA_FIELDS, NESTED_FIELDS, Shot

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEXT = {"type": "string"}


def script_schema() -> dict[str, Any]:
    """Return the schema of a script with `shots` or `scenes`. It does not check combinations of fields, files and names."""
    shot, film = Shot.model_json_schema(), FilmSettings.model_json_schema()
    fields = _with_short_forms(shot["properties"])
    line = {**fields, STYLE: {**TEXT, "description": "Name of a style of the header."}, MATRIX: _matrix(fields)}
    shots = {"type": "array", "items": {"anyOf": [TEXT, {"$ref": "#/$defs/Line"}]}}
    defaults = _with_flat_settings({name: field for name, field in line.items() if name not in ("id", MATRIX)})
    scene = {**_object({"title": TEXT, "defaults": {"$ref": "#/$defs/Defaults"}, "shots": shots}), "required": ["shots"]}
    definitions = {
        **shot.get("$defs", {}),
        **film.get("$defs", {}),
        "Line": _with_flat_settings(line),
        "Defaults": defaults,
        "Film": {name: value for name, value in film.items() if name != "$defs"},
    }
    properties = {
        "title": TEXT,
        "defaults": {"$ref": "#/$defs/Defaults"},
        "characters": _named(fields, CHARACTER_FIELDS, CHARACTER_TEXTS),
        "styles": _named(fields, STYLE_FIELDS, STYLE_TEXTS),
        "film": {"$ref": "#/$defs/Film"},
        "shots": shots,
        "scenes": {"type": "array", "items": scene},
    }
    either = [{"required": ["shots"]}, {"required": ["scenes"]}]
    return {"$schema": DIALECT, "title": "vidgen script", **_object(properties), "oneOf": either, "$defs": definitions}


def _with_short_forms(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a line, in which one file may stand for a list of one."""
    face = fields["face_image"]
    short = {"face_image": {**face, "anyOf": [TEXT, {"type": "array", "items": TEXT}]}}
    for name in LORA_FIELDS:
        lora = fields[name]["items"]
        short[name] = {**fields[name], "anyOf": [TEXT, lora, {"type": "array", "items": {"anyOf": [TEXT, lora]}}]}
    for field in short.values():
        for name in ("type", "items"):
            field.pop(name, None)
    return {**fields, **short}


def _with_flat_settings(properties: dict[str, Any]) -> dict[str, Any]:
    """Return an object that may also have settings of a stage in the form `flux.steps`."""
    names = "|".join(NESTED_FIELDS)
    return {**_object(properties), "patternProperties": {rf"^({names})\.|\.({names})$": {"type": "number"}}}


def _matrix(fields: dict[str, Any]) -> dict[str, Any]:
    values = {name: {"type": "array", "minItems": 1} for name in (*fields, STYLE) if name not in NO_MATRIX_FIELDS}
    return {**_object(values), "description": "Field -> values. Gives a shot for each combination."}


def _named(fields: dict[str, Any], allowed: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    properties = {name: fields[name] for name in allowed} | dict.fromkeys(texts, TEXT)
    return {"type": "object", "additionalProperties": _object(properties)}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}
