"""`vidgen models`: download, check and list the weights of profiles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from vidgen_ray.cli.file_options import JsonOption
from vidgen_ray.cli.options import STDIN, LineOptions, ProfileOption, example, local_path
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.licences import ShotLicences
from vidgen_ray.planner.cluster import profile_for
from vidgen_ray.profile import AUTO, Profile, builtin_profiles, is_builtin
from vidgen_ray.script.check import check_shot
from vidgen_ray.script.formats import READERS
from vidgen_ray.script.lines import COMPRESSED
from vidgen_ray.script.read import iter_script
from vidgen_ray.shot import Shot
from vidgen_ray.system.console import stdout_console, table_of
from vidgen_ray.system.files import load_yaml
from vidgen_ray.system.quantities import count, size
from vidgen_ray.weights import REMOTE
from vidgen_ray.weights.inventory import local_weights
from vidgen_ray.weights.ledger import WeightLicence, accept_licences, accepted_licences, licence_of

if TYPE_CHECKING:
    from vidgen_ray.weights.download import PullResult

models = typer.Typer(help="Download, check and list the weights of profiles.", no_args_is_help=True)

NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME...]",
        help="Profiles (a built-in name or a path), scripts, whose lines decide, or references as profiles write them, e.g. "
        "hub:OWNER/NAME. Default: the profile of --profile.",
    ),
]
AllOption = Annotated[
    bool, typer.Option("--all", help="All weights of the profiles. Default: those that a line with a prompt and a face needs.")
]
YAML = (".yaml", ".yml")
ActorOption = Annotated[
    list[str] | None,
    typer.Option("--actor", metavar="ACTOR", help="All weights of this actor of the profiles, and no others. Repeatable."),
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
def list_weights(
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
        for item in _wanted(names or builtin_profiles(), "", actors, everything=True)
    ]
    if as_json:
        typer.echo(json.dumps(rows, default=str))
        return
    table = table_of("weights", "size", "state", "licence", "commercial use", right=["size"])
    for row in rows:
        table.add_row(
            escape(row["reference"]),
            "" if row["size_bytes"] is None else size(row["size_bytes"]),
            row["state"],
            escape(row["licence"] or "unknown"),
            row["commercial_use"] or "unknown",
        )
    stdout_console().print(table)


@models.command()
def check(
    names: NamesArgument = None,
    profile: ProfileOption = AUTO,
    everything: AllOption = False,
    actors: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the keys and shapes of weights with the networks that load them, without loading the weights.

    Exits with code 4 if any weights are missing, incomplete or of another kind. All problems are printed at once.
    """
    from vidgen_ray.weights.inventory import header_problems

    results = []
    for item in _wanted(names or [profile], profile, actors, everything=everything):
        local = local_weights(item.reference, item.folder)
        problems = [local.problem] if local.problem else [] if local.path is None else header_problems(local.path)
        results.append({"reference": item.reference, "state": local.state, "problems": problems})
    failed = sum(bool(result["problems"]) for result in results)
    if as_json:
        typer.echo(json.dumps(results))
    else:
        for result in results:
            unchecked = " (on a server: `vidgen doctor` asks it)" if result["state"] == "on a server" else ""
            typer.echo(f"{'FAIL' if result['problems'] else 'ok':<5}{result['reference']}{unchecked}")
            for problem in result["problems"]:
                typer.echo(f"     {problem}", err=True)
        typer.echo(f"{len(results) - failed} of {len(results)} weights are usable")
    if failed:
        raise typer.Exit(SetupError.exit_code)


@models.command()
def pull(
    names: NamesArgument = None,
    profile: ProfileOption = AUTO,
    everything: AllOption = False,
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
    """Download the weights that are loaded: of the default chain of a profile, or of the lines of a script.

    Prints sizes, licences and the free space of the disk before it starts. Complete files are kept, and interrupted ones
    continue: run the command again.
    Licences that restrict the use must be accepted once with --accept-license. Exits with code 4 if the disk cannot hold the
    files, or if anything failed; all failures are printed at once.
    """
    from vidgen_ray.weights.download import Hub

    wanted = _wanted(names or [profile], profile, actors, everything=everything)
    if not dry_run:
        _require_acceptance(wanted, accept=accept_license)
    references = [(item.reference, item.folder) for item in wanted]
    hub = Hub(to.expanduser().absolute() / "hub" if to else None)
    with _nodes(address) as pull_on_nodes:
        # Digests are compared once, with the download.
        nodes = pull_on_nodes(references, hub, dry_run=True, verify=verify and dry_run)
        if not as_json:
            _print_planned(nodes, {item.reference: item.licence for item in wanted})
        if not dry_run:
            for node in nodes:
                for disk in node.disks:
                    disk.require("these weights" if node.node is None else f"{node.node}: these weights")
            nodes = pull_on_nodes(references, hub, dry_run=False, verify=verify)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, "nodes": [asdict(node) for node in nodes]}))
    else:
        for node in nodes:
            _print_node(node, dry_run=dry_run)
        if to and not dry_run:
            typer.echo(f"Set HF_HOME={to.expanduser().absolute()} for runs with these weights.")
    if any(node.problems for node in nodes):
        raise typer.Exit(SetupError.exit_code)


