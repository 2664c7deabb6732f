"""Clean up an output folder: garbage that nothing refers to, what shows a person, and the shots of removed lines."""

from __future__ import annotations

import json
import posixpath
import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from vidgen_ray.graph import STAGES
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import (
    REJECTED,
    REPLACED,
    SHOT_FILES,
    check_has_manifest,
    manifest_batches,
    manifest_files,
    new_name,
    opened,
    parquet_files,
)
from vidgen_ray.outputs.manifest_writer import drop_rows
from vidgen_ray.outputs.records import KEYS, RECORD, SCORES, SHARD, SHOTS, shot_path
from vidgen_ray.outputs.reviews import drop_reviews
from vidgen_ray.outputs.stage_cache import CONTENT_KEY, REMOTE_JOBS, entry_path
from vidgen_ray.outputs.storage import Storage, StoredFile, no_results
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.files import remove

MIN_AGE_S = 600.0
"""Minimum age of garbage, in seconds. Younger files may be in use by a `VideoGenerationPipeline`, which takes no lease."""
SHOT_FILE_NAMES = {*SHOT_FILES.values(), *(stage.debug_file for stage in STAGES if stage.debug_file)}
_Kind = Literal["cache entries", "partial shots", "stale keys", "temporaries"]
_FEATURES = InstantIDStage.debug_file
"""File of a shot with the features of its face, which `--keep stages` writes."""
INPUTS = "inputs"
KEPT_PHOTO = re.compile(r"([0-9a-f]{16})(?:[0-9a-f]{48})?(?:\.[a-z]+)?")
"""Name of a photo that vidgen has stored: its sha256, or the first 16 digits of it."""


@dataclass(slots=True)
class GarbageReport:
    """Counts of what was removed, or would be removed in a dry run."""

    counts: dict[_Kind, int] = field(
        default_factory=lambda: {"cache entries": 0, "partial shots": 0, "stale keys": 0, "temporaries": 0}
    )
    bytes: int = 0
    """Size of all removed files."""
    left_young: int = 0
    """Unreferenced entries that are younger than the grace period and were kept."""

    def add(self, kind: _Kind, size: int) -> None:
        self.counts[kind] += 1
        self.bytes += size


def collect_garbage(outputs: OutputFolder, *, dry_run: bool = False, grace_s: float = MIN_AGE_S) -> GarbageReport:
    """Remove garbage from an output folder.

    Garbage is: cache entries that no shot.json names, shots without shot.json, key files without a finished shot,
    jobs of servers whose clip a shot.json names, and temporary files of killed processes.

    Raises SetupError if the folder does not exist, a run is working in it, or a run takes the folder over after this process
    was suspended.
    """
    check_not_empty(outputs)
    run = f"gc-{secrets.token_hex(3)}"
    with outputs.lease(run) as lease:
        # Current time by the clock of the storage.
        now = outputs.storage.files("")[lease.name].modified
        return _Collector(outputs, lease, now - grace_s, dry_run).collect()


def check_not_empty(outputs: OutputFolder) -> None:
    """Raise SetupError for a folder without content, which is probably the wrong one."""
    if not (outputs.storage.folders("") or outputs.storage.files("")):
        raise no_results(outputs.storage)


class _Collector:
    def __init__(self, outputs: OutputFolder, lease: Lease, young_since: float, dry_run: bool) -> None:
        """`young_since`: time in seconds since 1970, by the clock of the storage."""
        self._outputs, self._storage = outputs, outputs.storage
        self._cache = outputs.stage_cache
        self._lease = lease
        self._used_keys = set[str]()
        """Step keys of all finished shots. Filled from their records."""
        self._shots_by_key = set[str]()
        """`KEY ID` of each finished shot."""
        self._young_since = young_since
        self._dry_run = dry_run
        self._report = GarbageReport()

    def collect(self) -> GarbageReport:
        for folder in self._shots_without_record():
            # Keep folders with foreign files or subfolders.
            if not self._storage.folders(folder) and self._storage.files(folder).keys() <= SHOT_FILE_NAMES:
                self._drop_folder("partial shots", folder)
        for key_file, file in self._stale_keys():
            self._drop("stale keys", key_file, [file], self._storage.delete)
        for key in self._cache.stored_keys():
            if key not in self._used_keys:
                self._drop_folder("cache entries", entry_path(key))
        for folder in (f"{REMOTE_JOBS}/{name}" for name in self._storage.folders(REMOTE_JOBS)):
            records = self._storage.files(folder)
            contents = self._storage.read_each(f"{folder}/{name}" for name in records)
            for name, record in zip(records, contents, strict=True):
                if json.loads(record or b"{}").get("key", "").partition("-")[0] in self._used_keys:
                    self._drop("temporaries", f"{folder}/{name}", [records[name]], self._storage.delete)
        for path in self._outputs.abandoned():
            files = path.rglob("*") if path.is_dir() else [path]
            self._report.add("temporaries", sum(file.stat().st_size for file in files if file.is_file()))
            self._delete(remove, path)
        return self._report

    def _shots_without_record(self) -> Iterator[str]:
        """Yield the shot folders without a record. Adds the keys in all other records to the indexes."""
        for folder, text in shot_records(self._storage):
            if text is None:
                yield folder
            else:
                key, keys = _keys_in(text)
                self._used_keys.update(keys)
                self._shots_by_key.add(f"{key} {posixpath.basename(folder)}")

    def _stale_keys(self) -> Iterator[tuple[str, StoredFile]]:
        """Yield the key files that do not lead to a shot finished with that key."""
        for folder in (f"{KEYS}/{name}" for name in self._storage.folders(KEYS) if SHARD.fullmatch(name)):
            files = self._storage.files(folder)
            keys = [name for name in files if CONTENT_KEY.fullmatch(name)]
            for key, shot_id in zip(keys, self._storage.read_each(f"{folder}/{key}" for key in keys), strict=True):
                if f"{key} {(shot_id or b'').decode(errors='replace')}" not in self._shots_by_key:
                    yield f"{folder}/{key}", files[key]

    def _drop_folder(self, kind: _Kind, folder: str) -> None:
        self._drop(kind, folder, self._storage.files(folder).values(), self._storage.delete_folder)

    def _drop(self, kind: _Kind, path: str, files: Collection[StoredFile], delete: Callable[[str], None]) -> None:
        if any(file.modified > self._young_since for file in files):
            self._report.left_young += 1
            return
        self._report.add(kind, sum(file.bytes for file in files))
        self._delete(delete, path)

    def _delete(self, delete: Callable[..., None], path: str | Path) -> None:
        if not self._dry_run:
            self._lease.check()
            delete(path)


