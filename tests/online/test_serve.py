"""`vidgen serve`: start-up errors, one request id, graceful stop, and recovery from kill -9."""

import asyncio
import json
import os
import signal
import socket
import time
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
import yaml
from ray.serve._private import constants
from ray.serve._private.http_util import _apply_middlewares, call_function_from_import_path
from starlette.testclient import TestClient

from tests.online.on_serve.applications import POLL_S
from tests.online.scripted_server import ROOT, scripted_server
from tests.online.scripted_stages import pipes_open
from vidgen_ray.cli import main
from vidgen_ray.errors import UsageError, VidgenError
from vidgen_ray.online import ENVIRONMENT, HeapTrim, LostReplica
from vidgen_ray.online.application import build_with
from vidgen_ray.online.auth import LOCAL_TENANT
from vidgen_ray.online.serve_command import settings_of
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.store.jobs import CLAIM_S, JobState, new_owner
from vidgen_ray.online.store.store import open_store


def test_invalid_settings_fail_before_start(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    store = open_store(OnlineSettings(data="used"))
    store.queue.hold(new_owner(), CLAIM_S)
    for arguments, code, message in (
        (["--profile", "nope"], 3, "must be one of auto, demo"),
        (["--host", "0.0.0.0"], 4, "requires API keys. Create one with `vidgen keys new`"),
        (
            ["--profile", "gpu-80gb"],
            4,
            "flux: weights 'hub:black-forest-labs/FLUX.1-dev@3de623fc3c33e44ffbe2bad470d0f45bccf2eb21': not on this machine",
        ),
        (["--database", "mysql://x"], 4, "database: must be an SQLite file"),
        (["--data", "s3://bucket/x"], 4, "database: must be set if data is an object store"),
        (["--keys", "gone.yaml"], 4, "keys file gone.yaml: cannot be read"),
        (["--settings", "gone.yaml"], 2, "settings gone.yaml: cannot be read"),
        (["--port", "0"], 2, "should be greater than or equal to 1"),
        (
            ["--data", "used", "--wait", "0"],
            4,
            f"another server works with it, whose director is process {os.getpid()} on {os.uname().nodename}. Stop it",
        ),
        (["--port", str(port)], 4, f"cannot listen on 127.0.0.1 port {port}: Address already in use"),
    ):
        assert main(["serve", "--profile", "tiny", *arguments]) == code
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    taken.close()
    store.close()


def test_options_override_the_settings_file(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("profile: tiny\nport: 8123\nmax_queued: 7\n")
    settings = settings_of(file, {"port": 9000})
    assert (settings.profile, settings.port, settings.max_queued) == ("tiny", 9000, 7)
    file.write_text("max_queue: 7\n")
    with pytest.raises(UsageError, match=r"s\.yaml, max_queue: Extra inputs"):
        settings_of(file, {})
    file.write_text("[1]")
    with pytest.raises(UsageError, match="must be a mapping of settings"):
        settings_of(file, {})


def test_response_has_one_request_id():
    """With the variable of the proxy that `vidgen serve`, the Docker image and the documentation set."""
    ((variable, path),) = ENVIRONMENT.items()
    assert hasattr(constants, variable)
    for file in ("Dockerfile", "docs/online.md"):
        assert f"{variable}={path}" in (ROOT / file).read_text()

    async def sync_video(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"video_1")]})

    sent = []

    async def keep(message):
        sent.append(message)

    app = _apply_middlewares(sync_video, call_function_from_import_path(path))
    asyncio.run(app({"type": "http", "path": "/v1/videos/sync", "headers": []}, None, keep))
    assert [value for name, value in sent[0]["headers"] if name.lower() == b"x-request-id"] == [b"video_1"]


