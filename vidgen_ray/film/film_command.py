"""`vidgen film`: join the finished shots of an output folder into one video."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vidgen_ray.cli.commands import ModelOptions, note, with_options
from vidgen_ray.cli.file_options import DETAILS_PANEL, JsonOption, MarkOptions
from vidgen_ray.cli.options import CharactersOption, OutArgument, WhereOption, ids_where
from vidgen_ray.errors import UsageError
from vidgen_ray.film.film_settings import FilmSettings, checked_fields, film_settings, read_film_file
from vidgen_ray.outputs.storage import URL, no_results
from vidgen_ray.safety import NO_POLICY
from vidgen_ray.script.expansion import read_characters
from vidgen_ray.script.formats import open_script
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import iter_script
from vidgen_ray.system.console import Console
from vidgen_ray.system.quantities import count

if TYPE_CHECKING:
    from vidgen_ray.film.film_settings import ShotCandidate


FILM_OPTIONS = ModelOptions.of(
    FilmSettings,
    title={},
    scene_titles={"rich_help_panel": DETAILS_PANEL},
    size={"metavar": "WIDTHxHEIGHT"},
    fps={"metavar": "RATE"},
    variant={"metavar": "hd|video", "rich_help_panel": DETAILS_PANEL},
    transition={"metavar": "cut|fade"},
    fade_s={"metavar": "SECONDS", "rich_help_panel": DETAILS_PANEL},
    still_s={"metavar": "SECONDS", "rich_help_panel": DETAILS_PANEL},
    captions={"metavar": "file|burn|none"},
    timeline={"metavar": "otio|fcpxml"},
    font={"metavar": "FILE", "rich_help_panel": DETAILS_PANEL},
    music={"metavar": "FILE"},
    narration={"metavar": "FILE"},
    voice={"rich_help_panel": DETAILS_PANEL},
    loudness_lufs={"flag": "--loudness", "metavar": "LUFS", "rich_help_panel": DETAILS_PANEL},
)


@with_options
def film(
    out: OutArgument,
    options: Annotated[dict[str, Any], FILM_OPTIONS],
    marks: MarkOptions,
    path: Annotated[str, typer.Option("--out", "-o", help="Film to write, an .mp4 file on this machine.")] = "film.mp4",
    film_file: Annotated[
        Path | None, typer.Option("--film", help="YAML file that describes the film. Command-line options override it.")
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            "--script",
            help="Take the shots, their order and metadata, and the section `film` from this script. Default: the manifest.",
        ),
    ] = None,
    characters: CharactersOption = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--ids", metavar="ID,ID", help="Shots of the film in this order. Repeatable. Default: all."),
    ] = None,
    where: WhereOption = None,
    best: Annotated[
        str | None,
        typer.Option(
            "--best",
            metavar="SQL",
            help="Of the shots of a line that differ only in their seed, only the one with the highest value of this SQL "
            "expression, e.g. stars.",
        ),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out shots that are not finished. Default: refuse, with a list.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Join the finished shots of an output folder into one video.

    In the order of the script. Only what has changed since the last film is rendered again.
    """
    from vidgen_ray.film.film_settings import manifest_candidates, with_reasons
    from vidgen_ray.film.make_film import make_film
    from vidgen_ray.outputs.folder import OutputFolder, setting_of_last_run
    from vidgen_ray.profile import DEFAULT_PROVENANCE, ProvenanceSettings
    from vidgen_ray.report.gallery_page import update_gallery

    if URL.match(path):
        raise UsageError(f"--out: got {path!r}, must be a file on this machine; upload the film when it is made")
    described: dict[str, Any] = {}
    if script is not None:
        header, _ = open_script(ScriptSettings(script))
        described |= {"title": header.title} if header.title else {}
        described |= checked_fields(header.film or {}, ScriptSettings(script).folder, f"{script.name}, film")
    if film_file is not None:
        described |= read_film_file(film_file)
    settings = film_settings({**described, **options}, "film")
    outputs = OutputFolder(out)
    if outputs.storage.local is not None and not outputs.storage.local.is_dir():
        raise no_results(outputs.storage)
    candidates = manifest_candidates(outputs.storage)
    if script is not None:
        candidates = with_reasons(_script_candidates(script, characters), candidates)
    chosen = _split(ids)
    if where is not None or best is not None:
        selected = {*ids_where(outputs.storage, where, best)} & {each.id for each in candidates if each.reason is None}
        listed = [entry.id for entry in settings.shots or ()] or [each.id for each in candidates]
        chosen = [shot_id for shot_id in chosen or listed if shot_id in selected]
        if not chosen:
            raise UsageError("--where, --best: no finished shot matches")
    target = Path(path)
    last = setting_of_last_run(outputs, ProvenanceSettings, "profile", "provenance") or DEFAULT_PROVENANCE
    marking = marks.settings(last)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Reading clips", total=None)
        report = make_film(
            outputs,
            settings,
            target,
            candidates=candidates,
            ids=chosen,
            skip_missing=skip_missing,
            provenance=marking,
            on_progress=lambda activity, done, total: bar.update(task, description=activity, completed=done, total=total),
        )
    if outputs.storage.local is not None and target.resolve().parent == outputs.storage.local.resolve():
        update_gallery(out)
    for text in report.notes:
        note(text)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    pieces = f"{report.copied} copied, {report.rendered} rendered, {report.reused} unchanged"
    typer.echo(
        f"{report.film}: {count(report.shots, 'shot')}, {report.seconds:.1f} s, {report.size}, {report.fps:g} fps ({pieces})"
    )
    for file in (*report.captions, *([report.timeline] if report.timeline else [])):
        typer.echo(file)


def _script_candidates(script: Path, characters: Path | None) -> list[ShotCandidate]:
    """Return the shots of a script in order. A line that cannot be rendered again may still have a finished shot."""
    from vidgen_ray.film.film_settings import ShotCandidate

    found = []
    people = read_characters(characters) if characters else {}
    for line in iter_script(ScriptSettings(script, characters=people, policy=NO_POLICY)):
        if line.errors:
            metadata = line.fields.get("metadata")
            found.append(ShotCandidate(line.id, metadata if isinstance(metadata, Mapping) else {}))
        else:
            assert line.shot.id is not None
            found.append(ShotCandidate(line.shot.id, line.shot.metadata))
    return found


def _split(ids: list[str] | None) -> list[str] | None:
    if ids is None:
        return None
    split = [shot_id.strip() for group in ids for shot_id in group.split(",") if shot_id.strip()]
    if not split:
        raise UsageError("--ids: got no ids, must be ids separated by commas")
    return split
