"""Task files: the pending shots of a run, written by the driver in parts and read by the director; and their results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from more_itertools import batched

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import Failure, ShotRecord


@dataclass(frozen=True, slots=True)
class ShotTask:
    """A shot to render."""

    plan: ShotPlan
    line: int
    """Line number in the script."""
    replaces: str | None
    """Id under which the line failed in an earlier run, if it differs."""

    def to_line(self) -> str:
        head = json.dumps({"line": self.line, "replaces": self.replaces})
        return f'{head[:-1]}, "plan": {self.plan.model_dump_json()}}}'

    @classmethod
    def from_line(cls, text: str) -> ShotTask:
        fields = json.loads(text)
        return cls(ShotPlan.model_validate(fields["plan"]), fields["line"], fields["replaces"])


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Result of one shot."""

    result: ShotRecord | Failure

    def to_line(self) -> str:
        kind = "failure" if isinstance(self.result, Failure) else "record"
        return f'{{"{kind}": {self.result.model_dump_json()}}}'

    @classmethod
    def from_line(cls, text: str) -> TaskResult:
        fields = json.loads(text)
        if "failure" in fields:
            return cls(Failure.model_validate(fields["failure"]))
        return cls(ShotRecord.model_validate(fields["record"]))


LINES_PER_PART = 500
"""Tasks per file."""


class TaskFiles:
    """Task files of one run, in the output folder, which driver and workers share."""

    def __init__(self, outputs: OutputFolder, run: str) -> None:
        self._outputs = outputs
        # This run holds the lease of the folder, so existing files are left over from a crashed run.
        outputs.storage.delete_folder("spool")
        self._folder = f"spool/{run}"
        self.parts: list[str] = []

    def write(self, tasks: Iterable[ShotTask]) -> Iterator[ShotTask]:
        """Write the tasks part by part, and yield each one."""
        for batch in batched(tasks, LINES_PER_PART):
            self.parts.append(f"{self._folder}/{len(self.parts):06d}.jsonl")
            self._outputs.storage.write(self.parts[-1], "".join(f"{task.to_line()}\n" for task in batch))
            yield from batch

    def drop(self) -> None:
        """Delete the files."""
        self._outputs.storage.delete_folder(self._folder)


def read_part(outputs: OutputFolder, part: str) -> list[str]:
    """Return the lines of a part, one task each."""
    content = outputs.storage.read(part)
    if content is None:
        raise SetupError(f"{outputs.storage.place(part)} not found. The driver and the workers need one shared output folder.")
    # Not splitlines(): JSON strings may contain other characters that Python treats as line ends.
    return content.decode().removesuffix("\n").split("\n")
