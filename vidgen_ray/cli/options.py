"""Options shared by several commands."""

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from vidgen_ray.errors import UsageError
from vidgen_ray.invalid_fields import shortened, wrong_defaults
from vidgen_ray.outputs.storage import URL
from vidgen_ray.profile import Profile, builtin_profiles
from vidgen_ray.provenance.record import MAX_LABEL_LETTERS, ProvenanceSettings
from vidgen_ray.safety import DECLARED_BASES, parse_consent
from vidgen_ray.script.check import file_errors
from vidgen_ray.script.lines import absolute_path, parse_text_fields, with_absolute_paths

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
    for error in file_errors(parsed, Path.cwd())[:1]:
        raise UsageError(f"--set {error.field}: got {error.got}, {error.allowed}")
    return parsed


def with_consent(fields: dict[str, Any], consent: str | None) -> dict[str, Any]:
    """Return the fields of all shots with the value of `--consent`. Raises UsageError if it is invalid."""
    if consent is None:
        return fields
    for name, got, allowed in wrong_defaults({"consent": consent})[:1]:
        raise UsageError(f"--consent: {name}: got {got}, {allowed}")
    return {**fields, "consent": parse_consent(consent)}


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


def local_path(value: str | Path) -> Path:
    """Reject a URL, and an empty path, which a shell passes for an unset variable and which would be the current folder."""
    text = str(value)  # the default of an option is a Path
    if not text.strip():
        raise typer.BadParameter("got an empty text, must be a file or a folder")
    if URL.match(text):
        raise typer.BadParameter(f"got {text!r}, must be a file or folder on this machine")
    return Path(value)


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
        "--characters",
        metavar="FILE",
        parser=local_path,
        help="YAML file of characters that lines may name in their field `character`.",
    ),
]
ConsentOption = Annotated[
    str | None,
    typer.Option(
        "--consent",
        metavar="subject=NAME,basis=BASIS[,reference=FILE]",
        help=f"Why the faces may be used, for all shots that do not say it. BASIS: {', '.join(DECLARED_BASES)}.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the run. Shots without a seed derive theirs from it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]


NoProvenanceOption = Annotated[
    bool,
    typer.Option(
        "--no-provenance", help="Do not mark files as AI-generated, and do not sign them. Recorded in shot.json and run.json."
    ),
]
PrivateOption = Annotated[
    bool, typer.Option("--private", help="Mark files without the prompt and other settings of the shot. Default: with them.")
]
LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label", metavar="TEXT", help="Draw this text into the lower right corner of images and clips. Default: none."
    ),
]
C2paKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--c2pa-key",
        envvar="VIDGEN_C2PA_KEY",
        help="Sign files (C2PA) with this key, see `vidgen keys c2pa`. Default: that of the profile, or do not sign.",
    ),
]


def example(name: str) -> Path:
    """Return an example, inside an installed package or in the folder above the package in a checkout."""
    package = Path(str(resources.files("vidgen_ray")))
    paths = [package / "examples" / name, package.parent / "examples" / name]
    return next(path for path in paths if path.is_file())


def with_provenance(
    profile: Profile, *, no_provenance: bool, private: bool, label: str | None = None, c2pa_key: Path | None
) -> Profile:
    """Return the profile with the options of a command for the provenance. Raises UsageError and SetupError."""
    return profile.with_provenance(
        provenance_settings(profile.provenance, no_provenance=no_provenance, private=private, label=label, c2pa_key=c2pa_key)
    )


def provenance_settings(
    base: ProvenanceSettings, *, no_provenance: bool, private: bool, label: str | None = None, c2pa_key: Path | None
) -> ProvenanceSettings:
    """Return the settings with the options of a command. Raises UsageError, and SetupError if files cannot be signed."""
    if no_provenance and private:
        raise UsageError("--no-provenance: cannot be combined with --private")
    changes: dict[str, Any] = {"metadata": "off"} if no_provenance else {"metadata": "private"} if private else {}
    if label is not None:
        changes["label"] = label
    if c2pa_key is not None:
        changes["c2pa_key"] = c2pa_key.expanduser().absolute()
    try:
        return ProvenanceSettings.model_validate({**base.model_dump(), **changes})
    except ValidationError:
        allowed = f"must be one line of 1 to {MAX_LABEL_LETTERS} printable letters"
        raise UsageError(f"--label: got {shortened(label)}, {allowed}") from None
