"""Columns of tables: names as people write them, and a single error for all unknown ones."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidgen_ray.invalid_fields import SCHEMA_COMMAND, known_fields
from vidgen_ray.script.expansion import MATRIX, STYLE
from vidgen_ray.script.lines import FAILURE_FIELD, file_error
from vidgen_ray.shot import NESTED_FIELDS, Shot, StageSteps

METADATA_PREFIX = "metadata."
"""A column `metadata.NAME` becomes an entry of `metadata`."""
PANDAS_INDEX = "__index_level_0__"
"""Column in which pandas stores its index."""
FIELDS = (*Shot.model_fields, STYLE, MATRIX, FAILURE_FIELD)
FLAT_SETTINGS = tuple(
    name for field in NESTED_FIELDS for stage in StageSteps.model_fields for name in (f"{field}.{stage}", f"{stage}.{field}")
)
MAX_NAMED = 5
"""Unknown columns that an error names."""


def is_known(column: str) -> bool:
    """Return whether a column is a field of a script line."""
    return column in FIELDS or column in FLAT_SETTINGS or column.startswith(METADATA_PREFIX)


def normal_name(column: str) -> str:
    """Return the field that a column means: ` Negative Prompt ` is `negative_prompt`. Unknown columns are unchanged."""
    column = column.strip()
    if is_known(column):
        return column
    name = "_".join(column.lower().replace("-", " ").split())
    return name if is_known(name) else column


def check_columns(path: Path, columns: Sequence[str], *, with_prompt: bool = True) -> None:
    """Raise ScriptError, once for the whole file, if columns are unknown or occur twice.

    `with_prompt`: one of the columns must be the prompt. Then the error says so if it is missing, as in a table without names.
    """
    if duplicates := [name for name, count in Counter(columns).items() if count > 1]:
        raise file_error(path, f"the column {duplicates[0][:40]!r} twice", "must appear only once")
    if unknown := [name for name in columns if not is_known(name)]:
        named = ", ".join(repr(name[:40]) for name in unknown[:MAX_NAMED]) + (", ..." if len(unknown) > MAX_NAMED else "")
        more = f"; a column {METADATA_PREFIX}{unknown[0][:40] or 'NAME'} is copied to the manifest"
        allowed = known_fields(unknown[0], FIELDS) + more
        if with_prompt and "prompt" not in columns:
            allowed = (
                f"columns must be named after fields, in the first row of a .csv, one of them prompt; see {SCHEMA_COMMAND}"
            )
        raise file_error(path, f"unknown column{'s' if len(unknown) > 1 else ''} {named}", allowed)


def nest_metadata(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn `{"metadata.scene": 4}` into `{"metadata": {"scene": 4}}`."""
    flat = [name for name in fields if name.startswith(METADATA_PREFIX)]
    if not flat:
        return fields
    out = {name: value for name, value in fields.items() if not name.startswith(METADATA_PREFIX)}
    metadata = out.get("metadata")
    out["metadata"] = {**(metadata if isinstance(metadata, dict) else {})}
    out["metadata"] |= {name.removeprefix(METADATA_PREFIX): fields[name] for name in flat}
    return out
