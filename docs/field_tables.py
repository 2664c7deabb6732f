"""Generate the tables in docs/ and the keywords of the library. `make docs` writes them; `--check` fails if one is stale."""

import ast
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from vidgen_ray.batch.shot_queue import Task
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.dataset.captions import COLUMNS as CAPTIONS
from vidgen_ray.dataset.measurements import SCORERS
from vidgen_ray.dataset.score_folder import NEIGHBOURS
from vidgen_ray.graph import STAGES
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.records import ShotRecord
from vidgen_ray.planner.cluster import H100
from vidgen_ray.planner.demand import seconds_of
from vidgen_ray.profile import load_profile
from vidgen_ray.script.lines import Line
from vidgen_ray.shot import DERIVED_FIELDS, NESTED_FIELDS, Shot
from vidgen_ray.stages.base import ChunkedStage, Stage
from vidgen_ray.stages.schedules import SCHEDULES

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "vidgen_ray"
CLIENT = PACKAGE.parent / "clients" / "python" / "vidgen_client" / "__init__.py"
RECORDS: tuple[type, ...] = (Line, Shot, ShotPlan, Task, ShotRecord, ManifestRow)
"""Types that a line of a script becomes, in order."""
READING_ORDER = (
    "shot.py",
    "stages/base.py",
    "graph.py",
    "stages/flux.py",
    "content_keys.py",
    "render/step_runner.py",
    "render/shot_files.py",
    "pipeline.py",
    "engine/core.py",
    "batch/render_script.py",
)
"""The files that explain the project, below `vidgen_ray/`."""
KINDS = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "array": "list",
    "object": "object",
}
NOT_KEYWORDS = ("prompt", "image", "last_image", "face_image", "consent", "variants", "character", "priority")
"""Fields of a shot that are arguments of the library's methods by other types, and those of scripts only."""
KEYWORD_TYPES = {
    "lora": "_Lora | Sequence[_Lora]",
    "video_model": "str",  # also those of other packages
    "video_lora": "_Lora | VideoLora | Sequence[_Lora | VideoLora]",
    "num_frames": "int | str",  # auto, and for:TRAINER:MODEL
    "steps": "Mapping[str, int]",
    "guidance": "Mapping[str, float]",
    "metadata": "Mapping[str, Any]",
}
"""Fields of a shot that take more types than they have."""


def shot_fields() -> Iterator[str]:
    """Yield a line for each field of a shot: name, values, default, description."""
    for name, schema in Shot.model_json_schema()["properties"].items():
        allowed = "per stage" if name in NESTED_FIELDS else values(schema) + default(Shot.model_fields[name])
        yield f"- `{name}` ({allowed}): {schema['description']}"


def keywords() -> Iterator[str]:
    """Yield a line for each field of a shot that is a keyword of the library's methods, with its type for type checkers."""
    for name, field in Shot.model_fields.items():
        if name not in NOT_KEYWORDS:
            yield f"    {name}: {KEYWORD_TYPES.get(name) or type_text(field.annotation)}"


def type_text(annotation: Any) -> str:
    """Return a type as it is written in code."""
    if get_origin(annotation) is Literal:
        return f"Literal[{', '.join(map(json.dumps, get_args(annotation)))}]"
    if get_origin(annotation) is Annotated:
        return type_text(get_args(annotation)[0])
    if get_args(annotation):
        return " | ".join(map(type_text, get_args(annotation)))
    return "None" if annotation is NoneType else str(annotation.__name__)


