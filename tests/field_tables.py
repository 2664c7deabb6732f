"""Tables of model fields in docs/, generated from JSON schemas."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

UPDATE_DOCS = "VIDGEN_UPDATE_DOCS"
"""Environment variable: write generated files instead of comparing them."""
GENERATED = re.compile(r"(<!-- generated: ([^>]+) -->\n).*?(<!-- end generated -->)", re.S)


def check_tables(document: Path, table: Callable[[str], str]) -> None:
    """Compare or update each part between `<!-- generated: NAME -->` and `<!-- end generated -->` with `table(NAME)`."""
    text = document.read_text()
    generated = GENERATED.sub(lambda match: match[1] + table(match[2]) + match[3], text)
    if os.environ.get(UPDATE_DOCS):
        document.write_text(generated)
        text = generated
    assert text == generated, f"{document.name} is out of date; run make docs"


def field_table(schema: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return a Markdown table of these fields of an object schema, required ones first."""
    required = schema.get("required", ())
    rows = [
        f"| `{name}` | {describe_type(schema['properties'][name])} | {description(schema['properties'][name], schema)} |\n"
        for name in sorted(names, key=lambda name: name not in required)
    ]
    return "| field | type, default | description |\n| --- | --- | --- |\n" + "".join(rows)


def description(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return the description of a field, or of the model that it contains."""
    return field.get("description") or schema["$defs"][field["$ref"].rsplit("/", 1)[1]]["description"]


def describe_type(field: Mapping[str, Any]) -> str:
    """Return type, range and default of a field, for example "integer 1 to 60, 5"."""
    default = field.get("default")
    if default is None or isinstance(default, dict):
        return _type(field)
    return f"{_type(field)}, {default if isinstance(default, str) else json.dumps(default)}"


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(name for name in dict.fromkeys(map(_type, field["anyOf"])) if name != "null")
    if "enum" in field:
        return " or ".join(f"`{choice}`" for choice in field["enum"])
    name = {"string": "text", "array": "list"}.get(field.get("type", "object"), field.get("type", "object"))
    if "minimum" not in field:
        return name
    high = field["exclusiveMaximum"] - 1 if "exclusiveMaximum" in field else field.get("maximum")
    return f"{name} from {field['minimum']}" if high is None else f"{name} {field['minimum']} to {high}"
