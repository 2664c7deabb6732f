"""Commands of `vidgen`: those of this package, and those of others that entry points name.

Exit codes: 0 all shots done, 1 some shots failed, 2 usage error, 3 invalid script or profile, 4 environment error, 5 too
expensive, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import wraps
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from vidgen_ray.cli.commands import RESUME, CommandWithShortHelp, HelpWithoutFlagTypes, note, with_options
from vidgen_ray.system.terminal_text import escaped_output, protocol_output
from vidgen_ray.version import __version__

COMMANDS = "vidgen.commands"
"""Group of entry points, name of a command -> function whose parameters typer reads, or `typer.Typer` with several commands."""
PIPE_CLOSED = 128 + signal.SIGPIPE
"""Exit code of a command that writes to a closed pipe, as shells report it."""
PROTOCOL_COMMANDS = ("mcp",)
"""Commands of entry points whose standard output is a protocol instead of text for a terminal."""
JOIN_S = 10.0
"""Seconds that a command whose storage hangs waits for its threads."""
START, RENDER, _LOOK, EXPORT = "Start", "Render scripts", "Look at results", "Export"
SERVE, MACHINE, _OTHER = "Serve", "Machine", "Other commands"
"""Groups of commands in `vidgen --help`."""


class Listed(NamedTuple):
    """Command in `vidgen --help`, which imports none of them."""

    group: str
    help: str
    """First sentence of the help of the command."""
    module: str | None = None
    """Module of this package with a function or `typer.Typer` of that name. `None`: an entry point names it."""


LISTED = {
    "demo": Listed(START, "Render the demo script on this machine: all stages, both modes.", "run_script"),
    "shot": Listed(START, "Render one prompt, in this process and without Ray.", "one_stage"),
    "render": Listed(RENDER, "Render all shots of a script that are not finished.", "run_script"),
    "validate": Listed(RENDER, "Check all lines of a script without rendering.", "validate"),
    "plan": Listed(RENDER, "Estimate the duration and cost of a script.", "plan"),
    "retry": Listed(RENDER, "Render the failed lines of an output folder again.", "run_script"),
    "slurm": Listed(RENDER, "Print the sbatch file that renders a script on a Slurm cluster, or submit it.", "slurm"),
    "stage": Listed(RENDER, "Run a single stage on an image or a clip.", "one_stage"),
    "schema": Listed(RENDER, "Print the JSON schema of a script, or of another file.", "inspect"),
    "status": Listed(
        _LOOK, "Print the progress of the last run in an output folder, and what the folder has.", "folder_commands"
    ),
    "watch": Listed(
        _LOOK,
        "Show the gallery of an output folder in a browser, also during a run, and review its clips.",
        "folder_commands",
    ),
    "review": Listed(_LOOK, "Import the reviews that were made in the gallery of an output folder.", "folder_commands"),
    "logs": Listed(_LOOK, "Print every attempt of every step of a shot.", "folder_commands"),
    "verify": Listed(_LOOK, "Find damaged and missing files of an output folder.", "folder_commands"),
    "prune": Listed(_LOOK, "Remove the shots of lines that their script no longer has.", "folder_commands"),
    "gc": Listed(_LOOK, "Remove unused files from an output folder.", "folder_commands"),
    "show": Listed(_LOOK, "Print how an image or a video was made.", "inspect"),
    "identity": Listed(_LOOK, "Inspect the identity features of a face, or remove a person.", "inspect"),
    "compare": Listed(_LOOK, "Compare clips by the values of a matrix, by choices or settings, or the clips of two folders."),
    "diff": Listed(_LOOK, "Say which shots of two output folders differ, and why: fields, weights, options or software."),
    "query": Listed(_LOOK, "Query the results of an output folder with SQL."),
    "score": Listed(
        _LOOK,
        "Measure the clips of an output folder: frozen frames, flicker, motion, sharpness, faces, near-duplicates.",
    ),
    "caption": Listed(_LOOK, "Caption clips by what they show, and say which facts of their prompts they show."),
    "trace": Listed(_LOOK, "Show what each worker of a run did when: all attempts of all steps, and their waits."),
    "export": Listed(EXPORT, "Make a data set of the finished shots that are not rejected."),
    "film": Listed(EXPORT, "Join the finished shots of an output folder into one video."),
    "upscale": Listed(EXPORT, "Enlarge videos with a super-resolution network."),
    "serve": Listed(SERVE, "Start a server with an OpenAI-compatible API and a web page."),
    "keys": Listed(SERVE, "Create API keys of a server, and keys that sign files (C2PA)."),
    "mcp": Listed(SERVE, "Start an MCP server: an assistant makes videos on a running server."),
    "selftest": Listed(
        MACHINE, "Render fixed shots with the demo models, and compare every pixel with stored results.", "selftest"
    ),
    "doctor": Listed(MACHINE, "Check whether this machine can run a profile.", "doctor"),
    "models": Listed(MACHINE, "Download, check and list the weights of profiles.", "models"),
    "bench": Listed(MACHINE, "Measure the speed and memory of the stages on this machine."),
}
"""The most used first, within each group."""


class FoundCommands(HelpWithoutFlagTypes, TyperGroup):
    """The commands of this package, and those that entry points name. A command is imported when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        found = entry_points(group=COMMANDS).names
        return [*(name for name, listed in LISTED.items() if listed.module or name in found), *sorted(found - LISTED.keys())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands and (found := _import_command(cmd_name)) is not None:
            self.commands[cmd_name] = found
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            return super(FoundCommands, self._listed(ctx)).resolve_command(ctx, args)  # names similar commands
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super(FoundCommands, self._listed(ctx)).format_help(ctx, formatter)

    def _listed(self, ctx: Any) -> FoundCommands:
        """Return a copy of this group with the listed commands as names with a help text. The others are imported."""
        copied = copy(self)
        copied.commands = {
            name: TyperCommand(name, help=listed.help, rich_help_panel=listed.group)
            if (listed := LISTED.get(name)) is not None
            else self.get_command(ctx, name)
            for name in self.list_commands(ctx)
        }
        return copied


def _import_command(name: str) -> Any:
    """Import a command of this package, or one that an entry point names. Return `None` if there is none with this name."""
    listed = LISTED.get(name)
    if listed is not None and listed.module is not None:
        command = getattr(import_module(f"vidgen_ray.cli.{listed.module}"), name)
        return _command(name, command if isinstance(command, typer.Typer) else with_options(command))
    for found in entry_points(group=COMMANDS, name=name):
        try:
            loaded = found.load()
            return _command(name, _with_protocol_output(loaded) if name in PROTOCOL_COMMANDS else loaded)
        except (ImportError, AttributeError) as error:
            return _unavailable(name, error)
    return None


def _with_protocol_output(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def call(**values: Any) -> None:
        with protocol_output():
            function(**values)

    return call


def _command(name: str, loaded: Any) -> Any:
    """Return a command of a function or of a `typer.Typer`."""
    if not isinstance(loaded, typer.Typer):
        function, loaded = loaded, typer.Typer(add_completion=False)
        loaded.command(name, cls=CommandWithShortHelp)(function)
    command = get_command(loaded)
    command.name = name
    vars(command)["rich_help_panel"] = _OTHER
    return command


def _unavailable(name: str, error: Exception) -> Any:
    """Return a command in place of one that cannot be imported, so that the others can be listed."""
    from vidgen_ray.errors import SetupError, install_command

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


def run_command(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors that a user can fix are printed without a traceback."""
    with escaped_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        app(args=None if argv is None else list(argv), prog_name="vidgen")
    except SystemExit as exit_:
        # The exit code of typer and rich is 1, which would mean that shots have failed.
        if isinstance(exit_.__context__, BrokenPipeError):
            return PIPE_CLOSED
        return exit_.code if isinstance(exit_.code, int) else 0
    except KeyboardInterrupt:
        note(f"interrupted. {RESUME}")
        return 130
    except Exception as error:
        code = _explain(error)
        if code is None:
            raise
        return code
    return 0


def _explain(error: Exception) -> int | None:
    """Print an error that a user can fix, and return the exit code of the command. Return `None` for other errors."""
    from vidgen_ray.errors import SetupError, StorageHangs, VidgenError, first_line
    from vidgen_ray.system.cache_dir import cache_dir

    if isinstance(error, VidgenError):
        note(error)
        if isinstance(error, StorageHangs):
            _exit_if_threads_hang(error.exit_code)
        return error.exit_code
    if isinstance(error, OSError):
        # A disk, a network share or an object store failed. A run can be resumed when it works again.
        # Without a name, the folder in which the command was started was deleted.
        unnamed = "the current folder: " if isinstance(error, FileNotFoundError) else ""
        path = f"{error.filename}: " if error.filename else unnamed
        is_cache = error.filename is not None and Path(str(error.filename)).is_relative_to(cache_dir())
        solved = "Or set VIDGEN_CACHE to another folder" if is_cache else "Run the same command again when this is solved"
        note(f"{path}{str(error.strerror or error).rstrip('.')}. {solved}.")
        return SetupError.exit_code
    # Only commands that use Ray import it.
    if (ray := sys.modules.get("ray")) is None or not isinstance(error, ray.exceptions.RayError):
        return None
    note(f"Ray failed: {type(error).__name__}: {first_line(error)}. {RESUME}")
    return SetupError.exit_code


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
