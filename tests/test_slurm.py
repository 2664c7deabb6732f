"""`vidgen slurm`: its files, and runs on a real Slurm with two nodes on this machine, whose GPUs are plain files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vidgen_ray.cli import slurm as slurm_command
from vidgen_ray.cli.app import run_command
from vidgen_ray.engine.ray_cluster import _unused_ports
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.planner.cluster import parse_gpus

ROOT = Path(__file__).parent.parent
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"
needs_slurm = pytest.mark.skipif(
    os.getuid() != 0 or any(shutil.which(name, path=PATH) is None for name in DAEMONS),
    reason="needs root, and slurm-wlm and munge of Debian",
)
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MpiDefault=none
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP GraceTime=90
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""
SHOTS = 12
LIMIT_S = 300


def until(condition, limit_s=LIMIT_S):
    """Wait for another process."""
    deadline = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.5)
    return result


class Slurm:
    """Commands of a Slurm with the nodes n1 and n2."""

    def __init__(self, folder: Path) -> None:
        # Slurm replaces %j in the name of a log.
        self.folder, self.out = folder, folder / "o'ut %j"
        (folder / "state").mkdir()
        for name in ("nvidia0", "nvidia1"):
            (folder / name).touch()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=_unused_ports(3)))
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/nvidia[0-1]\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        # Ray finds two GPUs on each node: nvidia-smi tells the planner which ones they are.
        (folder / "bin").mkdir()
        (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\nfor n in 0 1; do echo NVIDIA H100 80GB HBM3, 81559; done\n")
        (folder / "bin" / "nvidia-smi").chmod(0o755)
        lines = [{"id": f"s{n}", "prompt": f"a red kite {n}", "num_frames": 5, "width": 64, "height": 64} for n in range(SHOTS)]
        self.script = folder / "a script.jsonl"
        self.script.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.environment = {
            **os.environ,
            "PATH": f"{folder}/bin:{PATH}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "RAY_worker_niceness": "0",
        }

    def start(self) -> None:
        files = {"socket": "sock", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        self.daemon("munged", "--force", *(f"--{option}={self.folder}/munge.{end}" for option, end in files.items()))
        self.daemon("slurmctld", "-i")
        for node in ("n1", "n2"):
            self.daemon("slurmd", "-N", node)
        until(lambda: set(self("sinfo", "--noheader", "--format=%T").split()) == {"idle"}, 60)

    def stop(self) -> None:
        self("scancel", "--full", "--signal=KILL", "--user=root")
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge"):
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()

    def daemon(self, *words: str) -> None:
        # It would keep pipes open.
        subprocess.run(
            words, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, check=True
        )

    def __call__(self, *words: str, text: str | None = None) -> str:
        """Run a command, and return what it prints."""
        ended = subprocess.run(words, input=text, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        return ended.stdout

    def submit(self, *options: str, change: tuple[str, str] = ("", "")) -> str:
        """Submit a job of vidgen, and return its id. `change`: text of its file to replace, and what by."""
        words = ("slurm", str(self.script), "-o", str(self.out), "-p", "tiny", "--cpus-per-gpu", "2", *options)
        text = self(sys.executable, "-m", "vidgen_ray", *words)
        return self("sbatch", "--parsable", text=text.replace(*change)).strip()

    def state(self, job: str) -> str:
        return self("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").split("\n")[0]

    def finished(self) -> dict[str, float]:
        """Return id of each finished shot -> time when it was written."""
        return {path.parent.name: path.stat().st_mtime for path in self.out.glob("shots/*/*/shot.json")}

    def start_again(self, job: str) -> None:
        """Start a requeued job without the two minutes that Slurm waits."""
        until(lambda: self.state(job) == "PENDING")
        self("scontrol", "update", f"JobId={job}", "StartTime=now")

    def kill_node(self, name: str) -> None:
        """Kill a node: its slurmd, what watches over its jobs, and their processes."""
        killed, watching = [psutil.Process(int((self.folder / f"slurmd-{name}.pid").read_text()))], []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                found = process.environ()
                if found.get("SLURM_CONF") == self.environment["SLURM_CONF"] and found.get("SLURMD_NODENAME") == name:
                    killed.append(process)
                    watching += [each for each in process.parents() if each.name().startswith("slurmstepd")]
        for process in (*watching, *killed):
            with suppress(psutil.Error):
                process.kill()

    def check_all_done(self, before: dict[str, float]) -> None:
        """Every line has one row, and what was finished `before` was not rendered again."""
        rows = read_manifest(self.out)
        assert sorted(row.id for row in rows) == sorted(f"s{n}" for n in range(SHOTS))
        assert {row.status for row in rows} == {"done"}
        assert self.finished() == self.finished() | before


@pytest.fixture
def slurm(tmp_path_factory):
    # Paths of sockets are limited to 107 characters.
    found = Slurm(tmp_path_factory.mktemp("s"))
    found.start()
    yield found
    found.stop()


@needs_slurm
@pytest.mark.slow
def test_preempted_job_is_queued_again_and_renders_each_line_once(slurm):
    job = slurm.submit("--gpus", "2x2x80GB")
    until(lambda: len(slurm.finished()) >= 2)
    other = slurm(
        "sbatch", "--parsable", "--partition=high", "--gpus-per-node=2", "--cpus-per-gpu=2", "--output=/dev/null", "--wrap=true"
    ).strip()
    slurm.start_again(job)
    before = slurm.finished()
    assert 2 <= len(before) < SHOTS
    until(lambda: slurm.state(job) == "COMPLETED")
    assert slurm.state(other) == "COMPLETED"
    slurm.check_all_done(before)


@needs_slurm
@pytest.mark.very_slow
def test_job_that_reaches_its_time_limit_goes_on_in_the_next_one(slurm):
    job = slurm.submit("--gpus", "2x2x80GB", "--time", "2", change=("B:USR1@120", "B:USR1@90"))
    until(lambda: slurm.state(job) == "PENDING" and slurm.finished())
    before = slurm.finished()
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=10")
    until(lambda: slurm.state(job) == "COMPLETED")
    slurm.check_all_done(before)


@needs_slurm
@pytest.mark.very_slow
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_job_that_loses_a_node_is_queued_again(slurm, node):
    job = slurm.submit("--gpus", "2x2x80GB")
    until(lambda: len(slurm.finished()) >= 2)
    slurm.kill_node(node)
    before = slurm.finished()
    # Before Slurm notices that the second node is lost, the run may have ended without it.
    if until(lambda: slurm.state(job) if slurm.state(job) in ("PENDING", "COMPLETED") else None) == "PENDING":
        slurm.daemon("slurmd", "-N", node)
        slurm.start_again(job)
    until(lambda: slurm.state(job) == "COMPLETED")
    slurm.check_all_done(before)


@needs_slurm
@pytest.mark.very_slow
def test_cancelled_job_is_not_queued_again_and_another_one_resumes(slurm):
    job = slurm.submit("--gpus", "2x2x80GB")
    until(lambda: len(slurm.finished()) >= 2)
    slurm("scancel", job)
    until(lambda: slurm.state(job) == "CANCELLED")
    before = slurm.finished()
    again = slurm.submit("--gpus", "2x80GB")
    until(lambda: slurm.state(again) == "COMPLETED")
    slurm.check_all_done(before)


@needs_slurm
@pytest.mark.very_slow
def test_nodes_of_an_array_join_one_run_and_one_takes_the_place_of_the_first(slurm):
    array = slurm.submit("--gpus", "3x2x80GB", "--array")
    until(lambda: len(slurm.finished()) >= 2)
    first = (slurm.out / f".slurm-{array}" / "head" / "job").read_text().strip()
    slurm("scancel", first)
    before = slurm.finished()
    until(lambda: len(slurm.finished()) == SHOTS)
    until(lambda: not slurm("squeue", "--noheader").strip())
    slurm.check_all_done(before)
    assert (slurm.out / f".slurm-{array}" / "done").read_text() == "0\n"


@pytest.mark.parametrize(
    ("file", "options"), [("job.sbatch", "--gpus 4x8xH100 --time 8:00:00"), ("array.sbatch", "--gpus 32x1xH100 --array")]
)
def test_files_in_deploy_are_those_that_the_command_prints(file, options, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "cwd", lambda: Path("/shared"))
    monkeypatch.setattr(sys, "prefix", "/shared/venv")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command(["slurm", "/shared/script.jsonl", "-o", "/shared/out", "-p", "gpu-80gb", *options.split()]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "deploy" / "slurm" / file).read_text()
    assert subprocess.run(["/bin/bash", "-n"], input=printed, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("model", "offered", "name"),
    [
        ("H200", "gpu:gh200:1,gpu:h200:8", "h200:2"),
        ("A10", "gpu:a100:4", "2"),
        ("A100-80GB", "gpu:nvidia_a100-sxm4-40gb:8\ngpu:nvidia_a100-sxm4-80gb:8(S:0,1)", "nvidia_a100-sxm4-80gb:2"),
        ("A100-80GB", "gpu:a100_1g.5gb:7\ngpu:2", "2"),
        ("RTX-4090", "gpu:rtx4090:4", "rtx4090:2"),
        ("RTX-6000-Ada", "gpu:rtx_pro_6000:4,gpu:rtx_6000_ada:4", "rtx_6000_ada:2"),
        ("RTX-PRO-6000", "gpu:rtx_pro_6000:4,gpu:rtx_6000_ada:4", "rtx_pro_6000:2"),
        ("80GB", "gpu:h100:8", "2"),
    ],
)
def test_gpus_have_the_name_that_slurm_gives_to_this_model(monkeypatch, model, offered, name):
    monkeypatch.setattr(slurm_command, "_slurm", lambda *_: offered)
    assert slurm_command._gres(parse_gpus(f"2x{model}"), None) == name


STAND_INS = {
    # Runs the step on this node.
    "bin/srun": 'while [[ $1 == -* ]]; do shift; done; export other="$on_nodes"; exec "$@"',
    # The image is a folder of programs. Those of the node are not in it.
    "bin/apptainer": 'echo "${*:1:6}" >> "$log"; image=$7; shift 7; PATH=$image:/usr/bin:/bin exec "$@"',
    "image/vidgen": 'if [ "$1" = --version ]; then echo "0.1$other"; else printf "%s\\n" "$@" > "$log.words"; exit 1; fi',
    "image/python3": f'exec {sys.executable} "$@"',
    "image/ray": """for word; do case $word in --port=*) port=${word#*=} ;; esac; done
exec python3 -c "import signal, socket; listening = socket.create_server(('', $port)); signal.pause()\"""",
}
"""Programs of a node and of an image: their commands."""


