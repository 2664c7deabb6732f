"""Formats of exported data sets: which files they have, and the task of Ray Data that writes them.

Works on tables of rows and their files. Which rows those are, and which of them a data set has, is decided by `export.py`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from fractions import Fraction
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet
from more_itertools import batched
from pydantic import BaseModel, ConfigDict, field_validator

from vidgen_ray.errors import MediaError
from vidgen_ray.media import Mp4Settings, Mp4Writer, cover_crop, open_video, read_image, write_png
from vidgen_ray.media.images import image_size
from vidgen_ray.outputs.folder import REQUESTS_AT_ONCE
from vidgen_ray.outputs.storage import Storage, is_disk_full
from vidgen_ray.provenance.record import metadata_of, read_provenance
from vidgen_ray.system.cache_dir import sha256_of

if TYPE_CHECKING:
    from lance import LanceDataset

Format = Literal["videofolder", "webdataset", "parquet", "lance", "captions"]
SHARD_ENDING: dict[Format, str] = {"webdataset": ".tar", "parquet": ".parquet"}
"""Format whose files have many clips -> ending of these files."""
METADATA = "metadata.parquet"
"""File of a split of `videofolder` with a row per clip."""
PROPERTIES = ("sha256", "bytes", "width", "height", "num_frames", "fps", "duration_s")
"""Columns that change if a clip is encoded again."""
RESULTS = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("problem", pyarrow.string()),  # why the row was left out. With a null id: why the task failed
        ("is_full", pyarrow.bool_()),
        ("content", pyarrow.large_binary()),  # for lance, which this process writes
        ("sha256", pyarrow.string()),
        *((name, pyarrow.int64()) for name in ("bytes", "width", "height", "num_frames")),
        *((name, pyarrow.float64()) for name in ("fps", "duration_s")),
    ]
)
"""Result of a task: a row per clip, or one about the failure of the task."""
GROUP_BYTES = 64 << 20
"""Bytes of clips in a row group of Parquet."""
DECODED_FRAMES = 16
"""Frames that are encoded together."""
FEATURES = {"string": "string", "int64": "int64", "double": "float64", "bool": "bool"}
"""Type of Arrow -> type of `datasets`."""


class Transcode(BaseModel):
    """Settings of clips that are encoded again. Without any, their bytes are copied."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: str | None = None
    """WIDTHxHEIGHT in pixels, to which the clip is scaled and cropped around its centre, or the pixels of its shorter side."""
    fps: float | None = None
    """Frames per second. Frames are repeated or left out."""
    frames: int | None = None
    """Frames of every clip: its first ones. Shorter clips cannot be encoded."""

    @field_validator("resize")
    @classmethod
    def _check_resize(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d{1,4}|[1-9]\d{0,3}[02468]x[1-9]\d{0,3}[02468]", value):
            raise ValueError("must be WIDTHxHEIGHT in even numbers of pixels, or those of the shorter side")
        return value

    def __bool__(self) -> bool:
        return any(value is not None for _, value in self)


Row = dict[str, Any]


class Target(NamedTuple):
    """Source, destination and format of an export, for the tasks that write files."""

    source: Storage
    dest: Storage
    format: Format
    transcode: Transcode


def write_block(block: pyarrow.Table, target: Target) -> pyarrow.Table:
    """Task of Ray Data: write the clips of a block, for a format of shards all rows of one shard. Return rows of `RESULTS`.

    Columns of a block that start with `_` are not part of the data set: `_source` and `_bytes` (file in the output folder),
    `_file` (file or shard to write), `_sample` (name of the clip), `_keep` (the clip is in its place, only its caption is new).
    """
    rows, results = block.to_pylist(), list[dict[str, Any]]()

    def write(row: Row) -> None:
        for each in _clips([row], target, results):
            _write_clip(each, target)

    try:
        if target.format in SHARD_ENDING:
            clips = _clips(rows, target, results)
            # Without clips, there is no file.
            for first in islice(clips, 1):
                with target.dest.new_file(rows[0]["_file"]) as tmp:
                    if target.format == "webdataset":
                        _write_tar(tmp, chain([first], clips))
                    else:
                        _write_parquet(tmp, chain([first], clips), block)
        else:
            is_local = target.source.local is not None and target.dest.local is not None
            with ThreadPoolExecutor(1 if is_local else REQUESTS_AT_ONCE) as pool:
                list(pool.map(write, rows))
    # Raising it would wrap it in an error of Ray.
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        results = [{"problem": f"{path}{error.strerror or error}", "is_full": is_disk_full(error)}]
    return pyarrow.Table.from_pylist(results, RESULTS)


class Clip(NamedTuple):
    """A row with the local file of its clip, and the result of the task about it."""

    row: Row
    path: Path
    result: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.row['_sample']}{Path(self.row['_source']).suffix}"

    @property
    def record(self) -> dict[str, Any]:
        """The columns of the data set."""
        return {name: value for name, value in (self.row | self.result).items() if not name.startswith("_")}


