"""Processes of a server: those that crash or hang start again, and waiting requests get their results."""

import json
import logging
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPConnection
from threading import Event

import psutil
import pytest
import ray
import yaml

from tests.online.on_serve.applications import POLL_S, scripted_profile
from tests.online.scripted_stages import SCRIPTED, pipes_open, steps_run
from vidgen_ray.errors import SetupError
from vidgen_ray.online import REQUEST_ID
from vidgen_ray.online import server as server_module
from vidgen_ray.online.auth import LOCAL_TENANT
from vidgen_ray.online.recent_warnings import MAX_KEPT
from vidgen_ray.online.server import Watched, serving
from vidgen_ray.online.server_plan import server_plan
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.store.jobs import JobState
from vidgen_ray.online.store.store import open_store
from vidgen_ray.planner.cluster import this_machine

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def plan(tiny, tmp_path, local_ray):
    """Plan of a server with scripted stages on two simulated GPUs."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(scripted_profile(tiny).model_dump(mode="json")))
    settings = OnlineSettings(profile=str(tmp_path / "p.yaml"), data=str(tmp_path / "out"), gpus="2x80GB")
    return server_plan(settings, this_machine)


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as bound:
        yield bound


def image(port, prompt, seed=1):
    """Wait for an image. Return the status, `None` if the connection was lost."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"prompt": prompt, "seed": seed, "size": "64x64"})
    connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    try:
        response = connection.getresponse()
        json.loads(response.read())
        return response.status
    except OSError:
        return None
    finally:
        connection.close()


def pid_of(name):
    """Return the pid of a process of the server, once it has started: the newest one, since other servers run before it."""
    while True:
        found = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].partition(".")[0] == f"ray::{name}":
                    found[process.create_time()] = process.pid
        if found:
            return found[max(found)]


def test_waiting_requests_survive_crashes_and_new_ones_wait_for_the_api(plan, listening, pipe):
    port, store = listening.getsockname()[1], open_store(plan.settings)
    with serving(plan, listening, SCRIPTED) as server, ThreadPoolExecutor(2) as clients:
        server.wait_until_accepting(Event())
        server.wait_until_ready(Event())
        waiting = clients.submit(image, port, f"steps 3 pause at 2 {pipe}")
        while not pipe.with_name("pipe.steps").exists() or len(steps_run(pipe)) < 2:
            time.sleep(POLL_S)
        os.kill(pid_of("Director"), signal.SIGKILL)
        while next(iter(store.changed_since(0, tenant=LOCAL_TENANT).jobs)).claims < 2:
            time.sleep(POLL_S)
        with pipes_open(pipe):
            assert waiting.result() == 200
        pipe.with_name("pipe.steps").unlink()
        lost = clients.submit(image, port, f"steps 3 pause at 2 {pipe}", 2)
        while not pipe.with_name("pipe.steps").exists() or len(steps_run(pipe)) < 2:
            time.sleep(POLL_S)
        os.kill(pid_of("Api"), signal.SIGKILL)
        assert lost.result() is None
        with pipes_open(pipe):
            # Connects at once: another process has the port, too.
            assert image(port, "the next one", 3) == 200
        (job,) = [each for each in store.changed_since(0, tenant=LOCAL_TENANT).jobs if each.shot.seed == 2]
        while not (job := store.get(job.id, LOCAL_TENANT)).state.is_final:
            time.sleep(POLL_S)
        assert job.state == JobState.COMPLETED
    store.close()


def test_process_that_hangs_or_is_unhealthy_is_started_again_and_its_warnings_are_logged(local_ray, monkeypatch):
    logged = []
    monkeypatch.setattr(server_module.log, "warning", lambda text, *args: logged.append(text % args))
    process = Watched("Part", f"{__name__}:Part")
    try:
        pid_when_up(process)
        process.handle.warn.remote(["trouble", *map(str, range(30)), "trouble"])
        while len(logged) < MAX_KEPT + 1:
            pid_when_up(process)
            process.look()
        assert logged[0] == "Part: trouble (2 times, request r-1)"
        assert logged[-1] == f"Part: {30 - MAX_KEPT + 1} more warnings"
        monkeypatch.setattr(server_module, "MAX_SILENT_CHECKS", 2)
        for harm in ("hang", "break_down"):
            before = pid_when_up(process)
            getattr(process.handle, harm).remote()
            while pid_when_up(process) in (before, None):
                process.look()
    finally:
        ray.kill(process.handle.actor)


def pid_when_up(process):
    while not process.is_up:
        process.look()
        time.sleep(POLL_S)
    try:
        return ray.get(process.handle.pid.remote(), timeout=0.2)
    except (ray.exceptions.RayError, TimeoutError):
        return None


class Part:
    """Part of a server that can become unhealthy."""

    def __init__(self):
        self._is_broken = False

    async def pid(self):
        return os.getpid()

    async def hang(self):
        time.sleep(10_000)

    async def warn(self, texts):
        REQUEST_ID.set("r-1")
        for text in texts:
            logging.getLogger("ray.serve").warning("%s", text)

    async def break_down(self):
        self._is_broken = True

    async def check_health(self):
        if self._is_broken:
            raise RuntimeError("broken")


def test_part_that_cannot_be_made_ends_the_start(plan, listening):
    gone = plan.settings.model_copy(update={"loras": {"ink": "/gone.safetensors"}})
    no_file = pytest.raises(SetupError, match=r"^loras\.ink: no such file")
    with serving(replace(plan, settings=gone), listening, SCRIPTED) as server, no_file:
        server.wait_until_accepting(Event())
