"""`vidgen slurm`: its files, and runs on a real Slurm with three nodes on this machine, whose GPUs are plain files."""

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
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName=n3 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP GraceTime=90
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""
NODES = ("n1", "n2", "n3")
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
    """Commands of a Slurm with the nodes n1, n2 and n3."""

    def __init__(self, folder: Path) -> None:
        # Slurm replaces %j in the name of a log.
        self.folder, self.out = folder, folder / "o'ut %j"
        (folder / "state").mkdir()
        for name in ("nvidia0", "nvidia1"):
            (folder / name).touch()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=_unused_ports(4)))
        (folder / "gres.conf").write_text(f"NodeName=n[1-3] Name=gpu File={folder}/nvidia[0-1]\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        # Ray finds two GPUs on each node: nvidia-smi tells the planner which ones they are.
        (folder / "bin").mkdir()
        (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\nfor n in 0 1; do echo NVIDIA H100 80GB HBM3, 81559; done\n")
        (folder / "bin" / "nvidia-smi").chmod(0o755)
        self.script = folder / "a script.jsonl"
        self.write_script(SHOTS)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}/bin:{PATH}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "RAY_worker_niceness": "0",
        }

    def write_script(self, shots: int) -> None:
        self.shots = shots
        lines = [{"id": f"s{n}", "prompt": f"a red kite {n}", "num_frames": 5, "width": 64, "height": 64} for n in range(shots)]
        self.script.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def start(self) -> None:
        files = {"socket": "sock", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        self.daemon("munged", "--force", *(f"--{option}={self.folder}/munge.{end}" for option, end in files.items()))
        self.daemon("slurmctld", "-i")
        for node in NODES:
            self.daemon("slurmd", "-N", node)
        until(lambda: set(self("sinfo", "--noheader", "--format=%T").split()) == {"idle"}, 60)

    def stop(self) -> None:
        self("scancel", "--full", "--signal=KILL", "--user=root")
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munge"):
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
        """Submit a job of vidgen, and return its id. `change`: first occurrence of a text in its file, and what replaces it."""
        words = ("slurm", str(self.script), "-o", str(self.out), "-p", "tiny", "--cpus-per-gpu", "2", *options)
        text = self(sys.executable, "-m", "vidgen_ray", *words)
        return self("sbatch", "--parsable", text=text.replace(*change, 1)).strip()

    def state(self, job: str) -> str:
        return self("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").split("\n")[0]

    def ends(self) -> set[tuple[str, str, str]]:
        """Return state, exit code and highest exit code of a step of the jobs that have ended."""
        names = ("JobState", "ExitCode", "DerivedExitCode")
        jobs = (self.folder / "jobs").read_text().splitlines()
        return {tuple(dict(word.split("=", 1) for word in job.split() if "=" in word)[name] for name in names) for job in jobs}

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.out.glob("slurm-*.log")))

    def kill_job(self, job: str) -> None:
        """Kill the script of a job, and vidgen."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if process.environ().get("SLURM_JOB_ID") == job and ("slurm_script" in words or "vidgen render" in words):
                    process.kill()

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
        assert sorted(row.id for row in rows) == sorted(f"s{n}" for n in range(self.shots))
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
    # One node is free, so that a node of the job is needed.
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-gpu=2", "--output=/dev/null", "--wrap=true")
    other = slurm("sbatch", "--parsable", "--partition=high", *options).strip()
    slurm.start_again(job)
    before = slurm.finished()
    assert 2 <= len(before) < SHOTS
    until(lambda: slurm.state(job) == "COMPLETED")
    assert slurm.state(other) == "COMPLETED"
    slurm.check_all_done(before)
    assert ("COMPLETED", "0:0", "0:0") in slurm.ends()
    assert "srun: error" not in slurm.log().rpartition("connecting to Ray")[2]


@needs_slurm
@pytest.mark.very_slow
@pytest.mark.timeout(600)
def test_job_that_reaches_its_time_limit_goes_on_in_the_next_one(slurm):
    # More than are done until Slurm looks at its limits, every 30 s.
    slurm.write_script(120)
    job = slurm.submit("--gpus", "2x2x80GB", "--time", "20")
    until(lambda: len(slurm.finished()) >= 2)
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=3")
    until(lambda: slurm.state(job) == "PENDING")
    before = slurm.finished()
    assert "vidgen: time limit near: queued again" in slurm.log()
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
def test_job_that_has_finished_no_shot_before_its_time_limit_is_not_queued_again(slurm):
    job = slurm.submit("--gpus", "2x80GB", change=("set -u", "set -u; (sleep 1; kill -USR1 $$) &"))
    until(lambda: slurm.state(job) == "FAILED")
    assert "no shot was finished since the start: not queued again" in slurm.log()
    assert not slurm.finished()


@needs_slurm
@pytest.mark.very_slow
def test_array_continues_without_the_node_and_the_head_that_fail(slurm):
    """The head has the id of the array. One node has no vidgen. squeue fails at first, and answers nothing."""
    (slurm.folder / "bin" / "squeue").write_text(
        f"#!/bin/bash\nn=$(wc -l < {slurm.folder}/asked)\necho >> {slurm.folder}/asked\n"
        "[ $n = 0 ] && { echo slurm_load_jobs error: Socket timed out >&2; exit 1; }\n"
        '[ $n -lt 3 ] || exec /usr/bin/squeue "$@"\n'
    )
    (slurm.folder / "asked").touch()
    before_start = (
        'set -u\n[ "$SLURM_JOB_ID" = "$SLURM_ARRAY_JOB_ID" ] || sleep 10\n'
        '[ "$SLURMD_NODENAME" != n1 ] || run() { echo "no vidgen here" >&2; return 127; }'
    )
    array = slurm.submit("--gpus", "3x2x80GB", "--array", change=("set -u", before_start))
    run_folder = slurm.out / f".slurm-{array}"
    until(lambda: len(slurm.finished()) >= 2)
    assert os.readlink(run_folder / "head.1") == f"{array}_3"
    (slurm.folder / "bin" / "squeue").chmod(0o755)
    slurm.kill_job(array)
    before = slurm.finished()
    until(lambda: len(slurm.finished()) == SHOTS)
    until(lambda: (run_folder / "done").exists())
    until(lambda: {*slurm("/usr/bin/squeue", "--noheader", "--format=%T").split()} <= {"PENDING"})
    slurm.check_all_done(before)
    assert os.readlink(run_folder / "head.2") in (f"{array}_1", f"{array}_2")
    assert (run_folder / "done").read_text() == "0\n"
    assert "vidgen does not run on n1: no vidgen here" in slurm.log()
    assert "ExcNodeList=n1" in slurm("scontrol", "show", "job", f"{array}_1")
    assert ("COMPLETED", "0:0", "0:0") in slurm.ends()


@needs_slurm
@pytest.mark.very_slow
def test_node_that_does_not_join_is_named_and_given_back(slurm):
    job = slurm.submit(
        "--gpus",
        "2x2x80GB",
        change=("    run ray start", '    [ "$SLURMD_NODENAME" != n2 ] || give_up "no Ray"\n    run ray start'),
    )
    until(lambda: slurm.state(job) == "COMPLETED")
    slurm.check_all_done({})
    assert "2 of 4 GPUs have joined. Ray does not run on n2: given back to Slurm" in slurm.log()
    assert " NodeList=n1\n" in slurm("scontrol", "show", "job", job)


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
    if checker := shutil.which("shellcheck", path=PATH):
        found = subprocess.run([checker, "-"], input=printed, text=True, capture_output=True, check=False)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172_800), ("1-2:30", 95_400), ("0", None), ("UNLIMITED", None)],
)
def test_time_limits_are_read_as_slurm_does(text, seconds):
    assert slurm_command._seconds(text) == seconds


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
    "bin/getent": "echo '127.0.1.1 STREAM n1'",
    "bin/hostname": "echo 127.0.0.1 192.0.2.7 198.51.100.7",
    # The image is a folder of programs. Those of the node are not in it.
    "bin/apptainer": 'echo "$APPTAINER_BIND ${*:1:2}" >> "$calls"; image=$3; shift 3; PATH=$image:/usr/bin:/bin exec "$@"',
    "image/vidgen": 'if [ "$1" = --version ]; then echo "0.1$other"; else printf "%s\\n" "$@" > "$calls.words"; exit 1; fi',
    "image/python3": f'exec {sys.executable} "$@"',
    "image/ray": 'echo "$@" > "$calls.ray"; echo Ray runtime started.; exec sleep 1000',
}
"""Programs of a node and of an image: their commands."""


@pytest.mark.parametrize(
    ("removed", "on_nodes", "error"),
    [
        (None, "", None),
        ("bin/srun", "", "no srun on NODE: submit this file with sbatch, outside of a container"),
        ("bin/apptainer", "", "exec: apptainer: not found. Install it, or Apptainer for --container"),
        ("image/vidgen", "", "vidgen does not run on n1: "),
        (None, ".9", "n1 has vidgen 0.1.9 with Python 3."),
    ],
)
def test_file_runs_everything_in_the_container(removed, on_nodes, error, tmp_path, capsys, monkeypatch):
    """By a shell, with stand-ins for Slurm, Apptainer and what is in its image."""
    ended, out, log = run_with_stand_ins(tmp_path, capsys, monkeypatch, removed=removed, on_nodes=on_nodes)
    if error:
        assert ended.returncode == 4
        assert error.replace("NODE", os.uname().nodename) in ended.stderr
        return
    assert ended.returncode == 1, ended.stderr
    # Photos and weights elsewhere need the user's variable.
    assert set(log.read_text().splitlines()) == {f"{tmp_path},{out},{tmp_path},/photos exec --nv"}
    words = log.with_suffix(".words").read_text().splitlines()
    assert words[:-3] == ["render", str(tmp_path / "a script.txt"), "--out", str(out), "--profile", "tiny", "--address"]
    assert words[-2:] == ["--gpus", "1x1x80GB"]
    # The name of the node has the address of the loopback here.
    assert words[-3].startswith("192.0.2.7:")
    ray = log.with_suffix(".ray").read_text()
    assert f"--node-ip-address=192.0.2.7 --port={words[-3].rpartition(':')[2]} " in ray
    # 1000 MB for each of two CPUs, 30% of it for Ray's object store.
    assert f"--memory={1400 << 20} --object-store-memory={600 << 20}" in ray
    assert not list(tmp_path.glob("vidgen-ray.*"))


def run_with_stand_ins(tmp_path, capsys, monkeypatch, *, removed=None, on_nodes="", options=(), **changed):
    """Run a file of one job, and return its process, output folder and log. `changed`: other stand-ins."""
    for name, command in {**STAND_INS, **{f"bin/{name}": command for name, command in changed.items()}}.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{command}\n")
        file.chmod(0o755)
    for name in [
        "bash",
        "cat",
        "date",
        "df",
        "find",
        "flock",
        "grep",
        "head",
        "kill",
        "mktemp",
        "od",
        "rm",
        "sleep",
        "tail",
        "timeout",
        "tr",
    ]:
        if not (tmp_path / "bin" / name).exists():
            (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    if removed:
        (tmp_path / removed).unlink()
    script, out, log = tmp_path / "a script.txt", tmp_path / "o'ut", tmp_path / "log"
    script.write_text("a cat\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    options = ["--gpus", "1x80GB", "--container", str(tmp_path / "image"), "-p", "tiny", *options]
    assert run_command(["slurm", str(script), "-o", str(out), *options]) == 0
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": "0",
        "SLURM_NNODES": "1",
        "SLURMD_NODENAME": "n1",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_MEM_PER_CPU": "1000",
        "TMPDIR": str(tmp_path),
        "APPTAINER_BIND": "/photos",
        "calls": str(log),
        "on_nodes": on_nodes,
    }
    command = ["/bin/bash", "-c", capsys.readouterr().out]
    environment = {**os.environ, **variables}
    return (
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False),
        out,
        log,
    )


def test_signal_between_two_substitutions_of_a_command_is_not_lost(tmp_path, capsys, monkeypatch):
    """Slurm may send it as soon as the job starts. The stand-in does while the file asks for the version."""
    signal_at_start = STAND_INS["image/vidgen"].replace("then", 'then [ -n "$sent" ] || kill -USR1 "$(ps -o ppid= "$PPID")";')
    monkeypatch.setitem(STAND_INS, "image/vidgen", signal_at_start)
    ended, _, log = run_with_stand_ins(tmp_path, capsys, monkeypatch, scontrol="echo JobState=RUNNING PreemptTime=None")
    assert "unexpected EOF" not in ended.stderr
    assert "no shot was finished since the start: not queued again" in ended.stderr
    assert not log.with_suffix(".words").exists()


def test_no_command_has_two_substitutions():
    """Bash 5.2 fails to run a trap between them."""
    for name in ("slurm_node.sh", "slurm_job.sh", "slurm_array.sh"):
        for line in (ROOT / "vidgen_ray" / "cli" / name).read_text().splitlines():
            assert line.replace("$((", "").count("$(") < 2 or line.lstrip().startswith("others="), line


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
    wrong_option = error("--gpus", "2xH100", "--scael", "3")
    assert "No such option: --scael, did you mean --score? Options of sbatch come last, behind --" in wrong_option
    assert "--time=5: is set by the sbatch file" in error("--gpus", "2xH100", "--", "--time=5")
    assert "behind --, there must be options of sbatch" in error("--gpus", "2xH100", "--", "high")
    assert "--time: got 'bogus', must be minutes, HOURS:MINUTES:SECONDS" in error("--gpus", "2xH100", "--time", "bogus")
    # 60 s to start, 180 s to end, and the estimate of the profile.
    assert "--time: got '4', must be at least 5 minutes" in error("--gpus", "2xH100", "-p", "tiny", "--time", "4")
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
    (tmp_path / "sinfo").write_text(
        '#!/bin/sh\ncase "$*" in *partition*) ;; *%R) echo low; echo high ;; *) echo gpu:8 ;; esac\n'
    )
    assert "no partition 'nope'. This Slurm has: low, high" in error("--gpus", "2xH100", "--submit", "--partition", "nope")
    assert [code for code, _ in shown] == [2] * 8 + [4, 4, 0, 0, 4, 4]
    fake("sinfo", "gpu:nvidia_h100_80gb_hbm3:8(S:0-1),shard:8")
    options = ["--gpus", "2x8xH100", "--grace", "99.5", "--time", "1-0", "--", "--mem=200G", "--qos", "high", "--comment=a b"]
    assert run_command(["slurm", str(script), "-o", str(tmp_path / "new"), *options]) == 0
    printed, warned = capsys.readouterr()
    # Slurm has no log if the folder is missing.
    assert f"create {tmp_path}/new before you submit the file" in warned
    assert "#SBATCH --signal=B:USR1@160\n" in printed
    assert "#SBATCH --mem=200G\n#SBATCH --qos high\n#SBATCH '--comment=a b'\n" in printed
    assert "#SBATCH --gpus-per-node=nvidia_h100_80gb_hbm3:8\n" in printed
