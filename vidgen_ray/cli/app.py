"""Commands of `vidgen`.

Exit codes: 0 all shots done, 1 some shots failed, 2 usage error, 3 invalid script or profile, 4 environment error, 5 too
expensive, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from typer.core import TyperGroup
from typer.main import get_command

from vidgen_ray.bench.bench_command import bench
from vidgen_ray.cli.doctor import doctor
from vidgen_ray.cli.inspect import identity, show
from vidgen_ray.cli.models import models
from vidgen_ray.cli.options import (
    PROFILE_HELP,
    C2paKeyOption,
    CharactersOption,
    ConsentOption,
    JsonOption,
    LabelOption,
    NoProvenanceOption,
    OutOption,
    PrivateOption,
    ProfileOption,
    SeedOption,
    SetOption,
    check_out,
    example,
    local_path,
    parse_fields,
    provenance_settings,
    with_consent,
    with_provenance,
)
from vidgen_ray.cli.run_script import (
    RESUME,
    RequireLicenceOption,
    changes_until,
    interruptible,
    run_script,
    script_licences,
    script_settings,
)
from vidgen_ray.engine.cache_writer import DEFAULT_CACHE, KEPT, CacheMode
from vidgen_ray.errors import MAX_MESSAGES, ScriptError, SetupError, UsageError, VidgenError
from vidgen_ray.film.film_command import film
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.licences import require_licence
from vidgen_ray.online.serve_command import keys
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.storage import URL
from vidgen_ray.pipeline import progress_bar
from vidgen_ray.planner import load_calibration, parse_gpus
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.provenance.record import ProvenanceSettings
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import iter_script, read_script
from vidgen_ray.shot import Shot
from vidgen_ray.stages.progress import progress_callback
from vidgen_ray.upscale.upscale_command import upscale
from vidgen_ray.version import __version__

COMMANDS = "vidgen.commands"
"""Group of entry points, name of a command -> function whose parameters typer reads, or `typer.Typer` with several commands."""


class FoundCommands(TyperGroup):
    """The commands of this module, and those that entry points name. They are imported when called, or listed by --help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(entry_points(group=COMMANDS).names - self.commands.keys())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            for found in entry_points(group=COMMANDS, name=cmd_name):
                self.commands[cmd_name] = _command(cmd_name, found.load())
        return super().get_command(ctx, cmd_name)


def _command(name: str, loaded: Any) -> Any:
    """Return a command of an object that an entry point names."""
    if not isinstance(loaded, typer.Typer):
        function, loaded = loaded, typer.Typer(add_completion=False)
        loaded.command(name)(function)
    command = get_command(loaded)
    command.name = name
    return command


app = typer.Typer(
    name="vidgen",
    cls=FoundCommands,
    help="Batch and online video generation on Ray, with one recognisable person across every clip.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(identity, name="identity")
app.add_typer(keys, name="keys")
app.add_typer(models, name="models")
app.command()(film)
app.command()(doctor)
app.command()(upscale)
app.command()(show)
app.command()(bench)

ScriptArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SCRIPT",
        parser=local_path,
        help="Script with one shot per line: .jsonl, .csv, .tsv, .txt, .parquet or .yaml; or a folder of captioned images or "
        "of Parquet files.",
    ),
]
OutUrlOption = Annotated[
    str, typer.Option("--out", "-o", help="Output folder, or its URL: s3://BUCKET/FOLDER.", callback=check_out)
]
GpusOption = Annotated[
    str | None,
    typer.Option("--gpus", help="GPUs to plan for, e.g. 8x80GB or 2x8x80GB (two nodes of eight). Default: detect."),
]
MaxCostOption = Annotated[
    float | None,
    typer.Option(
        "--max-cost",
        metavar="COST",
        min=0,
        help="Exit with code 5 before any worker starts if the estimated cost exceeds this. Default: no limit.",
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option(
        "--price", metavar="PRICE", min=0, help="Price of a GPU-hour. Default: that of the profile, or of the detected GPUs."
    ),
]
AddressOption = Annotated[
    str | None, typer.Option("--address", "-a", help="Address of a Ray cluster, or `auto`. Default: start Ray on this machine.")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Render finished shots again, without the cache.")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="stages",
        help="Also write the intermediate results (base.png, refine.png, lora.png, style.png, face.json).",
    ),
]
CacheOption = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="none|images|all",
        help="Results of stages to keep for later runs: face features and images, or also the clips before upscaling.",
        show_default=True,
    ),
]
CacheGbOption = Annotated[
    float | None,
    typer.Option(
        "--cache-gb",
        metavar="GB",
        min=0,
        help="GB that the run may add to the cache. Default: until less than 10% and less than 50 GB of the disk are free.",
    ),
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="The same as --cache none.")]
UntilOption = Annotated[
    str | None,
    typer.Option(
        "--until", metavar="image|video", help="Stop after the image, or after the clip without upscaling. Default: all stages."
    ),
]
ModeOption = Annotated[
    str | None,
    typer.Option(
        "--mode", metavar="quality|fast", help="Mode of shots without one. Default: that of the profile, otherwise quality."
    ),
]


