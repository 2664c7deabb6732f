"""`vidgen models`: download, check and list the weights of profiles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vidgen_ray.cli.command_help import MACHINE
from vidgen_ray.cli.options import JsonOption, local_path
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.system.quantities import size
from vidgen_ray.weights.inventory import local_weights
from vidgen_ray.weights.ledger import WeightLicence, accept_licences, accepted_licences, licence_of

models = typer.Typer(help="Download, check and list the weights of profiles.", no_args_is_help=True, rich_help_panel=MACHINE)

NamesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME...",
        help="Profiles (a built-in name or a path), or references as profiles write them, e.g. hub:OWNER/NAME.",
    ),
]
ActorOption = Annotated[
    list[str] | None,
    typer.Option("--actor", metavar="ACTOR", help="Only the weights of this actor of the profiles. Repeatable. Default: all."),
]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Weights that a command is about."""

    reference: str
    folder: Path | None
    """Folder of relative paths: that of the profile file."""
    licence: WeightLicence | None
    """`None` if it is unknown."""


@models.command(name="list")
def list_models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Profiles or references. Default: all built-in profiles.")
    ] = None,
    actors: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """List weights with their size, whether they are on this machine, and their licence.

    Downloads nothing.
    """
    accepted = accepted_licences()
    rows = [
        {**asdict(local_weights(item.reference, item.folder)), **_licence_columns(item.licence, accepted)}
        for item in _wanted(names or builtin_profiles(), actors)
    ]
    if as_json:
        typer.echo(json.dumps(rows, default=str))
        return
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("weights", "size", "state", "licence", "commercial use"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for row in rows:
        table.add_row(
            escape(row["reference"]),
            "" if row["size_bytes"] is None else size(row["size_bytes"]),
            row["state"],
            escape(row["licence"] or "unknown"),
            row["commercial_use"] or "unknown",
        )
    Console(width=None if Console().is_terminal else 160).print(table)


@models.command()
def check(names: NamesArgument, actors: ActorOption = None, as_json: JsonOption = False) -> None:
    """Compare the keys and shapes of weights with the networks that load them, without loading the weights.

    Exits with code 4 if any weights are missing, incomplete or of another kind. All problems are printed at once.
    """
    from vidgen_ray.weights.inventory import header_problems

    results = []
    for item in _wanted(names, actors):
        local = local_weights(item.reference, item.folder)
        problems = [local.problem] if local.problem else [] if local.path is None else header_problems(local.path)
        results.append({"reference": item.reference, "state": local.state, "problems": problems})
    failed = sum(bool(result["problems"]) for result in results)
    if as_json:
        typer.echo(json.dumps(results))
    else:
        for result in results:
            typer.echo(f"{'FAIL' if result['problems'] else 'ok':<5}{result['reference']}")
            for problem in result["problems"]:
                typer.echo(f"     {problem}", err=True)
        typer.echo(f"{len(results) - failed} of {len(results)} weights are usable")
    if failed:
        raise typer.Exit(SetupError.exit_code)


@models.command()
def pull(
    names: NamesArgument,
    actors: ActorOption = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="FOLDER",
            parser=local_path,
            help="Folder to use as HF_HOME, e.g. one that all nodes share. Default: $HF_HOME.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", "-a", help="Download on every node of this Ray cluster, or `auto`. Default: this machine only."
        ),
    ] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept the licences of these weights. Remembered on this machine.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be downloaded, without downloading it.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the digests of existing files, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Download the files that are loaded, and no others.

    Complete files are kept; run the command again after an interruption.
    Licences that restrict the use must be accepted once with --accept-license. Exits with code 4 if anything failed; all
    failures are printed at once.
    """
    from vidgen_ray.weights.download import Hub, pull_all

    wanted = _wanted(names, actors)
    if not dry_run:
        _require_acceptance(wanted, accept=accept_license)
    references = [(item.reference, item.folder) for item in wanted]
    hub = Hub(to.expanduser().absolute() / "hub" if to else None)
    if address is None:
        pulled, problems = pull_all(references, hub, dry_run=dry_run, verify=verify)
        nodes = [{"node": None, "pulled": [asdict(one) for one in pulled], "problems": list(problems)}]
    else:
        from vidgen_ray.engine.ray_cluster import connected, pull_on_all_nodes

        with connected(address, 0):
            nodes = [asdict(node) for node in pull_on_all_nodes(references, hub, dry_run=dry_run, verify=verify)]
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, "nodes": nodes}))
    else:
        for node in nodes:
            _print_node(node, dry_run=dry_run)
        if to and not dry_run:
            typer.echo(f"Set HF_HOME={to.expanduser().absolute()} for runs with these weights.")
    if any(node["problems"] for node in nodes):
        raise typer.Exit(SetupError.exit_code)


def _print_node(node: dict[str, Any], *, dry_run: bool) -> None:
    where = f"{node['node']}: " if node["node"] else ""
    verb = "to download" if dry_run else "downloaded"
    for one in node["pulled"]:
        shown = f"{size(one['size_bytes'])}, {size(one['downloaded_bytes'])} {verb}" if one["size_bytes"] else "built in"
        named = one["commit"] is None or one["commit"] in one["reference"]
        at = "" if named else f", at commit {one['commit']}"
        typer.echo(f"{where}{one['reference']}: {shown}{at}")
    for problem in node["problems"]:
        typer.echo(f"{where}{problem}", err=True)
    total = sum(one["downloaded_bytes"] for one in node["pulled"])
    typer.echo(f"{where}{size(total)} {verb}, {len(node['problems'])} of {len(node['pulled']) + len(node['problems'])} failed")


def _require_acceptance(wanted: Iterable[Wanted], *, accept: bool) -> None:
    """Print the licences that restrict the use. Raise UsageError unless they were accepted, now or before."""
    restricted = {item.licence.id: item.licence for item in wanted if item.licence and item.licence.needs_acceptance}
    new = [licence for id_, licence in restricted.items() if id_ not in accepted_licences()]
    for licence in new:
        typer.echo(_summary(licence), err=True)
    if new and not accept:
        raise UsageError(
            f"{len(new)} licences restrict the use of these weights (above). Read them, then repeat the command with "
            "--accept-license"
        )
    if new:
        accept_licences(licence.id for licence in new)


def _summary(licence: WeightLicence) -> str:
    lines = [f"{licence.name}: {licence.licence}, commercial use: {licence.commercial_use}", f"  {licence.url}"]
    lines += [f"  {text}" for text in (licence.condition, licence.notes) if text]
    return "\n".join(lines)


def _licence_columns(licence: WeightLicence | None, accepted: set[str]) -> dict[str, Any]:
    if licence is None:
        return dict.fromkeys(("licence", "licence_url", "commercial_use", "condition", "gated", "accepted"))
    return {
        "licence": licence.licence,
        "licence_url": licence.url,
        "commercial_use": licence.commercial_use,
        "condition": licence.condition,
        "gated": licence.gated,
        "accepted": not licence.needs_acceptance or licence.id in accepted,
    }


def _wanted(names: Sequence[str], actors: Sequence[str] | None) -> list[Wanted]:
    """Return the weights of profiles and the given references, each once. Raises UsageError for an unknown actor."""
    found: dict[tuple[str, Path | None], Wanted] = {}
    for name in names:
        if name in builtin_profiles() or Path(name).suffix in (".yaml", ".yml"):
            profile = load_profile(name)
            if unknown := sorted(set(actors or ()) - profile.actors.keys()):
                raise UsageError(f"--actor: got {unknown[0]!r}, profile {name} has {', '.join(profile.actors)}")
            folder = profile.source.parent if profile.source else None
            for reference, licence in profile.weight_licences(actors or profile.actors).items():
                found[reference, folder] = Wanted(reference, folder, licence)
        else:
            found[name, None] = Wanted(name, None, licence_of(name))
    return list(found.values())
