"""Provenance records of the files of a shot, with its script line, in which files are named by their digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vidgen_ray.content_keys import FILE_FIELDS, FILES_FIELDS, ShotPlan
from vidgen_ray.graph import stages_of
from vidgen_ray.profile import ProvenanceSettings
from vidgen_ray.provenance.record import GENERATED, ProvenanceRecord, SourceType, provenance_of_input
from vidgen_ray.shot import LORA_FIELDS, NESTED_FIELDS, Shot
from vidgen_ray.stages.base import Stage

SIZES = ("width", "height", "crop_width", "crop_height")
SWITCHES = (
    "lora",
    "video_lora",
    "use_hunyuan_style",
    "style_model",
    "mode",
    "identity",
    "image_model",
    "video_model",
    "upscale_video",
    "generate_video",
)
"""Fields that decide which stages a shot passes. A test compares them with the stages."""
UNREAD_PROMPT = "(no stage reads the prompt)"
DIGEST_PREFIX = "sha256:"
"""Starts the name of a file in a record. Paths are private, and differ between machines for the same shot."""
BUILTIN_PREFIX = "builtin:"


def provenance_record(
    plan: ShotPlan, artefact: str, settings: ProvenanceSettings, until: type[Stage[Any]] | None = None
) -> ProvenanceRecord | None:
    """Return the record of the file that is written from an artefact of a shot. `None` if nothing is written.

    `until`: the last stage behind the file, for an intermediate result. Default: the last one that makes the artefact.
    Equal keys give equal records: neither the id of the shot nor the paths of its files are part of them.
    """
    return provenance_records(plan, [artefact], settings, until)[artefact]


def provenance_records(
    plan: ShotPlan, artefacts: Iterable[str], settings: ProvenanceSettings, until: type[Stage[Any]] | None = None
) -> dict[str, ProvenanceRecord | None]:
    """Return artefact -> the record of the file that is written from it. See `provenance_record`."""
    if settings.metadata == "off":
        return dict.fromkeys(artefacts)
    line = script_line(plan) if settings.metadata == "full" else None
    records: dict[str, ProvenanceRecord | None] = {}
    for artefact in artefacts:
        stages = stages_behind(plan.shot, artefact, until)
        names = tuple(stage.name for stage in stages)
        source_type = _source_type(plan.shot, artefact, stages)
        records[artefact] = ProvenanceRecord(source_type=source_type, key=plan.key, stages=names, shot=line)
    return records


def stages_behind(shot: Shot, artefact: str, until: type[Stage[Any]] | None = None) -> list[type[Stage[Any]]]:
    """Return the stages of a shot whose results are part of an artefact, in order. Stages that only measure are not."""
    behind: list[type[Stage[Any]]] = []
    needed = {artefact}
    stages = stages_of(shot)
    for stage in reversed(stages if until is None else stages[: stages.index(until) + 1]):
        if needed & set(stage.writes):
            behind.append(stage)
            needed |= set(stage.needs(shot))
    return behind[::-1]


def _source_type(shot: Shot, artefact: str, stages: list[type[Stage[Any]]]) -> SourceType | None:
    if artefact != "image" or shot.image is None or shot.continue_from is not None:
        return "trainedAlgorithmicMedia"
    start = provenance_of_input(Path(shot.image)).known_type
    if not stages or start in GENERATED:
        return start
    return "compositeWithTrainedAlgorithmicMedia"


def script_line(plan: ShotPlan) -> dict[str, Any]:
    """Return the fields of a shot that decide its files, with all values. Files are named by their digest.

    Fields that no stage of the shot reads are not part of its key, so they are left out, or have their default.
    """
    shot = _without_effectless(plan.shot)
    read = {name for stage in stages_of(shot) for name in (*stage.reads, *stage.identity_fields)}
    fields = {*SWITCHES, *SIZES, *FILE_FIELDS, *(name.partition(".")[0] for name in read)} & Shot.model_fields.keys()
    values = shot.model_dump(mode="json", include=fields, exclude_none=True)
    for name in values.keys() & set(NESTED_FIELDS):
        values[name] = {key: value for key, value in values[name].items() if f"{name}.{key}" in read}
    for name in FILE_FIELDS:
        if name in values:
            values[name] = f"{DIGEST_PREFIX}{plan.inputs[values[name]]}"
    for name in FILES_FIELDS:
        if name in values:
            values[name] = [f"{DIGEST_PREFIX}{plan.inputs[path]}" for path in values[name]]
    for name in LORA_FIELDS:
        for lora in values.get(name, ()):
            if not lora["path"].startswith(BUILTIN_PREFIX):
                lora["path"] = f"{DIGEST_PREFIX}{plan.inputs[lora['path']]}"
    return {name: values[name] for name in Shot.model_fields if values.get(name) not in (None, [], {})}


def _without_effectless(shot: Shot) -> Shot:
    """Return the shot with the default of every switch that does not change its way through the stages."""
    defaults = {name: Shot.model_fields[name].default for name in SWITCHES}
    way, values = _way(shot), shot.model_dump()
    for name in [name for name, default in defaults.items() if values[name] != default]:
        # Some defaults do not fit other models.
        with suppress(ValidationError):
            other = Shot.model_validate({**values, name: defaults[name]})
            if _way(other) == way:
                shot, values = other, other.model_dump()
    # A script line of a continued shot names the start image instead.
    return shot.model_copy(update={"continue_from": None})


def _way(shot: Shot) -> list[tuple[Any, ...]]:
    """Return the stages of a shot, and the choices that decide their weights and inputs."""
    return [(stage, stage.needs(shot), *(getattr(shot, name) for name in stage.weight_fields)) for stage in stages_of(shot)]


def line_with_files(line: Mapping[str, Any], files: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return a script line with the paths of the files that it names by digest, and the fields whose files are unknown.

    `files`: sha256 -> path.
    """
    unknown = dict[str, None]()

    def found(field: str, name: str) -> str:
        digest = name.removeprefix(DIGEST_PREFIX)
        if digest != name and digest not in files:
            unknown[field] = None
        return files.get(digest, name)

    replaced = {"prompt": UNREAD_PROMPT, **line}
    for field in {*FILE_FIELDS, *FILES_FIELDS, *LORA_FIELDS} & line.keys():
        value = line[field]
        if isinstance(value, str):
            replaced[field] = found(field, value)
        else:
            replaced[field] = [
                found(field, each) if isinstance(each, str) else {**each, "path": found(field, each["path"])} for each in value
            ]
    return replaced, list(unknown)
