"""`jobs/render.py`, which runs `vidgen_ray.jobs.render`, on a real head node: submission, output and exit code."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")
PORT_OPTIONS = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--metrics-export-port",
    "--ray-client-server-port",
    "--runtime-env-agent-port",
)
"""Options for all ports. Another Ray on this machine may use the defaults."""


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture
def dashboard():
    ports = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True))
    options = [str(word) for pair in ports.items() for word in pair]
    # A short path: it contains Ray's sockets, whose paths are limited to 107 characters.
    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")
    command = [RAY, "start", "--head", "--block", "--num-cpus", "6", "--temp-dir", temporary, "--disable-usage-stats"]
    head = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{ports['--dashboard-port']}"
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
            break
        except (urllib.error.URLError, ConnectionError):
            assert head.poll() is None, "the head node ended"
            assert time.monotonic() < deadline
            time.sleep(0.2)  # the dashboard sends no event when it is ready
    yield address
    # On SIGTERM, `ray start --block` waits 30 s for its processes.
    for process in [*psutil.Process(head.pid).children(recursive=True), head]:
        process.kill()
    head.wait(timeout=60)
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.slow
def test_submitted_job_renders_and_returns_its_exit_code(dashboard, tmp_path):
    script = tmp_path / "s.jsonl"
    script.write_text('{"id": "ball", "prompt": "a red ball"}\n{"id": "bad", "prompt": "a", "fps": 0}\n')
    out = tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    # What the job needs of the project: the rest would be uploaded, too.
    for folder in ("vidgen_ray", "jobs"):
        shutil.copytree(ROOT / folder, tmp_path / "project" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    job = [sys.executable, "jobs/render.py", str(script), "-o", str(out), "-p", "tiny", "--until", "image"]
    command = [RAY, "job", "submit", "--submission-id", "film-1", "--address", dashboard, "--working-dir", ".", "--", *job]
    result = subprocess.run(command, cwd=tmp_path / "project", env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 done, 0 already done, 1 failed" in result.stdout
    assert list(out.glob("shots/*/ball/image.png"))
    status = json.loads((out / "status.json").read_text())
    assert (status["submission_id"], status["done"], status["failed"], status["ended"]) == ("film-1", 1, 1, True)
