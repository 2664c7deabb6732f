"""Verify an output folder: the content of its files against the digests, keys and manifest rows that refer to them."""

from __future__ import annotations

import hashlib
import os
import posixpath
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from more_itertools import batched
from pydantic import ValidationError

from vidgen_ray.outputs.cleanup import INPUTS, KEPT_PHOTO, check_not_empty, shot_records
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import (
    SHOT_FILES,
    ManifestRow,
    is_damaged,
    is_trusted,
    manifest_batches,
    manifest_files,
    open_writers,
)
from vidgen_ray.outputs.manifest_writer import failed_line, fields_of
from vidgen_ray.outputs.records import RECORD, Failure, FileRecord, ShotRecord, key_path, shot_path
from vidgen_ray.outputs.stage_cache import entry_path
from vidgen_ray.outputs.storage import FILES_AT_ONCE
from vidgen_ray.system.cache_dir import sha256_of

_THREADS = 8
"""Shots that are read at the same time. Hashing a file does not hold the interpreter's lock."""
STATED = ("prompt", "seed", "width", "height", "num_frames", "fps", *(f"{name}_sha256" for name in SHOT_FILES))
"""Columns of the manifest that equal those of a row made from `shot.json`."""
REPAIRED = "repaired"
"""Script of shots that `vidgen shot` or the library has made."""


class Damage(NamedTuple):
    """A file that is not what refers to it."""

    path: str
    """Relative to the output folder."""
    problem: str


class _Row(NamedTuple):
    """The manifest row of a finished shot."""

    script: str
    line: int | None
    run: str
    committed_at: float | None
    stated: int
    """Hash of the columns `STATED`."""


class _CheckedShot(NamedTuple):
    shot_id: str
    record: ShotRecord | None
    """`None` if `shot.json` is damaged."""
    damaged: tuple[Damage, ...]


@dataclass(slots=True)
class VerifyReport:
    """Counts of what was read, and the damaged files."""

    shots: int = 0
    bytes: int = 0
    """Size of the files of these shots."""
    cache_entries: int = 0
    damaged: list[Damage] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """Lines of damaged shots, from their records, in the format of `failures.jsonl`."""
    scripts: set[str] = field(default_factory=set)
    """Scripts with a line whose shot is damaged or missing together with its record."""


def verify_outputs(outputs: OutputFolder, *, repair: bool = False) -> VerifyReport:
    """Read every file of an output folder that something refers to.

    `repair`: delete damaged shots and cache entries, so that the next run makes them again, and write missing key files.

    Raises SetupError if the folder is empty, or a run is working in it.
    """
    check_not_empty(outputs)
    report = VerifyReport()
    with outputs.lease(f"verify-{secrets.token_hex(3)}") as lease:
        writers, rows = open_writers(outputs.storage), _finished_rows(outputs, report)
        for shot in _checked_shots(outputs):
            report.shots += 1
            row = rows.pop(shot.shot_id, None)
            if shot.record is not None and row is not None and _differs(outputs, shot.record, row, writers):
                # Either may be damaged, so the line of the script is rendered again, not that of the record.
                place = f"{shot_path(shot.shot_id)}/{RECORD}"
                shot = shot._replace(record=None, damaged=(Damage(place, "has other values than the manifest"), *shot.damaged))
            if shot.record is not None:
                report.bytes += sum(file.bytes for file in shot.record.files.values())
                _verify_key_file(outputs, shot.record, report, repair)
            if shot.damaged:
                _add(report, shot, row)
                if repair:
                    lease.check()
                    outputs.delete_shot(shot.shot_id)
        for shot_id, row in rows.items():
            report.damaged.append(Damage(shot_path(shot_id), "is missing, but the manifest has it as finished"))
            report.scripts.add(row.script)
        _verify_cache(outputs, report, repair)
        _verify_inputs(outputs, report)
    return report


def _finished_rows(outputs: OutputFolder, report: VerifyReport) -> dict[str, _Row]:
    """Return the id and the line of each shot that is finished according to the manifest."""
    for name in manifest_files(outputs.storage):
        if is_damaged(outputs.storage, name):
            report.damaged.append(Damage(name, "is not a complete Parquet file; rendering its script again restores its rows"))
    rows = {}
    for batch in manifest_batches(outputs.storage, ["script", "line", "run", "committed_at", "id", "status", *STATED]):
        for row in batch.to_pylist():
            if row["status"] == "done":
                stated = hash(tuple(row[name] for name in STATED))
                rows[row["id"]] = _Row(row["script"], row["line"], row["run"], row["committed_at"], stated)
    return rows


