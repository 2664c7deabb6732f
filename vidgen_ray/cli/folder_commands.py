"""Commands about an output folder: `vidgen status`, `logs`, `verify`, `gc`, `prune`, `watch` and `review`."""

from __future__ import annotations

import getpass
import heapq
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from vidgen_ray.batch.run_options import RecordedOptions
from vidgen_ray.cli.commands import RESUME, note
from vidgen_ray.cli.file_options import JsonOption
from vidgen_ray.cli.options import AddressOption, DryRunOption, GpusOption, OutArgument, WhereOption, ids_where, local_path
from vidgen_ray.cli.progress_display import counts_line, speed_texts, stage_table
from vidgen_ray.cli.run_script import (
    ProfileOfLastRunOption,
    check_rendered_here,
    note_not_pruned,
    options_of_last_run,
    render_again,
)
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.errors import SetupError, UsageError, shortened_value
from vidgen_ray.outputs.cleanup import MIN_AGE_S, collect_garbage, prune_shots
from vidgen_ray.outputs.folder import OutputFolder, setting_of_last_run
from vidgen_ray.outputs.lease import is_held
from vidgen_ray.outputs.manifest import REPLACED, SHOT_FILES, manifest_batches
from vidgen_ray.outputs.reviews import MAX_NAME, clip_digest, read_reviews
from vidgen_ray.outputs.run_log import LOGS, RunStatus, read_log, read_status
from vidgen_ray.outputs.storage import Storage, no_results, storage_at
from vidgen_ray.outputs.verify import VerifyReport, verify_outputs
from vidgen_ray.planner.cluster import profile_for
from vidgen_ray.system.console import Console, table_of
from vidgen_ray.system.quantities import amount_text, count, duration, money, size

_HOST = "127.0.0.1"
SHOWN_MESSAGES = 5


def status(out: OutArgument = "out", as_json: JsonOption = False) -> None:
    """Print the progress of the last run in an output folder, and what the folder has.

    Prints its counts, failures, slowest and least alike shots, cost, and disk use.
    """
    storage = storage_at(out)
    with Console(stderr=True).status(f"Reading {storage.url}"):
        run = read_status(storage)
        found = overview(storage)
        last = setting_of_last_run(OutputFolder(out), EndedRun)
    has_results = bool(sum(found.counts.values()))
    if not has_results and run is None:
        raise no_results(storage)
    if as_json:
        typer.echo(
            json.dumps({"run": run and run.model_dump(mode="json"), "last_run": last and last.model_dump(), **asdict(found)})
        )
        return
    console = Console(highlight=False, soft_wrap=True)
    if run is not None and (not run.ended or run.error or run.remaining or not has_results):
        _print_run(console, run, is_over=run.ended or is_held(storage) is False)
    if has_results:
        options = setting_of_last_run(OutputFolder(out), RecordedOptions, "options")
        is_of_server = options is not None and options.server is not None
        _print(console, found, "the command of the run" if is_of_server else f"vidgen retry {storage.url}")
    if last is not None:
        cost = "" if last.cost is None else f", {money(last.cost, last.currency)}"
        console.print(f"Last run that ended: {duration(last.seconds)}{cost}", markup=False)


class EndedRun(BaseModel):
    """Content of `run.json` about the last run that has ended."""

    run: str
    seconds: float
    gpu_seconds: float
    cost: float | None
    currency: str | None


def _print_run(console: Console, run: RunStatus, *, is_over: bool) -> None:
    labels = {"script": run.script, "profile": run.profile, "team": run.team, "job": run.submission_id}
    console.print(f"run {run.run}: {', '.join(f'{name} {value}' for name, value in labels.items() if value)}", markup=False)
    age = f"written {duration(max(0, run.age_s))} ago"
    state = f"ended{f' with {run.error}' if run.error else ''}" if run.ended else run.phase or "rendering"
    if is_over and not run.ended:
        state, age = "killed", f"no news for {duration(max(0, run.age_s))}: its process has ended. {RESUME}"
    elif run.is_silent:
        age += ". The run was killed, or cannot reach the folder"
    console.print(f"{state}, started {run.started_at:%Y-%m-%d %H:%M:%S} UTC; {age}", markup=False)
    snapshot = Snapshot(run.stages, run.gpus_busy, run.in_progress)
    shots = f"{run.total - run.remaining:,}/{run.total:,} shots{'' if run.complete else ' so far'}"
    console.print(
        Text("   ").join([Text(", ".join([shots, *([] if is_over else speed_texts(run))])), counts_line(run, snapshot)])
    )
    if run.waiting_for:
        console.print(run.waiting_for, markup=False)
    if snapshot.stages:
        console.print(stage_table(snapshot))
    for message in run.messages[-SHOWN_MESSAGES:]:
        if message != run.waiting_for:
            console.print(message, markup=False)


