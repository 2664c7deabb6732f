"""What became of every line: `manifest/*.parquet`, and `failures.jsonl`, a script of the lines that failed."""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field

from vidgen_ray.outputs.atomic import TEMPORARY, write_atomically
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
    """Write this run's rows and drop older rows of the same ids, so that the folder holds one row an id."""
    folder = out / "manifest"
    folder.mkdir(parents=True, exist_ok=True)
    older = sorted(folder.glob("*.parquet"))
    ids = {row.id for row in rows}
    tables = [pyarrow.Table.from_pylist([row.model_dump() for row in rows], schema=SCHEMA)]
    for file in older:
        before = pyarrow.parquet.read_table(file, schema=SCHEMA)
        tables.append(before.filter(pyarrow.array([i not in ids for i in before["id"].to_pylist()], pyarrow.bool_())))
    target = folder / f"{run}.parquet"
    temporary = folder / f"{TEMPORARY}{run}"
    pyarrow.parquet.write_table(pyarrow.concat_tables(tables), temporary)
    os.replace(temporary, target)
    for file in older:
        if file != target:
            file.unlink()
    return target


def read_manifest(out: Path) -> list[ManifestRow]:
    """All rows, in no order."""
    files = sorted((out / "manifest").glob("*.parquet"))
    return [ManifestRow.model_validate(row) for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def write_failures(out: Path, lines: Sequence[tuple[dict[str, Any], Failure]]) -> None:
    """Write each failed line with the reason under `failure`, or remove the file where none failed."""
    path = out / "failures.jsonl"
    if not lines:
        path.unlink(missing_ok=True)
        return
    text = "".join(json.dumps({**line, "failure": f.model_dump()}, ensure_ascii=False) + "\n" for line, f in lines)
    write_atomically(path, text)
