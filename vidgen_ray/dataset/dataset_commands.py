"""Commands that make a data set of an output folder."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from vidgen_ray.cli.commands import ModelOptions, interruptible, note, with_options
from vidgen_ray.cli.file_options import DETAILS_PANEL, JsonOption, check_out
from vidgen_ray.cli.options import AddressOption, MaxCostOption, OutArgument, WhereOption, check_target, local_path
from vidgen_ray.cli.run_script import ProfileOfLastRunOption, options_of_last_run, profile_of_run
from vidgen_ray.dataset.export_rows import NOT_CAPTIONED, ExportSettings, parse_splits
from vidgen_ray.dataset.tables import open_tables, run_query, write_parquet
from vidgen_ray.errors import UsageError, VidgenError, allowed_of
from vidgen_ray.licences import Requirement
from vidgen_ray.outputs.cleanup import check_not_empty
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import check_has_manifest
from vidgen_ray.outputs.storage import storage_at
from vidgen_ray.remote.stages import RemoteParams
from vidgen_ray.report.shot_text import value_text
from vidgen_ray.system.console import Console
from vidgen_ray.system.files import new_file
from vidgen_ray.system.quantities import count, duration

if TYPE_CHECKING:
    from vidgen_ray.dataset.export import ExportReport

MAIN_MEASURES = ("accepted", "cost")
"""Measures that `compare` prints besides likeness and motion. Seconds also depend on what else the machine did."""
SHOWN_MEASURES = 5
"""Other measures that it names."""
SHOWN_ROWS = 100
"""Rows of a query that are printed as a table."""
SHOWN_REASONS = 10
"""Clips that are named when an export leaves them out or removes them."""


def check_optional_out(value: str | None) -> str | None:
    return None if value is None else check_out(value)


def query(
    out: OutArgument,
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="Query over the tables clips, manifest, scores and reviews (DuckDB's SQL).")
    ],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all rows as CSV.")] = False,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", parser=local_path, help="Write all rows to this Parquet file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Query the results of an output folder with SQL.

    `clips` has a row per shot with its settings, scores and review. `DESCRIBE clips` lists the columns.
    """
    if as_csv + as_json + (parquet is not None) > 1:
        raise UsageError("--csv, --json and --parquet: only one can be given")
    with open_tables(storage_at(out)) as database:
        result = run_query(database, sql)
        if parquet is not None:
            with new_file(parquet) as path:
                write_parquet(path, result)
            return
        rows = (row for batch in result for row in batch.to_pylist())
        if as_json:
            typer.echo("[" + ",\n".join(json.dumps(row, default=str) for row in rows) + "]")
        elif as_csv:
            table = csv.writer(sys.stdout, lineterminator="\n")
            table.writerow(result.schema.names)
            for row in rows:
                table.writerow(
                    json.dumps(value, default=str) if isinstance(value, list | dict) else value for value in row.values()
                )
        else:
            first = list(islice(rows, SHOWN_ROWS + 1))
            shown = Table(*result.schema.names, box=None)
            for row in first[:SHOWN_ROWS]:
                shown.add_row(*("" if value is None else value_text(value) for value in row.values()))
            console = Console(markup=False, highlight=False)
            console.print(shown)
            if len(first) > SHOWN_ROWS:
                left = sum(1 for _ in rows)
                typer.echo(f"{left + 1:,} more rows; --csv, --json or --parquet FILE give all", err=True)


