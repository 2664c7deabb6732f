"""What became of every line: `manifest/*.parquet`, and `failures.jsonl`, a script of the lines that failed."""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field

from vidgen_ray.atomic import write_atomically
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.shot import Shot

SHOT_FILES = {"image": "image.png", "video": "video.mp4", "hd_video": "hd.mp4"}
"""Column of the manifest -> file in the shot's folder."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class ManifestRow(BaseModel):
    """One line of a script that ended. Columns that do not apply are null; paths are relative to the output folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    id: str
    line: int | None
    status: Literal["done", "failed", "skipped"]
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
        cls, run: str, shot: Shot, line: int, result: ShotRecord | Failure, status: Literal["done", "failed", "skipped"]
    ) -> "ManifestRow":
        assert shot.id is not None
        columns: dict[str, Any] = shot.model_dump(include={"prompt", "mode", "seed", "width", "height"})
        if shot.generate_video:
            columns |= {"num_frames": shot.num_frames, "fps": shot.fps}
        if isinstance(result, Failure):
            columns |= _failure_columns(result)
        else:
            columns |= _result_columns(shot.id, result)
        return cls(run=run, id=shot.id, line=line, status=status, metadata=json.dumps(shot.metadata), **columns)

    @classmethod
    def of_refused_line(cls, run: str, line_id: str, line: int, prompt: object, failure: Failure) -> "ManifestRow":
        shown = prompt if isinstance(prompt, str) else None
        return cls(run=run, id=line_id, line=line, status="failed", prompt=shown, **_failure_columns(failure))


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


def write_manifest(out: Path, run: str, rows: Sequence[ManifestRow]) -> Path:
    """Write this run's rows together with those of earlier runs, one row an id: that of the run that ended it last."""
    older = sorted((out / "manifest").glob("*.parquet"))
    latest = {row.id: row for row in sorted([*_rows_of(older), *rows], key=lambda row: row.ended_at)}
    content = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row.model_dump() for row in latest.values()], schema=SCHEMA), content
    )
    target = out / "manifest" / f"{run}.parquet"
    write_atomically(target, content.getvalue())
    for file in older:
        file.unlink(missing_ok=True)
    return target


def read_manifest(out: Path) -> list[ManifestRow]:
    """One row an id, in no order."""
    rows = _rows_of(sorted((out / "manifest").glob("*.parquet")))
    return list({row.id: row for row in sorted(rows, key=lambda row: row.ended_at)}.values())


def _rows_of(files: Sequence[Path]) -> list[ManifestRow]:
    return [ManifestRow.model_validate(row) for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def write_failures(out: Path, ended: Collection[str], failed: Mapping[str, tuple[dict[str, Any], Failure]]) -> None:
    """Write `failures.jsonl`: each failed line with its id in the manifest and the reason under `failure`.

    Lines of earlier runs stay unless their id is among those that `ended` now; no file is left where none has failed.
    """
    path = out / "failures.jsonl"
    before = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    lines = [line for line in before if line.strip() and _failed_id(line) not in ended]
    for line_id, (line, failure) in failed.items():
        reason = {"id": line_id, **failure.model_dump()}
        # What is no JSON came from a Parquet or YAML script, and is shown as text.
        lines.append(json.dumps({**line, "failure": reason}, ensure_ascii=False, default=str))
    if lines:
        write_atomically(path, "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
    else:
        path.unlink(missing_ok=True)


def _failed_id(line: str) -> str | None:
    """None for a line that somebody wrote into the file by hand."""
    try:
        found = json.loads(line)["failure"]["id"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
