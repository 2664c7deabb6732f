"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vidgen_ray.profile import builtin_profiles
from vidgen_ray.script.lines import parse_text_fields

PROFILE_HELP = f"Built-in profile ({', '.join(builtin_profiles())}), or the path of a profile file."
ProfileOption = Annotated[str, typer.Option("--profile", "-p", help=PROFILE_HELP)]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Field of all shots that do not set it. Repeatable."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the run. Shots without a seed derive theirs from it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]


def parse_fields(pairs: list[str] | None) -> dict[str, Any]:
    """Parse `["fps=6", "prompt=7"]` into `{"fps": 6, "prompt": "7"}`."""
    fields = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"got {pair!r}, must be FIELD=VALUE", param_hint="--set")
        fields[name.strip()] = value
    return parse_text_fields(fields)