def compare(
    out: OutArgument,
    out2: Annotated[
        str | None,
        typer.Argument(metavar="[OUT2]", help="Second output folder, to compare the two.", callback=check_optional_out),
    ] = None,
    factor: Annotated[
        list[str] | None,
        typer.Option(
            "--factor", metavar="NAME", help="What to compare, such as lora_strength. Repeatable. Default: all factors."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="LEVEL", help="Value that the others are compared with. Default: the first one."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Folder for compare.html and compare.json. Default: OUT.",
            callback=check_optional_out,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare clips by the values of a matrix, by choices or settings, or the clips of two folders.

    Shows means, differences within pairs with 95% intervals, and the clips that differ most.
    """
    from vidgen_ray.dataset.compare import compare_clips, label, number_text, write_page

    storages = [storage_at(each) for each in (out, out2) if each is not None]
    result = compare_clips(storages, factor or (), reference)
    page = write_page(result, storages, storage_at(target or out))
    for text in result["unscored"]:
        note(text)
    if as_json:
        typer.echo(json.dumps(result))
        return
    console = Console(markup=False, highlight=False)
    for each in result["factors"]:
        shown = [*each["pareto"]["measures"], *(name for name in MAIN_MEASURES if name in each["measures"])]
        table = Table(label(each["name"]), "clips", *map(label, shown), box=None)
        for level in each["levels"]:
            cells = []
            for name in shown:
                text, change = number_text(level["measures"][name]["mean"], name), level.get("differences", {}).get(name)
                if change and change["pairs"]:
                    mean, low, high = (number_text(change[part], name, signed=True) for part in ("mean", "low", "high"))
                    text += f"\n{mean}" + (f" ({low} to {high})" if change["low"] is not None else "")
                cells.append(text)
            table.add_row(level["level"], f"{level['clips']:,}", *cells)
        console.print(table)
        if others := [label(name) for name in each["measures"] if name not in (*shown, *each["equal"])][:SHOWN_MEASURES]:
            typer.echo(f"Other measures that differ most: {', '.join(others)}.")
        intervals = f"no interval ({each['reason']})" if each["reason"] else "95% interval"
        typer.echo(f"Below the means: difference to {each['reference']}, {intervals}. Pairs by {each['paired_by']}.\n")
    typer.echo(page)


def diff(
    out1: Annotated[str, typer.Argument(help="Output folder, or its URL.", callback=check_out)],
    out2: Annotated[str, typer.Argument(help="Output folder to compare it with.", callback=check_out)],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array of the shots that are not equal.")] = False,
) -> None:
    """Say which shots of two output folders differ, and why: fields, weights, options or software.

    Exits with code 0 if all are equal, with 1 if not.
    """
    from vidgen_ray.dataset.lineage import difference_summary, differences

    folders = [OutputFolder(out) for out in (out1, out2)]
    for outputs in folders:
        check_not_empty(outputs)
    is_equal, found = True, differences(*folders)
    if as_json:
        for each in filter(None, found):
            row = {**each._asdict(), "reasons": [reason._asdict() for reason in each.reasons]}
            typer.echo(("[" if is_equal else ",\n") + json.dumps(row), nl=False)
            is_equal = False
        typer.echo("[]" if is_equal else "]")
    else:
        lines = list(difference_summary(found))
        typer.echo("\n".join(lines))
        is_equal = len(lines) == 1
    if not is_equal:
        raise typer.Exit(1)


def score(
    out: OutArgument,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            metavar="MODULE:CLASS",
            help="Also measure with this class, of an installed module or a file in the current folder. Repeatable.",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="NAME=PATH", help="Weights of the scorer with this name. Repeatable."),
    ] = None,
    profile: ProfileOfLastRunOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the clips of an output folder: frozen frames, flicker, motion, sharpness, faces, near-duplicates.

    Writes OUT/scores, for `vidgen query`. Only clips and scorers without scores are computed, so the same command resumes.
    Exits with code 1 if a clip cannot be measured.
    """
    from vidgen_ray.dataset.measurements import SCORERS
    from vidgen_ray.dataset.score_folder import faces_of, score_folder
    from vidgen_ray.dataset.scorers import choose_scorers

    outputs = OutputFolder(out)
    check_has_manifest(outputs.storage)
    found = faces_of(lambda: profile_of_run(outputs, profile), required=profile is not None)
    chosen = choose_scorers(SCORERS, scorer or (), weights or (), found)
    with interruptible(), redirect_stdout(sys.stderr):
        report = score_folder(outputs, chosen, found, address)
    typer.echo(json.dumps(asdict(report)) if as_json else report.summary("scored"))
    if report.failed:
        raise typer.Exit(1)


def caption(
    out: OutArgument,
    server: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Server with a vision model and OpenAI's chat completions. Repeatable. Default: that of the demo models.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Model, as /v1/models of the server names it.")] = None,
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=local_path, help="Text that says what a caption has.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, max=64, help="Frames of a clip that are seen.")] = 4,
    parallel: Annotated[int, typer.Option(help="Requests that a server has at once.")] = 4,
    key_env: Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable with the key of servers.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a request, for --max-cost.")] = None,
    max_cost: MaxCostOption = None,
    as_json: JsonOption = False,
) -> None:
    """Caption clips by what they show, and say which facts of their prompts they show.

    Writes caption, agrees and missing to OUT/scores, for `vidgen query`, --where and export. Clips with an answer of the same
    model to the same template are not asked for again, so the same command resumes. Exits with code 1 if one has no caption.
    """
    from vidgen_ray.dataset.captions import TEMPLATE, DemoCaptioner, ServerCaptioner, caption_folder

    outputs = OutputFolder(out)
    check_has_manifest(outputs.storage)
    captioner: DemoCaptioner | None = None
    profile = None
    if server and model and (price is not None or max_cost is None):
        options = {"servers": server, "key_env": key_env, "parallel": parallel, "price_per_second": price}
        try:
            params = RemoteParams.model_validate({"weights": f"remote:{model}", **options})
            text = TEMPLATE if template is None else template.read_text("utf-8").strip()
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            name = str(detail["loc"][0]).replace("servers", "server").replace("_", "-")
            raise UsageError(f"--{name}: got {detail['input']!r}, {allowed_of(detail)}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"--template: {error}; must be a text file") from None
        captioner = ServerCaptioner(params, text, max_cost)
    elif not (server or model):
        with suppress(VidgenError):
            if (profile := options_of_last_run(outputs, None).profile) == "demo":
                captioner = DemoCaptioner()
    if captioner is None:
        needed = "pass --server URL and --model NAME, and --price with --max-cost"
        used = f"the last run used {profile}" if profile else "no run has ended here"
        raise UsageError(
            f"{needed}; only clips of the profile demo are captioned without" + (f", {used}" if not server else "")
        )
    with interruptible(), redirect_stdout(sys.stderr):
        report = caption_folder(outputs.storage, captioner, frames)
    typer.echo(json.dumps(asdict(report)) if as_json else report.summary("captioned"))
    if report.failed:
        raise typer.Exit(1)


EXPORT_OPTIONS = ModelOptions.of(
    ExportSettings,
    format={},
    trainer={"flag": "--for", "metavar": "TRAINER:MODEL", "callback": check_target},
    fit={},
    best={"metavar": "SQL"},
    caption={"metavar": "TEMPLATE"},
    cleared={"metavar": "USE", "kind": Requirement},
    shard_mb={"kind": int, "min": 1, "rich_help_panel": DETAILS_PANEL},
    resize={"metavar": "WxH|SHORT", "rich_help_panel": DETAILS_PANEL},
)


@with_options
def export(
    out: OutArgument,
    dest: Annotated[str, typer.Argument(help="Folder of the data set, or its URL, which a call updates.", callback=check_out)],
    options: Annotated[dict[str, Any], EXPORT_OPTIONS],
    where: WhereOption = None,
    image: Annotated[bool, typer.Option("--image", help="Export the images.")] = False,
    video: Annotated[bool, typer.Option("--video", help="Export the clips before upscaling.")] = False,
    hd: Annotated[
        bool, typer.Option("--hd", help="Export only upscaled clips. Default: those, else clips, or images.")
    ] = False,
    split: Annotated[
        str, typer.Option(metavar="NAME=SHARE,...", help="Shares of clips, such as train=0.9,val=0.1.")
    ] = "train=1",
    split_by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Keep clips of one prompt, character or source (script) together. Repeatable. "
            "Default: prompt,character, with --for prompt.",
        ),
    ] = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a data set of the finished shots that are not rejected.

    The same call later adds new clips and removes those that are gone or rejected. On the same disk, files are linked.
    Rows have each person's consent as recorded: name, basis, and reference, such as the path of a form.
    Exits with code 1 if files of clips cannot be read, clips have no {caption} yet, or the trainer of --for would drop clips.
    """
    from vidgen_ray.dataset.export import export_folder

    kinds = [name for name, is_given in (("image", image), ("video", video), ("hd", hd)) if is_given]
    if len(kinds) > 1:
        raise UsageError("--image, --video and --hd: only one can be given")
    if options.get("trainer"):
        if wrong := [name for name in ("format", "resize") if options.get(name)]:
            raise UsageError(f"--for and --{wrong[0]}: only one can be given")
        options["format"] = "captions"
    elif options.get("fit"):
        raise UsageError("--fit: needs --for TRAINER:MODEL")
    options |= {"where": where, "files": kinds[0] if kinds else None, "splits": parse_splits(split)}
    if split_by:
        options["split_by"] = list(dict.fromkeys(key.strip() for each in split_by for key in each.split(",")))
    try:
        settings = ExportSettings.model_validate(options)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = next(part for part in reversed(detail["loc"]) if isinstance(part, str)).replace("_", "-")
        raise UsageError(f"--{name}: got {detail['input']!r}, {allowed_of(detail)}") from None
    with interruptible(), redirect_stdout(sys.stderr):
        report = export_folder(out, dest, settings, address)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        _print_export(report, is_fitted=settings.fit)
    uncaptioned = sum(row["reason"].endswith(NOT_CAPTIONED) for row in report.missing)
    if uncaptioned:
        new = f"{count(uncaptioned, 'clip')} {'has' if uncaptioned == 1 else 'have'} no caption yet"
        note(f"{new}; run: vidgen caption {shlex.quote(out)}, and the same command again")
    if report.counts["failed"] or report.counts.get("dropped") or uncaptioned:
        raise typer.Exit(1)


def _print_export(report: ExportReport, *, is_fitted: bool) -> None:
    for text, rows in (("removed", report.removed), ("refused by --cleared", report.refused), ("left out", report.missing)):
        for row in rows[:SHOWN_REASONS]:
            note(f"{row['id']}: {text}: {row['reason']}")
        if len(rows) > SHOWN_REASONS:
            note(f"{len(rows) - SHOWN_REASONS:,} more clips {text}; --json lists them")
    for group in report.groups:
        typer.echo(f"{count(group['clips'], 'clip')} of {group['each']}: {group['what']}")
    sizes = ", ".join(f"{name} {clips:,}" for name, clips in report.splits.items())
    counts = ", ".join(f"{number:,} {name}" for name, number in report.counts.items() if number)
    if report.counts.get("dropped") and not is_fitted:
        note("add --fit to encode these clips again, so that the trainer uses them")
    if report.cache:
        note(f"the trainer may have cached clips of an earlier export: {report.cache}")
    state = "is up to date" if report.up_to_date else f"written in {duration(report.seconds)}"
    typer.echo(f"{report.dest}: {state}: {sizes} ({counts})")