def _print(console: Console, found: Overview, retry: str) -> None:
    """Print the overview. `retry`: how failed lines are rendered again."""
    console.print(", ".join(f"{count:,} {status}" for status, count in found.counts.items() if count))
    space = f"{size(found.shot_bytes)} of images and clips"
    if found.cache_bytes is not None:
        space += f", {size(found.cache_bytes)} of cache"
    on_gpus = f", {duration(found.gpu_seconds)} of it on GPUs" if found.gpu_seconds else ""
    console.print(f"{duration(found.seconds)} of work{on_gpus}; {space}")
    if found.costs:
        _print_costs(console, found.costs)
    if found.failures:
        table = Table("stage", "error", "lines", "first", box=None, title="Failures", title_justify="left")
        # Paths in it are broken, not cut.
        table.add_column("message", overflow="fold")
        for group in found.failures:
            first = f"{group.script} line {group.line}" if group.line else group.example
            table.add_row(group.stage, group.error, f"{group.count:,}", first, group.message)
        console.print(table)
        console.print(f"Render them again: {retry}", markup=False)
    _print_shots(console, "Slowest shots", "time", found.slowest, duration)
    _print_shots(
        console,
        "Least alike shots (clip_likeness_worst, of images image_likeness)",
        "likeness",
        found.least_alike,
        "{:.2f}".format,
    )


def _print_costs(console: Console, costs: list[Cost]) -> None:
    numbers = ("clips", "accepted", "cost", "per clip", "per accepted clip")
    table = table_of("cost of", *numbers, right=numbers)
    table.title, table.title_justify = "Cost", "left"
    for _, entries in groupby(costs, lambda entry: entry.of):
        for entry in islice(entries, _LISTED):
            name = "all shots" if entry.name is None else f"{entry.of} {entry.name}"
            amounts = (entry.cost, entry.cost_per_clip, entry.cost_per_accepted)
            texts = ("-" if each is None else f"{amount_text(each)} {entry.currency or ''}".rstrip() for each in amounts)
            table.add_row(Text(name), f"{entry.clips:,}", f"{entry.accepted:,}", *texts)
    console.print(table)


def logs(
    out: OutArgument, shot: Annotated[str, typer.Argument(metavar="ID", help="Id of a shot.")], as_json: JsonOption = False
) -> None:
    """Print every attempt of every step of a shot.

    Prints time, stage, outcome, seconds, worker and node.
    """
    storage = storage_at(out)
    lines = list(read_log(storage, shot))
    if not lines and not storage.files(LOGS):
        raise no_results(storage)
    if not lines:
        raise SetupError(f"{storage.url}: no run has a step of the shot {shot!r} in its log; failures.jsonl has rejected lines")
    if as_json:
        typer.echo(json.dumps(lines))
        return
    width = max(len(line["stage"]) for line in lines)
    for run, steps in groupby(lines, lambda line: line["run"]):
        typer.echo(f"run {run}, times in UTC")
        for line in steps:
            at = f"{datetime.fromisoformat(line['at']):%m-%d %H:%M:%S}"
            step = f"{line['stage']:<{width}}  attempt {line['attempt']}: {line['outcome']}, {line['seconds']:.2f} s"
            place = f", {line['worker']} on {line.get('node', 'a lost node')}" if line["worker"] else ""
            error = f". {line['error']}: {line['message']}" if "error" in line else ""
            typer.echo(f"{at}  {step}{place}{error}")


