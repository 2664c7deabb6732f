"""`vidgen serve` as a person starts and ends it, and as a machine ends it: with kill -9 in the middle."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil
import pytest
import yaml

from tests.online.test_director import LOOK_S, passing
from vidgen_ray.cli import main
from vidgen_ray.cli.serve import settings_of
from vidgen_ray.errors import UsageError
from vidgen_ray.online.auth import LOCAL_TENANT
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.jobs import JobState
from vidgen_ray.online.store.store import open_store

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--profile", "nope"], 3, "must be one of demo"),
        (["--host", "0.0.0.0"], 4, "needs API keys; make one with `vidgen keys new`"),
        (
            ["--profile", "gpu-80gb"],
            4,
            "flux: weights 'hub:black-forest-labs/FLUX.1-dev@main': not on this machine",
        ),
        (["--database", "mysql://x"], 4, "database: must be an SQLite file"),
        (["--data", "s3://bucket/x"], 4, "database: must be set if data is an object store"),
        (["--keys", "gone.yaml"], 4, "keys file gone.yaml: cannot be read"),
        (["--settings", "gone.yaml"], 2, "settings gone.yaml: cannot be read"),
        (["--port", "0"], 2, "should be greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(capsys, monkeypatch, tmp_path, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--profile", "tiny", *arguments]) == code
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_port_that_is_taken_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--profile", "tiny", "--port", str(port)]) == 4
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_options_win_over_the_file_of_settings(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("profile: tiny\nport: 8123\nmax_queued: 7\n")
    settings = settings_of(file, {"port": 9000, "profile": None})
    assert (settings.profile, settings.port, settings.max_queued) == ("tiny", 9000, 7)
    file.write_text("max_queue: 7\n")
    with pytest.raises(UsageError, match=r"s\.yaml, max_queue: Extra inputs"):
        settings_of(file, {})
    file.write_text("[1]")
    with pytest.raises(UsageError, match="must be a mapping of settings"):
        settings_of(file, {})


class Process:
    """A server in a process of its own, with stages that do what the prompt says."""

    def __init__(self, folder, port):
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log.txt"
        settings = {"profile": str(folder / "profile.yaml"), "data": str(folder / "data"), "port": port}
        self.store = open_store(OnlineSettings(**settings))
        command = [sys.executable, "-m", "tests.online.obedient_server", json.dumps(settings)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(LOOK_S)

    def answers(self):
        try:
            with urlopen(f"{self.url}/healthz", timeout=10) as answer:
                return json.load(answer) == {"status": "ok"}
        except (URLError, OSError):
            return False

    def create(self, **fields):
        body = json.dumps({"generate_video": False, **fields}).encode()
        with urlopen(Request(f"{self.url}/v1/shots", body, {"content-type": "application/json"}), timeout=30) as answer:
            return json.load(answer)["id"]

    def when(self, job_id, is_so):
        while not is_so(job := self.store.get(job_id, LOCAL_TENANT)):
            assert self.process.poll() is None, self.log.read_text()
            assert not job.state.is_final, job
            time.sleep(LOOK_S)
        return job

    def ended(self, job_id):
        return self.when(job_id, lambda job: job.state.is_final)

    def kill(self):
        """With all that belongs to it, as a machine that goes down does."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)


@contextmanager
def started(folder, port):
    process = Process(folder, port)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.kill()


@pytest.mark.timeout(600)
def test_a_server_that_is_killed_goes_on_with_all_that_it_accepted_and_one_that_is_told_to_stop_stops(tiny, tmp_path):
    actors = {name: tiny.actors[name] for name in ("instantid", "flux", "svd", "realesrgan")}
    profile = tiny.model_copy(update={"actors": actors})
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json")))
    pipes = [tmp_path / "pipe-0", tmp_path / "pipe-1"]
    for path in pipes:
        os.mkfifo(path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with started(tmp_path, port) as server:
        # The first before anything is loaded.
        done = server.create(prompt="a red ball")
        assert server.ended(done).state == JobState.COMPLETED
        # One in its middle, others that are led or wait behind it.
        jobs = [server.create(prompt=f"steps 3 stop at 2 {pipes[0]}"), *(server.create(prompt=f"ball {n}") for n in range(6))]
        server.when(jobs[0], lambda job: job.step == 1)
        server.kill()
    with started(tmp_path, port) as server:
        with passing(pipes[0]):
            assert [server.ended(job).state for job in (done, *jobs)] == [JobState.COMPLETED] * 8
        assert server.store.get(jobs[0], LOCAL_TENANT).attempts == 2
        left = server.create(prompt=f"steps 3 stop at 2 {pipes[1]}")
        server.when(left, lambda job: job.step == 1)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(90) == 0
    job = server.store.get(left, LOCAL_TENANT)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0)
    log = server.log.read_text()
    assert f"profile.yaml at {server.url}/" in log
    assert "Returned 1 job to the queue. Start the server again to resume." in log
    assert "Traceback" not in log
