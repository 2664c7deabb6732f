"""Garbage collection of an output folder: delete files that nothing refers to. Files of finished shots are never touched."""

from __future__ import annotations

import json
import posixpath
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from more_itertools import batched

from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGES
from vidgen_ray.outputs.folder import SWEEP_FOLDERS, OutputFolder
from vidgen_ray.outputs.id_index import IdIndex
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import SHOT_FILES
from vidgen_ray.outputs.paths import KEYS, SHARD
from vidgen_ray.outputs.shot_records import SHOTS_AT_ONCE, read_each, shot_records
from vidgen_ray.outputs.storage import Storage, StoredFile
from vidgen_ray.system.files import remove

GRACE_S = 600.0
"""Minimum age of garbage, in seconds. Younger files may be in use by a `VideoGenerationPipeline`, which takes no lease."""
SHOT_FILE_NAMES = {*SHOT_FILES.values(), *(stage.debug_file for stage in STAGES if stage.debug_file)}
CONTENT_KEY = re.compile(r"[0-9a-f]{64}")
Kind = Literal["cache entries", "partial shots", "stale keys", "temporaries"]


@dataclass(slots=True)
class GarbageReport:
    """Counts of what was removed, or would be removed in a dry run."""

    counts: dict[Kind, int] = field(
        default_factory=lambda: {"cache entries": 0, "partial shots": 0, "stale keys": 0, "temporaries": 0}
    )
    bytes: int = 0
    """Size of all removed files."""
    left_young: int = 0
    """Unreferenced entries that are younger than the grace period and were kept."""

    def add(self, kind: Kind, size: int) -> None:
        self.counts[kind] += 1
        self.bytes += size


def collect_garbage(outputs: OutputFolder, *, dry_run: bool = False, grace_s: float = GRACE_S) -> GarbageReport:
    """Remove garbage from an output folder.

    Garbage is: cache entries that no shot.json names, shots without shot.json, key files without a finished shot, and
    temporary files of killed processes.

    Raises SetupError if the folder does not exist, a run is working in it, or a run takes the folder over after this process
    was suspended.
    """
    if not (outputs.storage.folders("") or outputs.storage.files("")):
        raise SetupError(f"output folder {outputs.url}: does not exist or is empty")
    run = f"gc-{secrets.token_hex(3)}"
    with outputs.lease(run) as lease:
        # Current time by the clock of the storage.
        now = outputs.storage.files("")[lease.name].modified
        return _Collector(outputs.storage, lease, now - grace_s, dry_run).collect()


class _Collector:
    def __init__(self, storage: Storage, lease: Lease, young_since: float, dry_run: bool) -> None:
        """`young_since`: time in seconds since 1970, by the clock of the storage."""
        self._storage = storage
        self._lease = lease
        self._used_keys = IdIndex()
        """Step keys of all finished shots. Filled from their records."""
        self._shots_by_key = IdIndex()
        """`KEY ID` of each finished shot."""
        self._young_since = young_since
        self._dry_run = dry_run
        self._report = GarbageReport()

    def collect(self) -> GarbageReport:
        for folder in self._shots_without_record():
            # Keep folders with foreign files or subfolders.
            if not self._storage.folders(folder) and self._storage.files(folder).keys() <= SHOT_FILE_NAMES:
                self._drop("partial shots", folder)
        for key_file, file in self._stale_keys():
            self._drop_file("stale keys", key_file, file)
        for entry in self._unused_entries():
            self._drop("cache entries", entry)
        for path in self._storage.abandoned(SWEEP_FOLDERS):
            self._report.add("temporaries", _size_of(path))
            self._delete(remove, path)
        return self._report

    def _shots_without_record(self) -> Iterator[str]:
        """Yield the shot folders without a record. Adds the keys in all other records to the indexes."""
        for records in batched(shot_records(self._storage), SHOTS_AT_ONCE):
            used_keys, shots_by_key = list[str](), list[str]()
            for folder, text in records:
                if text is None:
                    yield folder
                else:
                    key, keys = _keys_in(text)
                    used_keys += keys
                    shots_by_key.append(f"{key} {posixpath.basename(folder)}")
            self._used_keys.add_new(used_keys)
            self._shots_by_key.add_new(shots_by_key)

    def _stale_keys(self) -> Iterator[tuple[str, StoredFile]]:
        """Yield the key files that do not lead to a shot finished with that key."""
        for folder in (f"{KEYS}/{name}" for name in self._storage.folders(KEYS) if SHARD.fullmatch(name)):
            files = self._storage.files(folder)
            keys = [name for name in files if CONTENT_KEY.fullmatch(name)]
            for batch in batched(read_each(self._storage, keys, [f"{folder}/{key}" for key in keys]), SHOTS_AT_ONCE):
                entries = {key: f"{key} {(shot_id or b'').decode(errors='replace')}" for key, shot_id in batch}
                known = self._shots_by_key.intersection([*entries.values()])
                yield from ((f"{folder}/{key}", files[key]) for key, entry in entries.items() if entry not in known)

    def _unused_entries(self) -> Iterator[str]:
        for group in self._storage.folders("cache"):
            keys = [key for key in self._storage.folders(f"cache/{group}") if CONTENT_KEY.fullmatch(key)]
            yield from (f"cache/{group}/{key}" for key in sorted(set(keys) - self._used_keys.intersection(keys)))

    def _drop(self, kind: Kind, folder: str) -> None:
        files = self._storage.files(folder).values()
        if any(file.modified > self._young_since for file in files):
            self._report.left_young += 1
            return
        self._report.add(kind, sum(file.bytes for file in files))
        self._delete(self._storage.delete_folder, folder)

    def _drop_file(self, kind: Kind, path: str, file: StoredFile) -> None:
        if file.modified > self._young_since:
            self._report.left_young += 1
            return
        self._report.add(kind, file.bytes)
        self._delete(self._storage.delete, path)

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


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
