"""Walk over the records of all shots of an output folder, those of batch runs and of a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from more_itertools import batched

from vidgen_ray.outputs.folder import REQUESTS_AT_ONCE
from vidgen_ray.outputs.paths import RECORD, SHARD, SHOTS
from vidgen_ray.outputs.storage import Storage

SHOTS_AT_ONCE = 1_000
"""Files that are read together."""


def shot_records(storage: Storage) -> Iterator[tuple[str, bytes | None]]:
    """Yield the folder of each shot with the content of its `shot.json`, or `None` if it has none."""
    for group in _shot_folders(storage):
        for folders in batched(group, SHOTS_AT_ONCE):
            yield from read_each(storage, folders, [f"{folder}/{RECORD}" for folder in folders])


def read_each(storage: Storage, names: Sequence[str], paths: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
    """Yield each name with the content of its file, or `None`. Sends concurrent requests to an object store."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE if storage.local is None else 1) as pool:
        for batch in batched(zip(names, paths, strict=True), SHOTS_AT_ONCE):
            contents = pool.map(storage.read, [path for _, path in batch])
            yield from zip([name for name, _ in batch], contents, strict=True)


def _shot_folders(storage: Storage) -> Iterator[Sequence[str]]:
    """Yield the folders of shots, shard by shard."""
    for name in storage.folders(SHOTS):
        if SHARD.fullmatch(name):
            yield [f"{SHOTS}/{name}/{shot}" for shot in storage.folders(f"{SHOTS}/{name}")]
