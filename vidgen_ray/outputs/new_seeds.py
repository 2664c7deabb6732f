"""New seeds of finished shots that are rendered again, because their clip was rejected or is not wanted: `seeds.json`.

With them, the script of these shots does not render the old clips again.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow, manifest_batches, new_name
from vidgen_ray.outputs.manifest_writer import failed_line, fields_of
from vidgen_ray.outputs.records import Failure
from vidgen_ray.outputs.reviews import CLIP_COLUMNS, clip_digest, read_reviews
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.shot import MATRIX, Shot

SEEDS_FILE = "seeds.json"
Seeds = Mapping[str, tuple[int, int]]
"""Id of a shot -> the seed of its line (or of a try of it, with `min_identity`), and the seed to use in its place."""
REVIEWED_COLUMNS = (*CLIP_COLUMNS, "script", "line", "continue_from")


def read_seeds(storage: Storage) -> Seeds:
    """Return the new seeds of a folder. Raises SetupError if the file is damaged."""
    try:
        return TypeAdapter(dict[str, tuple[int, int]]).validate_json(storage.read(SEEDS_FILE) or b"{}")
    except ValidationError:
        raise SetupError(
            f"{storage.place(SEEDS_FILE)}: is damaged; delete it, and the shots that it names get the seeds of their script "
            "again"
        ) from None


def with_new_seed(shot: Shot, seeds: Seeds) -> Shot:
    """Return the shot with its new seed. A shot without one, or whose script has another seed by now, is not changed."""
    entry = seeds.get(shot.id or "")
    return shot if entry is None or entry[0] not in _seeds_of_tries(shot) else _with_seed(shot, entry[1])


def _seeds_of_tries(shot: Shot) -> set[int | None]:
    return {shot.with_seed_of_try(number).seed for number in range(1, shot.max_tries + 1)}


def _with_seed(shot: Shot, seed: int) -> Shot:
    metadata, matrix = shot.metadata, shot.metadata.get(MATRIX)
    if isinstance(matrix, dict) and "seed" in matrix:
        # A matrix over seeds tells the seed of each shot.
        metadata = {**metadata, MATRIX: {**matrix, "seed": seed}}
    return shot.model_copy(update={"seed": seed, "metadata": metadata})


@dataclass(frozen=True, slots=True)
class RepeatedShots:
    """Finished shots that are to be rendered again."""

    lines: tuple[str, ...] = ()
    """Lines in the format of `failures.jsonl`, in the order of their scripts."""
    continued: tuple[str, ...] = ()
    """Ids of the shots among them that keep their seeds, but continue one that gets a new one."""
    unreadable: tuple[str, ...] = ()
    """Ids of chosen shots whose files are missing or damaged."""


def give_new_seeds(outputs: OutputFolder, ids: Set[str] | None, *, rejected: bool) -> RepeatedShots:
    """Give new seeds to the finished shots with these `ids` (`None`: all). `rejected`: only to those with a rejected clip.

    A new seed follows from the seed, the id and the clip. Raises SetupError if a run is using the folder.
    """
    with outputs.lease(new_name()) as lease:
        rows = {
            row["id"]: row
            for batch in manifest_batches(outputs.storage, REVIEWED_COLUMNS)
            for row in batch.to_pylist()
            if row["status"] == "done"
        }
        reviews = read_reviews(outputs.storage) if rejected else {}
        rejected_clips = {digest for digest, review in reviews.items() if review.verdict == "reject"}
        wanted = [
            id_
            for id_, row in rows.items()
            if (ids is None or id_ in ids) and (not rejected or clip_digest(row) in rejected_clips)
        ]
        finished = {id_: done for id_ in wanted if (done := outputs.find_by_id(id_)) is not None}
        continued = _continuing(rows, finished.keys())
        finished |= {id_: done for id_ in continued if (done := outputs.find_by_id(id_)) is not None}
        seeds, lines = dict(read_seeds(outputs.storage)), []
        # A shot continues one of an earlier line.
        for row in sorted((rows[id_] for id_ in finished), key=lambda row: (row["script"], row["line"] or 0)):
            shot_id, record, clip = row["id"], finished[row["id"]], clip_digest(row)
            # A killed run may have rendered it again already, without a row.
            is_kept = shot_id in continued or all(file.sha256 != clip for file in record.files.values())
            shot = record.shot if is_kept else _with_seed(record.shot, record.shot.seed_instead_of(str(clip)))
            _remember(seeds, record.shot, shot.required_seed(), record.tries)
            failed = ManifestRow.of_shot("retry", row["script"], shot, row["line"], REASON, "failed")
            lines.append(failed_line(failed, fields_of(shot)))
        lease.check()
        if lines:
            outputs.storage.write(SEEDS_FILE, json.dumps(seeds, indent=1))
    return RepeatedShots(tuple(lines), tuple(sorted(continued)), tuple(sorted({*wanted} - finished.keys())))


REASON = Failure(stage="review", error="Rejected", message="is rendered again with another seed", attempts=0, worker="")


def _continuing(rows: Mapping[str, Mapping[str, Any]], chosen: Set[str]) -> set[str]:
    """Return the other shots that continue one of the chosen ones, at any distance."""
    continuing = defaultdict[str, list[str]](list)
    for id_, row in rows.items():
        if row["continue_from"] is not None:
            continuing[row["continue_from"]].append(id_)
    found, sources = set[str](), deque(chosen)
    while sources:
        for id_ in continuing[sources.popleft()]:
            if id_ not in chosen and id_ not in found:
                found.add(id_)
                sources.append(id_)
    return found


def _remember(seeds: dict[str, tuple[int, int]], finished: Shot, seed: int, tries: int) -> None:
    """Set the seed of the next render. `finished`: the shot with the seed that its clip has; `tries`: see `ShotRecord`."""
    assert finished.id is not None
    used, known = finished.required_seed(), seeds.get(finished.id)
    if seed == used and tries == 1:
        return  # a continued shot whose line has this seed
    # The clip may have a new seed already. The line has the one before it.
    is_new = known is not None and used in _seeds_of_tries(finished.model_copy(update={"seed": known[1]}))
    seeds[finished.id] = (known[0] if known is not None and is_new else used), seed
