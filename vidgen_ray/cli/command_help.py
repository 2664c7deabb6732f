"""Messages of commands, and their help: the group of a command, and the options that only `--help-all` shows.

An option with a `rich_help_panel` is left out by `--help`. `--help-all` shows it in that panel.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

START, RENDER, LOOK, EXPORT = "Start", "Render scripts", "Look at results", "Export"
SERVE, MACHINE, OTHER = "Serve", "Machine", "Other commands"
GROUPS = (START, RENDER, LOOK, EXPORT, SERVE, MACHINE, OTHER)
"""Groups of commands in the order of `vidgen --help`. In a group, the commands of this package come first."""

DETAILS_PANEL = "Details"
"""Panel of less common options."""
script_option = partial(typer.Option, rich_help_panel="Reading the script")
cost_option = partial(typer.Option, rich_help_panel="Costs and licences")
reuse_option = partial(typer.Option, rich_help_panel="Keeping and reusing results")
run_option = partial(typer.Option, rich_help_panel="Names of the run")
stop_option = partial(typer.Option, rich_help_panel="Failures and stops")
marks_option = partial(typer.Option, rich_help_panel="Marks on files")
details_option = partial(typer.Option, rich_help_panel=DETAILS_PANEL)
"""Like `typer.Option`, for less common options of the panel that is named."""


def note(message: object) -> None:
    """Print a message on standard error."""
    typer.echo(f"vidgen: {message}", err=True)


CommandFunction = TypeVar("CommandFunction", bound=Callable[..., None])


def in_group(group: str, *, first: bool = False) -> Callable[[CommandFunction], CommandFunction]:
    """Return a decorator that puts a command into a group of `vidgen --help`. A `typer.Typer` takes it as `rich_help_panel`."""

    def decorated(command: CommandFunction) -> CommandFunction:
        vars(command).update(rich_help_panel=group, is_first=first)
        return command

    return decorated


def group_of(command: Any) -> str:
    """Return the group of a command, of its function, or of a `typer.Typer`."""
    return str(getattr(command, "rich_help_panel", None) or OTHER)


def is_first(command: Any) -> bool:
    """Return whether a command comes first in its group."""
    return bool(getattr(command, "is_first", False))


def _print_all(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta[__name__] = True
        typer.echo(ctx.get_help(), nl=False)
        raise typer.Exit()


HELP_ALL = "help_all"
HelpAllOption = Annotated[
    bool,
    typer.Option("--help-all", callback=_print_all, is_eager=True, help="Show all options and exit."),
]


def is_common(option: Any) -> bool:
    """Return whether `--help` shows an option of a command, or one that is annotated as such."""
    return getattr(option, "rich_help_panel", None) is None


class CommandWithShortHelp(TyperCommand):
    """Command whose `--help` shows the common options only."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, with all options after `--help-all`."""
        shown = copy(self)
        if not ctx.meta.get(__name__):
            shown.params = [each for each in self.params if is_common(each)]
        super(CommandWithShortHelp, shown).format_help(ctx, formatter)
