"""The commands and their exit codes: 0 all done, 1 some shots failed, 2 usage, 3 bad script or profile, 4 environment,
130 interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console

from vidgen_ray.cli.identity import identity
from vidgen_ray.cli.keys import keys
from vidgen_ray.cli.options import JsonOption, OutOption, ProfileOption, SeedOption, SetOption, parse_fields
from vidgen_ray.cli.progress import run_view
from vidgen_ray.cli.stop_signals import stoppable
from vidgen_ray.errors import ScriptError, SetupError, VidgenError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner import load_calibration, parse_gpus
from vidgen_ray.profile import Profile, builtin_profiles, load_profile
from vidgen_ray.script.reader import CheckedLine, RejectedLine, iter_script, read_script
from vidgen_ray.shot import Shot
from vidgen_ray.version import __version__

app = typer.Typer(
    name="vidgen",
    help="A script goes in, one line a shot; finished clips come out, with the same recognisable person throughout.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(identity, name="identity")
app.add_typer(keys, name="keys")

ScriptArgument = Annotated[Path, typer.Argument(help="A .jsonl, .csv, .txt, .parquet or .yaml script.")]
OutUrlOption = Annotated[str, typer.Option("--out", "-o", help="The output folder, or its URL: s3://BUCKET/FOLDER.")]
GpusOption = Annotated[
    str | None, typer.Option("--gpus", help="What to plan for: 8x80GB, 2x8x80GB (nodes of 8). Without it the run looks.")
]
MaxCostOption = Annotated[float | None, typer.Option("--max-cost", min=0, help="End with 5 where the plan costs more.")]
PriceOption = Annotated[float | None, typer.Option("--price", min=0, help="Of a GPU-hour, in place of the default.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", "-a", help="A Ray cluster, or `auto`; without it Ray is started here.")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Render shots again that are done, without the cache.")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", help="`stages`: also base.png, lora.png, style.png, face.json of each shot."),
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Keep no results of single stages (saves disk).")]
UntilOption = Annotated[str | None, typer.Option("--until", help="`image` or `video`: stop after that.")]
ModeOption = Annotated[str | None, typer.Option("--mode", help="`quality` or `fast`, for shots that do not say.")]


INTERRUPTED = "vidgen: interrupted; the same command goes on where this one stopped"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code; a user's mistake is a sentence, not a traceback."""
    try:
        app(args=None if argv is None else list(argv), prog_name="vidgen")
    except VidgenError as error:
        typer.echo(f"vidgen: {error}", err=True)
        return error.exit_code
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        typer.echo(INTERRUPTED, err=True)
        return 130
    except OSError as error:
        # A disk, a share or an object store: the run can go on when it is there again.
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(f"vidgen: {place}{error.strerror or error}; the same command goes on where this one stopped", err=True)
        return SetupError.exit_code
    return 0


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the block with exit code 130 and a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(INTERRUPTED, err=True)
        raise typer.Exit(130) from None


