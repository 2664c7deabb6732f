"""`vidgen validate`: check the lines of a script."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Annotated

import typer

from vidgen_ray.cli.file_options import JsonOption
from vidgen_ray.cli.options import LineOptions, ProfileOption, ScriptsArgument, StrictPromptsOption
from vidgen_ray.content_keys import cut_texts, params_of
from vidgen_ray.errors import MAX_MESSAGES, ScriptError, SetupError
from vidgen_ray.graph import stages_of
from vidgen_ray.planner.cluster import profile_for
from vidgen_ray.profile import AUTO, Profile
from vidgen_ray.script.check import with_cut_prompts
from vidgen_ray.script.lines import Line
from vidgen_ray.script.read import Script, check_lora_sizes, read_script
from vidgen_ray.stages.base import StageParams
from vidgen_ray.system.quantities import count


def validate(
    scripts: ScriptsArgument,
    lines: LineOptions,
    profile: ProfileOption = AUTO,
    files: Annotated[
        bool, typer.Option("--files", help="Also decode all photos and start images, and read the headers of all LoRAs.")
    ] = False,
    strict_prompts: StrictPromptsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check all lines of a script without rendering.

    Exits with code 3 if any line is invalid.
    """
    chosen = profile_for(profile)
    settings = lines.settings(scripts, chosen)
    checked = with_profile_checks(read_script(settings, decode_files=files), chosen, strict=strict_prompts)
    if as_json:
        errors = [asdict(error) for error in checked.errors]
        result = {"shots": len(checked.shots), "rejected": len(checked.rejected), "errors": errors, "notes": checked.notes}
        typer.echo(json.dumps(result))
    else:
        if checked.errors:
            typer.echo(str(ScriptError(checked.errors)), err=True)
        for note in checked.notes[:MAX_MESSAGES]:
            typer.echo(f"note: {note}", err=True)
        typer.echo(
            f"{settings.path.name}: {count(len(checked.shots), 'valid shot')}, {count(len(checked.rejected), 'invalid line')}"
        )
    if checked.rejected:
        raise typer.Exit(ScriptError.exit_code)


def with_profile_checks(script: Script, profile: Profile, *, strict: bool) -> Script:
    """Return the script with errors of LoRAs for a model of another size than the profile's, and notes, or errors if `strict`,
    about prompts that its text encoders cut.

    Nothing is known about stages without weights on this machine.
    """

    params: dict[object, dict[str, StageParams] | None] = {}

    def checked(line: Line) -> Line:
        if line.errors:
            return line
        if wrong := check_lora_sizes(line.shot, profile):
            line = replace(line)
            for field, error in wrong:
                line.reject(field, "an unusable file", str(error))
            return line
        stages = stages_of(line.shot)
        if stages not in params:
            params[stages] = None
            with suppress(SetupError, OSError):
                params[stages] = params_of(profile, stages)
        found = params[stages]
        return line if found is None else with_cut_prompts(line, cut_texts(stages, found, line.shot), strict=strict)

    return replace(script, lines=tuple(map(checked, script.lines)))
