"""Finished shots of an output folder, found from its manifest instead of reading the record of every shot.

A row counts if its key is that of the plan and it still holds: on a disk, if `shot.json` has the time of the row and the files
have their sizes; in an object store, if no marker says otherwise (see `manifest`). In all other cases the record decides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import pyarrow
import pyarrow.compute as pc

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import FieldError
from vidgen_ray.outputs.folder import REQUESTS_AT_ONCE, OutputFolder
from vidgen_ray.outputs.manifest import LIKENESS, SCHEMA, SHOT_FILES, is_trusted, manifest_batches, open_writers
from vidgen_ray.outputs.records import RECORD, SHOTS, DoneShot, shot_path

COLUMNS = (
    *("run", "script", "id", "status", "key", "committed_at", "seed", "seconds", "gpu_seconds", "lora_loads"),
    *("licences", "commercial_use", *LIKENESS),
    *(f"{name}_{end}" for name in SHOT_FILES for end in ("sha256", "bytes")),
)
"""Columns of the manifest that a look-up and the row of a skipped shot need."""


class FinishedShots:
    """The finished shots of an output folder by id. Immutable, for use by many processes.

    Instances can be pickled. Their rows, some 500 bytes per shot, are then shared without a copy by stores such as Ray's.
    """

    def __init__(self, outputs: OutputFolder, rows: pyarrow.Table, changed_by: Sequence[str]) -> None:
        """`rows`: the current rows of finished shots, with `COLUMNS`."""
        self._outputs = outputs
        self._rows = rows
        self.changed_by = changed_by
        """Writers that may have changed shots without a row. Rows that are older are not trusted."""
        self._folders: dict[str, frozenset[str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return FinishedShots, (self._outputs, self._rows, self.changed_by)

    def __len__(self) -> int:
        return len(self._rows)

    @classmethod
    def load(
        cls, outputs: OutputFolder, changed_by: Sequence[str] | None = None, only: Sequence[str] | None = None
    ) -> FinishedShots:
        """Read the manifest.

        `only`: ids of the shots that are looked up. Takes less memory. Default: all shots.

        `changed_by`: writers that may have changed shots without a row. Default: those with a marker now, which includes a run
        that is writing. Raises OSError if the storage fails.
        """
        writers = open_writers(outputs.storage) if changed_by is None else changed_by
        batches = []
        for batch in manifest_batches(outputs.storage, COLUMNS):
            is_wanted = pc.not_equal(batch.column("status"), "failed")
            if only is not None:
                is_wanted = pc.and_(is_wanted, pc.is_in(batch.column("id"), pyarrow.array(only, pyarrow.string())))
            batches.append(batch.filter(is_wanted).select(COLUMNS))
        schema = pyarrow.schema([SCHEMA.field(name) for name in COLUMNS])
        return cls(outputs, pyarrow.Table.from_batches(batches, schema).combine_chunks(), writers)

    @cached_property
    def _positions(self) -> dict[str, int]:
        """Id -> position of its row."""
        return {shot_id: position for position, shot_id in enumerate(self._rows.column("id").to_pylist())}

    def _rows_of(self, plans: Sequence[ShotPlan], columns: Sequence[str] = COLUMNS) -> list[dict[str, Any] | None]:
        """Return the manifest row of each plan's id, or `None`."""
        positions = [self._positions.get(plan.shot.id or "") for plan in plans]
        known = pyarrow.array([position for position in positions if position is not None], pyarrow.int64())
        rows = iter(self._rows.select(columns).take(known).to_pylist())
        return [None if position is None else next(rows) for position in positions]

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
            has_key, trusted = row["key"] == plan.key, is_trusted(row["run"], self.changed_by)
            # With a minimal likeness, the result of another rule may count, too. Its record tells.
            if in_object_store and trusted and not has_key and plan.shot.min_identity is None:
                continue
            done = self._done_shot(plan, row) if has_key and not with_stages else None
            if done is not None and (trusted if in_object_store else self._holds_on_disk(done)):
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
        rows = self._rows_of(plans, ("script", "key"))
        return [
            row["script"] if row is not None and row["script"] != script and row["key"] != plan.key else None
            for plan, script, row in zip(plans, scripts, rows, strict=True)
        ]

    def _done_shot(self, plan: ShotPlan, row: Mapping[str, Any]) -> DoneShot | None:
        """Return the finished shot of a row with the key of the plan. `None` if the row has no files."""
        names = [name for name in SHOT_FILES if row[f"{name}_bytes"] is not None]
        if not names or plan.shot.id is None:
            return None
        has_likeness = row["frames_without_face"] is not None
        return DoneShot(
            key=plan.key,
            folder=shot_path(plan.shot.id),
            committed_at=row["committed_at"],
            seed=row["seed"],
            likeness={field: row[column] for column, field in LIKENESS.items()} if has_likeness else None,
            sha256={SHOT_FILES[name]: row[f"{name}_sha256"] for name in names},
            bytes={SHOT_FILES[name]: row[f"{name}_bytes"] for name in names},
            seconds=row["seconds"],
            gpu_seconds=row["gpu_seconds"],
            lora_loads=row["lora_loads"],
            # The manifest has the commercial use of all licences together only.
            licences=tuple((licence, row["commercial_use"]) for licence in json.loads(row["licences"] or "[]")),
        )

    def _holds_on_disk(self, done: DoneShot) -> bool:
        """Return whether the shot was not written again since its manifest row, and its files have their sizes."""
        folder = f"{self._outputs.storage.local}/{done.folder}"
        try:
            return os.stat(f"{folder}/{RECORD}").st_mtime == done.committed_at and all(
                os.stat(f"{folder}/{name}").st_size == size for name, size in done.bytes.items()
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
