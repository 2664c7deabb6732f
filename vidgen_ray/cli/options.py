"""Options shared by several commands."""

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from vidgen_ray.errors import UsageError
from vidgen_ray.invalid_fields import wrong_defaults
from vidgen_ray.outputs.storage import URL
from vidgen_ray.profile import builtin_profiles
from vidgen_ray.script.line_check import LineCheck, LineChecker
from vidgen_ray.script.lines import PATH_FIELDS, Line, absolute_path, parse_text_fields, with_absolute_paths

UNCHECKED = ("id", "character", "style")
"""Fields that depend on the command and on the script."""
JOB_FOLDER = "working_dir_files"
"""Folder of Ray that has the working directories of submitted jobs."""


def parse_fields(pairs: list[str] | None) -> dict[str, Any]:
    """Parse `["fps=6", "prompt=7"]` into `{"fps": 6, "prompt": "7"}`. Paths are relative to the current folder.

    Raises UsageError for a field or a file that does not exist, and for a value that is invalid for every shot.
    """
    fields = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"got {pair!r}, must be FIELD=VALUE", param_hint="--set")
        fields[name.strip()] = value
    absolute = partial(absolute_path, Path.cwd())
    parsed = {name: with_absolute_paths(name, value, absolute) for name, value in parse_text_fields(fields).items()}
    for name, got, allowed in wrong_defaults({name: value for name, value in parsed.items() if name not in UNCHECKED})[:1]:
        raise UsageError(f"--set {name}: got {got}, {allowed}")
    if files := {name: value for name, value in parsed.items() if name in PATH_FIELDS}:
        line = LineCheck(Line(None, {"prompt": "any", **files}, strict=True), LineChecker("vidgen", Path.cwd(), {}, 0))
        for error in line.errors[:1]:
            raise UsageError(f"--set {error.field}: got {error.got}, {error.allowed}")
    return parsed


def check_out(value: str) -> str:
    """Reject an empty output folder, which a shell passes for an unset variable, and one that Ray deletes with the job."""
    if not value.strip():
        raise typer.BadParameter("got an empty text, must be a folder or its URL")
    if not URL.match(value) and JOB_FOLDER in Path(value).absolute().parts:
        allowed = (
            "is inside the copy of the working directory that Ray deletes after the job; use an absolute path of a shared disk"
        )
        raise typer.BadParameter(f"{value} {allowed}, or a URL such as s3://BUCKET/FOLDER")
    return value


PROFILE_HELP = f"Built-in profile ({', '.join(builtin_profiles())}), or the path of a profile file."
ProfileOption = Annotated[str, typer.Option("--profile", "-p", help=PROFILE_HELP)]
# Not a Path: Path("") is the current folder.
OutOption = Annotated[str, typer.Option("--out", "-o", help="Output folder.", callback=check_out)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Field of all shots that do not set it. Repeatable."),
]
CharactersOption = Annotated[
    Path | None,
    typer.Option(
        "--characters", metavar="FILE", help="YAML file of characters that lines may name in their field `character`."
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the run. Shots without a seed derive theirs from it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]


def example(name: str) -> Path:
    """Return an example, inside an installed package or in the folder above the package in a checkout."""
    package = Path(str(resources.files("vidgen_ray")))
    paths = [package / "examples" / name, package.parent / "examples" / name]
    return next(path for path in paths if path.is_file())
