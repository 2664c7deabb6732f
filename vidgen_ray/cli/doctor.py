"""`vidgen doctor`: check this machine for what a profile needs, and say how to mend what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vidgen_ray.cli import doctor_checks as checks
from vidgen_ray.cli.doctor_checks import Finding
from vidgen_ray.cli.options import JsonOption, ProfileOption
from vidgen_ray.errors import SetupError
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.weights.inventory import local_weights
from vidgen_ray.weights.ledger import accepted_licences

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
FACES = "instantid"
"""Actor of the face stage, which uses onnxruntime."""


def doctor(profile: ProfileOption = "demo", as_json: JsonOption = False) -> None:
    """Check driver, packages, limits, Ray, weights and licences of this machine for a profile.

    Each finding is pass, warn or fail, with the command that mends it. Exits with code 4 if anything failed.
    """
    chosen = load_profile(profile)
    findings = list(_findings(chosen, profile))
    failed = sum(finding.status == "fail" for finding in findings)
    if as_json:
        typer.echo(
            json.dumps({"profile": chosen.name, "failed": failed, "findings": [asdict(finding) for finding in findings]})
        )
    else:
        _print(findings)
        warnings = sum(finding.status == "warn" for finding in findings)
        typer.echo(f"{failed} failed, {warnings} warnings, {len(findings) - failed - warnings} passed")
    if failed:
        raise typer.Exit(SetupError.exit_code)


def _findings(profile: Profile, name: str) -> Iterator[Finding]:
    import torch
    from huggingface_hub import constants

    needs_gpu = any(actor.device == "cuda" for actor in profile.actors.values())
    faces = profile.actors[FACES].device if FACES in profile.actors else "cpu"
    folder = profile.source.parent if profile.source else None
    licences = profile.weight_licences(profile.actors)
    weights = [local_weights(reference, folder) for reference in licences]
    yield checks.check_python()
    yield checks.check_driver(needs_gpu)
    yield from _present(checks.check_wsl(needs_gpu))
    yield checks.check_torch(needs_gpu, torch)
    yield checks.check_onnxruntime()
    yield checks.check_provider(faces)
    yield from _present(checks.check_cuda_pair(faces, checks.onnxruntime_cuda(), torch.version.cuda))
    yield checks.check_video()
    for path in dict.fromkeys((Path.cwd(), cache_dir(), Path(constants.HF_HUB_CACHE))):
        yield checks.check_disk(path)
    yield checks.check_shared_memory()
    yield checks.check_open_files()
    yield checks.check_locked_memory(needs_gpu)
    yield checks.check_container(max((local.size_bytes or 0 for local in weights), default=0) / 2**30)
    yield checks.check_ray_version()
    yield checks.check_ray_token()
    yield from checks.check_weights(name, weights)
    yield checks.check_licences(name, licences.values(), accepted_licences())


def _present(finding: Finding | None) -> Iterator[Finding]:
    if finding is not None:
        yield finding


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        status = f"[{COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(status, escape(finding.check), escape(finding.text))
        if finding.fix:
            table.add_row("", "", f"[bold]{escape(finding.fix)}[/]")
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
