"""Manifest `manifest/*.parquet`: a row per shot, see `fate_of_rows`; and the finished shots, found from their rows.

The row of a finished shot counts if its key is that of the plan and it still holds. Otherwise the record of the shot decides.
On a disk, a row holds if `shot.json` has its time and the files have their sizes. In an object store that would take a request
per shot, so a marker `manifest/.open-<writer>` marks a running writer: rows older than it are not trusted. Rows are trusted if
no marker is as new as their run. A run leaves a marker until it has a row for every shot that it wrote. A writer without
manifest rows leaves one for every shot. A server needs none: it derives the id of a shot from its content key, so it never
changes a shot of a row.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from datetime import UTC, datetime
from functools import cache, cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from pyarrow import compute
from pydantic import BaseModel, ConfigDict, Field, create_model

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import FieldError, encodable
from vidgen_ray.graph import clip_length, file_sizes
from vidgen_ray.licences import worst_use
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import in_order, last_number, number_of
from vidgen_ray.outputs.records import (
    HD_FILE,
    IMAGE_FILE,
    RECORD,
    SCORES,
    SHOTS,
    VIDEO_FILE,
    Failure,
    ShotRecord,
    shot_path,
)
from vidgen_ray.outputs.storage import REQUESTS_AT_ONCE, Storage, no_results, storage_at
from vidgen_ray.safety import Consent
from vidgen_ray.shot import GUIDANCE_SCALES, LORA_FIELDS, NESTED_FIELDS, STAGES_WITH_STEPS, Shot, types_in

SHOT_FILES = {"image": IMAGE_FILE, "video": VIDEO_FILE, "hd_video": HD_FILE}
"""Manifest column -> file in the folder of the shot."""
FILE_COLUMNS = ("video", "hd_video", "image")
"""Manifest columns with a file. The first that a shot has is its clip, which is scored and reviewed."""
LIKENESS_COLUMNS = {
    "image_likeness": "image",
    "clip_likeness_mean": "clip_mean",
    "clip_likeness_worst": "clip_worst",
    "frames_without_face": "frames_without_face",
}
"""Manifest column -> field of `LikenessRecord`."""
SCORER = re.compile(r"(\w+)@(\d+)")
"""Name of a folder in `scores/`: scorer and version."""
Status = Literal["done", "failed", "replaced"]
"""State of a shot."""
LastRun = Literal["rendered", "reused", "failed"]
"""Action of the last run that processed a shot."""
REPLACED = "replaced"
"""`status` of a finished shot whose line the script no longer has."""
VERSION = 1
"""Version of the columns. Raised when the type or the meaning of one changes, not when one is added."""
REJECTED = "script"
"""`failure_stage` of a line that was rejected when the script was read."""
BATCH_ROWS = 10_000
INDEX = ["run", "script", "id", "status", "failure_stage"]
"""Columns that decide whether a row is current."""
MARKER_PREFIX = ".open-"


def _now() -> datetime:
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


class _Columns(BaseModel):
    """Result of one script line: the clip, its files and its settings.

    Columns that do not apply are null. Paths are relative to the output folder.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, json_schema_extra={"version": VERSION}
    )

    run: str
    """Run that wrote the row. Runs are numbered, and their names have that of `--name`."""
    team: str | None = None
    """Team of the run."""
    submission_id: str | None = None
    """Submission id of the Ray job."""
    script: str
    id: str
    line: int | None
    """Line number in the script, from 1."""
    status: Status
    """State of the shot: done (it has its files), failed, or replaced (its script no longer has the line)."""
    last_run: LastRun | None = None
    """Action of the last run that processed the line: rendered, reused (finished before), or failed."""
    key: str | None = None
    """Content key: the same key stands for the same bytes."""
    prompt: str | None = None
    cut_tokens: int | None = None
    """Tokens at the end of the prompt that the stage did not read that cuts most of it. 0: all was read."""
    mode: str | None = None
    seed: int | None = None
    """Seed used for a finished shot. With `max_tries` it may differ from the seed in the script."""
    width: int | None = None
    """Width in pixels before upscaling and cropping."""
    height: int | None = None
    """Height in pixels before upscaling and cropping."""
    hd_width: int | None = None
    """Width in pixels of the upscaled clip."""
    hd_height: int | None = None
    """Height in pixels of the upscaled clip."""
    num_frames: int | None = None
    """Frames of the clip files."""
    fps: int | None = None
    """Frames per second of the clip files."""
    duration_s: float | None = None
    """Seconds that the clip lasts."""
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
    cost: float | None = None
    """`gpu_seconds` at the price of a GPU-hour in the run that rendered the shot. Null without GPUs."""
    currency: str | None = None
    """Currency of `cost` at a default price of the GPUs. Null if the price is the user's, which has no currency."""
    lora_loads: int | None = None
    """LoRAs loaded onto the weights while the shot was rendered."""
    licences: list[str | None] | None = None
    """Licences of the weights behind the shot. Null in it: an unknown licence."""
    commercial_use: str | None = None
    """Commercial use under all of these licences: yes, conditional, no, or unknown."""
    consent: dict[str, str | None] | None = None
    """Consent of the shot: subject, basis and reference. Null without a face photo."""
    failure_stage: str | None = None
    failure_error: str | None = None
    failure_message: str | None = None
    failure_attempts: int | None = None
    failure_worker: str | None = None
    metadata: str = "{}"
    """`metadata` of the line, as JSON text, with its values of a `matrix` under that name, and its `matrix_number`."""
    ended_at: datetime = Field(default_factory=_now)
    """Time at which the last run had its result, in UTC."""
    committed_at: float | None = None
    """Modification time of the shot's shot.json, in seconds since 1970. Null in an object store."""

    @property
    def shows_no_face(self) -> bool:
        """Return whether no face was found in the image of a shot with a face photo."""
        return self.frames_without_face is not None and self.image_likeness is None

    @staticmethod
    def of_shot(
        run: str, script: str, shot: Shot, line: int | None, result: Finished | Failure, last_run: LastRun
    ) -> ManifestRow:
        """Return the row of a rendered, reused or failed shot. Values are not validated again, for speed."""
        place = {"run": run, "script": script, "line": line, "last_run": last_run}
        if isinstance(result, ManifestRow):
            return _row(**{**vars(result), **_settings_of(shot), **place, "seed": result.seed, "status": "done"})
        if isinstance(result, Failure):
            return _row(**place, **_shot_columns(shot), **_failure_columns(result))
        return _row(**place, **{**_shot_columns(shot), **_result_columns(result)})

    @staticmethod
    def of_rejected_line(run: str, script: str, line_id: str, line: int, prompt: object, failure: Failure) -> ManifestRow:
        """Return the row of a line that was rejected when the script was read."""
        return _row(
            run=run,
            script=script,
            id=line_id,
            line=line,
            last_run="failed",
            prompt=encodable(prompt) if isinstance(prompt, str) else None,
            **_failure_columns(failure),
        )


