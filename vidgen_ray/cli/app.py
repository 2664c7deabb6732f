"""The commands and their exit codes: 0 all done, 1 some shots failed, 2 usage, 3 bad script or profile, 4 environment,
130 interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console

from vidgen_ray.cli.options import JsonOption, OutOption, ProfileOption, SeedOption, SetOption, parse_fields
from vidgen_ray.cli.progress import run_view
from vidgen_ray.errors import ScriptError, VidgenError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.script import Script, read_script
from vidgen_ray.shot import Shot
from vidgen_ray.version import __version__

app = typer.Typer(
    name="vidgen",
    help="A script goes in, one line a shot; finished clips come out, with the same recognisable person throughout.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
    script = read_script(_demo_script(), profile_defaults=chosen.defaults)
    try:
        _render(script, chosen, out, as_json=as_json, keep_stages=True)
    finally:
        if (out / "manifest").exists():
            typer.echo(f"all shots in one picture: {write_contact_sheet(out)}", err=as_json)


@app.command()
def render(
    script: Annotated[Path, typer.Argument(help="A .jsonl, .csv, .txt, .parquet or .yaml script.")],
    out: OutOption = Path("out"),
    profile: ProfileOption = "demo",
    address: AddressOption = None,
    seed: SeedOption = 0,
    mode: ModeOption = None,
    until: UntilOption = None,
    fields: SetOption = None,
    keep: KeepOption = None,
    fresh: FreshOption = False,
    no_cache: NoCacheOption = False,
    strict: Annotated[bool, typer.Option("--strict", help="Render nothing if any line is wrong.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Render a script on Ray. Shots that are done are skipped, so the same command resumes a run."""
    chosen = load_profile(profile)
    given = parse_fields(fields) | ({"mode": mode} if mode else {})
    checked = read_script(script, run_seed=seed, defaults=given, profile_defaults=chosen.defaults)
    if checked.rejected and strict:
        raise ScriptError(checked.errors)
    _render(
        _until(checked, until),
        chosen,
        out,
        address=address,
        fresh=fresh,
        use_cache=not no_cache,
        keep_stages=_keeps_stages(keep),
        as_json=as_json,
    )


@app.command()
def shot(
    prompt: Annotated[str, typer.Argument(help="What is to be seen.")],
    out: OutOption = Path("out"),
    profile: ProfileOption = "demo",
    face: Annotated[Path | None, typer.Option("--face", help="A photo of the person.")] = None,
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
    from vidgen_ray.script import check_shot

    chosen = load_profile(profile)
    given = parse_fields(fields)
    if "prompt" in given:
        raise typer.BadParameter("got prompt, which is the argument of this command", param_hint="--set")
    told = {"prompt": prompt, "face_image": str(face) if face else None, "lora": lora, "mode": mode}
    given |= {name: value for name, value in told.items() if value is not None}
    checked = _shortened(check_shot(given, "shot", chosen.defaults, run_seed=seed), until)
    pipeline = VideoGenerationPipeline(chosen, out, keep_stages=_keeps_stages(keep))
    with interruptible(), Console(stderr=True).status("rendering"):
        record = pipeline.render(checked)
    folder = pipeline.outputs.shot_folder(checked.id or "")
    if as_json:
        typer.echo(record.model_dump_json())
    else:
        for file in record.files:
            typer.echo(str(folder / file))


@app.command()
def validate(
    script: Annotated[Path, typer.Argument(help="A .jsonl, .csv, .txt, .parquet or .yaml script.")],
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


def _render(script: Script, profile: Profile, out: Path, *, as_json: bool, **options: Any) -> None:
    from vidgen_ray.batch.render import render as render_on_ray
    from vidgen_ray.report.gallery import write_gallery

    try:
        # Ray prints notices of its own on standard output, which is for the result alone.
        with interruptible(), redirect_stdout(sys.stderr), run_view() as view:
            report = render_on_ray(script, profile, out, watcher=view, **options)
    finally:
        if (out / "manifest").is_dir():
            gallery = write_gallery(out)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        counts = f"{report.done} done, {report.skipped} done before, {report.failed} failed"
        typer.echo(f"{counts} in {report.seconds:.1f} s; see {gallery}")
        if report.failed:
            typer.echo(f"the failed lines and their reasons are in {out / 'failures.jsonl'}")
    if report.failed:
        raise typer.Exit(1 if script.shots else ScriptError.exit_code)


def _until(script: Script, until: str | None) -> Script:
    return replace(script, shots=tuple(_shortened(shot, until) for shot in script.shots))


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
