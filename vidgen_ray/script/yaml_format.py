"""Read .yaml scripts, which may have defaults and characters for their shots."""

from pathlib import Path
from typing import Any

import yaml

from vidgen_ray.errors import FieldError
from vidgen_ray.invalid_fields import shortened
from vidgen_ray.script.lines import Header, Line, Lines, UnreadableLine, encoding_error, file_error
from vidgen_ray.strict_yaml import StrictLoader

HEADER_FIELDS = ("title", "defaults", "characters", "shots")
CHARACTER_FIELDS = ("face_image", "face_index", "identity", "identity_strength", "lora", "trigger")
MAX_YAML_BYTES = 2**24
"""Maximum size of a .yaml script. Parsing takes 70 times the memory of the file and 2 s per megabyte."""


def _parse_yaml(path: Path) -> tuple[Any, list[int]]:
    """Return the content, and the line number of each entry of `shots`."""
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
        raise file_error(path, "invalid YAML", " ".join(str(error).split())) from None
    fields = node.value if isinstance(node, yaml.MappingNode) else []
    shots = next((value for key, value in reversed(fields) if key.value == "shots"), None)
    return content, [shot.start_mark.line + 1 for shot in shots.value] if isinstance(shots, yaml.SequenceNode) else []


def read_yaml(path: Path) -> tuple[Header, Lines]:
    content, line_numbers = _parse_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("shots"), list):
        raise file_error(path, "no list of shots", "must have a list `shots`; title, defaults and characters are optional")
    if unknown := set(content) - set(HEADER_FIELDS):
        raise file_error(
            path, f"an unknown header field {sorted(unknown, key=str)[0]!r}", f"must be one of {', '.join(HEADER_FIELDS)}"
        )
    defaults, characters = content.get("defaults") or {}, content.get("characters") or {}
    for name, value in (("defaults", defaults), ("characters", characters)):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise file_error(path, f"{name}: {shortened(value)}", "must be a mapping of names to values")
    for name, character in characters.items():
        valid = isinstance(character, dict) and set(character) <= set(CHARACTER_FIELDS)
        if not valid or not isinstance(character.get("trigger", ""), str):
            raise file_error(
                path,
                f"character {name!r}: {shortened(character)}",
                f"must be a mapping with {', '.join(CHARACTER_FIELDS)}; trigger must be text",
            )

    def lines() -> Lines:
        for number, shot in zip(line_numbers, content["shots"], strict=True):
            if isinstance(shot, str):
                shot = {"prompt": shot}
            if isinstance(shot, dict):
                yield number, Line(number, shot, strict=True)
            else:
                allowed = "must be a prompt or a mapping of fields"
                yield number, UnreadableLine(str(shot), FieldError(path.name, number, None, shortened(shot), allowed))

    return Header(defaults, characters), lines()
