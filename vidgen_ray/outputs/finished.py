"""Finished shots of an output folder, found from its manifest instead of reading the record of every shot.

A row counts if its key is that of the plan and it still holds: on a disk, if `shot.json` has the time of the row and the files
have their sizes; in an object store, if no marker says otherwise (see `open_markers`). In all other cases the record decides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import FieldError
from vidgen_ray.outputs.folder import REQUESTS_AT_ONCE, OutputFolder
from vidgen_ray.outputs.manifest import (
    BATCH_ROWS,
    LIKENESS,
    SCHEMA,
    SHOT_FILES,
    is_trusted,
    manifest_files,
    open_writers,
    opened,
)
from vidgen_ray.outputs.records import RECORD, SHOTS, DoneShot, ShotSummary, id_digest, shot_path

KEY_BYTES = 16
"""Leading bytes of a content key that are compared."""
DIGEST_BYTES = 32
FLOATS = ("committed_at", "seconds", "gpu_seconds", *(name for name in LIKENESS if name != "frames_without_face"))
"""Columns that are NaN if they are null."""
INTEGERS = {"seed": "i8", "lora_loads": "i4", "frames_without_face": "i4", **{f"{name}_bytes": "i8" for name in SHOT_FILES}}
"""Columns that are -1 if they are null."""
HASHES = {"key": KEY_BYTES, **{f"{name}_sha256": DIGEST_BYTES for name in SHOT_FILES}}
"""Columns of hexadecimal text -> bytes kept. Zero if they are null."""
ROW = np.dtype(
    [
        ("script", "u4"),
        ("licences", "u4"),
        ("is_trusted", "?"),
        *((name, f"V{size}") for name, size in HASHES.items()),
        *((name, "f8") for name in FLOATS),
        *INTEGERS.items(),
    ]
)
"""A row in about 200 bytes: what a look-up and the manifest row of a skipped shot need."""
COLUMNS = ("run", "script", "licences", "commercial_use", *HASHES, *FLOATS, *INTEGERS)
"""Columns of the manifest from which the rows are filled."""
Licences = tuple[tuple[str | None, str], ...]
"""See `ShotSummary.licences`. Each licence has the commercial use of all of them together, as the manifest has no other."""


class FinishedShots:
    """The finished shots of an output folder by id. Immutable, for use by many processes.

    Instances can be pickled. Their arrays, about 210 bytes per shot, are then shared without a copy by stores such as Ray's.
    """

    def __init__(
        self,
        outputs: OutputFolder,
        ids: NDArray[np.uint64],
        rows: NDArray[np.void],
        scripts: Sequence[str],
        licences: Sequence[Licences],
        changed_by: Sequence[str],
    ) -> None:
        """`ids`: (N,) sorted hashes of ids. `rows`: (N,) of type `ROW`, in this order.

        `scripts`, `licences`: names of scripts, and licences of shots, that rows refer to by their index.
        """
        self._outputs = outputs
        self._ids = ids
        self._rows = rows
        self._scripts = scripts
        self._licences = licences
        self.changed_by = changed_by
        """Writers that may have changed shots without a row. Rows that are older are not trusted."""
        self._folders: dict[str, frozenset[str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return FinishedShots, (self._outputs, self._ids, self._rows, self._scripts, self._licences, self.changed_by)

    def __len__(self) -> int:
        return len(self._ids)

    @classmethod
    def load(
        cls, outputs: OutputFolder, changed_by: Sequence[str] | None = None, only: Sequence[str] | None = None
    ) -> FinishedShots:
        """Read the manifest. A million rows take 5 to 20 seconds and a peak of 400 MB.

        `only`: ids of the shots that are looked up. Takes less time and memory. Default: all shots.

        `changed_by`: writers that may have changed shots without a row. Default: those with a marker now, which includes a run
        that is writing. Raises OSError if the storage fails.
        """
        writers = open_writers(outputs.storage) if changed_by is None else changed_by
        while True:
            try:
                return cls(outputs, *_read_rows(outputs, writers, only), writers)
            except FileNotFoundError:
                # Without the lease, a run that ended meanwhile may have merged the files.
                continue

    def find(self, plans: Sequence[ShotPlan], with_stages: bool = False) -> list[DoneShot | None]:
        """Return for each plan its finished shot, or `None`.

        `with_stages` also requires the files of `--keep stages`, and reads every record. Sends concurrent requests to an object
        store. Raises OSError if the storage fails.
        """
        found: list[DoneShot | None] = [None] * len(plans)
        in_object_store = self._outputs.storage.local is None
        unsure, absent = list[int](), list[int]()
        for number, (plan, row) in enumerate(zip(plans, self._rows_of(plans), strict=True)):
            if row is None:
                (absent if in_object_store else unsure).append(number)
                continue
            has_key = row["key"] == _leading_bytes(plan.key)
            # With a minimal likeness, the result of another rule may count, too. Its record tells.
            if in_object_store and row["is_trusted"] and not has_key and plan.shot.min_identity is None:
                continue
            done = self._done_shot(plan, row) if has_key and not with_stages else None
            if done is not None and (row["is_trusted"] if in_object_store else self._holds_on_disk(done)):
                found[number] = done
            else:
                unsure.append(number)
        if in_object_store:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                existing = self._existing([plans[number] for number in absent], pool)
                unsure += [number for number in absent if plans[number].shot.id in existing]
                read = pool.map(lambda number: self._outputs.find_finished(plans[number], with_stages), unsure)
                for number, done in zip(unsure, read, strict=True):
                    found[number] = done
        else:
            for number in unsure:
                found[number] = self._outputs.find_finished(plans[number], with_stages)
        return found

    def other_owners(self, plans: Sequence[ShotPlan], scripts: Sequence[str]) -> list[str | None]:
        """Return for each plan the script that owns its id, or `None` if the shot may be rendered.

        `scripts` are the scripts of the plans. An id is owned by the script whose finished shot has it, with another key.
        """
        owners: list[str | None] = [None] * len(plans)
        numbers = {script: number for number, script in enumerate(self._scripts)}
        positions, is_known = self._positions_of(plans)
        known = np.flatnonzero(is_known)
        own_script = np.array([numbers.get(script, -1) for script in scripts], np.int64)[known]
        for number in known[self._rows["script"][positions[known]] != own_script].tolist():
            row = self._rows[positions[number]]
            if row["key"].tobytes() != _leading_bytes(plans[number].key):
                owners[number] = self._scripts[row["script"]]
        return owners

    def _positions_of(self, plans: Sequence[ShotPlan]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the position of the row of each plan's id, (N,), and whether there is such a row, (N,)."""
        ids = _hashes([plan.shot.id or "" for plan in plans])
        positions = np.searchsorted(self._ids, ids)
        is_known = positions < len(self._ids)
        is_known[is_known] = self._ids[positions[is_known]] == ids[is_known]
        return positions, is_known

    def _rows_of(self, plans: Sequence[ShotPlan]) -> Iterator[Mapping[str, Any] | None]:
        """Yield the manifest row of each plan's id, or `None`."""
        positions, is_known = self._positions_of(plans)
        rows = iter(self._rows[positions[is_known]].tolist())
        for has_row in is_known.tolist():
            yield dict(zip(ROW.names or (), next(rows), strict=True)) if has_row else None

    def _done_shot(self, plan: ShotPlan, row: Mapping[str, Any]) -> DoneShot | None:
        """Return the finished shot of a row with the key of the plan. `None` if the row has no files."""
        columns = [name for name in SHOT_FILES if row[f"{name}_bytes"] >= 0]
        if not columns or plan.shot.id is None:
            return None
        likeness = None
        if row["frames_without_face"] >= 0:
            likeness = {field: _not_nan(row[column]) for column, field in LIKENESS.items()}
        return DoneShot(
            ShotSummary(
                key=plan.key,
                folder=shot_path(plan.shot.id),
                committed_at=_not_nan(row["committed_at"]),
                seed=row["seed"] if row["seed"] >= 0 else None,
                likeness=likeness,
                sha256={SHOT_FILES[name]: row[f"{name}_sha256"].hex() for name in columns},
                bytes={SHOT_FILES[name]: row[f"{name}_bytes"] for name in columns},
                seconds=row["seconds"],
                gpu_seconds=row["gpu_seconds"],
                lora_loads=row["lora_loads"],
                licences=self._licences[row["licences"]],
            )
        )

    def _holds_on_disk(self, done: DoneShot) -> bool:
        """Return whether the shot was not written again since its manifest row, and its files have their sizes."""
        summary = done.summary
        folder = f"{self._outputs.storage.local}/{summary.folder}"
        try:
            return os.stat(f"{folder}/{RECORD}").st_mtime == summary.committed_at and all(
                os.stat(f"{folder}/{name}").st_size == size for name, size in summary.bytes.items()
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


def id_is_taken(script: str, line: int, shot_id: str, owner: str) -> FieldError:
    """Return the error of a line whose id belongs to a finished shot of the script `owner`."""
    allowed = (
        f"which is a finished shot of {owner} in this output folder; rename the id, use another output folder, "
        f"or replace the shot of {owner} with --replace"
    )
    return FieldError(script, line, "id", repr(shot_id), allowed)


def _not_nan(value: float) -> float | None:
    return value if value == value else None


def _leading_bytes(key: str) -> bytes:
    return bytes.fromhex(key[: 2 * KEY_BYTES])


def _hashes(ids: Sequence[str]) -> NDArray[np.uint64]:
    """Return the first 64 bits of the sha256 of each id. Two of a million ids are equal with a probability of 3e-8."""
    return np.frombuffer(b"".join([id_digest(id_)[:8] for id_ in ids]), ">u8").astype(np.uint64)


def _read_rows(
    outputs: OutputFolder, changed_by: Sequence[str], only: Sequence[str] | None
) -> tuple[NDArray[np.uint64], NDArray[np.void], Sequence[str], Sequence[Licences]]:
    """Return the ids, rows, scripts and licences of `FinishedShots`. Rows are placed directly into the result: less memory."""
    storage = outputs.storage
    with ExitStack() as stack:
        names = manifest_files(storage)[::-1]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE if storage.local is None else 1) as pool:
            files = list(pool.map(lambda name: stack.enter_context(opened(storage, name)), names))
        ids, is_finished = _ids_and_states(files)
        # Sort by id, then by time. The last row of an id is current.
        order = np.argsort(ids, kind="stable")
        is_last = np.ones(len(order), bool)
        is_last[:-1] = ids[order[1:]] != ids[order[:-1]]
        is_wanted = True if only is None else np.isin(ids[order], _hashes(only))
        current = order[is_last & is_finished[order] & is_wanted]
        target = np.full(len(ids), -1, np.int64)
        target[current] = np.arange(len(current))
        ids = ids[current]
        rows = np.empty(len(current), ROW)
        scripts, licences = dict[str, int](), dict[str, int]()
        begin = 0
        for batch in _batches(files, COLUMNS):
            positions = target[begin : begin + len(batch)]
            begin += len(batch)
            is_current = positions >= 0
            if not is_current.any():
                continue
            _fill(rows, positions[is_current], batch.filter(pyarrow.array(is_current)), scripts, licences, changed_by)
    return ids, rows, list(scripts), list(map(_licences, licences))