@contextmanager
def _nodes(address: str | None) -> Iterator[Callable[..., Sequence[PullResult]]]:
    """Yield what downloads on this machine, or on every node of a cluster, and returns a result per node."""
    if address is None:
        from vidgen_ray.weights.download import pull_all

        yield lambda *args, **options: [pull_all(*args, **options)]
    else:
        from vidgen_ray.engine.ray_cluster import connected, pull_on_all_nodes

        with connected(address, 0):
            yield pull_on_all_nodes


def _print_planned(nodes: Sequence[PullResult], licences: Mapping[str, WeightLicence | None]) -> None:
    """Print what each node needs: weights, files, sizes and licences, and the total with the free space of its disks."""
    for node in nodes:
        numbers = ("files", "GB", "to download")
        table = table_of("weights", *numbers, "licence", right=numbers)
        for one in node.pulled:
            licence = licences.get(one.reference)
            gb = (
                [f"{n_bytes / 1e9:.2f}" for n_bytes in (one.size_bytes, one.downloaded_bytes)]
                if one.files
                else ["on a server" if one.reference.startswith(REMOTE) else "built in", ""]
            )
            table.add_row(escape(one.reference), str(one.files or ""), *gb, escape(licence.licence if licence else "unknown"))
        if node.node is not None:
            typer.echo(node.node)
        stdout_console().print(table)
        total, missing = (sum(getattr(one, name) for one in node.pulled) for name in ("size_bytes", "downloaded_bytes"))
        free = "".join(f"; {disk.folder} has {size(disk.free_bytes)} free" for disk in node.disks)
        typer.echo(
            f"{size(total)} in {count(sum(one.files for one in node.pulled), 'file')}, {size(missing)} to download{free}"
        )


def _print_node(node: PullResult, *, dry_run: bool) -> None:
    where = f"{node.node}: " if node.node else ""
    for problem in node.problems:
        typer.echo(f"{where}{problem}", err=True)
    if dry_run:
        return
    for one in node.pulled:
        if one.commit is not None and one.commit not in one.reference:
            typer.echo(f"{where}{one.reference} is at commit {one.commit}")
    total = sum(one.downloaded_bytes for one in node.pulled)
    failed, of = len(node.problems), len(node.pulled) + len(node.problems)
    typer.echo(f"{where}{size(total)} downloaded, {failed} of {of} failed")


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


def _wanted(names: Sequence[str], profile: str, actors: Sequence[str] | None, *, everything: bool) -> list[Wanted]:
    """Return the weights of profiles, of scripts with `profile`, and the given references, each once.

    Raises UsageError for an unknown actor.
    """
    found: dict[tuple[str, Path | None], Wanted] = {}

    def add(chosen: Profile, references: Iterable[str]) -> None:
        folder = chosen.source.parent if chosen.source else None
        for reference in references:
            found[reference, folder] = Wanted(reference, folder, licence_of(reference, chosen.licences))

    scripts = [name for name in names if _is_script(name)]
    if scripts:
        chosen = profile_for(profile)
        add(chosen, _references_of_lines(map(local_path, scripts), chosen))
    for name in names:
        if is_builtin(name) or (Path(name).suffix in YAML and name not in scripts):
            chosen = profile_for(name)
            if unknown := sorted(set(actors or ()) - chosen.actors.keys()):
                raise UsageError(f"--actor: got {unknown[0]!r}, profile {name} has {', '.join(chosen.actors)}")
            if actors or everything:
                add(chosen, chosen.weight_licences(actors or chosen.actors))
            else:
                add(chosen, default_references(chosen))
        elif name not in scripts:
            found[name, None] = Wanted(name, None, licence_of(name))
    return list(found.values())


FACES = "instantid"
"""Actor of the face stage, which uses onnxruntime."""


def default_shot(profile: Profile) -> Shot:
    """Return a shot with a prompt, a face if the profile has its stage, and nothing else but the defaults of the profile."""
    face = {"face_image": str(example("faces/astronaut.jpg"))} if FACES in profile.actors else {}
    fields = {"prompt": "a portrait", **face}
    return check_shot(fields, "the default chain", profile.defaults)


def default_references(profile: Profile) -> list[str]:
    """Return the references of the weights that `default_shot` passes."""
    return _downloadable(ShotLicences(profile).references(default_shot(profile)))


def _downloadable(references: Iterable[str]) -> list[str]:
    return [reference for reference in references if not reference.startswith("package:")]


def _is_script(name: str) -> bool:
    path = Path(name)
    if path.suffix not in YAML:
        return name in STDIN or path.suffix.lower() in (*READERS, *COMPRESSED)
    try:
        content = load_yaml(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and not {"shots", "scenes"}.isdisjoint(content)


def _references_of_lines(scripts: Iterable[Path], profile: Profile) -> list[str]:
    """Return the references of the weights of all valid lines, without LoRAs, which are files of this machine."""
    licences, found, rejected = ShotLicences(profile), dict[str, None](), 0
    for line in iter_script(LineOptions().settings(list(scripts), profile)):
        rejected += bool(line.errors)
        if not line.errors:
            loras = {lora.path for lora in line.shot.all_loras}
            found |= dict.fromkeys(each for each in licences.references(line.shot) if each not in loras)
    if rejected:
        typer.echo(f"{count(rejected, 'line')} rejected, without their weights; vidgen validate prints the errors", err=True)
    return _downloadable(found)
