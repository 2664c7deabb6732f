"""What the driver leaves for the director: lines that are to be rendered, in parts; and what comes back of each."""

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
    """A shot to render, the line it stands on and, where its line failed under another id, that id."""

    plan: ShotPlan
    line: int
    replaces: str | None

    def to_line(self) -> str:
        head = json.dumps({"line": self.line, "replaces": self.replaces})
        return f'{head[:-1]}, "plan": {self.plan.model_dump_json()}}}'

    @classmethod
    def from_line(cls, text: str) -> ShotTask:
        fields = json.loads(text)
        return cls(ShotPlan.model_validate(fields["plan"]), fields["line"], fields["replaces"])


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What became of a shot."""

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


class TaskFiles:
    """The parts of one run, in the output folder, where driver and workers both see them."""

    def __init__(self, outputs: OutputFolder, run: str) -> None:
        self._outputs = outputs
        # This run holds the folder's lease: what lies there is a dead run's.
        outputs.storage.delete_folder("spool")
        self._folder = f"spool/{run}"
        self.parts: list[str] = []

    def write(self, errands: Iterable[ShotTask]) -> Iterator[ShotTask]:
        """Write the errands down, a part at a time, and give each on."""
        for batch in batched(errands, LINES_PER_PART):
            self.parts.append(f"{self._folder}/{len(self.parts):06d}.jsonl")
            self._outputs.storage.write(self.parts[-1], "".join(f"{errand.to_line()}\n" for errand in batch))
            yield from batch

    def drop(self) -> None:
        self._outputs.storage.delete_folder(self._folder)


def read_part(outputs: OutputFolder, part: str) -> list[str]:
    """The lines of a part, each an errand."""
    content = outputs.storage.read(part)
    if content is None:
        raise SetupError(f"{outputs.storage.place(part)} is not there; driver and workers need one shared output folder")
    # JSON's texts may hold other signs that Python takes for ends of lines.
    return content.decode().removesuffix("\n").split("\n")