def _clips(rows: Iterable[Row], target: Target, results: list[dict[str, Any]]) -> Iterator[Clip]:
    """Yield the rows that have a clip, encoded again if asked. Adds a result for each row. Raises OSError."""
    for row in rows:
        result = {"id": row["id"], **{name: row[name] for name in PROPERTIES}}
        try:
            with (
                target.source.local_copy(row["_source"]) as path,
                tempfile.TemporaryDirectory(prefix="vidgen-export-") if target.transcode else nullcontext("") as folder,
            ):
                if path.stat().st_size != row["_bytes"]:
                    raise FileNotFoundError
                if target.transcode:
                    encoded = Path(folder, f"clip{Path(row['_source']).suffix}")
                    result |= encode_again(path, encoded, target.transcode)
                    path = encoded
                yield Clip(row, path, result)
        except FileNotFoundError:
            result = {"id": row["id"], "problem": f"{row['_source']} is missing or incomplete, see vidgen verify --repair"}
        except MediaError as error:
            if is_disk_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            result = {"id": row["id"], "problem": str(error)}
        results.append(result)


def _write_clip(clip: Clip, target: Target) -> None:
    """Write a clip to a file of its own. A caption comes first, so that no clip is without one."""
    if target.format == "lance":
        clip.result["content"] = clip.path.read_bytes()
        return
    if target.format == "captions":
        target.dest.write(caption_file(clip.row["_file"]), clip.row["caption"])
    if not clip.row["_keep"]:
        _place(clip.path, target.dest, clip.row["_file"], may_link=target.source.local is not None and not target.transcode)


def caption_file(file: str) -> str:
    """Return the path of the caption of a clip."""
    return f"{file.rpartition('.')[0]}.txt"


def _place(path: Path, dest: Storage, file: str, *, may_link: bool) -> None:
    """Write a file with the content of `path`: a hard link if both are on one disk, otherwise a copy."""
    if may_link and dest.local is not None:
        to = dest.local / file
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, to)
            return
        # It exists, is on another disk, or the disk has no links.
        except OSError:
            if to.exists() and to.samefile(path):
                return
    with dest.new_file(file) as tmp:
        shutil.copyfile(path, tmp)


def _write_tar(tmp: Path, clips: Iterable[Clip]) -> None:
    """Write a shard of `webdataset`. Its bytes depend only on the rows and their clips."""

    def add(name: str, size: int, content: IO[bytes]) -> None:
        member = tarfile.TarInfo(name)
        member.size = size
        tar.addfile(member, content)

    with tarfile.open(tmp, "w", format=tarfile.GNU_FORMAT) as tar:
        for clip in clips:
            with clip.path.open("rb") as file:
                add(clip.name, clip.path.stat().st_size, file)
            record = json.dumps(clip.record, ensure_ascii=False)
            for ending, text in ((".json", record.encode()), (".txt", clip.row["caption"].encode())):
                add(f"{clip.row['_sample']}{ending}", len(text), BytesIO(text))