def _server_default(setting: str) -> str:
    return f"Default: {OnlineSettings.model_fields[setting].default}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors that a user can fix are printed without a traceback."""
    try:
        app(args=None if argv is None else list(argv), prog_name="vidgen")
    except VidgenError as error:
        typer.echo(f"vidgen: {error}", err=True)
        return error.exit_code
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    except KeyboardInterrupt:
        typer.echo(f"vidgen: interrupted. {RESUME}", err=True)
        return 130
    except OSError as error:
        # A disk, a network share or an object store failed. The run can be resumed when it works again.
        path = f"{error.filename}: " if error.filename else ""
        typer.echo(f"vidgen: {path}{error.strerror or error}. {RESUME}", err=True)
        return SetupError.exit_code
    return 0


@app.callback(invoke_without_command=True)
def show_version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def demo(
    out: OutOption = "out/demo",
    profile: ProfileOption = "demo",
    with_film: Annotated[
        bool, typer.Option("--film", help="Render the screenplay of the demo instead, and join its shots to OUT/film.mp4.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Render the demo script on this machine: all stages, both modes."""
    from vidgen_ray.batch.render import RenderOptions
    from vidgen_ray.report.sheets import write_contact_sheet

    if URL.match(out):
        raise UsageError(f"--out: got {out!r}, must be a folder on this machine")
    chosen = load_profile(profile)
    if with_film:
        script = example("film.yaml")
        settings = ScriptSettings(script, profile_defaults=chosen.defaults)
        run_script(settings, chosen, out, RenderOptions(), as_json=as_json)
        film(out, str(Path(out, "film.mp4")), script=script, as_json=as_json)
        return
    script = example("demo.jsonl")
    try:
        settings = ScriptSettings(script, profile_defaults=chosen.defaults)
        run_script(settings, chosen, out, RenderOptions(keep_stages=True), as_json=as_json)
    finally:
        if Path(out, "manifest").exists():
            typer.echo(f"contact sheet: {write_contact_sheet(Path(out))}", err=as_json)


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
    characters: CharactersOption = None,
    consent: ConsentOption = None,
    keep: KeepOption = None,
    fresh: FreshOption = False,
    cache: CacheOption = DEFAULT_CACHE,
    cache_gb: CacheGbOption = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace finished shots of other scripts with the same id. Default: reject the line."),
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Then remove the shots of lines that the script no longer has, as `vidgen prune` does."),
    ] = False,
    no_cache: NoCacheOption = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Check all lines first, and exit with code 3 if any is invalid. Default: render the valid lines."
        ),
    ] = False,
    attempts: Annotated[
        int, typer.Option("--attempts", min=1, help="Attempts per call of a stage when it fails, times out or crashes.")
    ] = 3,
    grace_s: Annotated[
        float,
        typer.Option(
            "--grace", metavar="SECONDS", min=0, help="How long shots in progress may finish after SIGTERM or Ctrl-C."
        ),
    ] = 60,
    max_cost: MaxCostOption = None,
    price: PriceOption = None,
    require: RequireLicenceOption = None,
    no_provenance: NoProvenanceOption = False,
    private: PrivateOption = False,
    label: LabelOption = None,
    c2pa_key: C2paKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Render a script on Ray. Finished shots are skipped, so the same command resumes a run.

    SIGTERM or Ctrl-C stops the run after the shots in progress. A second one stops it immediately.
    """
    from vidgen_ray.batch.render import RenderOptions

    chosen = load_profile(profile)
    chosen = with_provenance(chosen, no_provenance=no_provenance, private=private, label=label, c2pa_key=c2pa_key)
    settings = script_settings(script, chosen, fields, characters, mode, seed, until, consent)
    if strict:
        errors = [error for line in iter_script(settings) for error in line.errors]
        if errors:
            raise ScriptError(errors)
    if require is not None:
        require_licence(require, script_licences(iter_script(settings), chosen, OutputFolder(out)))
    options = RenderOptions(
        address=address,
        cluster=parse_gpus(gpus) if gpus else None,
        price=price,
        max_cost=max_cost,
        fresh=fresh,
        replace=replace,
        cache="none" if no_cache else _cache_mode(cache),
        cache_gb=cache_gb,
        keep_stages=_keeps_stages(keep),
        attempts=attempts,
        grace_s=grace_s,
    )
    run_script(settings, chosen, out, options, as_json=as_json, then_prune=prune)


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
    characters: CharactersOption = None,
    consent: ConsentOption = None,
    seed: SeedOption = 0,
    max_cost: MaxCostOption = None,
    price: PriceOption = None,
    require: RequireLicenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the GPU layout, duration and cost of a script without rendering it. Also lists the licences of its weights."""
    from vidgen_ray.batch.render import estimate_run
    from vidgen_ray.cli.plan import plan_command

    chosen = load_profile(profile)
    settings = script_settings(script, chosen, fields, characters, mode, seed, until, consent)
    planned_gpus = parse_gpus(gpus) if gpus else None
    with interruptible():
        demand, counts, cluster = estimate_run(settings, chosen, OutputFolder(out), address, planned_gpus)
    measured = load_calibration(chosen.name, cluster.card)
    licences = script_licences(iter_script(settings), chosen, OutputFolder(out))
    plan_command(
        chosen,
        demand,
        cluster,
        counts=counts,
        measured=measured,
        price=price,
        max_cost=max_cost,
        licences=licences,
        as_json=as_json,
    )
    require_licence(require, licences)


