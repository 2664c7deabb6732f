"""Options of scripts, runs and output folders that commands share, and what they parse."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from glob import glob, has_magic
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vidgen_ray.cli.file_options import check_out
from vidgen_ray.errors import SetupError, UsageError, install_command, known_fields
from vidgen_ray.graph import WITHOUT_CHUNKED_STAGES, WITHOUT_CLIP
from vidgen_ray.licences import Requirement
from vidgen_ray.outputs.storage import URL, Storage
from vidgen_ray.planner.cluster import Cluster, parse_gpus
from vidgen_ray.profile import Profile, builtin_profiles
from vidgen_ray.safety import DECLARED_BASES, parse_consent
from vidgen_ray.script.check import file_errors
from vidgen_ray.script.expansion import read_characters
from vidgen_ray.script.formats import FIELDS, is_known, is_table
from vidgen_ray.script.lines import Columns, ScriptSettings, absolute_path, parse_text_fields, with_absolute_paths
from vidgen_ray.shot import wrong_defaults
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.files import write_atomically
from vidgen_ray.trainers import TRAINERS, parse_target

script_option = partial(typer.Option, rich_help_panel="Reading the script")
cost_option = partial(typer.Option, rich_help_panel="Costs and licences")
reuse_option = partial(typer.Option, rich_help_panel="Keeping and reusing results")
run_option = partial(typer.Option, rich_help_panel="Names of the run")
stop_option = partial(typer.Option, rich_help_panel="Failures and stops")

Until = Literal["image", "video"]
Kept = Literal["stages"]
Mode = Literal["quality", "fast"]
UNCHECKED = ("id", "character", "style")
"""Fields that depend on the command and on the script."""
FOR_HELP = "; ".join([f"{name}: {', '.join(trainer.models)}" for name, trainer in TRAINERS.items()])
WHERE = "vidgen.where"
"""Group of entry points. Its `sql` is a function that selects shots, see `ids_where`."""


def parse_fields(pairs: list[str] | None) -> dict[str, Any]:
    """Parse `["fps=6", "prompt=7"]` into `{"fps": 6, "prompt": "7"}`. Paths are relative to the current folder.

    Raises UsageError for a field or a file that does not exist, and for a value that is invalid for every shot.
    """
    fields = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"got {pair!r}, must be FIELD=VALUE", param_hint="--set")
        if name.strip() in fields:
            raise UsageError(f"--set {name.strip()}: is given twice")
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


def local_path(value: str | Path) -> Path:
    """Reject a URL, and an empty path, which a shell passes for an unset variable and which would be the current folder."""
    text = os.path.expanduser(str(value))  # the default of an option is a Path
    if not text.strip():
        raise typer.BadParameter("got an empty text, must be a file or a folder")
    if URL.match(text):
        raise typer.BadParameter(f"got {text!r}, must be a file or folder on this machine")
    return Path(text)


STDIN = ("-", "/dev/stdin", "/dev/fd/0")


def script_settings(scripts: Sequence[Path]) -> ScriptSettings:
    """Return the settings of one script: a file, a folder, standard input (`-`), or several files and patterns as one."""
    if any(str(each) in STDIN for each in scripts):
        if len(scripts) > 1:
            raise UsageError("SCRIPT: standard input must be the only script")
        return ScriptSettings(_standard_input(), base=Path.cwd())
    files: list[Path] = []
    for script in scripts:
        is_pattern = has_magic(str(script)) and not script.exists()
        found = sorted(map(Path, glob(str(script), recursive=True))) if is_pattern else [script]
        if not found:
            raise UsageError(f"SCRIPT: no file matches {str(script)!r}")
        files += [each for each in found if each not in files]
    if len(files) == 1:
        # The folders `.` and `..` have names of their own.
        return ScriptSettings(files[0].resolve() if files[0].name in ("", "..") else files[0])
    name = scripts[0].name if len(scripts) == 1 else f"{files[0].name}+{len(files) - 1}"
    return ScriptSettings(files[0].with_name(name), files=tuple(files))


def _standard_input() -> Path:
    """Return a file with the content of standard input, named after its format. It is kept, so that a run can be resumed."""
    content = sys.stdin.buffer.read()
    first = content.decode("utf-8-sig", "replace").lstrip().partition("\n")[0]
    ending = "jsonl" if first.startswith("{") else "csv" if is_table(first) else "txt"
    path = cache_dir() / "stdin" / hashlib.sha256(content).hexdigest()[:16] / f"stdin.{ending}"
    write_atomically(path, content)
    return path


def parse_columns(pairs: Sequence[str] | None) -> dict[str, str]:
    """Parse `["sample_id=id"]` into `{"sample_id": "id"}`. Raises UsageError for an unknown field."""
    names: dict[str, str] = {}
    for pair in pairs or []:
        column, equals, field = (part.strip() for part in pair.rpartition("="))
        if not equals or not column:
            raise UsageError(f"--map: got {pair!r}, must be COLUMN=FIELD, such as sample_id=id")
        if not is_known(field):
            raise UsageError(f"--map {column}: got {field!r}, {known_fields(field, FIELDS)}")
        if column in names:
            raise UsageError(f"--map {column}: is given twice")
        names[column] = field
    return names


PROFILE_HELP = (
    f"Built-in profile (auto, {', '.join(builtin_profiles())}), -lossy behind it allows lossy speed options, or the path of a "
    "profile file."
)
ProfileOption = Annotated[str, typer.Option("--profile", "-p", help=PROFILE_HELP)]
# Not a Path: Path("") is the current folder.
OutOption = Annotated[
    str, typer.Option("--out", "-o", help="Output folder, or its URL: s3://BUCKET/FOLDER.", callback=check_out)
]
OutArgument = Annotated[str, typer.Argument(help="Output folder, or its URL.", callback=check_out)]
ScriptsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SCRIPT...",
        parser=local_path,
        help="Script with one shot per line: .jsonl, .csv, .tsv, .txt (also .gz, .zst), .parquet or .yaml; a folder of "
        "captioned images or of Parquet files; or - for standard input. Several files, or a pattern in quotes, are one script.",
    ),
]
MapOption = Annotated[
    list[str] | None,
    script_option("--map", metavar="COLUMN=FIELD", help="Read a column of the script as this field. Repeatable."),
]
KeepColumnsOption = Annotated[
    bool, script_option("--keep-columns", help="Copy unknown columns to `metadata`. Default: they are errors.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Field of all shots that do not set it. Repeatable."),
]
CharactersOption = Annotated[
    Path | None,
    script_option(
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
        metavar="CONSENT",
        help="Why the faces may be used, for all shots that do not say it: subject=NAME,basis=BASIS[,reference=FILE]. "
        f"BASIS: {', '.join(DECLARED_BASES)}.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the run. Shots without a seed derive theirs from it.")]
ModeOption = Annotated[
    Mode | None, typer.Option("--mode", help="Mode of shots without one. Default: that of the profile, otherwise quality.")
]
AspectOption = Annotated[
    str | None,
    typer.Option(
        "--aspect", metavar="W:H", help="Shape of clips without one, such as 9:16. Default: that of their width and height."
    ),
]
UntilOption = Annotated[
    Until | None,
    typer.Option("--until", help="Stop after the image, or after the clip without upscaling. Default: all stages."),
]
KeepOption = Annotated[
    Kept | None,
    reuse_option("--keep", help="Also write the intermediate results (base.png, refine.png, lora.png, style.png, face.json)."),
]
AddressOption = Annotated[
    str | None, typer.Option("--address", "-a", help="Address of a Ray cluster, or `auto`. Default: start Ray on this machine.")
]
GpusOption = Annotated[
    Cluster | None,
    typer.Option(
        "--gpus",
        metavar="GPUS",
        parser=parse_gpus,
        help="GPUs to plan for, e.g. 8x80GB or 2x8x80GB (two nodes of eight). Default: detect.",
    ),
]
PriceOption = Annotated[
    float | None,
    cost_option(
        "--price", metavar="PRICE", min=0, help="Price of a GPU-hour. Default: that of the profile, or of the detected GPUs."
    ),
]
MaxCostOption = Annotated[
    float | None,
    typer.Option(
        "--max-cost",
        metavar="COST",
        min=0,
        help="Maximum cost of a run. Exit with code 5 before any worker starts if the estimate exceeds it, or stop during the "
        "run; the same command resumes, with the same limit again. Default: no limit.",
    ),
]


def check_target(value: str | None) -> str | None:
    """Return `TRAINER:MODEL` as it is. Raises UsageError for an unknown one."""
    try:
        if value is not None:
            parse_target(value)
    except ValueError as error:
        raise UsageError(f"--for: got {value!r}, {error}") from None
    return value


TrainerOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="TRAINER:MODEL",
        help=f"Trainer of LoRAs and its model. {FOR_HELP}. Default: none.",
        callback=check_target,
    ),
]
RequireLicenceOption = Annotated[
    Requirement | None,
    cost_option(
        "--require-licence",
        metavar="USE",
        help="Exit with code 3, naming the weights, if a shot uses weights that may not be used commercially (commercial), or "
        "only under a condition (unconditional). Default: no requirement.",
    ),
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="SQL",
        help='Only shots for which this SQL expression over the columns of `clips` holds, e.g. "stars >= 4"; see vidgen query.',
    ),
]
StrictPromptsOption = Annotated[
    bool, script_option("--strict-prompts", help="Reject lines whose prompt a text encoder would cut. Default: a note.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be removed, without removing it.")]


@dataclass(frozen=True)
class LineOptions:
    """Options for all lines of a script."""

    mode: ModeOption = None
    aspect: AspectOption = None
    fields: SetOption = None
    characters: CharactersOption = None
    consent: ConsentOption = None
    columns: MapOption = None
    keep_columns: KeepColumnsOption = False

    def settings(self, scripts: Sequence[Path], profile: Profile, seed: int = 0, until: Until | None = None) -> ScriptSettings:
        """Return the settings for reading a script. Raises UsageError and ScriptError."""
        options = {"mode": self.mode, "aspect": self.aspect}
        defaults = with_consent(parse_fields(self.fields), self.consent) | {
            name: value for name, value in options.items() if value
        }
        if "id" in defaults:
            raise UsageError("--set id: must be set by each line of the script, not for all of them")
        people = read_characters(self.characters) if self.characters else {}
        return replace(
            script_settings(scripts),
            run_seed=seed,
            defaults=defaults,
            profile_defaults=profile.defaults,
            changes=changes_until(until),
            characters=people,
            policy=profile.policy,
            columns=Columns(parse_columns(self.columns), self.keep_columns),
        )


def changes_until(until: Until | None) -> dict[str, Any]:
    """Return the fields of a shot that has no stages after `until`."""
    return {"image": dict(WITHOUT_CLIP), "video": dict(WITHOUT_CHUNKED_STAGES)}[until] if until else {}


def ids_where(storage: Storage, where: str | None, best: str | None = None) -> list[str]:
    """Return the ids of the shots, in any state, for which an SQL expression holds, in the order of their scripts.

    `best`: SQL expression. Of finished shots of a line that differ only in their seed, only the one with its highest value.
    Raises UsageError for invalid SQL, and SetupError if the packages of the extra `dataset` are not installed.
    """
    select: Callable[[Storage, str | None, str | None], list[str]] = load_of_extra(WHERE, "sql", "--where and --best")
    return select(storage, where, best)


def load_of_extra(group: str, name: str, option: str) -> Any:
    """Return the object of an entry point of the extra `dataset`. Raises SetupError if its packages are not installed."""
    try:
        return entry_points(group=group)[name].load()
    except (KeyError, ImportError) as error:
        raise SetupError(f"{option}: needs packages that are not installed ({error}); {install_command('dataset')}") from None


def given_words(ctx: typer.Context, names: Set[str]) -> tuple[str, ...]:
    """Return the options with these names that were given, as words of a command."""
    words = list[str]()
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT"):
            value, option = ctx.params[parameter.name], max(parameter.opts, key=len)
            if isinstance(value, bool):
                words += [option] if value else []
                continue
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [option, str(each)]
    return tuple(words)


def example(name: str) -> Path:
    """Return an example, inside an installed package or in the folder above the package in a checkout."""
    package = Path(str(resources.files("vidgen_ray")))
    paths = [package / "examples" / name, package.parent / "examples" / name]
    return next(path for path in paths if path.is_file())