def _differs(outputs: OutputFolder, record: ShotRecord, row: _Row, writers: Sequence[str]) -> bool:
    """Return whether a record differs from its manifest row, unless the shot was written again without one."""
    storage, stated = outputs.storage, ManifestRow.of_shot("", "", record.shot, None, record, "rendered")
    if storage.local is not None and os.stat(storage.local / shot_path(stated.id) / RECORD).st_mtime != row.committed_at:
        return False
    return is_trusted(row.run, writers) and hash(tuple(getattr(stated, name) for name in STATED)) != row.stated


def _checked_shots(outputs: OutputFolder) -> Iterator[_CheckedShot]:
    """Read the files of all shots with a record. Others were never finished; `vidgen gc` removes them."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in batched(shot_records(outputs.storage), FILES_AT_ONCE):
            yield from pool.map(
                lambda shot: _check_shot(outputs, *shot), [(path, text) for path, text in batch if text is not None]
            )


def _check_shot(outputs: OutputFolder, folder: str, text: bytes) -> _CheckedShot:
    shot_id = posixpath.basename(folder)
    try:
        record = ShotRecord.model_validate_json(text)
    except ValidationError:
        return _CheckedShot(shot_id, None, (Damage(f"{folder}/{RECORD}", "is not the record of a shot"),))
    if record.shot.id != shot_id or folder != shot_path(shot_id):
        return _CheckedShot(shot_id, None, (Damage(f"{folder}/{RECORD}", f"is the record of the shot {record.shot.id}"),))
    problems = ((name, _problem_of(outputs, f"{folder}/{name}", file)) for name, file in record.files.items())
    return _CheckedShot(shot_id, record, tuple(Damage(f"{folder}/{name}", found) for name, found in problems if found))


def _problem_of(outputs: OutputFolder, path: str, file: FileRecord) -> str | None:
    """Return what is wrong with a file of a shot, or `None`. A signed file is compared with its digest after signing."""
    try:
        with outputs.storage.local_copy(path) as copy:
            if (size := copy.stat().st_size) != file.bytes:
                return f"has {size} bytes instead of {file.bytes}"
            if sha256_of(copy) != (file.signed_sha256 or file.sha256):
                return "has another content than shot.json states (sha256)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def _add(report: VerifyReport, shot: _CheckedShot, row: _Row | None) -> None:
    """Add a damaged shot."""
    report.damaged += shot.damaged
    if shot.record is None:
        report.scripts |= {row.script} if row else set()
        return
    message = "; ".join(f"{damage.path} {damage.problem}" for damage in shot.damaged)
    failure = Failure(stage="verify", error="Damaged", message=message, attempts=0, worker="")
    script, line = (row.script, row.line) if row else (REPAIRED, None)
    failed = ManifestRow.of_shot("verify", script, shot.record.shot, line, failure, "failed")
    report.lines.append(failed_line(failed, fields_of(shot.record.shot)))


def _verify_key_file(outputs: OutputFolder, record: ShotRecord, report: VerifyReport, repair: bool) -> None:
    path, shot_id = key_path(record.key), record.shot.id or ""
    content = outputs.storage.read(path)
    # Shots with the same key have one key file, with the id of one of them.
    if content is None or (content != shot_id.encode() and not outputs.find_by_id(content.decode(errors="replace"))):
        problem = "is missing" if content is None else "has the id of no shot"
        report.damaged.append(Damage(path, f"{problem}; a server finds the shot {shot_id} by it"))
        if repair:
            outputs.storage.write(path, shot_id)


def _verify_cache(outputs: OutputFolder, report: VerifyReport, repair: bool) -> None:
    """Decode every entry of the stage cache. A run does the same with the entries that it needs."""
    cache = outputs.stage_cache
    for key in cache.stored_keys():
        report.cache_entries += 1
        if not cache.is_readable(key):
            report.damaged.append(Damage(entry_path(key), "cannot be decoded"))
            if repair:
                cache.drop([key])


def _verify_inputs(outputs: OutputFolder, report: VerifyReport) -> None:
    """Compare stored photos with the digest in their name."""
    for name in outputs.storage.files(INPUTS):
        stored = KEPT_PHOTO.fullmatch(name)
        content = outputs.storage.read(f"{INPUTS}/{name}") if stored else None
        if stored and content is not None and not hashlib.sha256(content).hexdigest().startswith(stored[1]):
            report.damaged.append(Damage(f"{INPUTS}/{name}", "has another content than its name states (sha256)"))
