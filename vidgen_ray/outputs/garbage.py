"""What an output folder holds that nothing refers to, and its removal. Files of shots that are done are never touched."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from more_itertools import batched

from vidgen_ray.atomic_files import remove
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGES
from vidgen_ray.outputs.folder import KEYS, RECORD, REQUESTS_AT_ONCE, SWEPT, OutputFolder, key_file
from vidgen_ray.outputs.id_index import IdIndex
from vidgen_ray.outputs.lease import PREFIX
from vidgen_ray.outputs.manifest import SHOT_FILES
from vidgen_ray.outputs.storage import Storage, StoredFile

GRACE_S = 600.0
"""What is younger is left alone: a pipeline of one process, which takes no lease, may be about to refer to it."""
SHOTS_AT_ONCE = 1_000
OUR_FILES = {*SHOT_FILES.values(), *(stage.debug_file for stage in STAGES if stage.debug_file)}
CONTENT_KEY = re.compile(r"[0-9a-f]{64}")
Kind = Literal["cache entries", "partial shots", "stale keys", "temporaries", "spools"]


@dataclass(slots=True)
class GarbageReport:
    """What was removed, or would be."""

    counts: dict[Kind, int] = field(
        default_factory=lambda: {"cache entries": 0, "partial shots": 0, "stale keys": 0, "temporaries": 0, "spools": 0}
    )
    bytes: int = 0
    left_young: int = 0
    """What nothing refers to and is younger than the time of grace."""

    def add(self, kind: Kind, size: int) -> None:
        self.counts[kind] += 1
        self.bytes += size


def collect_garbage(outputs: OutputFolder, *, dry_run: bool = False, grace_s: float = GRACE_S) -> GarbageReport:
    """Remove cache entries that no shot.json names, shots without shot.json, keys that lead to no shot, old temporaries, and
    spools of dead runs.

    Raises SetupError where there is no such folder, or while a run is working in it.
    """
    if not (outputs.storage.folders("") or outputs.storage.files("")):
        raise SetupError(f"output folder {outputs.url}: there is none, or it is empty")
    run = f"gc-{secrets.token_hex(3)}"
    with outputs.lease(run), closing(IdIndex()) as used, closing(IdIndex()) as found_by:
        # By the storage's own clock.
        now = outputs.storage.files("")[f"{PREFIX}{run}"].modified
        return _Collector(outputs.storage, used, found_by, now - grace_s, dry_run).collect()


class _Collector:
    def __init__(self, storage: Storage, used: IdIndex, found_by: IdIndex, young_since: float, dry_run: bool) -> None:
        """`used` and `found_by` are empty: for the keys that shots name, and for each shot its own key with its id."""
        self._storage = storage
        self._used = used
        self._found_by = found_by
        self._young_since = young_since
        self._dry_run = dry_run
        self._report = GarbageReport()

    def collect(self) -> GarbageReport:
        for shot_id in self._shots_without_record():
            folder = f"shots/{shot_id}"
            # Somebody else's files in a folder that happens to be called shots are no garbage.
            if not self._storage.folders(folder) and self._storage.files(folder).keys() <= OUR_FILES:
                self._drop("partial shots", folder)
        for key, file in self._stale_keys():
            self._drop_file("stale keys", key_file(key), file)
        for entry in self._unused_entries():
            self._drop("cache entries", entry)
        for run in self._storage.folders("spool"):
            if all(name.endswith(".jsonl") for name in self._storage.files(f"spool/{run}")):
                self._drop("spools", f"spool/{run}", whatever_age=True)
        for path in self._storage.abandoned(SWEPT):
            self._report.add("temporaries", _size_of(path))
            if not self._dry_run:
                remove(path)
        return self._report

    def _shots_without_record(self) -> Iterator[str]:
        """Also remembers the keys that the others name."""
        shot_ids = [name for name in self._storage.folders("shots") if not name.startswith(".")]
        for shot_id, text in self._read_each(shot_ids, lambda shot_id: f"shots/{shot_id}/{RECORD}"):
            if text is None:
                yield shot_id
            else:
                key, keys = _keys_in(text)
                self._used.add(keys)
                self._found_by.add([f"{key} {shot_id}"])

    def _stale_keys(self) -> Iterator[tuple[str, StoredFile]]:
        """Those that lead to no shot that is done with them."""
        files = self._storage.files(KEYS)
        keys = [name for name in files if CONTENT_KEY.fullmatch(name)]
        for key, shot_id in self._read_each(keys, key_file):
            led = f"{key} {(shot_id or b'').decode(errors='replace')}"
            if not self._found_by.known([led]):
                yield key, files[key]

    def _read_each(self, names: Sequence[str], path_of: Callable[[str], str]) -> Iterator[tuple[str, bytes | None]]:
        """Each name with the content of its file, or none. An object store is asked for many at once."""
        with ThreadPoolExecutor(REQUESTS_AT_ONCE if self._storage.local is None else 1) as pool:
            for batch in batched(names, SHOTS_AT_ONCE):
                yield from zip(batch, pool.map(self._storage.read, map(path_of, batch)), strict=True)

    def _unused_entries(self) -> Iterator[str]:
        for group in self._storage.folders("cache"):
            keys = [key for key in self._storage.folders(f"cache/{group}") if CONTENT_KEY.fullmatch(key)]
            yield from (f"cache/{group}/{key}" for key in sorted(set(keys) - self._used.known(keys)))

    def _drop(self, kind: Kind, folder: str, *, whatever_age: bool = False) -> None:
        files = self._storage.files(folder).values()
        if not whatever_age and any(file.modified > self._young_since for file in files):
            self._report.left_young += 1
            return
        self._report.add(kind, sum(file.bytes for file in files))
        if not self._dry_run:
            self._storage.delete_folder(folder)

    def _drop_file(self, kind: Kind, path: str, file: StoredFile) -> None:
        if file.modified > self._young_since:
            self._report.left_young += 1
            return
        self._report.add(kind, file.bytes)
        if not self._dry_run:
            self._storage.delete(path)


def _keys_in(shot_json: bytes) -> tuple[str, Sequence[str]]:
    """The shot's own key, and those of its stages."""
    try:
        record = json.loads(shot_json)
        return record["key"], [step["key"] for step in record["stages"]]
    # A damaged record names none; its shot will be rendered again.
    except (ValueError, KeyError, TypeError):
        return "", []


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