@pytest.mark.parametrize(
    ("removed", "on_nodes", "error"),
    [
        (None, "", None),
        ("bin/srun", "", "no srun on NODE: submit this file with sbatch, outside of a container"),
        ("bin/apptainer", "", "exec: apptainer: not found. Install it, or Apptainer for --container"),
        ("image/vidgen", "", "vidgen does not run on NODE: "),
        (None, ".9", "NODE has vidgen 0.1.9 with Python 3."),
    ],
)
def test_file_runs_everything_in_the_container(removed, on_nodes, error, tmp_path, capsys, monkeypatch):
    """By a shell, with stand-ins for Slurm, Apptainer and what is in its image."""
    for name, command in STAND_INS.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{command}\n")
        file.chmod(0o755)
    for name in ("bash", "hostname", "od", "tr", "sleep", "timeout", "rm"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    if removed:
        (tmp_path / removed).unlink()
    script, out, log = tmp_path / "a script.txt", tmp_path / "o'ut", tmp_path / "log"
    script.write_text("a cat\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    options = ["--gpus", "1x80GB", "--container", str(tmp_path / "image"), "-p", "tiny"]
    assert run_command(["slurm", str(script), "-o", str(out), *options]) == 0
    ids = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_CPUS_ON_NODE": "2", "log": str(log), "on_nodes": on_nodes}
    command = ["/bin/bash", "-c", capsys.readouterr().out]
    ended = subprocess.run(command, env={**os.environ, **ids}, capture_output=True, text=True, timeout=120, check=False)
    if error:
        assert ended.returncode == 4
        assert error.replace("NODE", os.uname().nodename) in ended.stderr
        return
    assert ended.returncode == 1, ended.stderr
    assert set(log.read_text().splitlines()) == {f"exec --nv --bind {out} --bind {tmp_path}"}
    words = log.with_suffix(".words").read_text().splitlines()
    assert words[:-1] == ["render", str(script), "--out", str(out), "--profile", "tiny", "--gpus", "1x80GB", "--address"]


def test_mistakes_are_named_before_anything_is_submitted(capsys, tmp_path, monkeypatch):
    script = tmp_path / "s.txt"
    script.write_text("a cat\n")
    shown = []

    def fake(name, text, code=0):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n/bin/cat > /dev/null\necho '{text}' {'>&2' if code else ''}\nexit {code}\n")
        file.chmod(0o755)

    def error(*words):
        code = run_command(["slurm", str(script), "-o", str(tmp_path / "out"), *words])
        shown.append((code, capsys.readouterr().err))
        return " ".join(shown[-1][1].split())

    monkeypatch.setenv("PATH", str(tmp_path))
    assert "must be equal nodes for one job" in error("--gpus", "1xH100+2xH100")
    assert "--address: is set by the sbatch file" in error("--gpus", "2xH100", "--address", "auto")
    assert "--container: got '', must be an image" in error("--gpus", "2xH100", "--container", "")
    assert "No such option: --scael" in error("--gpus", "2xH100", "--scael", "3")
    assert "there is no sbatch here: use a login node" in error("--gpus", "2xH100", "--submit")
    fake("sinfo", "(null)")
    fake("sbatch", "")
    assert "this Slurm offers no GPUs" in error("--gpus", "2xH100", "--submit")
    assert "this Slurm offers no GPUs" in error("--gpus", "2xH100")
    # 0xff, which is not UTF-8.
    fake("sinfo", r"Unable to contact slurm controller \0377", 1)
    assert "sinfo failed: Unable to contact slurm controller \ufffd" in error("--gpus", "2xH100")
    fake("sinfo", "gpu:nvidia_h100_80gb_hbm3:8(S:0-1),shard:8")
    fake("sbatch", "sbatch: error: invalid partition specified: gpu", 1)
    assert "sbatch failed: sbatch: error: invalid partition" in error("--gpus", "2xH100", "--submit", "--partition", "gpu")
    assert [code for code, _ in shown] == [2, 2, 2, 2, 4, 4, 0, 0, 4]
    options = ["--gpus", "2x8xH100", "--grace", "99.5"]
    assert run_command(["slurm", str(script), "-o", str(tmp_path / "new"), *options]) == 0
    printed, warned = capsys.readouterr()
    # Slurm has no log if the folder is missing.
    assert f"create {tmp_path}/new before you submit the file" in warned
    assert "#SBATCH --signal=B:USR1@160\n" in printed
    assert "#SBATCH --gpus-per-node=nvidia_h100_80gb_hbm3:8\n" in printed