@app.command()
def serve(
    profile: Annotated[str | None, typer.Option("--profile", "-p", help=f"{PROFILE_HELP} {_server_default('profile')}")] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", help=f"Address to listen on. Addresses other than localhost require API keys. {_server_default('host')}"
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help=f"Port to listen on. {_server_default('port')}")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help=f"Output folder, or its URL, for results and jobs. {_server_default('data')}"),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option("--database", help="Job database: sqlite:///FILE or postgresql://... Default: jobs.db in --data."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", help="File with API keys, see `vidgen keys new`. Default: those in $VIDGEN_API_KEYS."),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", help="YAML file with all settings. Command-line options override it.")
    ] = None,
    address: AddressOption = None,
    require: RequireLicenceOption = None,
    c2pa_key: C2paKeyOption = None,
    grace_s: Annotated[
        float,
        typer.Option("--grace", metavar="SECONDS", min=0, help="How long jobs in progress may finish after SIGTERM or Ctrl-C."),
    ] = 60,
) -> None:
    """Start a server with an OpenAI-compatible API for videos and images, and a web page.

    Jobs are stored before they are accepted. After a stop or a crash, the same command resumes them.
    """
    from vidgen_ray.online.serve_command import serve_command, settings_of

    options = {"profile": profile, "host": host, "port": port, "data": data, "database": database, "keys_file": keys}
    options |= {"require_licence": require}
    with interruptible(), redirect_stdout(sys.stderr):
        chosen = settings_of(settings, options)
        if c2pa_key is not None:
            base = chosen.provenance or load_profile(chosen.profile).provenance
            marking = provenance_settings(base, no_provenance=False, private=False, c2pa_key=c2pa_key)
            chosen = chosen.model_copy(update={"provenance": marking})
        serve_command(chosen, address=address, grace_s=grace_s)


