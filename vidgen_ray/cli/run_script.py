"""Run a script for the commands that render one: settings of its lines, the run with its messages, and the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vidgen_ray.cli.options import parse_fields, with_consent
from vidgen_ray.cli.progress import run_view
from vidgen_ray.cli.stop_signals import stoppable
from vidgen_ray.errors import ScriptError, UsageError
from vidgen_ray.graph import WITHOUT_CHUNKED_STAGES, WITHOUT_CLIP
from vidgen_ray.invalid_fields import wrong_defaults
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import manifest_files
from vidgen_ray.profile import Profile
from vidgen_ray.script.expansion import read_characters
from vidgen_ray.script.lines import ScriptSettings

if TYPE_CHECKING:
    from vidgen_ray.batch.render import RenderOptions

RESUME = "Run the same command to resume."


@contextmanager
def interruptible() -> Iterator[None]:
    """Exit with code 130 and a hint to resume when the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"vidgen: interrupted. {RESUME}", err=True)
        raise typer.Exit(130) from None


def script_settings(
    script: Path,
    profile: Profile,
    fields: list[str] | None,
    characters: Path | None,
    mode: str | None,
    seed: int,
    until: str | None,
    consent: str | None,
) -> ScriptSettings:
    """Return the settings of a script from the options of a command. Raises UsageError and ScriptError."""
    if mode is not None and (wrong := wrong_defaults({"mode": mode})):
        raise UsageError(f"--mode: got {wrong[0][1]}, {wrong[0][2]}")
    defaults = with_consent(parse_fields(fields), consent) | ({"mode": mode} if mode else {})
    if "id" in defaults:
        raise UsageError("--set id: must be set by each line of the script, not for all of them")
    people = read_characters(characters) if characters else {}
    changes = changes_until(until)
    return ScriptSettings(script, seed, defaults, profile.defaults, changes, people, policy=profile.policy)


def changes_until(until: str | None) -> dict[str, Any]:
    """Return the fields of a shot that has no stages after `until`."""
    changes: dict[str | None, dict[str, Any]] = {
        None: {},
        "image": dict(WITHOUT_CLIP),
        "video": dict(WITHOUT_CHUNKED_STAGES),
    }
    if until not in changes:
        raise typer.BadParameter(f"got {until!r}, must be image or video", param_hint="--until")
    return changes[until]


def run_script(
    script: ScriptSettings, profile: Profile, out: str, options: RenderOptions, *, as_json: bool, then_prune: bool = False
) -> None:
    """Render a script, write the gallery and print the result. Raises typer.Exit unless all shots are done."""
    from vidgen_ray.batch.render import render
    from vidgen_ray.outputs.cleanup import prune as prune_folder
    from vidgen_ray.report.gallery_page import check_no_other_page, write_gallery

    outputs = OutputFolder(out)
    outputs.prepare()
    check_no_other_page(out)
    local = outputs.storage.local
    try:
        # Ray prints messages on standard output, which is reserved for the result.
        with (
            interruptible(),
            redirect_stdout(sys.stderr),
            run_view(local / "progress.jsonl" if local else None) as view,
            stoppable(options.grace_s) as stop,
        ):
            report = render(script, profile, outputs, options, listener=view, stop=stop)
        if then_prune:
            prune_folder(outputs)
    finally:
        # A script that cannot be read has no results to show.
        gallery = write_gallery(out) if manifest_files(outputs.storage) else None
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        counts = f"{report.done} done, {report.skipped} already done, {report.failed} failed"
        typer.echo(f"{counts} in {report.seconds:.1f} s." + (f" Gallery: {gallery}" if gallery else ""))
        if report.failed:
            typer.echo(f"Failed lines with their errors: {outputs.storage.place('failures.jsonl')}")
    if report.left:
        typer.echo(f"vidgen: stopped. {report.left} lines not started. {RESUME}", err=True)
        raise typer.Exit(130)
    if report.failed:
        nothing_to_render = report.failed == report.rejected and not report.done + report.skipped
        raise typer.Exit(ScriptError.exit_code if nothing_to_render else 1)