def _print_shots(console: Console, title: str, heading: str, shots: list[ListedShot], text_of: Callable[[float], str]) -> None:
    if not shots:
        return
    table = Table(heading, "id", "line", box=None, title=title, title_justify="left")
    for shot in shots:
        table.add_row(text_of(shot.value), shot.id, f"{shot.script} line {shot.line}" if shot.line else shot.script)
    console.print(table)


def gc(out: OutArgument, dry_run: DryRunOption = False, as_json: JsonOption = False) -> None:
    """Remove unused files from an output folder.

    These are cache entries without a finished shot, and files of killed runs.
    """
    report = collect_garbage(OutputFolder(out), dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **asdict(report)}))
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
    typer.echo(f"{'would remove' if dry_run else 'removed'} {counts}: {size(report.bytes)}")
    if report.left_young:
        typer.echo(f"{report.left_young} younger than {MIN_AGE_S / 60:.0f} minutes kept, because they may still be in use")


def verify(
    out: OutArgument = "out",
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Delete damaged shots and cache entries, and render these shots again as the last run did, like vidgen retry.",
        ),
    ] = False,
    profile: ProfileOfLastRunOption = None,
    address: AddressOption = None,
    gpus: GpusOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find damaged and missing files of an output folder.

    Reads every file. Exits with code 1 if there are any.
    """
    outputs = OutputFolder(out)
    last = options_of_last_run(outputs, profile) if repair else None
    if last is not None:
        check_rendered_here(out, last)
        profile_for(last.profile)
    with Console(stderr=True).status(f"Reading {outputs.url}"):
        report = verify_outputs(outputs, repair=repair)
    if as_json:
        found = {name: getattr(report, name) for name in ("shots", "bytes", "cache_entries")}
        damaged = [damage._asdict() for damage in report.damaged]
        typer.echo(json.dumps({**found, "damaged": damaged, "render_again": sorted(report.scripts)}))
    else:
        _print_damage(report, repaired=repair)
    if last is not None and report.lines:
        # With --json, standard output has the report above only.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            render_again(out, lambda: report.lines, last, profile, address, gpus, as_json=as_json)
    if report.damaged and (not repair or report.scripts):
        raise typer.Exit(1)


def _print_damage(report: VerifyReport, *, repaired: bool) -> None:
    for damage in report.damaged:
        typer.echo(f"{damage.path}: {damage.problem}")
    entries = f"{report.cache_entries:,} cache {'entry' if report.cache_entries == 1 else 'entries'}"
    read = f"{count(report.shots, 'shot')} with {size(report.bytes)} and {entries}"
    typer.echo(f"{read} read, {count(len(report.damaged), 'file')} damaged or missing")
    for script in sorted(report.scripts):
        typer.echo(f"Some of its lines have no record any more, render it again: {script}")
    if report.damaged and not repaired:
        typer.echo("vidgen verify --repair deletes what is damaged and renders it again")


def prune(out: OutArgument, where: WhereOption = None, dry_run: DryRunOption = False, as_json: JsonOption = False) -> None:
    """Remove the shots of lines that their script no longer has.

    --where also removes the finished shots that match. Their script renders them again.
    """
    from vidgen_ray.report.gallery_page import update_gallery

    outputs = OutputFolder(out)
    ids = frozenset() if where is None else frozenset(ids_where(outputs.storage, where))
    report = prune_shots(outputs, ids, dry_run=dry_run)
    if report.shots and not dry_run:
        update_gallery(out)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **asdict(report)}))
        return
    note_not_pruned(report)
    verb = "would remove" if dry_run else "removed"
    typer.echo(f"{verb} {count(len(report.shots), 'shot')}: {size(report.bytes)}")
    for shot_id in report.shots if dry_run else ():
        typer.echo(shot_id)


def _reviewer(name: str | None) -> str | None:
    """Return the name of the person who reviews. `None`: without one, in a container without a user. Raises UsageError."""
    if name is not None and not 0 < len(name) <= MAX_NAME:
        raise UsageError(f"--reviewer: got {shortened_value(name)}, must have 1 to {MAX_NAME} letters")
    with suppress(OSError, KeyError):
        return name or getpass.getuser()
    return None


ReviewerOption = Annotated[
    str | None, typer.Option("--reviewer", metavar="NAME", help="Name in the reviews. Default: the user of this machine.")
]


def watch(
    out: OutArgument = "out",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on, on this machine only.")] = 8001,
    reviewer: ReviewerOption = None,
) -> None:
    """Show the gallery of an output folder in a browser, also during a run, and review its clips."""
    import uvicorn

    from vidgen_ray.report.gallery_page import gallery_app
    from vidgen_ray.system.http_limits import LimitedHttp

    app = gallery_app(out, _reviewer(reviewer))
    listen(_HOST, port).close()
    typer.echo(f"Gallery of {storage_at(out).url}: http://{_HOST}:{port}/. Ctrl-C to stop.", err=True)
    uvicorn.run(app, host=_HOST, port=port, log_level="warning", http=LimitedHttp, ws="none")


def review(
    out: OutArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", parser=local_path, help="File that the gallery has saved.")],
    reviewer: ReviewerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import the reviews that were made in the gallery of an output folder.

    Exits with code 1, naming them, if some are of clips that the folder does not have, such as those that were rendered again.
    """
    from vidgen_ray.report.gallery_page import import_reviews

    report = import_reviews(out, file, _reviewer(reviewer))
    if as_json:
        typer.echo(json.dumps(report._asdict()))
    else:
        typer.echo(f"{count(report.imported, 'review')} imported, {report.known:,} known or older")
        if report.refused:
            ids = ", ".join(report.refused[:_LISTED]) + (", ..." if len(report.refused) > _LISTED else "")
            note(f"{count(len(report.refused), 'review')} left out, of clips that the folder does not have (any more): {ids}")
    if report.refused:
        raise typer.Exit(1)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port. Raises SetupError if that is not possible."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # The port of a server that just stopped is free.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reason = error.strerror or error
        raise SetupError(f"cannot listen on {host} port {port}: {reason}. Choose another port with --port.") from None
    return listening


