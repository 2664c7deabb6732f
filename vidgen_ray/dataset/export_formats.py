"""Formats of exported data sets: which files they have, and the task of Ray Data that writes them.

Works on tables of rows and their files. Which rows those are, and which of them a data set has, is decided by `export.py`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from fractions import Fraction
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from more_itertools import batched, constrained_batches

from vidgen_ray.dataset.export_rows import ExportSettings, Format
from vidgen_ray.errors import MediaError
from vidgen_ray.media.decode import open_foreign_video
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.media.images import cover_crop, image_size, read_image, write_png
from vidgen_ray.outputs.storage import REQUESTS_AT_ONCE, Storage, is_disk_full
from vidgen_ray.provenance.record import metadata_of, read_provenance
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.trainers import SourceClip, shown_frames

SHARD_ENDING: dict[Format, str] = {"webdataset": ".tar", "parquet": ".parquet"}
"""Format whose files have many clips -> ending of these files."""
_METADATA = "metadata.parquet"
"""File of a split of `videofolder` with a row per clip."""
PROPERTIES = {
    "sha256": pyarrow.string(),
    **dict.fromkeys(("bytes", "width", "height", "num_frames"), pyarrow.int64()),
    **dict.fromkeys(("fps", "duration_s"), pyarrow.float64()),
}
"""Columns that change if a clip is encoded again, with their types."""
_RESULTS = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("problem", pyarrow.string()),  # why the row was left out. With a null id: why the task failed
        ("is_full", pyarrow.bool_()),
        ("content", pyarrow.large_binary()),  # for lance, which this process writes
        *PROPERTIES.items(),
    ]
)
"""Result of a task: a row per clip, or one about the failure of the task."""
GROUP_BYTES = 64 << 20
"""Bytes of clips in a row group of Parquet."""
_DECODED_FRAMES = 16
"""Frames that are encoded together."""
_FEATURES = {"string": "string", "int64": "int64", "double": "float64", "bool": "bool"}
"""Type of Arrow -> type of `datasets`."""


Row = dict[str, Any]


class Target(NamedTuple):
    """Folders and settings of an export, for the tasks that write its files."""

    source: Storage
    dest: Storage
    settings: ExportSettings


def write_block(block: pyarrow.Table, target: Target) -> pyarrow.Table:
    """Task of Ray Data: write the clips of a block, for a format of shards all rows of one shard. Return rows of `_RESULTS`.

    Columns of a block that start with `_` are not part of the data set: `_source` and `_bytes` (file in the output folder),
    `_file` (file or shard to write), `_sample` (name of the clip).
    """
    rows, results = block.to_pylist(), list[dict[str, Any]]()

    def write(row: Row) -> None:
        for each in _clips([row], target, results):
            _write_clip(each, target)

    try:
        if target.settings.format in SHARD_ENDING:
            clips = _clips(rows, target, results)
            # Without clips, there is no file.
            for first in islice(clips, 1):
                with target.dest.new_file(rows[0]["_file"]) as tmp:
                    if target.settings.format == "webdataset":
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
    return pyarrow.Table.from_pylist(results, _RESULTS)


class ExportedClip(NamedTuple):
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


def _clips(rows: Iterable[Row], target: Target, results: list[dict[str, Any]]) -> Iterator[ExportedClip]:
    """Yield the rows that have a clip, encoded again if asked. Adds a result for each row. Raises OSError."""
    for row in rows:
        result = {"id": row["id"], **{name: row[name] for name in PROPERTIES}}
        try:
            with target.source.local_copy(row["_source"]) as path, tempfile.TemporaryDirectory(prefix="vidgen-") as folder:
                if path.stat().st_size != row["_bytes"]:
                    raise FileNotFoundError
                if target.settings.trainer:
                    with open_foreign_video(path) as video:
                        found = SourceClip(video.frame_count, float(video.fps), video.width, video.height)
                    if found != (expected := SourceClip(*(row[name] for name in SourceClip._fields))):
                        raise MediaError(f"{row['_source']} has {found}; its row says {expected}")
                if target.settings.resize or row["_encoded"]:
                    encoded = Path(folder, f"clip{Path(row['_source']).suffix}")
                    to = SourceClip(**row["_encoded"]) if row["_encoded"] else None
                    result |= encode_again(path, encoded, target.settings.resize, to)
                    path = encoded
                yield ExportedClip(row, path, result)
        except FileNotFoundError:
            result = {"id": row["id"], "problem": f"{row['_source']} is missing or incomplete, see vidgen verify --repair"}
        except MediaError as error:
            if is_disk_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            result = {"id": row["id"], "problem": str(error)}
        results.append(result)


def _write_clip(clip: ExportedClip, target: Target) -> None:
    """Write a clip to a file of its own. A caption comes first, so that no clip is without one."""
    if target.settings.format == "lance":
        clip.result["content"] = clip.path.read_bytes()
        return
    if target.settings.format == "captions":
        target.dest.write(caption_file(clip.row["_file"]), clip.row["caption"])
    if target.source.local and target.dest.local and not (target.settings.resize or clip.row["_encoded"]):
        to = target.dest.local / clip.row["_file"]
        to.parent.mkdir(parents=True, exist_ok=True)
        # Fails if they are on two disks, or the disk has no links.
        with suppress(OSError):
            os.link(clip.path, to)
            return
    with target.dest.new_file(clip.row["_file"]) as tmp:
        shutil.copyfile(clip.path, tmp)


def caption_file(file: str) -> str:
    """Return the path of the caption of a clip."""
    return f"{file.rpartition('.')[0]}.txt"


def _write_tar(tmp: Path, clips: Iterable[ExportedClip]) -> None:
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


def _write_parquet(tmp: Path, clips: Iterable[ExportedClip], block: pyarrow.Table) -> None:
    """Write a shard of `parquet` with the clips inside, which `datasets` reads as videos or images."""
    record = [field for field in block.schema if not field.name.startswith("_")]
    column = "image" if block["_source"][0].as_py().endswith(".png") else "video"
    features = {
        column: {"_type": column.capitalize()},
        **{field.name: {"dtype": _FEATURES[str(field.type)], "_type": "Value"} for field in record},
    }
    content = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([(column, content), *record], {"huggingface": json.dumps({"info": {"features": features}})})
    rows = ({column: {"bytes": clip.path.read_bytes(), "path": clip.name}, **clip.record} for clip in clips)
    with pyarrow.parquet.ParquetWriter(tmp, schema) as out:
        for group in constrained_batches(rows, GROUP_BYTES, get_len=lambda row: row["bytes"], strict=False):
            out.write_table(pyarrow.Table.from_pylist(list(group), schema))


# Lance: a dataset per split, which only the driver writes. Each change is a version of it, which appears atomically.


def append_to_lance(dest: Storage, split: str, rows: pyarrow.Table, column: str) -> None:
    """Append rows, with `content` as the clip in `column`, of which a reader loads only what it asks for."""
    import lance

    contents = lance.blob_array(rows["content"].to_pylist())
    table = rows.drop_columns("content").append_column(lance.blob_field(column), contents)
    path = Path(dest.local or "", f"{split}.lance")
    lance.write_dataset(table, path, mode="append" if path.is_dir() else "create", data_storage_version="2.2")


def delete_from_lance(dest: Storage, split: str, ids: Sequence[str]) -> None:
    """Delete rows, and their clips from the disk: older versions of the dataset are deleted, too."""
    import lance

    path = Path(dest.local or "", f"{split}.lance")
    if not ids or not path.is_dir():
        return
    dataset = lance.dataset(path)
    for some in batched(ids, 1_000):
        listed = ", ".join(f"'{each}'" for each in some)
        dataset.delete(f"id IN ({listed})")
    if not dataset.count_rows():
        shutil.rmtree(path)
        return
    dataset.optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0)
    dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)


def encode_again(path: Path, to: Path, resize: str | None, clip: SourceClip | None = None) -> dict[str, Any]:
    """Encode a clip or an image again, with the marks of its origin. Return its properties. Raises MediaError.

    `resize`: width and height, or the shorter side. `clip`: all properties of the result, in place of it.
    """
    marks = metadata_of(read_provenance(path).record)
    if to.suffix == ".png":
        width, height = _size(*image_size(path), resize)
        write_png(to, cover_crop(read_image(path), width, height), marks)
        timing = {}
    else:
        with open_foreign_video(path) as video:
            size = _size(video.width, video.height, resize)
            clip = clip or SourceClip(video.frame_count, float(video.fps), *size)
            shown, fps = shown_frames(video.frame_count, video.fps, clip), Fraction(clip.fps).limit_denominator(1001)
            with Mp4Writer(to, clip.width, clip.height, fps, Mp4Settings(), marks) as written:
                for indices in batched(shown, _DECODED_FRAMES):
                    frames = video.frames_at(indices)
                    written.write(np.stack([cover_crop(frame, clip.width, clip.height) for frame in frames]))
        width, height = clip.width, clip.height
        timing = {"num_frames": len(shown), "fps": float(fps), "duration_s": float(len(shown) / fps)}
    return {"sha256": sha256_of(to), "bytes": to.stat().st_size, "width": width, "height": height, **timing}


def _size(width: int, height: int, resize: str | None) -> tuple[int, int]:
    """Return the width and height to which a clip of this size is scaled, both even."""
    wanted = [int(side) for side in (resize or f"{width}x{height}").split("x")]
    if len(wanted) == 1:
        factor = wanted[0] / min(width, height)
        wanted = [round(width * factor / 2) * 2, round(height * factor / 2) * 2]
    return wanted[0], wanted[1]