SETTINGS = {
    "start_image" if name == "image" else name: name
    for name in Shot.model_fields
    if name == "image" or (name not in _Columns.model_fields and name not in ("variants", "character", "priority", "aspect"))
}
"""Column -> field of the shot. The other fields are columns of their own, part of `metadata`, or say nothing about files."""
STRUCTS = {
    "lora": [("path", pyarrow.string()), ("weight", pyarrow.float64())],
    "video_lora": [("path", pyarrow.string()), ("weight", pyarrow.float64()), ("expert", pyarrow.string())],
    "consent": [(name, pyarrow.string()) for name in Consent.model_fields],
    "steps": [(stage, pyarrow.int64()) for stage in STAGES_WITH_STEPS],
    "guidance": [(name, pyarrow.float64()) for name in GUIDANCE_SCALES],
}
"""Column -> entries of its structs."""


SCALARS = {column: name for column, name in SETTINGS.items() if name not in (*STRUCTS, "face_image")}
_CLIP_COLUMNS = ("hd_width", "hd_height", "num_frames", "fps", "duration_s")
"""Columns about the files of the clip, which follow from several fields of the shot."""
_scalars_of = attrgetter(*SCALARS.values())


def _shot_columns(shot: Shot) -> dict[str, Any]:
    """Return the columns of a shot before it has a result."""
    n_frames, fps = clip_length(shot) if shot.generate_video else (None, None)
    hd_width, hd_height = file_sizes(shot).get("hd_frames", (None, None))
    sizes = (hd_width, hd_height, n_frames, fps, n_frames / fps if n_frames and fps else None)
    return {**dict(zip(_CLIP_COLUMNS, sizes, strict=True)), **_settings_of(shot)}


