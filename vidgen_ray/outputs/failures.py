"""`failures.jsonl`: the lines that failed, as a script that can be rendered again, each with the reason under `failure`.

A run that goes on writes parts in `failures/`, since the file itself may be the script that it renders.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
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
    """A line that can be rendered again, under its id in the manifest, and why it failed."""

    id: str
    script: str
    fields: dict[str, Any]
    failure: Failure

    def as_json(self, run: str) -> str:
        reason = {"id": self.id, "script": self.script, "run": run, **self.failure.model_dump()}
        try:
            # What is no JSON came from a Parquet or YAML script, and is shown as text.
            return json.dumps({**self.fields, "failure": reason}, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):
            return json.dumps({"unreadable": repr(self.fields)[:10_000], "failure": reason}, ensure_ascii=False)


def encoded(text: str) -> bytes:
    """Text of a broken line may hold lone surrogates, which UTF-8 has not."""
    return text.encode("utf-8", "backslashreplace")


class Standing(NamedTuple):
    """What the manifest says of failures."""

    known: IdIndex
    """All ids."""
    failed: IdIndex
    """`failed_as` of those whose last run failed."""
    void: IdIndex
    """Ids of lines that have another id by now."""
    rejected_by: str | None
    """A script of which no refused line of an earlier run counts any more."""


def failed_as(run: object, line_id: object) -> str:
    return f"{run} {line_id}"


def merge_failures(storage: Storage, standing: Standing) -> None:
    """Put the parts of all runs into `failures.jsonl`, without what was mended; no file is left where nothing failed."""
    parts = [f"{PARTS}/{name}" for name in sorted(storage.files(PARTS)) if name.endswith(".jsonl")]
    if FILE not in storage.files("") and not parts:
        return
    with closing(IdIndex()) as written, storage.new_file(FILE) as path:
        with path.open("wb") as target:
            for lines in _batches(storage, [FILE, *parts]):
                target.writelines(encoded(line + "\n") for line in _that_stand(lines, standing, written))
        is_empty = path.stat().st_size == 0
    for gone in [FILE, *parts] if is_empty else parts:
        storage.delete(gone)
    if parts and not storage.files(PARTS):
        storage.delete_folder(PARTS)


def _batches(storage: Storage, sources: Sequence[str]) -> Iterator[Sequence[str]]:
    for source in sources:
        with (
            suppress(FileNotFoundError),
            storage.local_copy(source) as path,
            path.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file,
        ):
            lines = (line.rstrip("\n") for line in file if line.strip())
            yield from batched(lines, BATCH_LINES)


def _that_stand(lines: Sequence[str], standing: Standing, written: IdIndex) -> Iterator[str]:
    reasons = [_reason(line) for line in lines]
    ids = [reason.id for reason in reasons if reason]
    known, void = standing.known.known(ids), standing.void.known(ids)
    failed = standing.failed.known([reason.mark for reason in reasons if reason])
    # A run that was killed while it merged may have left a line twice.
    first = iter(written.add_new([reason.mark for reason in reasons if reason]))
    for line, reason in zip(lines, reasons, strict=True):
        if reason is None:
            yield line
            continue
        is_void = (
            reason.id in known or reason.id in void or (reason.script == standing.rejected_by and reason.stage == REJECTED)
        )
        if next(first) and (reason.mark in failed or not is_void):
            yield line


class _Reason(NamedTuple):
    id: str
    script: object
    stage: object
    run: object

    @property
    def mark(self) -> str:
        return failed_as(self.run, self.id)


def _reason(line: str) -> _Reason | None:
    """None for a line that somebody wrote into the file by hand."""
    try:
        reason = json.loads(line)["failure"]
        return _Reason(str(reason["id"]), reason["script"], reason["stage"], reason.get("run"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
