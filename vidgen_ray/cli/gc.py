"""`vidgen gc`: remove from an output folder what nothing refers to, and say how much it was."""

import json
from dataclasses import asdict

import typer

from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.garbage import GRACE_S, collect_garbage


def gc(out: str, *, dry_run: bool, as_json: bool) -> None:
    """The body of the command. Raises SetupError where there is no such folder, or a run is working in it."""
    report = collect_garbage(OutputFolder(out), dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **asdict(report)}))
        return
    what = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
    typer.echo(f"{'would remove' if dry_run else 'removed'} {what}: {report.bytes / 1e6:.1f} MB")
    if report.left_young:
        typer.echo(f"{report.left_young} younger than {GRACE_S / 60:.0f} minutes are left: something may be about to use them")