@app.command()
def gc(
    out: Annotated[str, typer.Argument(help="Output folder, or its URL.", callback=check_out)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed, without removing it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove unused files from an output folder: cache entries without a finished shot, and files of killed runs."""
    from vidgen_ray.cli.folder import gc as collect

    collect(out, dry_run=dry_run, as_json=as_json)


@app.command()
def status(
    out: Annotated[str, typer.Argument(help="Output folder, or its URL.", callback=check_out)] = "out",
    as_json: JsonOption = False,
) -> None:
    """Print what an output folder has: counts, failures, slowest and least alike shots, disk use."""
    from vidgen_ray.cli.folder import status_command

    status_command(out, as_json=as_json)


@app.command()
def retry(
    out: Annotated[str, typer.Argument(help="Output folder, or its URL.", callback=check_out)] = "out",
    profile: Annotated[
        str | None, typer.Option("--profile", "-p", help=f"{PROFILE_HELP} Default: that of the last run in the folder.")
    ] = None,
    address: AddressOption = None,
    gpus: GpusOption = None,
    consent: ConsentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Render the failed lines of an output folder again, as its last run did: with its profile and provenance options, --keep,
    --cache, --cache-gb, --replace, --attempts, --seed and --until.
    """
    from vidgen_ray.batch.render import RenderOptions
    from vidgen_ray.cli.run_script import failed_lines, last_options, last_profile
    from vidgen_ray.outputs.folder import setting_of_last_run

    outputs = OutputFolder(out)
    chosen = load_profile(profile) if profile else last_profile(outputs)
    chosen = chosen.with_provenance(setting_of_last_run(outputs, "provenance", ProvenanceSettings))
    with failed_lines(outputs) as script:
        last = last_options(outputs)
        fields = with_consent({}, consent)
        settings = ScriptSettings(script, last.run_seed, fields, chosen.defaults, last.changes, policy=chosen.policy)
        options = RenderOptions(
            address=address,
            cluster=parse_gpus(gpus) if gpus else None,
            cache=last.cache,
            cache_gb=last.cache_gb,
            replace=last.replace,
            keep_stages=last.keep_stages,
            attempts=last.attempts,
        )
        run_script(settings, chosen, out, options, as_json=as_json)


@app.command()
def watch(
    out: Annotated[str, typer.Argument(help="Output folder.", callback=check_out)] = "out",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on, on this machine only.")] = 8001,
) -> None:
    """Show the gallery of an output folder in the browser, while a run fills it."""
    from vidgen_ray.cli.folder import watch_command

    watch_command(Path(out), port)


@app.command()
def prune(
    out: Annotated[str, typer.Argument(help="Output folder, or its URL.", callback=check_out)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed, without removing it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the shots of lines that their script no longer has."""
    from vidgen_ray.outputs.cleanup import prune as remove_replaced

    report = remove_replaced(OutputFolder(out), dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **asdict(report)}))
    else:
        verb = "would remove" if dry_run else "removed"
        typer.echo(f"{verb} {report.shots:,} replaced shots: {report.bytes / 1e6:.1f} MB")


@app.command()
def shot(
    prompt: Annotated[str, typer.Argument(help="Text to render.")],
    out: OutUrlOption = "out",
    profile: ProfileOption = "demo",
    face: Annotated[
        list[Path] | None, typer.Option("--face", help="Photo of the person. Repeat for more photos of the same person.")
    ] = None,
    consent: ConsentOption = None,
    lora: Annotated[str | None, typer.Option("--lora", help="LoRA weights, a .safetensors file.")] = None,
    seed: SeedOption = 0,
    mode: ModeOption = None,
    until: UntilOption = None,
    fields: SetOption = None,
    keep: KeepOption = None,
    no_provenance: NoProvenanceOption = False,
    private: PrivateOption = False,
    label: LabelOption = None,
    c2pa_key: C2paKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Render one shot in this process, without Ray."""
    from vidgen_ray.pipeline import VideoGenerationPipeline
    from vidgen_ray.script.read import check_shot

    chosen = load_profile(profile)
    chosen = with_provenance(chosen, no_provenance=no_provenance, private=private, label=label, c2pa_key=c2pa_key)
    values = with_consent(parse_fields(fields), consent)
    if "prompt" in values:
        raise typer.BadParameter("got prompt, which is the argument PROMPT of this command", param_hint="--set")
    options = {"prompt": prompt, "face_image": [str(photo) for photo in face] if face else None, "lora": lora, "mode": mode}
    values |= {name: value for name, value in options.items() if value is not None}
    checked = check_shot(values, "shot", chosen.defaults, run_seed=seed, policy=chosen.policy)
    checked = checked.model_copy(update=changes_until(until))
    pipeline = VideoGenerationPipeline(chosen, out, keep_stages=_keeps_stages(keep))
    with interruptible(), progress_bar(Console(stderr=True)) as on_progress, progress_callback(on_progress):
        record = pipeline.render(checked)
    for note in (note for step in record.stages for note in step.notes):
        typer.echo(f"vidgen: note: {note}", err=True)
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
    characters: CharactersOption = None,
    consent: ConsentOption = None,
    mode: ModeOption = None,
    files: Annotated[
        bool, typer.Option("--files", help="Also decode all photos and start images, and read the headers of all LoRAs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check all lines of a script without rendering. Exits with code 3 if any line is invalid."""
    chosen = load_profile(profile)
    checked = read_script(script_settings(script, chosen, fields, characters, mode, 0, None, consent), decode_files=files)
    if as_json:
        errors = [asdict(error) for error in checked.errors]
        result = {"shots": len(checked.shots), "rejected": len(checked.rejected), "errors": errors, "notes": checked.notes}
        typer.echo(json.dumps(result))
    else:
        if checked.errors:
            typer.echo(str(ScriptError(checked.errors)), err=True)
        for note in checked.notes[:MAX_MESSAGES]:
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"{script.name}: {len(checked.shots)} valid shots, {len(checked.rejected)} invalid lines")
    if checked.rejected:
        raise typer.Exit(ScriptError.exit_code)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help=f"Stage to run: {', '.join(STAGE_BY_NAME)}.")],
    source: Annotated[Path | None, typer.Argument(help="Input file: an image, a clip or face.json. Not used by flux.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", parser=local_path, help="Output file: .png, .mp4 or .json.")
    ] = Path("out.png"),
    profile: ProfileOption = "demo",
    seed: SeedOption = 0,
    fields: SetOption = None,
    consent: ConsentOption = None,
    no_provenance: NoProvenanceOption = False,
    private: PrivateOption = False,
    label: LabelOption = None,
    c2pa_key: C2paKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a single stage on an image or a clip."""
    from vidgen_ray.cli.one_stage import run_one_stage

    chosen = load_profile(profile)
    chosen = with_provenance(chosen, no_provenance=no_provenance, private=private, label=label, c2pa_key=c2pa_key)
    with interruptible(), progress_bar(Console(stderr=True)) as on_progress, progress_callback(on_progress):
        is_media = run_one_stage(chosen, name, source, out, with_consent(parse_fields(fields), consent), seed)
    marking = chosen.provenance
    note = {"metadata": marking.metadata, "label": marking.label, "signed": marking.signing_key is not None}
    typer.echo(json.dumps({"out": str(out), "provenance": note if is_media else None}) if as_json else str(out))


@app.command()
def schema(
    model: Annotated[
        str,
        typer.Argument(
            help="script (a .yaml script, for editors), shot (a script line), profile, manifest (a manifest row) or film (a "
            "film file)."
        ),
    ] = "shot",
) -> None:
    """Print the JSON schema of a script, a shot, a profile, a manifest row or a film file."""
    from vidgen_ray.film.film_settings import FilmSettings
    from vidgen_ray.outputs.manifest import ManifestRow
    from vidgen_ray.script.screenplay import script_schema

    models: dict[str, type[BaseModel]] = {"shot": Shot, "profile": Profile, "manifest": ManifestRow, "film": FilmSettings}
    if model != "script" and model not in models:
        raise typer.BadParameter(f"got {model!r}, must be one of script, {', '.join(models)}", param_hint="MODEL")
    content = script_schema() if model == "script" else models[model].model_json_schema()
    typer.echo(json.dumps(content, indent=2))


def _cache_mode(value: str) -> CacheMode:
    for mode in KEPT:
        if value == mode:
            return mode
    raise typer.BadParameter(f"got {value!r}, must be one of {', '.join(KEPT)}", param_hint="--cache")


def _keeps_stages(keep: list[str] | None) -> bool:
    for value in keep or []:
        if value != "stages":
            raise typer.BadParameter(f"got {value!r}, must be stages", param_hint="--keep")
    return bool(keep)