def _keys_in(shot_json: bytes) -> tuple[str, Sequence[str]]:
    """Return the key of the shot and the keys of its steps."""
    try:
        record = json.loads(shot_json)
        return record["key"], [step["key"] for step in record["stages"]]
    # A damaged record has no keys. Its shot will be rendered again.
    except (ValueError, KeyError, TypeError):
        return "", []


@dataclass(frozen=True, slots=True)
class RemovalReport:
    """Files and results that were removed from an output folder, or would be removed in a dry run."""

    shots: tuple[str, ...]
    """Ids of the shots that were made with the person."""
    shots_removed: bool
    """The shots were removed, too."""
    cached_steps: int
    """Entries of the stage cache."""
    features: int
    """Files with face features beside shots."""
    photos: tuple[str, ...]
    """Photos that vidgen had stored."""


def photos_of_character(outputs: OutputFolder, name: str) -> set[str]:
    """Return the sha256 of the photos of the shots that name this character in their metadata."""
    return {sha256 for record in _records(outputs.storage) if _character(record) == name for sha256 in record["face_photos"]}


def remove_person(
    outputs: OutputFolder, photos: Set[str], character: str | None, *, with_shots: bool = False, dry_run: bool = False
) -> RemovalReport:
    """Delete what the folder and the cache of this machine hold of a person.

    `with_shots`: also the shots made with them, and their reviews and scores.
    `photos`: the sha256 of each photo of the person. `character`: their name in scripts.
    Cache entries that no finished shot names are deleted, too, since they may show the person.

    Raises SetupError if a run is using the folder.
    """
    storage = outputs.storage
    with outputs.lease(new_name()) as lease:
        shots, clips, features = list[str](), set[str](), list[tuple[str, dict[str, Any]]]()
        kept_keys, drop_keys = set[str](), set[str]()
        for record in _records(storage):
            keys = [step["key"] for step in record["stages"]]
            is_named = character is not None and _character(record) == character
            if not is_named and photos.isdisjoint(record["face_photos"]):
                kept_keys.update(keys)
                continue
            shots.append(record["shot"]["id"])
            clips.update(file["sha256"] for file in record["files"].values())
            drop_keys.update(keys)
            if _FEATURES in record["files"]:
                features.append((record.pop("folder"), record))
        drop_keys = {key for key in outputs.stage_cache.stored_keys() if key in drop_keys or key not in kept_keys}
        kept_photos = [f"{INPUTS}/{name}" for name in storage.files(INPUTS) if _is_photo(name, photos)]
        # Where they are if the output folder is in an object store.
        own = cache_dir() / INPUTS
        local_photos = [file for file in own.iterdir() if _is_photo(file.name, photos)] if own.is_dir() else []
        report = RemovalReport(
            tuple(sorted(shots)),
            with_shots,
            len(drop_keys),
            len(features),
            tuple(sorted({*(str(storage.place(photo)) for photo in kept_photos), *map(str, local_photos)})),
        )
        if dry_run:
            return report
        outputs.stage_cache.drop(drop_keys)
        for photo in kept_photos:
            storage.delete(photo)
        for file in local_photos:
            file.unlink(missing_ok=True)
        if not with_shots:
            for folder, record in features:
                # The shot stays finished without them.
                record["files"].pop(_FEATURES)
                storage.write(f"{folder}/{RECORD}", json.dumps(record, indent=1))
                storage.delete(f"{folder}/{_FEATURES}")
            return report
        # Their notes may be about the person. Before the shots, by which the next call after a crash finds them.
        drop_reviews(storage, clips)
        _drop_scores(storage, clips)
        for shot_id in shots:
            outputs.delete_shot(shot_id)
        if shots and manifest_files(storage):
            drop_rows(storage, lease.run, set(shots))
    return report