def _settings_of(shot: Shot) -> dict[str, Any]:
    """Return the columns of a shot with its own fields."""
    return {
        "id": shot.id,
        "prompt": shot.prompt,
        "mode": shot.mode,
        "seed": shot.seed,
        "width": shot.width,
        "height": shot.height,
        "consent": shot.consent.model_dump() if shot.consent else None,
        "metadata": json.dumps(shot.metadata) if shot.metadata else "{}",
        **dict(zip(SCALARS, _scalars_of(shot), strict=True)),
        "face_image": list(shot.face_image),
        **{name: [lora.model_dump() for lora in getattr(shot, name)] for name in LORA_FIELDS},
        **{
            name: {stage: value for stage, value in vars(getattr(shot, name)).items() if value is not None}
            for name in NESTED_FIELDS
        },
    }


def _type_of(column: str, annotation: Any) -> pyarrow.DataType:
    """Return the type of a column: that of the first scalar type in the annotation of its field."""
    if column in STRUCTS:
        struct = pyarrow.struct(STRUCTS[column])
        return pyarrow.list_(struct) if column in LORA_FIELDS else struct
    if column in ("licences", "face_image"):
        return pyarrow.list_(pyarrow.string())
    found = {each if isinstance(each, type) else type(each) for each in types_in(annotation)}
    scalars = {
        bool: pyarrow.bool_(),
        datetime: pyarrow.timestamp("ms", "UTC"),
        float: pyarrow.float64(),
        int: pyarrow.int64(),
    }
    return next((arrow for scalar, arrow in scalars.items() if scalar in found), pyarrow.string())


def _setting(name: str) -> tuple[Any, Any]:
    """Return type and description of the column of a setting."""
    field = Shot.model_fields[name]
    nested: dict[str, Any] = {"face_image": list[str], **dict.fromkeys(LORA_FIELDS, list[dict[str, Any]])}
    kind: Any = nested.get(name, dict[str, Any] if name in STRUCTS else field.annotation)
    return kind | None, Field(default=None, description=field.description)


if TYPE_CHECKING:

    class ManifestRow(_Columns):
        """`_Columns` with a column for each of `SETTINGS`."""

        def __getattr__(self, column: str) -> Any: ...
else:
    ManifestRow = create_model(
        "ManifestRow",
        __base__=_Columns,
        __module__=__name__,
        __doc__=_Columns.__doc__,
        **{column: _setting(name) for column, name in SETTINGS.items()},
    )


_EMPTY = ManifestRow.model_construct(**dict[str, Any]())


def _row(**columns: Any) -> ManifestRow:
    """Return a row with these columns. Copying an empty one takes a fraction of the time of `model_construct`."""
    row = copy(_EMPTY)
    vars(row).update(columns, ended_at=_now())
    return row


def _failure_columns(failure: Failure) -> dict[str, Any]:
    columns = {f"failure_{name}": value for name, value in failure.model_dump().items()}
    return {"status": "failed", **columns, "failure_message": encodable(failure.message)}


