"""What became of every line: the rows of `manifest/*.parquet`, and how they are read. See manifest_writer for writing."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field

from vidgen_ray.outputs.id_index import IdIndex
from vidgen_ray.outputs.records import DoneShot, Failure, ShotRecord, ShotSummary
from vidgen_ray.outputs.storage import Storage, storage_at
from vidgen_ray.shot import Shot

SHOT_FILES = {"image": "image.png", "video": "video.mp4", "hd_video": "hd.mp4"}
"""Column of the manifest -> file in the shot's folder."""
LIKENESS = {
    "image_likeness": "image",
    "clip_likeness_mean": "clip_mean",
    "clip_likeness_worst": "clip_worst",
    "frames_without_face": "frames_without_face",
}
"""Column of the manifest -> field of the record's likeness."""
Status = Literal["done", "failed", "skipped"]
REJECTED = "script"
"""Stage of the failure of a line that was refused before anything was rendered."""
BATCH_ROWS = 10_000
INDEX = ["run", "script", "id", "status", "failure_stage"]
"""What decides whether a row holds."""


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
    """Of a shot that is done the one that was used: with `retries` it may be another one than the script's."""
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
    image_likeness: float | None = None
    """-1 to 1, of the picture to the face; null where no face was found in it, and for a shot without a face."""
    clip_likeness_mean: float | None = None
    """Over the frames that were looked at and in which a face was found; null where there is none."""
    clip_likeness_worst: float | None = None
    frames_without_face: int | None = None
    """Of the frames of the clip that were looked at; without a clip of the one picture. Null for a shot without a face."""
    seconds: float | None = None
    """Of all stages together, when they were run."""
    gpu_seconds: float | None = None
    lora_loads: int | None = None
    """How often a LoRA had to be laid on the weights for it, when it was rendered."""
    failure_stage: str | None = None
    failure_error: str | None = None
    failure_message: str | None = None
    failure_attempts: int | None = None
    failure_worker: str | None = None
    metadata: str = "{}"
    """The line's own, as JSON text."""
    ended_at: str = Field(default_factory=_now)

    @staticmethod
    def of_shot(
        run: str, script: str, shot: Shot, line: int | None, result: ShotRecord | DoneShot | Failure, status: Status
    ) -> "ManifestRow":
        # Nothing is checked again: a shot, a summary and a failure are what they are, and a run has many rows.
        assert shot.id is not None
        return _row(
            run=run,
            script=script,
            id=shot.id,
            line=line,
            status=status,
            prompt=shot.prompt,
            mode=shot.mode,
            seed=shot.seed if isinstance(result, Failure) else result.summary.seed,
            width=shot.width,
            height=shot.height,
            num_frames=shot.num_frames if shot.generate_video else None,
            fps=shot.fps if shot.generate_video else None,
            metadata=json.dumps(shot.metadata) if shot.metadata else "{}",
            **(_failure_columns(result) if isinstance(result, Failure) else _result_columns(shot.id, result.summary)),
        )

    @staticmethod
    def of_rejected_line(run: str, script: str, line_id: str, line: int, prompt: object, failure: Failure) -> "ManifestRow":
        return _row(
            run=run,
            script=script,
            id=line_id,
            line=line,
            status="failed",
            prompt=_storable(prompt) if isinstance(prompt, str) else None,
            **_failure_columns(failure),
        )


_EMPTY = {name: field.get_default() for name, field in ManifestRow.model_fields.items() if not field.is_required()}


def _row(**columns: Any) -> ManifestRow:
    """All columns are given, since finding the default of each would take longer than all the rest."""
    return ManifestRow.model_construct(**{**_EMPTY, "ended_at": _now(), **columns})


def _storable(text: str) -> str:
    """Text of a broken line may hold lone surrogates, which neither Parquet nor UTF-8 has."""
    return text.encode("utf-8", "backslashreplace").decode()


def _failure_columns(failure: Failure) -> dict[str, Any]:
    columns = {f"failure_{name}": value for name, value in failure.model_dump().items()}
    return {**columns, "failure_message": _storable(failure.message)}