BACKLOG = 2048
"""Connections that wait while a server starts."""
_LISTED = 5
"""Shots in each list."""
_MAX_MESSAGE_LENGTH = 200
MAX_COSTS = 1000
"""Scripts and characters whose cost is counted. Those after them count in the total only."""
CostOf = Literal["all", "script", "character"]
_CostKey = tuple[CostOf, str | None, str | None]
"""`of`, `name` and `currency` of a cost."""


@dataclass(slots=True)
class FailureGroup:
    """Failures with the same stage and class of error."""

    stage: str
    error: str
    count: int
    example: str
    """Id of the first one in the order of the manifest."""
    script: str
    line: int | None
    message: str
    """Message of the example."""


@dataclass(slots=True)
class ListedShot:
    """A shot that stands out."""

    id: str
    script: str
    line: int | None
    value: float
    """Seconds of all stages, or the worst likeness of the clip, -1 to 1."""


@dataclass(slots=True)
class Cost:
    """Cost of the finished shots of a folder, of a script, or of a character."""

    of: CostOf
    name: str | None
    """Name of the script or character."""
    currency: str | None
    """`None` if the price is the user's. Shots with another currency have an entry of their own."""
    cost: float = 0.0
    """Cost of the GPU seconds of all stages."""
    clips: int = 0
    """Finished shots of known cost."""
    accepted: int = 0
    """Clips of these that their review accepts."""
    cost_per_clip: float | None = None
    cost_per_accepted: float | None = None
    """`cost` of all clips, divided by the accepted ones. `None` without any."""


@dataclass(slots=True)
class Overview:
    """Figures that `vidgen status` prints."""

    counts: dict[str, int]
    """Status -> number of shots."""
    failures: list[FailureGroup]
    """Most frequent first."""
    slowest: list[ListedShot]
    least_alike: list[ListedShot]
    seconds: float
    """Seconds of all stages of all shots."""
    gpu_seconds: float
    shot_bytes: int
    """Bytes of the images and clips."""
    costs: list[Cost]
    """All shots, then scripts and characters by their cost. Empty if no shot has a cost."""
    cache_bytes: int | None = field(default=None)
    """Bytes of the stage cache. `None` in an object store."""


