"""`failures.jsonl`: the failed lines, as a script that can be rendered again. The field `failure` of each line has the reason.

During a run, failures are written to part files in `failures/`: `failures.jsonl` itself may be the script of this run.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from more_itertools import batched

from vidgen_ray.outputs.id_index import IdIndex
from vidgen_ray.outputs.manifest import REJECTED
from vidgen_ray.outputs.records import Failure
from vidgen_ray.outputs.storage import Storage

FILE = "failures.jsonl"
PARTS = "failures"
BATCH_LINES = 500


@dataclass(frozen=True, slots=True)
class FailedLine:
    """A failed script line: its id in the manifest, the script, the fields needed to render it again, and the reason."""

    id: str
    script: str
    line: int | None
    """Line number in that script, from 1."""
    fields: dict[str, Any]
    failure: Failure

    def as_json(self, run: str) -> str:
        """Return the line of `failures.jsonl`, without the newline."""
        reason = {"id": self.id, "script": self.script, "line": self.line, "run": run, **self.failure.model_dump()}
        try:
            # Values from Parquet and YAML scripts that JSON does not support, such as dates, are written as text.
            return json.dumps({**self.fields, "failure": reason}, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):
            return json.dumps({"unreadable": repr(self.fields)[:10_000], "failure": reason}, ensure_ascii=False)


def to_utf8(text: str) -> bytes:
    """Encode as UTF-8. Lone surrogates, which malformed script lines may contain, are written as backslash escapes."""
    return text.encode("utf-8", "backslashreplace")


class ManifestState(NamedTuple):
    """The manifest rows of all runs, as far as they decide which failures are kept."""

    ids: IdIndex
    """Ids of all rows."""
    failures: IdIndex
    """`failure_key` of each row whose status is failed."""
    replaced_ids: IdIndex
    """Ids of earlier runs whose lines now have another id."""
    rechecked_script: str | None
    """Script that this run read to its end. Earlier rejections of its lines are dropped."""
    every_line_has_a_row: bool = False
    """The ids include all lines that this script has now. Its other failures are dropped."""


def failure_key(run: object, line_id: object) -> str:
    """Return the text that identifies the failure of a line in a run."""
    return f"{run} {line_id}"


def merge_failures(storage: Storage, state: ManifestState) -> None:
    """Merge the part files of all runs into `failures.jsonl` and drop resolved failures.

    The file is deleted if no failure is left.
    """
    parts = [f"{PARTS}/{name}" for name in sorted(storage.files(PARTS)) if name.endswith(".jsonl")]
    if FILE not in storage.files("") and not parts:
        return
    written = IdIndex()
    with storage.new_file(FILE) as path:
        with path.open("wb") as target:
            for lines in _batches(storage, [FILE, *parts]):
                target.writelines(to_utf8(line + "\n") for line in _unresolved(lines, state, written))
        is_empty = path.stat().st_size == 0
    for merged in [FILE, *parts] if is_empty else parts:
        storage.delete(merged)
    if parts and not storage.files(PARTS):
        storage.delete_folder(PARTS)


def _batches(storage: Storage, sources: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the non-empty lines of all source files in batches of at most `BATCH_LINES`."""
    for source in sources:
        with (
            suppress(FileNotFoundError),
            storage.local_copy(source) as path,
            path.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file,
        ):
            lines = (line.rstrip("\n") for line in file if line.strip())
            yield from batched(lines, BATCH_LINES)


def _unresolved(lines: Sequence[str], state: ManifestState, written: IdIndex) -> Iterator[str]:
    """Yield the lines whose failure still counts, and lines without a reason. Adds their failure keys to `written`."""
    reasons = [_reason(line) for line in lines]
    ids = [reason.id for reason in reasons if reason]
    known, replaced = state.ids.intersection(ids), state.replaced_ids.intersection(ids)
    failed = state.failures.intersection([reason.key for reason in reasons if reason])
    # A run that was killed during a merge may have left a line twice.
    is_new = iter(written.add_new([reason.key for reason in reasons if reason]))
    for line, reason in zip(lines, reasons, strict=True):
        if reason is None:
            yield line
            continue
        is_rejection = reason.stage == REJECTED
        was_rechecked = reason.script == state.rechecked_script and (is_rejection or state.every_line_has_a_row)
        is_resolved = reason.id in known or reason.id in replaced or was_rechecked
        if next(is_new) and (reason.key in failed or not is_resolved):
            yield line


class _Reason(NamedTuple):
    id: str
    script: object
    stage: object
    run: object

    @property
    def key(self) -> str:
        return failure_key(self.run, self.id)


def _reason(line: str) -> _Reason | None:
    """Return the reason of a line, or `None` for a line that was added by hand."""
    try:
        reason = json.loads(line)["failure"]
        return _Reason(str(reason["id"]), reason["script"], reason["stage"], reason.get("run"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