def _result_columns(shot_id: str, result: ShotSummary) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "key": result.key,
        "seconds": result.seconds,
        "gpu_seconds": result.gpu_seconds,
        "lora_loads": result.lora_loads,
    }
    if result.likeness is not None:
        columns |= {column: result.likeness[field] for column, field in LIKENESS.items()}
    for name, file in SHOT_FILES.items():
        if file in result.sha256:
            columns[name] = f"shots/{shot_id}/{file}"
            columns[f"{name}_sha256"] = result.sha256[file]
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
REQUIRED = [name for name, field in ManifestRow.model_fields.items() if field.is_required()]


class ManifestFile(NamedTuple):
    """A file of the manifest, and which of its rows hold."""

    name: str
    holds: Sequence[bool]
    is_current: bool
    """Whether it has the columns of SCHEMA."""


@contextmanager
def _opened(storage: Storage, name: str) -> Iterator[pyarrow.NativeFile]:
    """A file that stays what it is until the end of the block, whatever a run writes under its name meanwhile.

    Raises FileNotFoundError.
    """
    with storage.local_copy(name) as path, pyarrow.OSFile(str(path)) as file:
        yield file


def account_of(storage: Storage, name: str, seen: IdIndex) -> tuple[ManifestFile, pyarrow.Table] | None:
    """The account of a file and the columns of INDEX; none for a file that is no manifest of ours.

    Of rows with the same id the last one holds, unless the id was `seen` before. Afterwards the file's ids are.
    """
    with _opened(storage, name) as file:
        return _account(file, name, seen)


def _account(file: pyarrow.NativeFile, name: str, seen: IdIndex) -> tuple[ManifestFile, pyarrow.Table] | None:
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        schema = parquet.schema_arrow
        if not set(REQUIRED) <= set(schema.names) <= set(SCHEMA.names):
            return None
        index = parquet.read(columns=INDEX, use_threads=False)
    except (pyarrow.ArrowException, OSError):
        return None
    last_first = index.column("id").to_pylist()[::-1]
    return ManifestFile(name, seen.add_new(last_first)[::-1], schema.equals(SCHEMA)), index


def manifest_files(storage: Storage) -> list[str]:
    """Newest first: a file is named after its run, and a run after the time of its beginning."""
    names = sorted(storage.files("manifest"), reverse=True)
    return [f"manifest/{name}" for name in names if name.endswith(".parquet") and not name.startswith(".")]


def rows_that_hold(storage: Storage, account: ManifestFile) -> Iterator[pyarrow.RecordBatch]:
    """In batches of at most BATCH_ROWS, with the columns of SCHEMA. Nobody may write the file meanwhile."""
    with _opened(storage, account.name) as file:
        yield from _rows(file, account)


def _rows(file: pyarrow.NativeFile, account: ManifestFile) -> Iterator[pyarrow.RecordBatch]:
    begin = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(BATCH_ROWS):
        mask = pyarrow.array(account.holds[begin : begin + len(batch)], pyarrow.bool_())
        begin += len(batch)
        yield _with_all_columns(batch.filter(mask))


def _with_all_columns(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    columns = [
        batch.column(field.name).cast(field.type) if field.name in batch.schema.names else pyarrow.nulls(len(batch), field.type)
        for field in SCHEMA
    ]
    return pyarrow.RecordBatch.from_arrays(columns, schema=SCHEMA)


def manifest_batches(storage: Storage) -> Iterator[pyarrow.RecordBatch]:
    """All rows, one an id, in no order; also while a run goes on, whatever is on disk of it. Memory does not grow with them."""
    seen, names, looked_at = IdIndex(), manifest_files(storage), set[str]()
    try:
        while names:
            moved = False
            for name in names:
                looked_at.add(name)
                try:
                    with _opened(storage, name) as file:
                        if (found := _account(file, name, seen)) is not None:
                            yield from _rows(file, found[0])
                except FileNotFoundError:
                    moved = True
            # A run that ends puts its parts together under new names, and only then deletes them.
            names = [name for name in manifest_files(storage) if name not in looked_at] if moved else []
    finally:
        seen.close()


def read_manifest(out: str | Path) -> list[ManifestRow]:
    """One row an id, in no order."""
    return [ManifestRow(**row) for batch in manifest_batches(storage_at(out)) for row in batch.to_pylist()]
