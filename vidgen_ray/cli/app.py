"""Commands of `vidgen`: those of this package, and those of others that entry points name.

Exit codes: 0 all shots done, 1 some shots failed, 2 usage error, 3 invalid script or profile, 4 environment error, 5 too
expensive, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from typer.core import TyperGroup
from typer.main import get_command

from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.cli import folder_commands
from vidgen_ray.cli.doctor import doctor
from vidgen_ray.cli.inspect import identity, show
from vidgen_ray.cli.models import models
from vidgen_ray.cli.one_stage import shot, stage
from vidgen_ray.cli.options import (
    GROUPS,
    RENDER,
    START,
    CommandWithShortHelp,
    HelpWithoutFlagTypes,
    JsonOption,
    ProfileOption,
    check_out,
    example,
    group_of,
    in_group,
    is_first,
    note,
    with_options,
)
from vidgen_ray.cli.plan import plan
from vidgen_ray.cli.run_script import RESUME, render, retry, run_script, validate
from vidgen_ray.errors import SetupError, StorageHangs, UsageError, VidgenError, first_line, install_command
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.storage import URL
from vidgen_ray.planner import profile_for
from vidgen_ray.profile import Profile
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.screenplay import script_schema
from vidgen_ray.shot import Shot
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.quantities import escaped_output
from vidgen_ray.version import __version__

COMMANDS = "vidgen.commands"
"""Group of entry points, name of a command -> function whose parameters typer reads, or `typer.Typer` with several commands."""
SCHEMAS = "vidgen.schemas"
"""Group of entry points, name of a schema and of a section of .yaml scripts -> pydantic model."""
PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit code of a command that writes to a closed pipe, as shells report it."""
JOIN_S = 10.0
"""Seconds that a command whose storage hangs waits for its threads."""
CORE_SCHEMAS: dict[str, type[BaseModel]] = {"shot": Shot, "profile": Profile, "manifest": ManifestRow}


class FoundCommands(HelpWithoutFlagTypes, TyperGroup):
    """The commands of this module, and those that entry points name. They are imported when called, or listed by --help."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = [*super().list_commands(ctx), *sorted(entry_points(group=COMMANDS).names - self.commands.keys())]
        commands = {name: self.get_command(ctx, name) for name in names}
        return sorted(names, key=lambda name: (GROUPS.index(group_of(commands[name])), not is_first(commands[name])))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            self.list_commands(ctx)  # imports all, so that similar names are found
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            for found in entry_points(group=COMMANDS, name=cmd_name):
                try:
                    self.commands[cmd_name] = _command(cmd_name, found.load())
                except (ImportError, AttributeError) as error:
                    return _unavailable(cmd_name, error)
        return super().get_command(ctx, cmd_name)


def _command(name: str, loaded: Any) -> Any:
    """Return a command of an object that an entry point names."""
    function = loaded
    if not isinstance(loaded, typer.Typer):
        loaded = typer.Typer(add_completion=False, rich_help_panel=group_of(loaded))
        loaded.command(name, cls=CommandWithShortHelp)(function)
    command = get_command(loaded)
    command.name = name
    vars(command).update(rich_help_panel=group_of(loaded), is_first=is_first(function))
    return command


def _unavailable(name: str, error: Exception) -> Any:
    """Return a command in place of one that cannot be imported, so that the others can be listed."""
    fix = f"; {install_command('dataset')}" if isinstance(error, ModuleNotFoundError) and error.name == "duckdb" else ""
    reason = f"vidgen {name} cannot be imported: {error}{fix}"

    def fail() -> None:
        raise SetupError(reason)

    fail.__doc__ = f"Not available: {error}{fix}."
    found = _command(name, fail)
    found.context_settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return found


app = typer.Typer(
    name="vidgen",
    # Commands whose `--help` leaves out options have an option `--help-all` of their own.
    context_settings={"help_option_names": ["--help", "--help-all"]},
    cls=FoundCommands,
    help="Batch and online video generation on Ray, with one recognisable person across every clip.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors that a user can fix are printed without a traceback."""
    with escaped_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        app(args=None if argv is None else list(argv), prog_name="vidgen")
    except VidgenError as error:
        note(error)
        if isinstance(error, StorageHangs):
            _exit_if_threads_hang(error.exit_code)
        return error.exit_code
    except SystemExit as exit_:
        # The exit code of typer and rich is 1, which would mean that shots have failed.
        if isinstance(exit_.__context__, BrokenPipeError):
            return PIPE_CLOSED
        return exit_.code if isinstance(exit_.code, int) else 0
    except KeyboardInterrupt:
        note(f"interrupted. {RESUME}")
        return 130
    except OSError as error:
        # A disk, a network share or an object store failed. A run can be resumed when it works again.
        path = f"{error.filename}: " if error.filename else ""
        is_cache = error.filename is not None and Path(str(error.filename)).is_relative_to(cache_dir())
        solved = "Or set VIDGEN_CACHE to another folder" if is_cache else "Run the same command again when this is solved"
        note(f"{path}{str(error.strerror or error).rstrip('.')}. {solved}.")
        return SetupError.exit_code
    except Exception as error:
        # Only commands that use Ray import it.
        if (ray := sys.modules.get("ray")) is None or not isinstance(error, ray.exceptions.RayError):
            raise
        note(f"Ray failed: {type(error).__name__}: {first_line(error)}. {RESUME}")
        return SetupError.exit_code
    return 0


