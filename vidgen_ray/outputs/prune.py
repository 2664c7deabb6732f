"""Remove the shots of lines that their script no longer has: the rows with status `replaced`."""

from __future__ import annotations

from dataclasses import dataclass

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import REPLACED, SHOT_FILES, manifest_batches
from vidgen_ray.outputs.manifest_writer import drop_rows
from vidgen_ray.outputs.open_markers import new_writer


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Shots that were removed, and their bytes."""

    shots: int
    bytes: int
    """Bytes of their images and clips."""


def prune(outputs: OutputFolder, *, dry_run: bool = False) -> PruneReport:
    """Delete the files and rows of replaced shots. A killed call is completed by the next one.

    Raises SetupError if a run is using the folder, or if it has no manifest.
    """
    if not outputs.storage.files("manifest"):
        raise SetupError(f"output folder {outputs.url}: has no manifest")
    run = new_writer()
    with outputs.lease(run):
        shots = size = 0
        for batch in manifest_batches(outputs.storage):
            for row in batch.to_pylist():
                if row["status"] != REPLACED:
                    continue
                shots += 1
                size += sum(row[f"{name}_bytes"] or 0 for name in SHOT_FILES)
                if not dry_run:
                    outputs.delete_shot(row["id"])
        if shots and not dry_run:
            drop_rows(outputs.storage, run, "status", {REPLACED})
    return PruneReport(shots, size)
