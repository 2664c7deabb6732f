"""`vidgen gc`: remove unused files from an output folder."""

import json
from dataclasses import asdict

import typer

from vidgen_ray.outputs.cleanup import GRACE_S, collect_garbage
from vidgen_ray.outputs.folder import OutputFolder


def gc(out: str, *, dry_run: bool, as_json: bool) -> None:
    """Run `vidgen gc`. Raises SetupError if the folder does not exist or is in use by a run."""
    report = collect_garbage(OutputFolder(out), dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **asdict(report)}))
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
    typer.echo(f"{'would remove' if dry_run else 'removed'} {counts}: {report.bytes / 1e6:.1f} MB")
    if report.left_young:
        typer.echo(f"{report.left_young} younger than {GRACE_S / 60:.0f} minutes kept, because they may still be in use")