def _drop_scores(storage: Storage, clips: Set[str]) -> None:
    """Delete the scores of clips with these digests, such as the likeness to the person."""
    digests = pyarrow.array(sorted(clips), pyarrow.string())
    for folder in storage.folders(SCORES):
        for path in parquet_files(storage, f"{SCORES}/{folder}"):
            with opened(storage, path) as file:
                table = pyarrow.parquet.read_table(file)
            kept = table.filter(pyarrow.compute.invert(pyarrow.compute.is_in(table["clip_sha256"], value_set=digests)))
            if len(kept) < len(table):
                with storage.new_file(path) as target:
                    pyarrow.parquet.write_table(kept, target)


def _records(storage: Storage) -> Iterator[dict[str, Any]]:
    """Yield the content of each readable `shot.json`, with its folder as `folder`."""
    for folder, text in shot_records(storage):
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(text or b"")
            record["shot"]["id"], record["face_photos"], record["stages"], record["files"]
            yield {**record, "folder": folder}


def _character(record: dict[str, Any]) -> object:
    return (record["shot"].get("metadata") or {}).get("character")


def _is_photo(name: str, photos: Collection[str]) -> bool:
    found = KEPT_PHOTO.fullmatch(name)
    return found is not None and any(photo.startswith(posixpath.splitext(name)[0]) for photo in photos)


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Shots that were removed, or would be removed in a dry run, and their bytes."""

    shots: tuple[str, ...]
    """Their ids."""
    bytes: int
    """Bytes of their images and clips."""
    rejected: dict[str, int]
    """Script -> its rejected lines, if it has any: its replaced shots are kept."""


def prune_shots(
    outputs: OutputFolder, ids: Set[str] = frozenset(), *, dry_run: bool = False, lease: Lease | None = None
) -> PruneReport:
    """Delete the files and rows of replaced shots, and of finished shots with these `ids`. `lease`: if it is held already.

    The replaced shots of a script with rejected lines are kept: these lines may be theirs. So are files that the library or a
    server has made since under the same id. A killed call is completed by the
    next one. Raises SetupError if a run is using the folder, or if it has no manifest.
    """
    check_has_manifest(outputs.storage)
    with outputs.lease(new_name()) if lease is None else nullcontext(lease) as lease:
        rejected = Counter(
            row["script"]
            for batch in manifest_batches(outputs.storage, ("script", "status", "failure_stage"))
            for row in batch.to_pylist()
            if row["status"] == "failed" and row["failure_stage"] == REJECTED
        )
        shots, others, size = list[str](), set[str](), 0
        for batch in manifest_batches(outputs.storage):
            for row in batch.to_pylist():
                is_gone = row["status"] == REPLACED and row["script"] not in rejected
                if not is_gone and not (row["status"] == "done" and row["id"] in ids):
                    continue
                if not _has_files_of(outputs.storage, row):
                    others.add(row["id"])
                    continue
                shots.append(row["id"])
                size += sum(row[f"{name}_bytes"] or 0 for name in SHOT_FILES)
                if not dry_run:
                    lease.check()
                    outputs.delete_shot(row["id"])
        if (shots or others) and not dry_run:
            # After the files of a run that holds this lease.
            drop_rows(outputs.storage, f"{lease.run}-prune", {*shots, *others})
    return PruneReport(tuple(sorted(shots)), size, dict(rejected))


def _has_files_of(storage: Storage, row: dict[str, Any]) -> bool:
    """Return whether the files of a shot are those of its manifest row, not of a later render by a writer without rows."""
    folder = shot_path(row["id"])
    try:
        files = json.loads(storage.read(f"{folder}/{RECORD}") or b"{}").get("files", {})
        # Not the key: a shot that was made with another key may count as the result of the row's.
        digests = {file: row[f"{name}_sha256"] for name, file in SHOT_FILES.items() if row[f"{name}_sha256"] is not None}
        if digests:
            return not files or {file: files[file].get("sha256") for file in files.keys() & SHOT_FILES.values()} == digests
        # The row of a failure has no digests.
        record = storage.files(folder).get(RECORD)
        return record is None or record.modified <= row["ended_at"].timestamp()
    # A damaged record is of no other render that could be used.
    except (ValueError, TypeError, AttributeError):
        return True


def shot_records(storage: Storage) -> Iterator[tuple[str, bytes | None]]:
    """Yield the folder of each shot with the content of its `shot.json`, or `None` if it has none."""
    for shard in filter(SHARD.fullmatch, storage.folders(SHOTS)):
        shots = [f"{SHOTS}/{shard}/{shot}" for shot in storage.folders(f"{SHOTS}/{shard}")]
        yield from zip(shots, storage.read_each(f"{shot}/{RECORD}" for shot in shots), strict=True)
