"""Scripts in YAML: shots or scenes, with defaults, characters and styles for them, and the JSON schema for editors."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vidgen_ray.errors import known_fields, shortened_value
from vidgen_ray.limits import MAX_YAML_BYTES
from vidgen_ray.script.expansion import (
    CHARACTER_FIELDS,
    CHARACTER_TEXTS,
    NO_MATRIX_FIELDS,
    STYLE,
    STYLE_FIELDS,
    STYLE_TEXTS,
    checked_characters,
    checked_styles,
)
from vidgen_ray.script.lines import Columns, Header, Line, Lines, encoding_error, file_error, unreadable_line
from vidgen_ray.shot import LORA_FIELDS, MATRIX, NESTED_FIELDS, Shot
from vidgen_ray.system.files import StrictLoader, yaml_problem

HEADER_FIELDS = ("title", "defaults", "characters", "styles", "film", "shots", "scenes")
SCENE_FIELDS = ("title", "defaults", "shots")


def read_screenplay(path: Path, _columns: Columns) -> tuple[Header, Lines]:
    """Return the header and the shots of a script, with the shots of its scenes in order."""
    content, shot_lines = _parse(path)
    if not isinstance(content, dict):
        got = "an empty file" if content is None else shortened_value(content)
        raise file_error(path, got, "must be a mapping with a list `shots` or `scenes`")
    _check_names(path, content, HEADER_FIELDS, "header field")
    if ("shots" in content) == ("scenes" in content):
        got = "both shots and scenes" if "shots" in content else "neither shots nor scenes"
        raise file_error(path, got, "must have one of them, a list")
    title = content.get("title")
    if title is not None and not isinstance(title, str):
        raise file_error(path, f"title: {shortened_value(title)}", "must be text")
    film = content.get("film")
    if film is not None:
        _check_mapping(path, "film", film)
    header = Header(
        _check_mapping(path, "defaults", content.get("defaults") or {}),
        checked_characters(path.name, content.get("characters")),
        checked_styles(path.name, content.get("styles")),
        title,
        film,
    )
    if "scenes" not in content:
        _check_list(path, "shots", content["shots"])
        return header, _lines(path, content["shots"], iter(shot_lines), {}, None)
    scenes = [
        _checked_scene(path, number, scene) for number, scene in enumerate(_check_list(path, "scenes", content["scenes"]))
    ]
    line_numbers = iter(shot_lines)

    def lines() -> Lines:
        for scene in scenes:
            yield from _lines(path, scene["shots"], line_numbers, scene.get("defaults") or {}, scene.get("title"))

    return header, lines()


def _lines(path: Path, shots: list[Any], line_numbers: Iterator[int], defaults: dict[str, Any], scene: str | None) -> Lines:
    for shot in shots:
        number = next(line_numbers)
        if isinstance(shot, str):
            shot = {"prompt": shot}
        if isinstance(shot, dict) and all(isinstance(name, str) for name in shot):
            yield Line(number, shot, defaults=defaults, scene=scene)
        else:
            allowed = "must be a prompt or a mapping of fields"
            yield unreadable_line(path.name, number, shortened_value(shot), allowed, text=str(shot))


def _checked_scene(path: Path, number: int, scene: Any) -> dict[str, Any]:
    where = f"scenes[{number}]"
    _check_mapping(path, where, scene)
    _check_names(path, scene, SCENE_FIELDS, f"field of {where}")
    if "title" in scene and not isinstance(scene["title"], str):
        raise file_error(path, f"{where}.title: {shortened_value(scene['title'])}", "must be text")
    _check_mapping(path, f"{where}.defaults", scene.get("defaults") or {})
    _check_list(path, f"{where}.shots", scene.get("shots"))
    return dict(scene)


def _check_names(path: Path, content: dict[Any, Any], allowed: tuple[str, ...], what: str) -> None:
    if unknown := [name for name in content if name not in allowed]:
        raise file_error(path, f"an unknown {what} {unknown[0]!r}", known_fields(str(unknown[0]), allowed))


def _check_mapping(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise file_error(path, f"{name}: {shortened_value(value)}", "must be a mapping of names to values")
    return value


def _check_list(path: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise file_error(path, f"{name}: {shortened_value(value)}", "must be a list")
    return value


def _parse(path: Path) -> tuple[Any, list[int]]:
    """Return the content, and the line number of each shot, in order."""
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        allowed = f"must be at most {MAX_YAML_BYTES:,} bytes in YAML; .jsonl and .parquet scripts can be of any length"
        raise file_error(path, f"{size:,} bytes", allowed)
    try:
        loader = StrictLoader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
    except UnicodeDecodeError as error:
        raise encoding_error(path, error.object.count(b"\n", 0, error.start) + 1) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise file_error(path, "invalid YAML", yaml_problem(error)) from None
    return content, list(_shot_line_numbers(node))


def _shot_line_numbers(node: yaml.Node | None) -> Iterator[int]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if not isinstance(value, yaml.SequenceNode):
            continue
        if key.value == "shots":
            yield from (shot.start_mark.line + 1 for shot in value.value)
        elif key.value == "scenes":
            for scene in value.value:
                yield from _shot_line_numbers(scene)


DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TEXT = {"type": "string"}


def script_schema(sections: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a script with `shots` or `scenes`. It does not check combinations of fields, files and names.

    `sections`: further fields of the header -> their schemas.
    """
    shot = Shot.model_json_schema()
    fields = _with_short_forms(shot["properties"])
    line = {**fields, STYLE: {**_TEXT, "description": "Name of a style of the header."}, MATRIX: _matrix(fields)}
    shots = {"type": "array", "items": {"anyOf": [_TEXT, {"$ref": "#/$defs/Line"}]}}
    defaults = _with_flat_settings({name: field for name, field in line.items() if name not in ("id", MATRIX)})
    scene = {**_object({"title": _TEXT, "defaults": {"$ref": "#/$defs/Defaults"}, "shots": shots}), "required": ["shots"]}
    definitions = {**shot.get("$defs", {}), "Line": _with_flat_settings(line), "Defaults": defaults}
    for name, section in sections.items():
        definitions |= section.get("$defs", {}) | {name: {key: value for key, value in section.items() if key != "$defs"}}
    properties = {
        "title": _TEXT,
        "defaults": {"$ref": "#/$defs/Defaults"},
        "characters": _named(fields, CHARACTER_FIELDS, CHARACTER_TEXTS),
        "styles": _named(fields, STYLE_FIELDS, STYLE_TEXTS),
        **{name: {"$ref": f"#/$defs/{name}"} for name in sections},
        "shots": shots,
        "scenes": {"type": "array", "items": scene},
    }
    either = [{"required": ["shots"]}, {"required": ["scenes"]}]
    return {"$schema": DIALECT, "title": "vidgen script", **_object(properties), "oneOf": either, "$defs": definitions}


def _with_short_forms(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a line, in which one file may stand for a list of one."""
    face = fields["face_image"]
    short = {"face_image": {**face, "anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}}
    for name in LORA_FIELDS:
        lora = fields[name]["items"]
        short[name] = {**fields[name], "anyOf": [_TEXT, lora, {"type": "array", "items": {"anyOf": [_TEXT, lora]}}]}
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
    properties = {name: fields[name] for name in allowed} | dict.fromkeys(texts, _TEXT)
    return {"type": "object", "additionalProperties": _object(properties)}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}
