"""`vidgen slurm`: the sbatch file of a run on the nodes of one Slurm job, or of an array of jobs with one node each."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from vidgen_ray.cli.commands import with_options
from vidgen_ray.cli.file_options import check_out, details_option
from vidgen_ray.cli.options import ProfileOption
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.outputs.storage import URL
from vidgen_ray.planner.cluster import ASSUMED_CPUS_PER_GPU, Cluster, parse_gpus
from vidgen_ray.profile import AUTO

END_S = 60
"""Seconds between the grace period of the run and the end of the job, for its last files."""
OWN_OPTIONS = ("--address", "-a", "--gpus")
"""Options of `vidgen render` that the file sets."""
SLURM_S = 60
"""Seconds after which a command of Slurm is given up."""

slurm = typer.Typer(add_completion=False)


@slurm.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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
    submit: Annotated[bool, typer.Option("--submit", help="Submit the file, instead of printing it.")] = False,
) -> None:
    """Print the sbatch file that renders a script on a Slurm cluster, or submit it.

    Further options are those of `vidgen render`. The same command resumes, also with another number of nodes.
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
    text = sbatch_file(settings, words if array else [*words, "--gpus", gpus], folder, container, grace_s, is_array=array)
    if not submit:
        typer.echo(text, nl=False)
        if not folder.exists():
            typer.echo(f"vidgen: create {folder} before you submit the file: Slurm writes its log there", err=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    typer.echo(_slurm("sbatch", content=text), nl=False)


def sbatch_file(
    settings: dict[str, Any], words: list[str], folder: Path, container: str | None, grace_s: int, *, is_array: bool
) -> str:
    """Return the file. `settings`: options of sbatch, without those that are `None`. `words`: command that renders.

    `folder`: where the jobs of an array find each other. `grace_s`: seconds that shots in progress have at the end.
    """
    # sbatch reads quotes as a shell does.
    options = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in settings.items() if value is not None]
    path = f"export PATH={shlex.quote(str(Path(sys.prefix, 'bin')))}:$PATH\n" if container is None else ""
    binds = f"--bind {shlex.quote(str(folder))} --bind {shlex.quote(str(Path(words[2]).parent))}"
    image = "" if container is None else f"apptainer exec --nv {binds} {shlex.quote(container)} "
    ours = resources.files(__package__)
    return "\n".join(
        [
            "#!/bin/bash",
            *options,
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "",
            "# Renders a script on the nodes of Slurm jobs. Finished shots are skipped: submit it again at any time.",
            f"command=({shlex.join(words)})",
            f"folder={shlex.quote(str(folder))}",
            f"grace_s={grace_s}",
            f'{path}run() {{ exec {image}"$@"; }}',
            "",
            ours.joinpath("slurm_node.sh").read_text(),
            ours.joinpath("slurm_array.sh" if is_array else "slurm_job.sh").read_text(),
        ]
    )


def _checked_render(words: list[str]) -> dict[str, Any]:
    """Return the options of `vidgen render`. Raises what it raises. Otherwise a job would wait for nodes, and then fail."""
    from vidgen_ray.cli.run_script import render

    checked = typer.Typer()
    checked.command()(with_options(render))
    return get_command(checked).make_context("vidgen render", list(words)).params


def _gres(cluster: Cluster, partition: str | None) -> str:
    """Return the GPUs of a node as this Slurm names them. Raises SetupError if it has no GPUs."""
    node = cluster.nodes[0]
    only = [] if partition is None else [f"--partition={partition}"]
    listed = _slurm("sinfo", "--noheader", "--format=%G", *only).replace(",", "\n").split("\n")
    offered = [part.split("(")[0] for part in listed]
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