def values(schema: Mapping[str, Any]) -> str:
    """Return the allowed values of a field, for example "integer, 2 to 256"."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(values(option) for option in schema["anyOf"] if option.get("type") != "null"))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    lowest, highest = schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum"))
    kind = KINDS[schema.get("type", "object")]
    if lowest is None:
        return kind
    if highest is None:
        return f"{kind}, at least {lowest}"
    return f"{kind}, {lowest} to {highest - 1 if 'exclusiveMaximum' in schema else highest}"


def default(field: FieldInfo) -> str:
    """Return the default of a field, for example "; default `25`", or "" if there is none."""
    if field.is_required():
        return ", required"
    value = field.get_default(call_default_factory=True)
    return "" if value in (None, (), {}) else f"; default `{str(value).lower() if isinstance(value, bool) else value}`"


def fields_read(stage: type[Stage[Any]]) -> set[str]:
    """Return the shot fields that change the result of a stage."""
    reads = [read.split(".")[0] for read in (*stage.reads, *stage.identity_fields)]
    return {field for read in reads for field in DERIVED_FIELDS.get(read, (read,))}


def readers(name: str) -> list[str]:
    """Return the stages whose result changes with a field."""
    return [stage.name for stage in STAGES if name in fields_read(stage)]


GPU = load_profile("gpu")


def stages() -> Iterator[str]:
    """Yield a line for each stage: name, actor, artefacts, seconds."""
    for stage in STAGES:
        notes = [f"actor `{stage.actor}`"] * (stage.actor != stage.name) + ["chunked"] * issubclass(stage, ChunkedStage)
        name = f"`{stage.name}`" + (f" ({', '.join(notes)})" if notes else "")
        takes = ", ".join((*stage.takes, *(f"[{artefact}]" for artefact in stage.identity_inputs)))
        if stage.actor in GPU.actors:
            seconds = f"{float(f'{seconds_of(GPU, stage, {}, H100).reference_s:.2g}'):g} s"
        else:
            seconds = "computed by a server"
        yield f"- {name}: {takes} -> {', '.join(stage.writes)}; {seconds}".replace(":  ->", ":")


def score_columns() -> Iterator[str]:
    """Yield a line for each column of the built-in scorers."""
    for scorer in SCORERS:
        yield from (f"- `{name}`: {column.description}" for name, column in scorer.columns.items())
    yield from (f"- `{name}`: {column.description}" for name, column in (NEIGHBOURS | CAPTIONS).items())


def first_sentence(docstring: str | None) -> str:
    """Return the first sentence of a docstring in one line, without its full stop."""
    assert docstring
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def module_summary(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    return first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


def records() -> Iterator[str]:
    """Yield the list of records."""
    for record in RECORDS:
        file = Path(inspect.getfile(record)).relative_to(PACKAGE)
        yield f"- `{record.__name__}` in `{file}`: {first_sentence(inspect.getdoc(record))}"


def reading_order() -> Iterator[str]:
    """Yield the numbered list of the files to read first."""
    for number, file in enumerate(READING_ORDER, start=1):
        yield f"{number}. `{file}`: {module_summary(PACKAGE / file)}"


def modules() -> Iterator[str]:
    """Yield a line for each package with modules."""
    for init in (*sorted(PACKAGE.glob("*/__init__.py")), CLIENT):
        if any(not path.stem.startswith("__") for path in init.parent.glob("*.py")):
            yield f"- `{init.parent.relative_to(DOCS.parent)}/`: {module_summary(init)}"


def schedules() -> Iterator[str]:
    """Yield the rows of the schedules that the authors of weights state."""
    yield "| `schedule` | scheduler | shift | timesteps | steps, guidance | the authors' | source |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, each in SCHEDULES.items():
        scheduler = each.scheduler.removesuffix("Scheduler").removesuffix("Discrete").removesuffix("Multistep")
        settings = f"{each.steps}, {f'{each.guidance:g}' if each.guidance else 'none'}"
        cells = (f"`{name}`", scheduler, each.shift, each.timesteps, settings, each.authors, each.source)
        yield f"| {' | '.join(cells)} |"


TABLES: Mapping[str, Mapping[str, Callable[[], Iterator[str]]]] = {
    "scripts.md": {"shot fields": shot_fields},
    "models.md": {"schedules": schedules},
    "dataset.md": {"scores": score_columns},
    "architecture.md": {
        "records": records,
        "reading order": reading_order,
        "modules": modules,
        "stages": stages,
    },
    "../vidgen_ray/pipeline.py": {"keywords": keywords},
}


def main(*, check: bool) -> int:
    """Write the tables, or return 1 if one is stale."""
    stale = []
    for page, tables in TABLES.items():
        path = DOCS / page
        text = new = path.read_text(encoding="utf-8")
        for name, rows in tables.items():
            begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->\n"
            if path.suffix == ".py":
                begin, end = f"    # generated: {name}\n", "    # end\n"
            before, rest = new.split(begin)
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