def _parquet_file(content: pyarrow.NativeFile) -> pyarrow.parquet.ParquetFile | None:
    """Open a file. Return `None` if it is not a manifest of this package."""
    try:
        parquet = pyarrow.parquet.ParquetFile(content)
    except (pyarrow.ArrowException, OSError):
        return None
    return parquet if parquet.schema_arrow.equals(SCHEMA) else None


def _ids_and_states(files: Sequence[pyarrow.NativeFile]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return the hash of the id of every row, and whether its shot is finished."""
    hashes, is_finished = [np.empty(0, np.uint64)], [np.empty(0, bool)]
    for batch in _batches(files, ["id", "status"]):
        hashes.append(_hashes(batch.column("id").to_pylist()))
        is_finished.append(pc.not_equal(batch.column("status"), "failed").to_numpy(zero_copy_only=False))
    return np.concatenate(hashes), np.concatenate(is_finished)


def _batches(files: Sequence[pyarrow.NativeFile], columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Yield these columns of all rows in batches."""
    for file in files:
        # Opened here, since a Parquet reader keeps ten megabytes.
        parquet = _parquet_file(file)
        if parquet is None:
            continue
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            yield batch
        del parquet, batch
        # Otherwise the allocator keeps more than a hundred megabytes.
        pyarrow.default_memory_pool().release_unused()


def _fill(
    rows: NDArray[np.void],
    positions: NDArray[np.int64],
    batch: pyarrow.RecordBatch,
    scripts: dict[str, int],
    licences: dict[str, int],
    changed_by: Sequence[str],
) -> None:
    """Copy a batch of the manifest to these positions of `rows`. Adds its scripts and its licences, as text, to the others."""
    runs = batch.column("run").dictionary_encode()
    trusted = np.array([is_trusted(run, changed_by) for run in runs.dictionary.to_pylist()], bool)
    rows["is_trusted"][positions] = trusted[runs.indices.to_numpy()]
    rows["script"][positions] = _numbered(batch.column("script"), scripts)
    licences_and_use = [pc.fill_null(batch.column(name), "") for name in ("licences", "commercial_use")]
    rows["licences"][positions] = _numbered(pc.binary_join_element_wise(*licences_and_use, "\n"), licences)
    for name in FLOATS:
        rows[name][positions] = pc.fill_null(batch.column(name), np.nan).to_numpy(zero_copy_only=False)
    for name in INTEGERS:
        rows[name][positions] = pc.fill_null(batch.column(name), -1).to_numpy(zero_copy_only=False)
    for name, size in HASHES.items():
        rows[name][positions] = _from_hex(batch.column(name), size)


def _numbered(column: pyarrow.Array, numbers: dict[str, int]) -> NDArray[np.uint32]:
    """Return the number of each text. Adds new texts to `numbers`."""
    texts = column.dictionary_encode()
    of_texts = np.array([numbers.setdefault(text, len(numbers)) for text in texts.dictionary.to_pylist()], np.uint32)
    numbered: NDArray[np.uint32] = of_texts[texts.indices.to_numpy()]
    return numbered


def _licences(text: str) -> Licences:
    """Parse the columns `licences` and `commercial_use`, joined by a line feed. Empty if the row has none."""
    licences, commercial_use = text.split("\n")
    return tuple((licence, commercial_use) for licence in json.loads(licences or "[]"))


def _from_hex(column: pyarrow.Array, size: int) -> NDArray[np.void]:
    """Return the leading bytes of hexadecimal sha256 texts. Zero for null and for text that is not one."""
    zeros = "0" * 2 * DIGEST_BYTES
    is_digest = pc.fill_null(pc.match_substring_regex(column, f"^[0-9a-f]{{{2 * DIGEST_BYTES}}}$"), False)
    text = "".join(pc.if_else(is_digest, column, zeros).to_pylist())
    digests = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, DIGEST_BYTES)
    return np.ascontiguousarray(digests[:, :size]).view(f"V{size}")[:, 0]
