"""`vidgen slurm`: the sbatch file of a run on the nodes of one Slurm job, or of an array of jobs with one node each."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from vidgen_ray.cli.commands import with_options
from vidgen_ray.cli.file_options import check_out, details_option
from vidgen_ray.cli.models import default_shot
from vidgen_ray.cli.options import ProfileOption
from vidgen_ray.errors import SetupError, UsageError, VidgenError
from vidgen_ray.outputs.storage import URL
from vidgen_ray.planner.choose_layout import plan_run
from vidgen_ray.planner.cluster import ASSUMED_CPUS_PER_GPU, Cluster, parse_gpus, profile_for
from vidgen_ray.planner.demand import demand_of
from vidgen_ray.profile import AUTO

END_S = 60
"""Seconds between the grace period of the run and the end of the job, for its last files."""
OWN_OPTIONS = ("--address", "-a", "--gpus")
"""Options of `vidgen render` that the file sets."""
SLURM_S = 60
"""Seconds after which a command of Slurm is given up."""
JOB_START_S = 60
"""Seconds until a job has started Ray. Assumed."""
EARLY_S = 60
"""Seconds by which Slurm may send a signal earlier than at the requested time."""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
"""A time limit of Slurm."""
FIXED = re.compile(
    r"--(?:time|array|nodes|ntasks(?:-.*)?|cpus-per-gpu|gpus(?:-.*)?|gres|exclusive-topo|signal|chdir|wrap|no-requeue)(?:=.*|$)|-[taNnGDc]"
)
"""Options of sbatch that the file sets, or that it does not work with."""
SBATCH = "vidgen.sbatch"
"""Key of the options behind `--` in the context of the command."""

slurm = typer.Typer(add_completion=False)


class _WithSbatchOptions(TyperCommand):
    """Command that keeps what stands behind `--` apart."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            split = args.index("--")
            ctx.meta[SBATCH] = args[split + 1 :]
            args = args[:split]
        return super().parse_args(ctx, args)


