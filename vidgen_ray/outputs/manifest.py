"""What became of every line: `manifest/*.parquet`, and `failures.jsonl`, a script of the lines that failed."""

import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field, field_validator

from vidgen_ray.atomic import write_atomically
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.shot import Shot

SHOT_FILES = {"image": "image.png", "video": "video.mp4", "hd_video": "hd.mp4"}
"""Column of the manifest -> file in the shot's folder."""
Status = Literal["done", "failed", "skipped"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class ManifestRow(BaseModel):
    """One line of a script that ended. Columns that do not apply are null; paths are relative to the output folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    script: str
    id: str
    line: int | None
    status: Status
    key: str | None = None
    prompt: str | None = None
    mode: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    image: str | None = None
    image_sha256: str | None = None
    video: str | None = None
    video_sha256: str | None = None
    hd_video: str | None = None
    hd_video_sha256: str | None = None
    seconds: float | None = None
    """Of all stages together, when they were run."""
    gpu_seconds: float | None = None
    failure_stage: str | None = None
    failure_error: str | None = None
    failure_message: str | None = None
    failure_attempts: int | None = None
    failure_worker: str | None = None
    metadata: str = "{}"
    """The line's own, as JSON text."""
    ended_at: str = Field(default_factory=_now)

    @classmethod
    def of_shot(
        cls,
        run: str,
        script: str,
        shot: Shot,
        line: int,
        result: ShotRecord | Failure,
        status: Status,
    ) -> "ManifestRow":
        assert shot.id is not None
        columns: dict[str, Any] = shot.model_dump(include={"prompt", "mode", "seed", "width", "height"})
        if shot.generate_video:
            columns |= {"num_frames": shot.num_frames, "fps": shot.fps}
        if isinstance(result, Failure):
            columns |= _failure_columns(result)
        else:
            columns |= _result_columns(shot.id, result)
        return cls(run=run, script=script, id=shot.id, line=line, status=status, metadata=json.dumps(shot.metadata), **columns)

    @classmethod
    def of_refused_line(cls, run: str, script: str, line_id: str, line: int, prompt: object, failure: Failure) -> "ManifestRow":
        shown = prompt if isinstance(prompt, str) else None
        columns = _failure_columns(failure)
        return cls(run=run, script=script, id=line_id, line=line, status="failed", prompt=shown, **columns)

    @field_validator("prompt", "failure_message", mode="before")
    @classmethod
    def _is_storable(cls, value: Any) -> Any:
        """Text of a broken line may hold lone surrogates, which neither Parquet nor UTF-8 has."""
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _failure_columns(failure: Failure) -> dict[str, Any]:
    return {f"failure_{name}": value for name, value in failure.model_dump().items()}


def _result_columns(shot_id: str, record: ShotRecord) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "key": record.key,
        "seconds": sum(step.seconds for step in record.stages),
        "gpu_seconds": sum(step.gpu_seconds for step in record.stages),
    }
    for name, file in SHOT_FILES.items():
        if file in record.files:
            columns |= {name: f"shots/{shot_id}/{file}", f"{name}_sha256": record.files[file].sha256}
    return columns


def _arrow_schema() -> pyarrow.Schema:
    types = {int: pyarrow.int64(), float: pyarrow.float64()}
    return pyarrow.schema(
        [
            (
                name,
                next((types[t] for t in types if t in (field.annotation, *_members(field.annotation))), pyarrow.string()),
            )
            for name, field in ManifestRow.model_fields.items()
        ]
    )


def _members(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


SCHEMA = _arrow_schema()
"""Text, whole numbers and floats; the same for every run, so that the folder reads as one table."""


@dataclass(frozen=True, slots=True)
class Superseded:
    """What of earlier accounts a run makes void: these ids, and every line that this script had refused."""

    ids: Collection[str]
    script: str

    def __call__(self, line_id: object, script: object, failure_stage: object) -> bool:
        return line_id in self.ids or (script == self.script and failure_stage == REFUSED)


REFUSED = "script"
"""Stage of the failure of a line that was refused before anything was rendered."""


def write_manifest(out: Path, run: str, rows: Sequence[ManifestRow], superseded: Superseded) -> Path:
    """Write this run's rows together with those of earlier runs that still hold, one row an id."""
    older = {file: _rows_of(file) for file in sorted((out / "manifest").glob("*.parquet"))}
    kept = [row for found in older.values() for row in found or () if not superseded(row.id, row.script, row.failure_stage)]
    content = io.BytesIO()
    latest = _latest([*kept, *rows])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row.model_dump() for row in latest], schema=SCHEMA), content)
    target = out / "manifest" / f"{run}.parquet"
    write_atomically(target, content.getvalue())
    for file, found in older.items():
        if found is not None:
            file.unlink(missing_ok=True)
    return target


def read_manifest(out: Path) -> list[ManifestRow]:
    """One row an id, in no order."""
    return _latest([row for file in (out / "manifest").glob("*.parquet") for row in _rows_of(file) or ()])


def _latest(rows: Sequence[ManifestRow]) -> list[ManifestRow]:
    return list({row.id: row for row in sorted(rows, key=lambda row: row.ended_at)}.values())


def _rows_of(file: Path) -> list[ManifestRow] | None:
    """None for a file that is no manifest of ours; it is left alone."""
    try:
        return [ManifestRow.model_validate(row) for row in pyarrow.parquet.read_table(file).to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class FailedLine:
    """A line that can be rendered again, under its id in the manifest, and why it failed."""

    id: str
    script: str
    fields: dict[str, Any]
    failure: Failure


def write_failures(out: Path, superseded: Superseded, failed: Sequence[FailedLine]) -> None:
    """Write `failures.jsonl`: each failed line with the reason under `failure`.

    Lines of earlier runs stay unless this run makes them void; no file is left where none has failed.
    """
    path = out / "failures.jsonl"
    before = path.read_text(encoding="utf-8", errors="backslashreplace").split("\n") if path.exists() else []
    lines = [line for line in before if line.strip() and not superseded(*_failed_as(line))]
    for line in failed:
        lines.append(_as_json(line.fields, {"id": line.id, "script": line.script, **line.failure.model_dump()}))
    if lines:
        write_atomically(path, "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
    else:
        path.unlink(missing_ok=True)


def _as_json(line: dict[str, Any], reason: dict[str, Any]) -> str:
    try:
        # What is no JSON came from a Parquet or YAML script, and is shown as text.
        return json.dumps({**line, "failure": reason}, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return json.dumps({"unreadable": repr(line)[:10_000], "failure": reason}, ensure_ascii=False)


def _failed_as(line: str) -> tuple[object, object, object]:
    """Id, script and stage; nothing for a line that somebody wrote into the file by hand."""
    try:
        reason = json.loads(line)["failure"]
        return reason["id"], reason["script"], reason["stage"]
    except (ValueError, KeyError, TypeError):
        return None, None, None