@app.callback(invoke_without_command=True)
def show_version(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    # The one option that is no command's.
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def demo(
    out: OutOption = Path("out/demo"),
    profile: ProfileOption = "demo",
    as_json: JsonOption = False,
) -> None:
    """Render the demo script: every stage, both modes, on this machine."""
    from vidgen_ray.report.contact_sheet import write_contact_sheet

    chosen = load_profile(profile)
    script = _demo_script()
    try:
        lines = iter_script(script, profile_defaults=chosen.defaults)
        _render(lines, script.name, chosen, str(out), as_json=as_json, keep_stages=True)
    finally:
        if (out / "manifest").exists():
            typer.echo(f"all shots in one picture: {write_contact_sheet(out)}", err=as_json)


@app.command()
def render(
    script: ScriptArgument,
    out: OutUrlOption = "out",
    profile: ProfileOption = "demo",
    address: AddressOption = None,
    gpus: GpusOption = None,
    seed: SeedOption = 0,
    mode: ModeOption = None,
    until: UntilOption = None,
    fields: SetOption = None,
    keep: KeepOption = None,
    fresh: FreshOption = False,
    no_cache: NoCacheOption = False,
    strict: Annotated[bool, typer.Option("--strict", help="Render nothing if any line is wrong.")] = False,
    attempts: Annotated[
        int, typer.Option("--attempts", min=1, help="How often a line may break a stage, hang, or kill its process.")
    ] = 3,
    grace_s: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that shots in progress get when the run is told to stop.")
    ] = 60,
    max_cost: MaxCostOption = None,
    price: PriceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Render a script on Ray. Shots that are done are skipped, so the same command resumes a run.

    SIGTERM and Ctrl-C end it when the shots in progress are done; a second one ends it at once.
    """
    chosen = load_profile(profile)
    given = parse_fields(fields) | ({"mode": mode} if mode else {})
    lines = partial(iter_script, script, run_seed=seed, defaults=given, profile_defaults=chosen.defaults)
    if strict and (wrong := [error for line in lines() if isinstance(line, RejectedLine) for error in line.errors]):
        raise ScriptError(wrong)
    _render(
        _until(lines(), until),
        script.name,
        chosen,
        out,
        address=address,
        cluster=parse_gpus(gpus) if gpus else None,
        price=price,
        before_start=lambda plan: plan.check_cost(max_cost),
        fresh=fresh,
        use_cache=not no_cache,
        keep_stages=_keeps_stages(keep),
        attempts=attempts,
        grace_s=grace_s,
        as_json=as_json,
    )


@app.command()
def plan(
    script: ScriptArgument,
    out: OutUrlOption = "out",
    profile: ProfileOption = "demo",
    address: AddressOption = None,
    gpus: GpusOption = None,
    mode: ModeOption = None,
    until: UntilOption = None,
    fields: SetOption = None,
    seed: SeedOption = 0,
    max_cost: MaxCostOption = None,
    price: PriceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how a script would be laid out over GPUs, how long it would take and what it would cost, without rendering."""
    from vidgen_ray.batch.estimate import estimated
    from vidgen_ray.cli.plan import plan_command

    chosen = load_profile(profile)
    given = parse_fields(fields) | ({"mode": mode} if mode else {})
    checked = partial(iter_script, script, run_seed=seed, defaults=given, profile_defaults=chosen.defaults)
    told = parse_gpus(gpus) if gpus else None
    with interruptible():
        demand, counts, cluster = estimated(lambda: _until(checked(), until), chosen, OutputFolder(out), address, told)
    measured = load_calibration(chosen.name, cluster.card)
    plan_command(chosen, demand, cluster, counts=counts, measured=measured, price=price, max_cost=max_cost, as_json=as_json)


@app.command()
def serve(
    profile: Annotated[
        str | None, typer.Option("--profile", "-p", help=f"{', '.join(builtin_profiles())}, or the path of a profile file.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Where to listen. Beyond this machine it needs API keys.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535)] = None,
    data: Annotated[str | None, typer.Option("--data", help="Results and jobs: an output folder, or its URL.")] = None,
    database: Annotated[
        str | None, typer.Option("--database", help="sqlite:///FILE or postgresql://...; without it jobs.db in --data.")
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="API keys; see `vidgen keys`.")] = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", help="A YAML file with these and all other settings; options win over it.")
    ] = None,
    address: AddressOption = None,
    grace_s: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that jobs in progress get when the server is told to stop.")
    ] = 60,
) -> None:
    """Answer an API like OpenAI's for videos and images, and show a page, until told to stop.

    Jobs are stored before they are accepted: whatever ends the server, the same command goes on with them.
    """
    from vidgen_ray.cli.serve import serve_command, settings_of

    told = {"profile": profile, "host": host, "port": port, "data": data, "database": database, "keys_file": keys}
    with interruptible(), redirect_stdout(sys.stderr):
        serve_command(settings_of(settings, told), address=address, grace_s=grace_s)


