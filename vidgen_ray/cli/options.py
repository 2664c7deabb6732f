"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vidgen_ray.profile import builtin_profiles
from vidgen_ray.script.formats import parse_text_fields

ProfileOption = Annotated[
    str, typer.Option("--profile", "-p", help=f"{', '.join(builtin_profiles())}, or the path of a profile file.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The output folder.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="A field for every shot that does not give it; repeatable."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The run's seed; shots without one derive theirs from it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def parse_fields(pairs: list[str] | None) -> dict[str, Any]:
    """`["fps=6", "prompt=7"]` -> `{"fps": 6, "prompt": "7"}`."""
    fields = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"got {pair!r}, must be FIELD=VALUE", param_hint="--set")
        fields[name.strip()] = value
    return parse_text_fields(fields)
