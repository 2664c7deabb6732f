"""Generate the tables of shot fields and stages in docs/. `make docs` writes them; `--check` fails if one is stale."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidgen_ray.graph import STAGES
from vidgen_ray.shot import NESTED_FIELDS, Shot
from vidgen_ray.stages.base import ChunkedStage

DOCS = Path(__file__).parent
KINDS = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "array": "list",
    "object": "object",
}


def shot_fields() -> Iterator[str]:
    """Yield the rows of the table of shot fields."""
    yield "| field | value | default | meaning | stages |"
    yield "| --- | --- | --- | --- | --- |"
    for name, field in Shot.model_json_schema()["properties"].items():
        cells = (f"`{name}`", values(name, field), default(name), field.get("description", ""), ", ".join(readers(name)))
        yield f"| {' | '.join(cells)} |"


def values(name: str, schema: dict[str, Any]) -> str:
    """Return the allowed values of a field, for example "integer, 2 to 256"."""
    if name in NESTED_FIELDS:
        return "per stage"
    schema = next((option for option in schema.get("anyOf", ()) if option["type"] != "null"), schema)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    lowest, highest = schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum"))
    kind = KINDS[schema["type"]]
    if lowest is None:
        return kind
    if highest is None:
        return f"{kind}, at least {lowest}"
    return f"{kind}, {lowest} to {highest - 1 if 'exclusiveMaximum' in schema else highest}"


def default(name: str) -> str:
    field = Shot.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return (
        ""
        if value in (None, (), {}) or name in NESTED_FIELDS
        else f"`{str(value).lower() if value in (True, False) else value}`"
    )


def readers(name: str) -> list[str]:
    """Return the stages whose result changes with a field."""
    return [
        stage.name for stage in STAGES if any(read.split(".")[0] == name for read in (*stage.reads, *stage.identity_fields))
    ]


def stages() -> Iterator[str]:
    """Yield the rows of the table of stages."""
    yield "| stage | label | actor | takes | returns | own fields | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for stage in STAGES:
        name = f"`{stage.name}`" + (" (chunked)" if issubclass(stage, ChunkedStage) else "")
        takes = ", ".join((*stage.takes, *(f"[{artefact}]" for artefact in stage.identity_inputs))) or "-"
        own = ", ".join(f"`{field}`" for field in stage.reads if len(readers(field.split(".")[0])) == 1 or "." in field) or "-"
        cells = name, stage.label, stage.actor, takes, ", ".join(stage.writes), own, f"{stage.reference_s:g}"
        yield f"| {' | '.join(cells)} |"


TABLES = {"scripts.md": ("shot fields", shot_fields), "architecture.md": ("stages", stages)}


def main(*, check: bool) -> int:
    """Write the tables, or return 1 if one is stale."""
    stale = []
    for page, (name, rows) in TABLES.items():
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->\n"
        before, rest = text.split(begin)
        new = before + begin + "\n".join(rows()) + "\n" + end + rest.split(end, 1)[1]
        if new != text:
            stale.append(page)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        sys.stderr.write(f"stale tables in {', '.join(stale)}; run `make docs`\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