def overview(storage: Storage) -> Overview:
    """Read the manifest. Memory use does not grow with the number of shots, only of reviews. Raises OSError."""
    counts: Counter[str] = Counter(done=0, failed=0)
    groups: dict[tuple[str, str], FailureGroup] = {}
    slowest: list[tuple[float, str, ListedShot]] = []
    least: list[tuple[float, str, ListedShot]] = []
    seconds = gpu_seconds = 0.0
    shot_bytes = 0
    costs: dict[_CostKey, Cost] = {}
    accepted = {digest for digest, review in read_reviews(storage).items() if review.verdict == "accept"}
    for batch in manifest_batches(storage):
        for row in batch.to_pylist():
            counts[row["status"]] += 1
            if row["status"] == "failed":
                _count_failure(groups, row)
                continue
            if row["status"] == REPLACED:
                continue
            seconds += row["seconds"] or 0
            gpu_seconds += row["gpu_seconds"] or 0
            shot_bytes += sum(row[f"{name}_bytes"] or 0 for name in SHOT_FILES)
            if row["cost"] is not None:
                _add_cost(costs, row, is_accepted=clip_digest(row) in accepted)
            _keep(slowest, row, row["seconds"], largest=True)
            worst = row["clip_likeness_worst"] if row["num_frames"] else row["image_likeness"]
            _keep(least, row, worst, largest=False)
    return Overview(
        dict(counts),
        sorted(groups.values(), key=lambda group: -group.count),
        [shot for _, _, shot in sorted(slowest, key=lambda entry: -entry[2].value)],
        [shot for _, _, shot in sorted(least, key=lambda entry: entry[2].value)],
        round(seconds, 1),
        round(gpu_seconds, 1),
        shot_bytes,
        _with_means(costs.values()),
        _bytes_below(storage.local / "cache") if storage.local else None,
    )


def _count_failure(groups: dict[tuple[str, str], FailureGroup], row: Mapping[str, Any]) -> None:
    key = row["failure_stage"] or "", row["failure_error"] or ""
    if key in groups:
        groups[key].count += 1
        return
    message = " ".join((row["failure_message"] or "").split())
    groups[key] = FailureGroup(*key, 1, row["id"], row["script"], row["line"], message[:_MAX_MESSAGE_LENGTH])


def _add_cost(costs: dict[_CostKey, Cost], row: Mapping[str, Any], *, is_accepted: bool) -> None:
    """Add the cost of a shot to that of the folder, of its script and of its character."""
    metadata = json.loads(row["metadata"] or "{}")
    character = metadata.get("character") if isinstance(metadata, dict) else None
    keys: list[_CostKey] = [("all", None, row["currency"]), ("script", row["script"], row["currency"])]
    if isinstance(character, str) and character:
        keys.append(("character", character, row["currency"]))
    for key in keys:
        if key not in costs and len(costs) >= MAX_COSTS:
            continue
        entry = costs.setdefault(key, Cost(*key))
        entry.cost += row["cost"]
        entry.clips += 1
        entry.accepted += is_accepted


def _with_means(costs: Collection[Cost]) -> list[Cost]:
    """Return the costs, if any shot has cost something, with their means."""
    if not any(entry.cost for entry in costs):
        return []
    for entry in costs:
        entry.cost = round(entry.cost, 6)
        entry.cost_per_clip = round(entry.cost / entry.clips, 6)
        entry.cost_per_accepted = round(entry.cost / entry.accepted, 6) if entry.accepted else None
    return sorted(costs, key=lambda entry: (get_args(CostOf).index(entry.of), -entry.cost))


def _keep(kept: list[tuple[float, str, ListedShot]], row: Mapping[str, Any], value: float | None, *, largest: bool) -> None:
    """Add the shot to a heap of the `_LISTED` shots with the largest or smallest values."""
    if value is None:
        return
    heapq.heappush(kept, (value if largest else -value, row["id"], ListedShot(row["id"], row["script"], row["line"], value)))
    if len(kept) > _LISTED:
        heapq.heappop(kept)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            # Removed meanwhile.
            except FileNotFoundError:
                continue
    return total