@slurm.command(
    cls=_WithSbatchOptions,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] [-- OPTIONS OF SBATCH]",
)
def command(
    ctx: typer.Context,
    script: Annotated[Path, typer.Argument(help="Script, in a folder that all nodes see.")],
    gpus: Annotated[
        str, typer.Option("--gpus", help="Nodes, GPUs of each, and their model or memory: 4x8xH100, or 8xH100 for one node.")
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="Output folder that all nodes see, or its URL.", callback=check_out)
    ] = "out",
    profile: ProfileOption = AUTO,
    array: Annotated[
        bool,
        typer.Option(
            "--array", help="One job per node: each starts when a node is free, and the run continues without those lost."
        ),
    ] = False,
    time: Annotated[
        str | None, typer.Option("--time", metavar="LIMIT", help="Time limit of a job. The run continues in the next one.")
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="NAME", help="Partition of Slurm.")] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="NAME", help="Account of Slurm.")] = None,
    cpus_per_gpu: Annotated[
        int, details_option("--cpus-per-gpu", min=1, help="CPU cores for each GPU.", show_default=True)
    ] = ASSUMED_CPUS_PER_GPU,
    container: Annotated[
        str | None,
        typer.Option("--container", metavar="IMAGE", help="Image for Apptainer. Default: the environment of this command."),
    ] = None,
    interface: Annotated[
        str | None,
        details_option("--interface", metavar="NAME", help="Network interface, such as ib0. Default: that of the node's name."),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the file, instead of printing it.")] = False,
) -> None:
    """Print the sbatch file that renders a script on a Slurm cluster, or submit it.

    Further options are those of `vidgen render`, and behind `--` those of sbatch, such as -- --mem=200G --mail-type=END.
    The same command resumes, also with another number of nodes.
    """
    cluster = parse_gpus(gpus)
    if len(set(cluster.nodes)) > 1:
        raise UsageError(f"--gpus: got {gpus!r}, must be equal nodes for one job, such as 4x8xH100")
    if not script.exists():
        raise UsageError(f"SCRIPT: there is no file {str(script)!r}")
    if wrong := next((word for word in ctx.args if word.split("=")[0] in OWN_OPTIONS), None):
        raise UsageError(f"{wrong}: is set by the sbatch file")
    if container == "":
        raise UsageError("--container: got '', must be an image, such as vidgen.sif")
    folder = script.absolute().parent if URL.match(out) else Path(out).absolute()
    words = ["vidgen", "render", str(script.absolute()), "--out", out if URL.match(out) else str(folder), "--profile", profile]
    words += ctx.args
    grace_s = ceil(_checked_render(words[2:])["grace_s"])
    if time is not None:
        _check_time(time, grace_s, profile, Cluster(cluster.nodes[:1]) if array else cluster)
    gpus_per_node = str(len(cluster.nodes[0].gpus))
    if shutil.which("sinfo"):
        try:
            gpus_per_node = _gres(cluster, partition)
        except SetupError as error:
            if submit:
                raise
            typer.echo(f"vidgen: {error}", err=True)
    settings = {
        # Further options may have relative paths.
        "chdir": Path.cwd(),
        "job-name": f"vidgen-{re.sub('[^A-Za-z0-9._-]', '-', script.stem)}",
        "partition": partition,
        "account": account,
        "time": time,
        "array": f"1-{len(cluster.nodes)}" if array else None,
        "nodes": 1 if array else len(cluster.nodes),
        "ntasks-per-node": 1,
        "gpus-per-node": gpus_per_node,
        "cpus-per-gpu": cpus_per_gpu,
        "signal": f"B:USR1@{grace_s + END_S}",
        "output": f"{folder}/".replace("%", "%%") + ("slurm-%A_%a.log" if array else "slurm-%j.log"),
    }
    # sbatch reads quotes as a shell does.
    options = [f"--{name}={shlex.quote(str(value))}" for name, value in settings.items() if value is not None]
    options += ["--requeue", "--open-mode=append", *_sbatch_options(ctx.meta.get(SBATCH, ()))]
    kind = gpus.replace(" ", "").rsplit("x", 1)[1]
    variables = {
        "out": words[4],
        "folder": str(folder),
        "grace_s": str(grace_s),
        # For an array, which GPUs it has is known when it runs.
        "gpus": "" if array else f"{len(cluster.nodes[0].gpus)}x{kind}",
        "interface": interface or "",
    }
    text = sbatch_file(options, words, variables, container, is_array=array)
    if not submit:
        typer.echo(text, nl=False)
        if not folder.exists():
            typer.echo(f"vidgen: create {folder} before you submit the file: Slurm writes its log there", err=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    typer.echo(_slurm("sbatch", content=text), nl=False)


def sbatch_file(
    options: Sequence[str], words: Sequence[str], variables: dict[str, str], container: str | None, *, is_array: bool
) -> str:
    """Return the file. `options`: of sbatch. `words`: command that renders. `variables`: of the script behind them."""
    path = f"export PATH={shlex.quote(str(Path(sys.prefix, 'bin')))}:$PATH\n"
    image = ""
    if container is not None:
        binds = shlex.quote(f"{Path(words[2]).parent},{variables['folder']}")
        more = '"${TMPDIR:+,$TMPDIR}${HF_HOME:+,$HF_HOME}${APPTAINER_BIND:+,$APPTAINER_BIND}"'
        path = f"export APPTAINER_BIND={binds}{more}\n"
        image = f"apptainer exec --nv {shlex.quote(container)} "
    ours = resources.files(__package__)
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "# shellcheck disable=SC1083,SC2034,SC2154,SC2317  # a coprocess, and what traps and srun call",
            "",
            "# Renders a script on the nodes of Slurm jobs. Finished shots are skipped: submit it again at any time.",
            f"command=({shlex.join(words)})",
            *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
            f'{path}run() {{ exec {image}"$@"; }}',
            "",
            ours.joinpath("slurm_node.sh").read_text(),
            ours.joinpath("slurm_array.sh" if is_array else "slurm_job.sh").read_text(),
        ]
    )


def _sbatch_options(words: Sequence[str]) -> list[str]:
    """Return options of sbatch, a value with its option. Raises UsageError for those of the file itself."""
    options: list[str] = []
    for word in words:
        if "\n" in word:
            raise UsageError(f"{word!r}: an option of sbatch must be on one line")
        if FIXED.match(word):
            raise UsageError(f"{word}: is set by the sbatch file; see the options of vidgen slurm before --")
        if word.startswith("-"):
            options.append(shlex.quote(word))
        elif options:
            options[-1] += f" {shlex.quote(word)}"
        else:
            raise UsageError(f"{word}: behind --, there must be options of sbatch, such as --mem=200G")
    return options