def _result_columns(result: ShotRecord) -> dict[str, Any]:
    """Return the columns of a finished shot, without its cost."""
    columns: dict[str, Any] = {
        "status": "done",
        "key": result.key,
        "committed_at": result.committed_at,
        "seed": result.shot.seed,
        "seconds": sum(step.seconds for step in result.stages),
        "gpu_seconds": sum(step.gpu_seconds for step in result.stages),
        "lora_loads": sum(step.adapter_loads for step in result.stages),
        "cut_tokens": max((cut.tokens - cut.read for cut in result.cut_texts), default=0),
    }
    if result.licences:
        columns["licences"] = sorted({used.licence for used in result.licences}, key=str)
        columns["commercial_use"] = worst_use(used.commercial_use for used in result.licences)
    if result.likeness is not None:
        columns |= {column: getattr(result.likeness, field) for column, field in LIKENESS_COLUMNS.items()}
    for name, file in SHOT_FILES.items():
        if file in result.files:
            columns[name] = f"{result.folder}/{file}"
            columns[f"{name}_sha256"] = result.files[file].sha256
            columns[f"{name}_bytes"] = result.files[file].bytes
    return columns


SCHEMA = pyarrow.schema(
    [(name, _type_of(name, field.annotation)) for name, field in ManifestRow.model_fields.items()],
    {"vidgen.manifest": str(VERSION)},
)
"""The same for every run, so that the folder can be read as one table."""


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
    """Return the paths of all manifest files, newest first: names start with the run, and that with the number of its lease."""
    paths = parquet_files(storage, "manifest")
    return sorted(paths, key=lambda path: in_order(path.removeprefix("manifest/")), reverse=True)


def parquet_files(storage: Storage, folder: str) -> list[str]:
    """Return the paths of the Parquet files of a folder, sorted. Leaves out temporary and damaged ones."""
    names = sorted(storage.files(folder))
    return [f"{folder}/{name}" for name in names if name.endswith(".parquet") and not name.startswith(".")]


def score_files(storage: Storage) -> dict[str, list[str]]:
    """Return scorer -> paths of the Parquet files of its newest version, the oldest first."""
    versions = defaultdict[str, list[int]](list)
    for folder in storage.folders(SCORES):
        if found := SCORER.fullmatch(folder):
            versions[found[1]].append(int(found[2]))
    files = {name: parquet_files(storage, f"{SCORES}/{name}@{max(each)}") for name, each in sorted(versions.items())}
    return {name: paths for name, paths in files.items() if paths}


def check_has_manifest(storage: Storage) -> None:
    """Raise SetupError for a folder without a manifest."""
    if not manifest_files(storage):
        raise no_results(storage)


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
            status = compute.if_else(pyarrow.array(file.replaced[rows]), REPLACED, batch.column(position))
            batch = batch.set_column(position, "status", status)
        yield batch if file.current[rows].all() else batch.filter(pyarrow.array(file.current[rows]))


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
            if writer == run or oldest_run is None or number_of(writer) < number_of(oldest_run):
                storage.delete(_path(writer))


def open_writers(storage: Storage) -> Sequence[str]:
    """Return the writers that left a marker. Empty on a disk."""
    if storage.local is not None:
        return ()
    return [name.removeprefix(MARKER_PREFIX) for name in storage.files("manifest") if name.startswith(MARKER_PREFIX)]


def is_trusted(run: str, open_writers: Sequence[str]) -> bool:
    """Return whether the rows of a run hold, although the given writers have changed shots."""
    return all(run == writer or number_of(run) > number_of(writer) for writer in open_writers)


@contextmanager
def shot_without_row(storage: Storage) -> Iterator[None]:
    """Mark that the block may write a shot that gets no manifest row."""
    if storage.local is not None:
        yield
        return
    before = f"{last_number(storage)}-{new_name()}"
    write_marker(storage, before)
    yield
    # A run that began during the block may have read the old shot. It deletes only markers of writers that began before it.
    write_marker(storage, f"{last_number(storage)}-{new_name()}")
    storage.delete(_path(before))