@pytest.mark.parametrize(
    ("start", "status"),
    [(None, 503), ((503, b"text/plain"), 503), ((500, b"application/json"), 500), ((200, b"text/plain"), 200)],
    ids=["nothing", "proxy", "api", "text"],
)
def test_request_whose_replica_is_lost_can_be_sent_again(start, status):
    async def proxy(scope, receive, send):
        if start is not None:
            await send({"type": "http.response.start", "status": start[0], "headers": [(b"content-type", start[1])]})
            await send({"type": "http.response.body", "body": b"its own"})

    response = TestClient(LostReplica(proxy)).get("/v1/models")
    assert response.status_code == status
    if response.headers.get("Retry-After"):
        assert (status, response.json()["error"]["code"]) == (503, "unavailable")
    else:
        assert (status != 503, response.text) == (True, "its own")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prot": 8000}, "args, prot: Extra inputs are not permitted"),
        ({"port": "x"}, "args, port: Value error, must be a number"),
        ({"profile": "nope", "gpus": "1x80GB"}, "profile 'nope': must be one of auto"),
    ],
)
def test_wrong_args_of_a_serve_config_are_a_sentence(args, message):
    with pytest.raises(VidgenError, match=message):
        build_with(args)


def test_memory_of_large_bodies_is_returned_after_the_request(monkeypatch):
    calls = []
    monkeypatch.setattr("vidgen_ray.online.TRIM_DELAY_S", 0.0)
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(malloc_trim=calls.append))

    async def app(scope, receive, send):
        assert not calls

    async def request(*headers):
        calls.clear()
        await HeapTrim(app)({"type": "http", "headers": headers}, None, None)
        await asyncio.sleep(0.01)  # for the timer of 0 s
        await asyncio.get_running_loop().shutdown_default_executor()
        return len(calls)

    assert asyncio.run(request((b"content-length", b"999999"))) == 0
    assert asyncio.run(request((b"content-length", b"1000000"))) == 1
    assert asyncio.run(request((b"transfer-encoding", b"chunked"))) == 1


class Jobs:
    """Creates jobs of a server, and looks at them in its store."""

    def __init__(self, server, folder):
        self._server = server
        self._store = open_store(OnlineSettings(data=str(folder / "data")))

    def create(self, **fields):
        body = json.dumps({"generate_video": False, **fields}).encode()
        with urlopen(Request(f"{self._server.url}/v1/shots", body, {"content-type": "application/json"}), timeout=30) as answer:
            return json.load(answer)["id"]

    def get(self, job_id):
        return self._store.get(job_id, LOCAL_TENANT)

    def wait_until(self, job_id, condition):
        while not condition(job := self.get(job_id)):
            assert self._server.process.poll() is None, self._server.log.read_text()
            assert not job.state.is_final, job
            time.sleep(POLL_S)
        return job

    def wait_for_end(self, job_id):
        return self.wait_until(job_id, lambda job: job.state.is_final)


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_killed_server_resumes_all_accepted_jobs_and_sigterm_requeues_jobs(tiny, tmp_path):
    actors = {name: tiny.actors[name] for name in ("instantid", "flux", "svd", "realesrgan")}
    profile = tiny.model_copy(update={"actors": actors})
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json")))
    pipes = [tmp_path / "pipe-0", tmp_path / "pipe-1"]
    for path in pipes:
        os.mkfifo(path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with scripted_server(tmp_path, port) as server:
        jobs = Jobs(server, tmp_path)
        # Created before the stages are loaded.
        done = jobs.create(prompt="a red ball")
        assert jobs.wait_for_end(done).state == JobState.COMPLETED
        # One job in the middle, others in progress or queued behind it.
        ids = [jobs.create(prompt=f"steps 3 pause at 2 {pipes[0]}"), *(jobs.create(prompt=f"ball {n}") for n in range(6))]
        jobs.wait_until(ids[0], lambda job: job.step == 1)
        server.kill()
    with scripted_server(tmp_path, port) as server:
        jobs = Jobs(server, tmp_path)
        with pipes_open(pipes[0]):
            assert [jobs.wait_for_end(job).state for job in (done, *ids)] == [JobState.COMPLETED] * 8
        assert jobs.get(ids[0]).claims == 2
        unfinished = jobs.create(prompt=f"steps 3 pause at 2 {pipes[1]}")
        jobs.wait_until(unfinished, lambda job: job.step == 1)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(90) == 0
    job = jobs.get(unfinished)
    assert (job.state, job.claims) == (JobState.QUEUED, 0)
    log = server.log.read_text()
    assert f"profile.yaml at {server.url}/" in log
    assert "Returned 1 job to the queue. Start the server again to resume." in log
    assert "Traceback" not in log