def _exit_if_threads_hang(exit_code: int) -> None:
    """End this process if threads still wait for the storage after `JOIN_S`: the interpreter would wait for them, too."""
    deadline = time.monotonic() + JOIN_S
    threads = [each for each in threading.enumerate() if each is not threading.current_thread() and not each.daemon]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


@app.callback(invoke_without_command=True)
def show_version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@in_group(START)
def demo(
    out: Annotated[str, typer.Option("--out", "-o", help="Output folder.", callback=check_out)] = "out/demo",
    profile: ProfileOption = "demo",
    with_film: Annotated[
        bool, typer.Option("--film", help="Render the screenplay of the demo instead, and join its shots to OUT/film.mp4.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Render the demo script on this machine: all stages, both modes."""
    if URL.match(out):
        raise UsageError(f"--out: got {out!r}, must be a folder on this machine")
    chosen = profile_for(profile)
    script = example("film.yaml" if with_film else "demo.jsonl")
    settings = ScriptSettings(script, profile_defaults=chosen.defaults)
    run_script(settings, chosen, out, RenderOptions(keep_stages=not with_film), as_json=as_json)
    if with_film:
        options = ["--out", str(Path(out, "film.mp4")), "--script", str(script), *(["--json"] if as_json else [])]
        if code := app(["film", out, *options], standalone_mode=False):
            raise typer.Exit(code)


@in_group(RENDER)
def schema(
    model: Annotated[
        str,
        typer.Argument(
            help="script (a .yaml script, for editors), shot (a script line), profile, manifest (a manifest row) or film (a "
            "film file)."
        ),
    ] = "shot",
) -> None:
    """Print the JSON schema of a script, or of another file."""
    sections = {each.name: each.load().model_json_schema() for each in entry_points(group=SCHEMAS)}
    schemas = {"script": script_schema(sections), **{name: each.model_json_schema() for name, each in CORE_SCHEMAS.items()}}
    schemas |= sections
    if model not in schemas:
        raise typer.BadParameter(f"got {model!r}, must be one of {', '.join(schemas)}", param_hint="MODEL")
    typer.echo(json.dumps(schemas[model], indent=2))


# The most used first, within each group.
for _function in (demo, shot, render, validate, plan, retry, stage, schema, *folder_commands.COMMANDS, show, doctor):
    app.command(cls=CommandWithShortHelp, rich_help_panel=group_of(_function))(with_options(_function))
for _name, _typer in (("identity", identity), ("models", models)):
    app.add_typer(_typer, name=_name, rich_help_panel=group_of(_typer))