def _check_time(limit: str, grace_s: int, profile: str, cluster: Cluster) -> None:
    """Raise UsageError for a time limit in which a job cannot finish a shot."""
    limit_s = _seconds(limit)
    first_clip_s = 0.0
    try:
        chosen = profile_for(profile, lambda: cluster)
        first_clip_s = plan_run(chosen, demand_of([default_shot(chosen)]), cluster).first_clip_s
    except VidgenError:
        pass  # `vidgen render` says why, or has more GPUs than these
    end_s = grace_s + END_S + EARLY_S
    lowest = ceil((JOB_START_S + first_clip_s + end_s) / 60)
    if limit_s is not None and limit_s < lowest * 60:
        raise UsageError(
            f"--time: got {limit!r}, must be at least {lowest} minutes: {JOB_START_S + first_clip_s:.0f} s until the first "
            f"clip, and {end_s} s before the limit to finish shots (--grace {grace_s})"
        )


def _seconds(limit: str) -> int | None:
    """Return the seconds of a time limit of Slurm, `None` for no limit. Raises UsageError."""
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = TIME.fullmatch(limit)
    if found is None:
        raise UsageError(
            f"--time: got {limit!r}, must be minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, such as 8:00:00"
        )
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is None and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None


def _checked_render(words: list[str]) -> dict[str, Any]:
    """Return the options of `vidgen render`. Raises what it raises. Otherwise a job would wait for nodes, and then fail."""
    from vidgen_ray.cli.run_script import render

    checked = typer.Typer()
    checked.command()(with_options(render))
    found = get_command(checked)
    known = {name for option in found.params for name in (*option.opts, *option.secondary_opts)}
    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and name not in known:
            similar = "".join(f", did you mean {known_name}?" for known_name in get_close_matches(name, known, 1))
            raise UsageError(f"No such option: {name}{similar or '.'} Options of sbatch come last, behind --")
    return found.make_context("vidgen render", list(words)).params


def _gres(cluster: Cluster, partition: str | None) -> str:
    """Return the GPUs of a node as this Slurm names them. Raises SetupError if it has no GPUs."""
    node = cluster.nodes[0]
    only = [] if partition is None else [f"--partition={partition}"]
    listed = _slurm("sinfo", "--noheader", "--format=%G", *only).replace(",", "\n").split("\n")
    offered = [part.split("(")[0] for part in listed]
    if partition is not None and not any(offered):
        raise SetupError(f"--partition: there is no partition {partition!r}. {_partitions()}")
    if not any(each.startswith("gpu") for each in offered):
        where = "" if partition is None else f" in partition {partition}"
        raise SetupError(
            f"this Slurm offers no GPUs{where} (`sinfo -o %G` shows none): its administrator must declare them as generic "
            "resources (GresTypes=gpu in slurm.conf, gres.conf on the nodes)"
        )
    kinds = {each.split(":")[1] for each in offered if each.startswith("gpu:") and each.count(":") == 2}
    words = node.card.name.lower().split() if node.card else [""]
    model = re.compile(rf"(?<![a-z0-9])(rtx)?{next((word for word in words if re.search('[0-9]', word)), '')}(?![a-z0-9])")
    # Neither a GPU whose name has more letters, such as GH200, nor a part of one (MIG), such as a100_1g.5gb.
    named = [kind for kind in sorted(kinds) if node.card and model.search(kind.lower()) and not re.search(r"\dg\.\d", kind)]
    count = str(len(node.gpus))
    return f"{max(named, key=lambda kind: sum(word in kind.lower() for word in words))}:{count}" if named else count


def _partitions() -> str:
    names = _slurm("sinfo", "--noheader", "--format=%R").split()
    return f"This Slurm has: {', '.join(dict.fromkeys(names))}"


def _slurm(*words: str, content: str | None = None) -> str:
    """Run a command of Slurm and return what it prints. Raises SetupError."""
    try:
        ended = subprocess.run(
            words, input=content, capture_output=True, text=True, errors="replace", timeout=SLURM_S, check=False
        )
    except FileNotFoundError:
        raise SetupError(
            f"there is no {words[0]} here: use a login node of the cluster, or print the file and copy it there"
        ) from None
    except subprocess.TimeoutExpired:
        raise SetupError(f"{words[0]} has not answered within {SLURM_S} s: Slurm's controller may be down") from None
    if ended.returncode:
        raise SetupError(f"{words[0]} failed: {ended.stderr.strip() or 'without a message'}")
    return ended.stdout