@app.command()
def gc(
    out: Annotated[str, typer.Argument(help="An output folder, or its URL.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, say what would be.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove from an output folder what no finished shot refers to: old cache entries, what killed runs left."""
    from vidgen_ray.cli.gc import gc as collect

    collect(out, dry_run=dry_run, as_json=as_json)


@app.command()
def shot(
    prompt: Annotated[str, typer.Argument(help="What is to be seen.")],
    out: OutUrlOption = "out",
    profile: ProfileOption = "demo",
    face: Annotated[
        list[Path] | None, typer.Option("--face", help="A photo of the person; repeatable, for several of the same one.")
    ] = None,
    lora: Annotated[str | None, typer.Option("--lora", help="A .safetensors file.")] = None,
    seed: SeedOption = 0,
    mode: ModeOption = None,
    until: UntilOption = None,
    fields: SetOption = None,
    keep: KeepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Render one shot in this process, without Ray."""
    from vidgen_ray.pipeline import VideoGenerationPipeline
    from vidgen_ray.script.reader import check_shot

    chosen = load_profile(profile)
    given = parse_fields(fields)
    if "prompt" in given:
        raise typer.BadParameter("got prompt, which is the argument of this command", param_hint="--set")
    told = {"prompt": prompt, "face_image": [str(photo) for photo in face] if face else None, "lora": lora, "mode": mode}
    given |= {name: value for name, value in told.items() if value is not None}
    checked = _shortened(check_shot(given, "shot", chosen.defaults, run_seed=seed), until)
    pipeline = VideoGenerationPipeline(chosen, out, keep_stages=_keeps_stages(keep))
    with interruptible(), Console(stderr=True).status("rendering"):
        record = pipeline.render(checked)
    if as_json:
        typer.echo(record.model_dump_json())
    else:
        for file in record.files:
            typer.echo(str(pipeline.outputs.place(checked.id or "", file)))


@app.command()
def validate(
    script: ScriptArgument,
    profile: ProfileOption = "demo",
    fields: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every line of a script without rendering. Ends with 3 if any line is wrong."""
    chosen = load_profile(profile)
    checked = read_script(script, defaults=parse_fields(fields), profile_defaults=chosen.defaults)
    if as_json:
        errors = [asdict(error) for error in checked.errors]
        typer.echo(json.dumps({"shots": len(checked.shots), "refused": len(checked.rejected), "errors": errors}))
    else:
        for error in checked.errors:
            typer.echo(f"{error}", err=True)
        typer.echo(f"{script.name}: {len(checked.shots)} shots fine, {len(checked.rejected)} lines wrong")
    if checked.rejected:
        raise typer.Exit(ScriptError.exit_code)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGE_BY_NAME)}.")],
    source: Annotated[Path | None, typer.Argument(help="The picture or clip to work on; flux needs none.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: .png, .mp4 or .json.")] = Path("out.png"),
    profile: ProfileOption = "demo",
    seed: SeedOption = 0,
    fields: SetOption = None,
) -> None:
    """Run one stage alone on a picture or a clip."""
    from vidgen_ray.cli.one_stage import run_one_stage

    run_one_stage(load_profile(profile), name, source, out, parse_fields(fields), seed)
    typer.echo(str(out))


@app.command()
def schema(
    what: Annotated[str, typer.Argument(help="shot, profile or manifest.")] = "shot",
) -> None:
    """Print the JSON schema of a script's line, a profile, or a row of the manifest."""
    from vidgen_ray.outputs.manifest import ManifestRow

    models: dict[str, type[BaseModel]] = {"shot": Shot, "profile": Profile, "manifest": ManifestRow}
    if what not in models:
        raise typer.BadParameter(f"got {what!r}, must be one of {', '.join(models)}", param_hint="WHAT")
    typer.echo(json.dumps(models[what].model_json_schema(), indent=2))


def _render(
    lines: Iterable[CheckedLine | RejectedLine], source: str, profile: Profile, out: str, *, as_json: bool, **options: Any
) -> None:
    from vidgen_ray.batch.render import GRACE_S, render
    from vidgen_ray.report.gallery import write_gallery

    outputs = OutputFolder(out)
    local = outputs.storage.local
    try:
        # Ray prints notices of its own on standard output, which is for the result alone.
        with (
            interruptible(),
            redirect_stdout(sys.stderr),
            run_view(local / "progress.jsonl" if local else None) as view,
            stoppable(options.get("grace_s", GRACE_S)) as stop,
        ):
            report = render(lines, profile, outputs, source=source, watcher=view, stop=stop, **options)
    finally:
        gallery = write_gallery(out)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        counts = f"{report.done} done, {report.skipped} done before, {report.failed} failed"
        typer.echo(f"{counts} in {report.seconds:.1f} s; see {gallery}")
        if report.failed:
            typer.echo(f"the failed lines and their reasons are in {outputs.storage.place('failures.jsonl')}")
    if report.left:
        typer.echo(f"vidgen: stopped with {report.left} lines to go; the same command goes on with them", err=True)
        raise typer.Exit(130)
    if report.failed:
        nothing_to_render = report.failed == report.refused and not report.done + report.skipped
        raise typer.Exit(ScriptError.exit_code if nothing_to_render else 1)


def _until(lines: Iterable[CheckedLine | RejectedLine], until: str | None) -> Iterator[CheckedLine | RejectedLine]:
    for line in lines:
        yield line._replace(shot=_shortened(line.shot, until)) if isinstance(line, CheckedLine) else line


def _shortened(shot: Shot, until: str | None) -> Shot:
    """The shot without what comes after the picture, or after the clip."""
    changes: dict[str, dict[str, Any]] = {"image": {"generate_video": False}, "video": {"upscale_video": False}}
    if until is None:
        return shot
    if until not in changes:
        raise typer.BadParameter(f"got {until!r}, must be image or video", param_hint="--until")
    return shot.model_copy(update=changes[until])


def _keeps_stages(keep: list[str] | None) -> bool:
    for what in keep or []:
        if what != "stages":
            raise typer.BadParameter(f"got {what!r}, must be stages", param_hint="--keep")
    return bool(keep)


def _demo_script() -> Path:
    """The examples lie in the package where it was installed, beside it in a checkout."""
    package = Path(str(resources.files("vidgen_ray")))
    places = [package / "examples" / "demo.jsonl", package.parent / "examples" / "demo.jsonl"]
    return next(place for place in places if place.is_file())
