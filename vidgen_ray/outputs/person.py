"""Remove a person from an output folder: face features, cached results and kept photos; on request also the shots."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.id_index import IdIndex
from vidgen_ray.outputs.manifest import manifest_files
from vidgen_ray.outputs.manifest_writer import drop_rows
from vidgen_ray.outputs.open_markers import new_writer
from vidgen_ray.outputs.paths import RECORD
from vidgen_ray.outputs.shot_records import shot_records
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.system.cache_dir import cache_dir

FEATURES = InstantIDStage.debug_file
"""File of a shot with the features of its face, which `--keep stages` writes."""
INPUTS = "inputs"
KEPT_PHOTO = re.compile(r"([0-9a-f]{16})(?:[0-9a-f]{48})?(?:\.[a-z]+)?")
"""Name of a photo that vidgen has stored: its sha256, or the first 16 digits of it."""


@dataclass(frozen=True, slots=True)
class Person:
    """A person, by the photos that show them and the names that scripts give them."""

    photos: frozenset[str]
    """sha256 of each photo."""
    character: str | None = None


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


def remove_person(outputs: OutputFolder, person: Person, *, with_shots: bool = False, dry_run: bool = False) -> RemovalReport:
    """Delete what the folder and the cache of this machine hold of a person. `with_shots`: also the shots made with them.

    Cache entries that no finished shot names are deleted, too, since they may show the person.

    Raises SetupError if a run is using the folder.
    """
    storage = outputs.storage
    run = new_writer()
    with outputs.lease(run):
        shots, features = list[str](), list[tuple[str, dict[str, Any]]]()
        kept_keys, drop_keys = IdIndex(), set[str]()
        for record in _records(storage):
            keys = [step["key"] for step in record["stages"]]
            is_named = person.character is not None and _character(record) == person.character
            if not is_named and person.photos.isdisjoint(record["face_photos"]):
                kept_keys.add_new(keys)
                continue
            shots.append(record["shot"]["id"])
            drop_keys.update(keys)
            if FEATURES in record["files"]:
                features.append((record.pop("folder"), record))
        drop_keys = {key for key in drop_keys if outputs.stage_cache.has(key)} | set(_entries_without_shot(storage, kept_keys))
        photos = [*_kept_photos(storage, person.photos)]
        local_photos = [*_local_photos(person.photos)]
        report = RemovalReport(
            tuple(sorted(shots)),
            with_shots,
            len(drop_keys),
            len(features),
            tuple(sorted({*(str(storage.place(photo)) for photo in photos), *map(str, local_photos)})),
        )
        if dry_run:
            return report
        outputs.stage_cache.drop(drop_keys)
        for photo in photos:
            storage.delete(photo)
        for file in local_photos:
            file.unlink(missing_ok=True)
        if not with_shots:
            for folder, record in features:
                _remove_features(storage, folder, record)
            return report
        for shot_id in shots:
            outputs.delete_shot(shot_id)
        if shots and manifest_files(storage):
            drop_rows(storage, run, "id", set(shots))
    return report


def _records(storage: Storage) -> Iterator[dict[str, Any]]:
    """Yield the content of each readable `shot.json`, with its folder as `folder`."""
    for folder, text in shot_records(storage):
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(text or b"")
            record["shot"]["id"], record["face_photos"], record["stages"], record["files"]
            yield {**record, "folder": folder}


def _character(record: dict[str, Any]) -> object:
    return (record["shot"].get("metadata") or {}).get("character")


def _entries_without_shot(storage: Storage, used: IdIndex) -> Iterator[str]:
    """Yield the keys of cache entries that none of the shots that stay has."""
    for group in storage.folders("cache"):
        keys = storage.folders(f"cache/{group}")
        yield from sorted(set(keys) - used.intersection(keys))


def _kept_photos(storage: Storage, photos: Collection[str]) -> Iterator[str]:
    """Yield the paths of photos that the folder holds."""
    yield from (f"{INPUTS}/{name}" for name in storage.files(INPUTS) if _is_photo(name, photos))


def _local_photos(photos: Collection[str]) -> Iterator[Path]:
    """Yield the photos in the cache folder of this machine, where they are if the output folder is in an object store."""
    with suppress(FileNotFoundError, NotADirectoryError):
        yield from (file for file in (cache_dir() / INPUTS).iterdir() if _is_photo(file.name, photos))


def _is_photo(name: str, photos: Collection[str]) -> bool:
    found = KEPT_PHOTO.fullmatch(name)
    return found is not None and any(photo.startswith(posixpath.splitext(name)[0]) for photo in photos)


def _remove_features(storage: Storage, folder: str, record: dict[str, Any]) -> None:
    """Delete the features beside a shot, which stays finished without them."""
    files = {name: file for name, file in record["files"].items() if name != FEATURES}
    storage.write(f"{folder}/{RECORD}", json.dumps({**record, "files": files}, indent=1))
    storage.delete(f"{folder}/{FEATURES}")