def _write_parquet(tmp: Path, clips: Iterable[Clip], block: pyarrow.Table) -> None:
    """Write a shard of `parquet` with the clips inside, which `datasets` reads as videos or images."""
    record = [field for field in block.schema if not field.name.startswith("_")]
    column = "image" if block["_source"][0].as_py().endswith(".png") else "video"
    features = {
        column: {"_type": column.capitalize()},
        **{field.name: {"dtype": FEATURES[str(field.type)], "_type": "Value"} for field in record},
    }
    content = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([(column, content), *record], {"huggingface": json.dumps({"info": {"features": features}})})
    group, size = list[dict[str, Any]](), 0
    with pyarrow.parquet.ParquetWriter(tmp, schema) as out:
        for clip in clips:
            group.append({column: {"bytes": clip.path.read_bytes(), "path": clip.name}, **clip.record})
            size += clip.result["bytes"]
            if size >= GROUP_BYTES:
                out.write_table(pyarrow.Table.from_pylist(group, schema))
                group, size = [], 0
        if group:
            out.write_table(pyarrow.Table.from_pylist(group, schema))


# Lance: a dataset per split, which only the driver writes. Each change is a version of it, which appears atomically.


def _lance(dest: Storage, split: str) -> LanceDataset | None:
    import lance

    path = Path(dest.local or "", f"{split}.lance")
    return lance.dataset(path) if path.is_dir() else None


def append_to_lance(dest: Storage, split: str, rows: pyarrow.Table, column: str, contents: Sequence[bytes]) -> None:
    """Append rows with their clips, of which a reader loads only what it asks for."""
    import lance

    schema = pyarrow.schema([*rows.schema, lance.blob_field(column)])
    table = pyarrow.Table.from_arrays([*rows.columns, lance.blob_array(list(contents))], schema=schema)
    mode = "append" if _lance(dest, split) else "create"
    lance.write_dataset(table, Path(dest.local or "", f"{split}.lance"), mode=mode, data_storage_version="2.2")


def delete_from_lance(dest: Storage, split: str, ids: Sequence[str]) -> None:
    """Delete rows, and their clips from the disk: older versions of the dataset are deleted, too."""
    dataset = _lance(dest, split)
    if dataset is None or not ids:
        return
    for some in batched(ids, 1_000):
        listed = ", ".join(f"'{each}'" for each in some)
        dataset.delete(f"id IN ({listed})")
    if not dataset.count_rows():
        shutil.rmtree(Path(dest.local or "", f"{split}.lance"))
        return
    dataset.optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0)
    dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)


def encode_again(path: Path, to: Path, transcode: Transcode) -> dict[str, Any]:
    """Encode a clip or an image as asked, with the marks of its origin. Return its properties. Raises MediaError."""
    marks = metadata_of(read_provenance(path).record)
    if to.suffix == ".png":
        width, height = _size(*image_size(path), transcode)
        write_png(to, cover_crop(read_image(path), width, height), marks)
        return _properties(to, width, height)
    with open_video(path) as video:
        fps = video.fps if transcode.fps is None else Fraction(str(transcode.fps))
        # Each frame is the one that is shown at its time.
        count = max(1, round(video.frame_count * fps / video.fps))
        if transcode.frames is not None and count < transcode.frames:
            raise MediaError(f"has {count} frames, fewer than --frames {transcode.frames}")
        shown = [min(int(number * video.fps / fps), video.frame_count - 1) for number in range(transcode.frames or count)]
        width, height = _size(video.width, video.height, transcode)
        with Mp4Writer(to, width, height, fps, Mp4Settings(), marks) as clip:
            for indices in batched(shown, DECODED_FRAMES):
                for frame in video.frames_at(indices):
                    scaled = frame if frame.shape[:2] == (height, width) else cover_crop(frame, width, height)
                    clip.write(scaled[None])
    return {
        **_properties(to, width, height),
        "num_frames": len(shown),
        "fps": float(fps),
        "duration_s": float(len(shown) / fps),
    }


def _size(width: int, height: int, transcode: Transcode) -> tuple[int, int]:
    """Return the width and height to which a clip of this size is scaled, both even."""
    wanted = [int(side) for side in (transcode.resize or f"{width}x{height}").split("x")]
    if len(wanted) == 1:
        factor = wanted[0] / min(width, height)
        wanted = [round(width * factor / 2) * 2, round(height * factor / 2) * 2]
    return wanted[0], wanted[1]


def _properties(file: Path, width: int, height: int) -> dict[str, Any]:
    return {"sha256": sha256_of(file), "bytes": file.stat().st_size, "width": width, "height": height}
