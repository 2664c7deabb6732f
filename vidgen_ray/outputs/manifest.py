"""Manifest `manifest/*.parquet`: one row per script line with its result. Row type and reading; see manifest_writer.

On a disk, the time of a shot's record shows whether its row still holds. In an object store that would take a request per
shot, so a marker `manifest/.open-<writer>` marks a running writer: rows older than it are not trusted. Rows are trusted if no
marker is as new as their run. A run leaves a marker until it has a row for every shot that it wrote. A writer without manifest
rows leaves one for every shot. A server needs none: it derives the id of a shot from its content key, so it never changes a
shot of a row.
"""

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from vidgen_ray.graph import clip_length
from vidgen_ray.licences import worst_use
from vidgen_ray.outputs.records import DoneShot, Failure, ShotRecord
from vidgen_ray.outputs.storage import Storage, storage_at
from vidgen_ray.shot import Shot

SHOT_FILES = {"image": "image.png", "video": "video.mp4", "hd_video": "hd.mp4"}
"""Manifest column -> file in the folder of the shot."""
LIKENESS = {
    "image_likeness": "image",
    "clip_likeness_mean": "clip_mean",
    "clip_likeness_worst": "clip_worst",
    "frames_without_face": "frames_without_face",
}
"""Manifest column -> field of `LikenessRecord`."""
Status = Literal["done", "failed", "skipped", "replaced"]
REPLACED = "replaced"
"""`status` of a finished shot whose line the script no longer has."""
REJECTED = "script"
"""`failure_stage` of a line that was rejected when the script was read."""
BATCH_ROWS = 10_000
INDEX = ["run", "script", "id", "status", "failure_stage"]
"""Columns that decide whether a row is current."""
MARKER_PREFIX = ".open-"
TIME_LETTERS = len("20260101T000000")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class ManifestRow(BaseModel):
    """Result of one script line. Columns that do not apply are null. Paths are relative to the output folder."""

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
    """Seed used for a finished shot. With `retries` it may differ from the seed in the script."""
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    image: str | None = None
    image_sha256: str | None = None
    image_bytes: int | None = None
    video: str | None = None
    video_sha256: str | None = None
    video_bytes: int | None = None
    hd_video: str | None = None
    hd_video_sha256: str | None = None
    hd_video_bytes: int | None = None
    image_likeness: float | None = None
    """Likeness of the image to the face photo, -1 to 1. Null if the image shows no face or the shot has no face photo."""
    clip_likeness_mean: float | None = None
    """Mean over the checked frames in which a face was found, -1 to 1. Null if there is none."""
    clip_likeness_worst: float | None = None
    """Minimum over the same frames."""
    frames_without_face: int | None = None
    """Checked frames without a face. Without a clip: 1 if the image shows no face, else 0. Null without a face photo."""
    seconds: float | None = None
    """Seconds of all stages together, when they ran."""
    gpu_seconds: float | None = None
    """Seconds times the share of a GPU, of all stages together."""
    lora_loads: int | None = None
    """LoRAs loaded onto the weights while the shot was rendered."""
    licences: str | None = None
    """Licences of the weights behind the shot, as a JSON list. `null` in it: an unknown licence."""
    commercial_use: str | None = None
    """Commercial use under all of these licences: yes, conditional, no, or unknown."""
    consent: str | None = None
    """`consent` of the shot as JSON text: subject, basis and reference. Null without a face photo."""
    failure_stage: str | None = None
    failure_error: str | None = None
    failure_message: str | None = None
    failure_attempts: int | None = None
    failure_worker: str | None = None
    metadata: str = "{}"
    """`metadata` of the line, as JSON text."""
    ended_at: str = Field(default_factory=_now)
    committed_at: float | None = None
    """Modification time of the shot's shot.json, in seconds since 1970. Null in an object store."""

    @staticmethod
    def of_shot(
        run: str, script: str, shot: Shot, line: int | None, result: ShotRecord | DoneShot | Failure, status: Status
    ) -> "ManifestRow":
        """Return the row of a finished, failed or skipped shot. Values are not validated again, for speed."""
        assert shot.id is not None
        done = result.done if isinstance(result, ShotRecord) else result
        n_frames, fps = clip_length(shot) if shot.generate_video else (None, None)
        return ManifestRow.model_construct(
            run=run,
            script=script,
            id=shot.id,
            line=line,
            status=status,
            prompt=shot.prompt,
            mode=shot.mode,
            seed=shot.seed if isinstance(done, Failure) else done.seed,
            width=shot.width,
            height=shot.height,
            num_frames=n_frames,
            fps=fps,
            consent=shot.consent.model_dump_json() if shot.consent else None,
            metadata=json.dumps(shot.metadata) if shot.metadata else "{}",
            **(_failure_columns(done) if isinstance(done, Failure) else _result_columns(done)),
        )

    @staticmethod
    def of_rejected_line(run: str, script: str, line_id: str, line: int, prompt: object, failure: Failure) -> "ManifestRow":
        """Return the row of a line that was rejected when the script was read."""
        return ManifestRow.model_construct(
            run=run,
            script=script,
            id=line_id,
            line=line,
            status="failed",
            prompt=_storable(prompt) if isinstance(prompt, str) else None,
            **_failure_columns(failure),
        )


