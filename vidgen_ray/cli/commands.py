"""Messages of commands, their help, and commands whose options are the fields of a class.

An option with a `rich_help_panel` is left out by `--help`. `--help-all` shows it in that panel.
"""

from __future__ import annotations

import inspect
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import fields, is_dataclass
from functools import wraps
from itertools import pairwise
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Self, cast, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from vidgen_ray.limits import DECIMAL_COMMA

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vidgen_ray.profile import Profile

RESUME = "Run the same command to resume."


def note(message: object) -> None:
    """Print a message on standard error, if it can be written: the terminal may be closed, or the disk of a log full."""
    with suppress(OSError, ValueError):
        typer.echo(f"vidgen: {message}", err=True)


def note_no_face(images: int, profile: Profile) -> None:
    """Say that no face was found in this many images of shots with face photos, and what helps."""
    if not images:
        return
    where = "the image" if images == 1 else f"{images:,} images"
    advice = "other photos, seeds or a higher identity_strength may help; min_identity and max_tries try more seeds"
    if profile.is_demo:
        advice = f"the models of profile {profile.name} draw a cartoon world, photos of real people need a profile for GPUs"
    note(f"note: no face was found in {where} of a person with a photo: {advice}")


@contextmanager
def interruptible(hint: str = RESUME) -> Iterator[None]:
    """Exit with code 130 and a hint what to do when the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"interrupted. {hint}")
        raise typer.Exit(130) from None


@contextmanager
def handling_signals(signals: Iterable[signal.Signals], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handle` for these signals in the block, as `signal.signal` does."""
    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def remembered_interrupt() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed in the block.

    Ctrl-C itself raises it, too. But Python drops an exception that is raised in a destructor or a callback of the interpreter,
    and libraries that are imported catch some. Call the function about once a second in long work.
    """
    pressed = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    def check() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    with handling_signals((signal.SIGINT,), handle):
        yield check


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


class HelpWithoutFlagTypes:
    """Mixin of commands whose help shows no type of a flag, which takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for each in params:
            if getattr(each, "is_flag", False):
                each.display_type_rich = lambda ctx: None
        return params


class CommandWithShortHelp(HelpWithoutFlagTypes, TyperCommand):
    """Command whose `--help` shows the common options only, and whose numbers are finite."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options. Raises BadParameter for an infinite number and for one that is none."""
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            for text, after in pairwise([*given, ""]):
                name, _, value = text.partition("=")
                if name in getattr(error.param, "opts", ()) and DECIMAL_COMMA.fullmatch(value := value or after):
                    error.message = f"got {value!r}, must have a decimal point: {value.replace(',', '.')}"
            raise
        parameters: list[Any] = self.params
        for parameter in parameters:
            value = ctx.params.get(parameter.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"got {value}, must be a finite number", ctx=ctx, param=parameter)
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, with all options after `--help-all`."""
        shown = copy(self)
        if not ctx.meta.get(__name__):
            shown.params = [each for each in self.params if is_common(each)]
        super(CommandWithShortHelp, shown).format_help(ctx, formatter)


class ModelOptions(tuple[inspect.Parameter, ...]):
    """Options for fields of a pydantic model, whose descriptions are their help."""

    @classmethod
    def of(cls, model: type[BaseModel], **fields: dict[str, Any]) -> Self:
        """Return an option for each of these fields. `fields`: field -> further arguments of `typer.Option`.

        `flag` is the name of an option that differs from its field. Values are flags, or text that the model parses; `kind` is
        another type of values.
        """
        options = []
        for name, details in fields.items():
            field = model.model_fields[name]
            default = f" Default: {field.default}." if field.default else ""
            flag = details.pop("flag", f"--{name.replace('_', '-')}")
            kind = details.pop("kind", str)
            option = typer.Option(*flag.split("/"), help=f"{field.description}{default}", **details)
            annotation: Any = Annotated[bool, option] if field.annotation is bool else Annotated[kind | None, option]
            options.append(_parameter(name, annotation, None))
        return cls(options)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command for typer, with an option for each field of its parameters that stand for several options.

    Adds `--help-all` if `--help` leaves out options.

    Such a parameter is a dataclass, whose fields are options if they are annotated as such. Or it is
    `Annotated[dict[str, Any], ModelOptions]`: the values of the options that were given.
    """
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    flat, groups = list[inspect.Parameter](), dict[str, tuple[Callable[..., Any], list[inspect.Parameter]]]()
    for each in parameters:
        found = next((item for item in getattr(each.annotation, "__metadata__", ()) if isinstance(item, ModelOptions)), None)
        if found is not None:
            groups[each.name] = _given, list(found)
        elif is_dataclass(each.annotation):
            hints = get_type_hints(each.annotation, include_extras=True)
            annotated = [field for field in fields(each.annotation) if get_origin(hints[field.name]) is Annotated]
            options = [_parameter(field.name, hints[field.name], field.default) for field in annotated]
            groups[each.name] = cast(type, each.annotation), options
        else:
            flat.append(_parameter(each.name, each.annotation, each.default))

    @wraps(command)
    def with_groups(**values: Any) -> None:
        values.pop(HELP_ALL, None)
        for name, (make, options) in groups.items():
            values[name] = make(**{option.name: values.pop(option.name) for option in options})
        command(**values)

    flat += [option for _, options in groups.values() for option in options]
    if not all(is_common(item) for each in flat for item in getattr(each.annotation, "__metadata__", ())):
        flat.append(_parameter(HELP_ALL, HelpAllOption, False))
    with_groups.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {each.name: each.annotation for each in flat}
    return with_groups


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
