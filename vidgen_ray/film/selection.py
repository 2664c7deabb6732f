"""Choose the shots of a film: their order, their settings and their files in the output folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pydantic_core

from vidgen_ray.errors import MissingShots, UsageError
from vidgen_ray.film.settings import SHOT_FIELDS, FilmEntry, FilmSettings, ShotSettings, shot_settings
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import REPLACED, manifest_batches
from vidgen_ray.outputs.storage import Storage

COLUMNS = ("script", "line", "id", "status", "metadata", "failure_stage", "failure_message")
CLIP_FILES = {"hd": ("hd.mp4", "video.mp4"), "video": ("video.mp4", "hd.mp4")}
"""Variant -> files of a shot, the first that exists is used."""
IMAGE_FILE = "image.png"


class Candidate(NamedTuple):
    """A shot that may be part of the film."""

    id: str
    metadata: Mapping[str, Any] | None = None
    """`metadata` of its line. `None`: that of its record."""
    reason: str | None = None
    """Why the shot is not finished, if it is known."""


class ChosenShot(NamedTuple):
    """A title card, or a finished shot with the file to show."""

    name: str
    """Id of the shot, or `title card N`."""
    settings: ShotSettings
    title: str | None = None
    path: str | None = None
    """Clip or image, relative to the output folder."""
    sha256: str = ""
    is_clip: bool = False
    scene: str | None = None
    """Title of the scene."""


def manifest_candidates(storage: Storage) -> list[Candidate]:
    """Return the shots of the manifest in the order of their scripts; several scripts in the order of their names.

    Shots of lines that their script no longer has are left out.
    """
    rows = [row for batch in manifest_batches(storage) for row in batch.select(COLUMNS).to_pylist()]
    rows = [row for row in rows if row["status"] != REPLACED]
    rows.sort(key=lambda row: (row["script"], row["line"] or 0, _natural(row["id"])))
    return [
        Candidate(
            row["id"],
            json.loads(row["metadata"] or "{}"),
            f"failed in {row['failure_stage']}: {row['failure_message']}" if row["status"] == "failed" else None,
        )
        for row in rows
    ]


def with_reasons(candidates: Iterable[Candidate], of_manifest: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates with the reasons of the manifest's."""
    reasons = {candidate.id: candidate.reason for candidate in of_manifest}
    return [candidate._replace(reason=reasons.get(candidate.id)) for candidate in candidates]


def choose_shots(
    outputs: OutputFolder,
    settings: FilmSettings,
    candidates: Sequence[Candidate],
    ids: Sequence[str] | None,
    *,
    skip_missing: bool,
) -> list[ChosenShot]:
    """Return title cards and finished shots in the order of the film.

    The order is that of `ids`, else of the settings' `shots`, else of the candidates.
    Raises MissingShots for unfinished shots, unless they are skipped, and UsageError if nothing is left.
    """
    known = {candidate.id: candidate for candidate in candidates}
    chosen, missing = [], []
    scene: str | None = None
    if settings.title is not None:
        chosen.append(ChosenShot("title", ShotSettings(), title=settings.title))
    entries = _entries(settings, candidates, ids)
    for number, entry in enumerate(entries, 1):
        if entry.id is None:
            chosen.append(ChosenShot(f"title card at position {number}", entry, title=entry.title))
            continue
        candidate = known.get(entry.id, Candidate(entry.id))
        shot = _finished(outputs, settings, candidate, entry)
        if shot is None:
            missing.append(f"{entry.id}: {candidate.reason or f'not finished in {outputs.url}'}")
            continue
        if settings.scene_titles and shot.scene is not None and shot.scene != scene:
            scene = shot.scene
            chosen.append(ChosenShot(f"title card of scene {scene!r}", ShotSettings(), title=scene))
        chosen.append(shot)
    if missing and not skip_missing:
        raise MissingShots(missing, len(entries))
    if not any(shot.path for shot in chosen):
        raise UsageError(f"{outputs.url}: has no finished shots for a film; render a script into it first")
    return chosen


def _entries(settings: FilmSettings, candidates: Iterable[Candidate], ids: Sequence[str] | None) -> Sequence[FilmEntry]:
    if ids is not None:
        own = {entry.id: entry for entry in settings.shots or ()}
        return [own.get(shot_id) or FilmEntry(id=shot_id) for shot_id in ids]
    return settings.shots or [FilmEntry(id=candidate.id) for candidate in candidates]


def _finished(outputs: OutputFolder, settings: FilmSettings, candidate: Candidate, entry: FilmEntry) -> ChosenShot | None:
    """Return the shot with the file to show, or `None` if it is not finished, or failed when it was last rendered."""
    done = outputs.find_by_id(candidate.id) if candidate.reason is None else None
    if done is None:
        return None
    metadata = candidate.metadata
    if metadata is None:
        assert done.text is not None
        metadata = pydantic_core.from_json(done.text)["shot"].get("metadata", {})
    of_shot = shot_settings(metadata, f"shot {candidate.id}, metadata")
    merged = of_shot.model_copy(update={name: getattr(entry, name) for name in entry.model_fields_set & set(SHOT_FIELDS)})
    files = done.summary.sha256
    clip = next((name for name in CLIP_FILES[settings.variant] if name in files), None)
    name = clip or IMAGE_FILE
    scene = metadata.get("scene")
    return ChosenShot(
        candidate.id,
        merged,
        path=f"{done.summary.folder}/{name}",
        sha256=files[name],
        is_clip=clip is not None,
        scene=scene if isinstance(scene, str) and scene.strip() else None,
    )


def _natural(text: str) -> list[str | int]:
    """Sort key with numbers by value: shot-v2 before shot-v10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]