def new_name(prefix: str | None = None) -> str:
    """Return a new name for a run or another writer."""
    return f"{f'{prefix}-' if prefix else ''}{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def _path(writer: str) -> str:
    return f"manifest/{MARKER_PREFIX}{writer}"


_COLUMNS = (
    *("run", "script", "id", "status", "key", "committed_at", "seed", "seconds", "gpu_seconds", "cost", "currency"),
    *("lora_loads", "cut_tokens", "licences", "commercial_use", *_CLIP_COLUMNS, *LIKENESS_COLUMNS),
    *(f"{name}{end}" for name in SHOT_FILES for end in ("", "_sha256", "_bytes")),
)
"""Columns of the manifest that a look-up and the row of a reused shot need."""
Finished = ShotRecord | ManifestRow
"""A finished shot: its record, or its row in the manifest if that holds. Without settings, which are those of its line."""


class FinishedShots:
    """The finished shots of an output folder by id. Immutable, for use by many processes.

    Instances can be pickled. Their rows, some 500 bytes per shot, are then shared without a copy by stores such as Ray's.
    """

    def __init__(self, outputs: OutputFolder, rows: pyarrow.Table, changed_by: Sequence[str]) -> None:
        """`rows`: the current rows of finished shots, with `_COLUMNS`."""
        self._outputs = outputs
        self._rows = rows
        self.changed_by = changed_by
        """Writers that may have changed shots without a row. Rows that are older are not trusted."""
        self._folders: dict[str, frozenset[str]] = {}
        self._is_of_another = cache(self._rows_of_others)

    def __reduce__(self) -> tuple[Any, ...]:
        return FinishedShots, (self._outputs, self._rows, self.changed_by)

    def __len__(self) -> int:
        return len(self._rows)

    @classmethod
    def load(cls, outputs: OutputFolder) -> FinishedShots:
        """Read the manifest. Rows of shots that writers with a marker may have changed are not trusted.

        These include a run that is writing. Raises OSError if the storage fails.
        """
        writers = open_writers(outputs.storage)
        batches = [
            # Without its type, pyarrow imports pandas for the text.
            batch.filter(compute.not_equal(batch.column("status"), pyarrow.scalar("failed", pyarrow.string()))).select(_COLUMNS)
            for batch in manifest_batches(outputs.storage, _COLUMNS)
        ]
        schema = pyarrow.schema([SCHEMA.field(name) for name in _COLUMNS])
        return cls(outputs, pyarrow.Table.from_batches(batches, schema).combine_chunks(), writers)

    @cached_property
    def _positions(self) -> dict[str, int]:
        """Id -> position of its row."""
        return {shot_id: position for position, shot_id in enumerate(self._rows.column("id").to_pylist())}

    def _rows_of(self, plans: Sequence[ShotPlan]) -> list[dict[str, Any] | None]:
        """Return the manifest row of each plan's id, or `None`."""
        if not len(self._rows):
            return [None] * len(plans)  # pyarrow imports pandas for an array
        positions = [self._positions.get(plan.shot.id or "") for plan in plans]
        known = pyarrow.array([position for position in positions if position is not None], pyarrow.int64())
        rows = iter(self._rows.take(known).to_pylist())
        return [None if position is None else next(rows) for position in positions]

    def find(self, plans: Sequence[ShotPlan], with_stages: bool = False) -> list[Finished | None]:
        """Return for each plan its finished shot, or `None`.

        `with_stages` also requires the files of `--keep stages`, and reads every record. Sends concurrent requests to an object
        store. Raises OSError if the storage fails.
        """
        found: list[Finished | None] = [None] * len(plans)
        in_object_store = self._outputs.storage.local is None
        unsure, absent, rows = list[int](), list[int](), self._rows_of(plans)
        for number, (plan, row) in enumerate(zip(plans, rows, strict=True)):
            if row is None:
                (absent if in_object_store else unsure).append(number)
                continue
            has_key, trusted = row["key"] == plan.key, is_trusted(row["run"], self.changed_by)
            # With a minimal likeness, the result of another rule may count, too. Its record tells.
            if in_object_store and trusted and not has_key and plan.shot.min_identity is None:
                continue
            has_files = any(row[name] is not None for name in SHOT_FILES)
            if has_key and has_files and not with_stages and (trusted if in_object_store else self._holds_on_disk(row)):
                found[number] = _row(**row)
            else:
                unsure.append(number)
        if in_object_store:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                existing = self._existing([plans[number] for number in absent], pool)
                unsure += [number for number in absent if plans[number].shot.id in existing]
                read = pool.map(lambda number: self._outputs.find_finished(plans[number], with_stages), unsure)
                for number, record in zip(unsure, read, strict=True):
                    found[number] = _found(plans[number], record, rows[number])
        else:
            for number in unsure:
                record = self._outputs.find_finished(plans[number], with_stages)
                found[number] = _found(plans[number], record, rows[number])
        return found

    def other_owner(self, shot_id: str, key: str | None, script: str) -> str | None:
        """Return the script whose finished shot has this id, with another key. `None` if `script` may render the shot."""
        position = self._positions.get(shot_id)
        if position is None or not self._is_of_another(script)[position]:
            return None
        owner, finished_key = (self._rows.column(name)[position].as_py() for name in ("script", "key"))
        return owner if finished_key != key else None

    def _rows_of_others(self, script: str) -> list[bool]:
        """Return for each row whether it is of another script."""
        others: list[bool] = compute.not_equal(
            self._rows.column("script"), pyarrow.scalar(script, pyarrow.string())
        ).to_pylist()
        return others

    def _holds_on_disk(self, row: Mapping[str, Any]) -> bool:
        """Return whether the shot was not written again since its manifest row, and its files have their sizes."""
        root = self._outputs.storage.local
        try:
            return os.stat(f"{root}/{shot_path(row['id'])}/{RECORD}").st_mtime == row["committed_at"] and all(
                os.stat(f"{root}/{row[name]}").st_size == row[f"{name}_bytes"] for name in SHOT_FILES if row[name] is not None
            )
        # Reading the record will raise the error again, unless a file is missing.
        except OSError:
            return False

    def _existing(self, plans: Sequence[ShotPlan], pool: ThreadPoolExecutor) -> set[str | None]:
        """Return the ids of the plans for which the object store has a folder.

        A listing of a shard takes one request per thousand shots, reading the record of each shot one per shot.
        """
        if not plans:
            return set()
        if SHOTS not in self._folders:
            self._folders[SHOTS] = frozenset(self._outputs.storage.folders(SHOTS))
        top = self._folders[SHOTS]
        shards = {os.path.dirname(shot_path(plan.shot.id or "")) for plan in plans} - self._folders.keys()
        new = sorted(shard for shard in shards if os.path.basename(shard) in top)
        self._folders.update(zip(new, map(frozenset, pool.map(self._outputs.storage.folders, new)), strict=True))
        return {
            plan.shot.id
            for plan in plans
            if plan.shot.id in self._folders.get(os.path.dirname(shot_path(plan.shot.id or "")), ())
        }


def _found(plan: ShotPlan, record: ShotRecord | None, row: Mapping[str, Any] | None) -> Finished | None:
    """Return a shot that was found by its record, with the key of the plan; if its row has that, too, with the row's cost."""
    if record is None:
        return None
    record = record.model_copy(update={"key": plan.key})
    if row is None or row["key"] != plan.key:
        return record
    known = {name: row[name] for name in ("run", "script", "cost", "currency")}
    return _row(**{**_shot_columns(plan.shot), "line": None, **_result_columns(record), **known})


def id_is_taken(script: str, line: int, shot_id: str, owner: str) -> FieldError:
    """Return the error of a line whose id belongs to a finished shot of the script `owner`."""
    allowed = (
        f"which is a finished shot of {owner} in this output folder; rename the id, use another output folder, "
        f"or replace the shot of {owner} with --replace"
    )
    return FieldError(script, line, "id", repr(shot_id), allowed)