def _storable(text: str) -> str:
    """Replace lone surrogates by backslash escapes. Malformed lines may contain them; Parquet cannot store them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _failure_columns(failure: Failure) -> dict[str, Any]:
    columns = {f"failure_{name}": value for name, value in failure.model_dump().items()}
    return {**columns, "failure_message": _storable(failure.message)}


def _result_columns(result: DoneShot) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "key": result.key,
        "committed_at": result.committed_at,
        "seconds": result.seconds,
        "gpu_seconds": result.gpu_seconds,
        "lora_loads": result.lora_loads,
    }
    if result.licences:
        columns["licences"] = json.dumps(sorted({licence for licence, _ in result.licences}, key=str))
        columns["commercial_use"] = worst_use(use for _, use in result.licences)
    if result.likeness is not None:
        columns |= {column: result.likeness[field] for column, field in LIKENESS.items()}
    for name, file in SHOT_FILES.items():
        if file in result.sha256:
            columns[name] = f"{result.folder}/{file}"
            columns[f"{name}_sha256"] = result.sha256[file]
            columns[f"{name}_bytes"] = result.bytes[file]
    return columns


def _arrow_schema() -> pyarrow.Schema:
    types = {int: pyarrow.int64(), float: pyarrow.float64()}
    return pyarrow.schema(
        [
            (
                name,
                next((types[t] for t in types if t in (field.annotation, *_union_members(field.annotation))), pyarrow.string()),
            )
            for name, field in ManifestRow.model_fields.items()
        ]
    )


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


SCHEMA = _arrow_schema()
"""Strings, integers and floats. The same for every run, so that the folder can be read as one table."""


def rows_as_columns(rows: Iterable[ManifestRow]) -> pyarrow.RecordBatch:
    """Return the rows as a batch with the columns of `SCHEMA`."""
    return pyarrow.RecordBatch.from_pylist([vars(row) for row in rows], schema=SCHEMA)


class ManifestFile(NamedTuple):
    """A file of the manifest and its current rows."""

    name: str
    current: NDArray[np.bool_]
    """(rows,): true if no later row replaces it."""
    replaced: NDArray[np.bool_] | None = None
    """(rows,): true if the row gets the status `replaced`. `None`: no row does."""


@contextmanager
def opened(storage: Storage, name: str) -> Iterator[pyarrow.NativeFile]:
    """Open a file. Its content does not change during the block, even if a run replaces the file.

    Raises FileNotFoundError.
    """
    with storage.local_copy(name) as path, pyarrow.OSFile(str(path)) as file:
        yield file


def read_index(storage: Storage, name: str, seen: set[str]) -> tuple[ManifestFile, pyarrow.Table] | None:
    """Return a file with its current rows and the columns of `INDEX`, or `None` if the file is not a manifest of this package.

    Of several rows with the same id the last one is current, unless the id is in `seen`. Adds the ids of the file to `seen`.
    """
    with opened(storage, name) as content:
        return _read_index(content, name, seen)


def _read_index(content: pyarrow.NativeFile, name: str, seen: set[str]) -> tuple[ManifestFile, pyarrow.Table] | None:
    try:
        parquet = pyarrow.parquet.ParquetFile(content)
        if not parquet.schema_arrow.equals(SCHEMA):
            return None
        index = parquet.read(columns=INDEX, use_threads=False)
    except (pyarrow.ArrowException, OSError):
        return None
    ids = index.column("id").to_pylist()
    current = np.zeros(len(ids), bool)
    for position in reversed(range(len(ids))):
        current[position] = ids[position] not in seen
        seen.add(ids[position])
    return ManifestFile(name, current), index


def is_damaged(storage: Storage, name: str) -> bool:
    """Return whether a file is not in the Parquet format, or cannot be read to its end."""
    with opened(storage, name) as content:
        try:
            for _ in pyarrow.parquet.ParquetFile(content).iter_batches(BATCH_ROWS, use_threads=False):
                pass
        except (pyarrow.ArrowException, OSError):
            return True
    return False


def manifest_files(storage: Storage) -> list[str]:
    """Return the paths of all manifest files, newest first. File names start with the run, and runs with their start time."""
    names = sorted(storage.files("manifest"), reverse=True)
    return [f"manifest/{name}" for name in names if name.endswith(".parquet") and not name.startswith(".")]


def ids_that_failed_before(storage: Storage, run: str) -> frozenset[str]:
    """Return the ids of the lines and shots whose last result before this run is a failure."""
    seen, failed = set[str](), set[str]()
    for name in manifest_files(storage):
        if name.startswith(f"manifest/{run}-") or (indexed := read_index(storage, name, seen)) is None:
            continue
        file, index = indexed
        rows = zip(index.column("id").to_pylist(), index.column("status").to_pylist(), file.current, strict=True)
        failed |= {id_ for id_, status, is_current in rows if is_current and status == "failed"}
    return frozenset(failed)


def current_rows(storage: Storage, file: ManifestFile) -> Iterator[pyarrow.RecordBatch]:
    """Yield the current rows in batches of at most `BATCH_ROWS`, with the columns of `SCHEMA`.

    The file must not be replaced between `read_index` and this call.
    """
    with opened(storage, file.name) as content:
        yield from _rows(content, file)


def _rows(
    content: pyarrow.NativeFile, file: ManifestFile, columns: Sequence[str] | None = None
) -> Iterator[pyarrow.RecordBatch]:
    begin = 0
    for batch in pyarrow.parquet.ParquetFile(content).iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
        rows = slice(begin, begin + len(batch))
        begin += len(batch)
        if file.replaced is not None and file.replaced[rows].any():
            position = batch.schema.get_field_index("status")
            status = pyarrow.compute.if_else(pyarrow.array(file.replaced[rows]), REPLACED, batch.column(position))
            batch = batch.set_column(position, "status", status)
        yield batch.filter(pyarrow.array(file.current[rows]))


def manifest_batches(storage: Storage, columns: Sequence[str] | None = None) -> Iterator[pyarrow.RecordBatch]:
    """Yield all current rows, one per id, in no particular order, in batches of bounded size. Default of `columns`: all.

    Can be called during a run and then returns the rows written so far.
    """
    seen, names, visited = set[str](), manifest_files(storage), set[str]()
    while names:
        was_merged = False
        for name in names:
            visited.add(name)
            try:
                with opened(storage, name) as content:
                    if (indexed := _read_index(content, name, seen)) is not None:
                        yield from _rows(content, indexed[0], columns)
            except FileNotFoundError:
                was_merged = True
        # A run that ended meanwhile has merged its parts into new files, and then deleted the parts.
        names = [name for name in manifest_files(storage) if name not in visited] if was_merged else []


def read_manifest(out: str | Path) -> list[ManifestRow]:
    """Return all current rows, one per id, in no particular order."""
    return [ManifestRow(**row) for batch in manifest_batches(storage_at(out)) for row in batch.to_pylist()]


def write_marker(storage: Storage, writer: str) -> None:
    """Write the marker of a writer, such as a run."""
    if storage.local is None:
        storage.write(_path(writer), "")


def delete_markers(storage: Storage, run: str, oldest_run: str | None) -> None:
    """Delete the marker of a run, and those of writers that began before `oldest_run`, the oldest run with a finished shot."""
    if storage.local is None:
        for writer in open_writers(storage):
            if writer == run or oldest_run is None or _began(writer) < _began(oldest_run):
                storage.delete(_path(writer))


def open_writers(storage: Storage) -> Sequence[str]:
    """Return the writers that left a marker. Empty on a disk."""
    if storage.local is not None:
        return ()
    return [name.removeprefix(MARKER_PREFIX) for name in storage.files("manifest") if name.startswith(MARKER_PREFIX)]


def is_trusted(run: str, open_writers: Sequence[str]) -> bool:
    """Return whether the rows of a run hold, although the given writers have changed shots."""
    return all(run == writer or _began(run) > _began(writer) for writer in open_writers)


@contextmanager
def shot_without_row(storage: Storage) -> Iterator[None]:
    """Mark that the block may write a shot that gets no manifest row."""
    before = new_writer()
    write_marker(storage, before)
    yield
    # A run that began during the block may have read the old shot. It deletes only markers of writers that began before it.
    write_marker(storage, new_writer())
    if storage.local is None:
        storage.delete(_path(before))


def new_writer() -> str:
    """Return a new name of a writer, such as a run. Names sort by their time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def _path(writer: str) -> str:
    return f"manifest/{MARKER_PREFIX}{writer}"


def _began(writer: str) -> str:
    return writer[:TIME_LETTERS]
