"""Output folder on storage with faults: an object store that fails requests, sick disks, power loss, flipped bits."""

import threading
from datetime import timedelta

import numpy as np
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.outputs.test_outputs import commit, failed
from vidgen_ray.outputs import object_storage
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import FinishedShots, ManifestRow, read_manifest
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.verify import verify

FILES = ("image.png", "video.mp4")
PIXELS = {"image": np.zeros((2, 2, 3), np.uint8)}


class FaultyStore:
    """S3 server with the buckets of `endpoint`, in which the first request for each path and method has a fault."""

    def __init__(self):
        self.fault = self.expired_key = None
        self.is_hit = lambda method, path: True
        self.hits = set()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._stalled = threading.Event()
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._stalled.set()
        self._server.shutdown()

    def begin(self, fault, is_hit=lambda method, path: True):
        self.fault, self.is_hit = fault, is_hit
        self.hits.clear()

    def __call__(self, environ, start_response):
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"] + environ["QUERY_STRING"]
        fault = self.fault if request not in self.hits and self.is_hit(*request) else None
        self.hits |= {request} if fault else set()
        if fault == "slow down":
            return self._error(start_response, "503 Slow Down", "SlowDown", "Please reduce your request rate.")
        if f"Credential={self.expired_key}/" in environ["HTTP_AUTHORIZATION"]:
            return self._error(start_response, "400 Bad Request", "ExpiredToken", "The provided token has expired.")
        if fault == "stall":
            self._stalled.wait()
        answer = []
        body = b"".join(self._app(environ, lambda *headers: answer.append(headers)))
        if fault == "error after success":
            return self._error(start_response, "500 Internal Server Error", "InternalError", "We encountered an error.")
        start_response(*answer[0])
        return [body[: len(body) // 2] if fault == "truncated" else body]

    def _error(self, start_response, status, code, message):
        start_response(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()]


@pytest.fixture
def store(endpoint):
    store = FaultyStore()
    yield store
    store.stop()


def write_run(outputs, run, plans, failing=()):
    """Write shots, their rows and failed lines as a run does. Return the name of the run."""
    outputs.prepare()
    with outputs.lease(run) as held:
        fenced = outputs.fenced(held)
        outputs.sweep()
        writer = ManifestWriter(fenced, held.run, "s.jsonl")
        try:
            for plan in plans:
                record = commit(fenced, plan, FILES)
                writer.add(ManifestRow.of_shot(held.run, "s.jsonl", plan.shot, 1, record, "done"))
                fenced.stage_cache.put(plan.steps[0].key, PIXELS)
            for shot_id in failing:
                writer.add(**failed(held.run, shot_id))
            held.refresh()
        except BaseException:
            writer.discard()
            raise
        damaged = writer.close()
        fenced.write_run({"run": held.run})
        return damaged


def found(outputs, *plans):
    return [done is not None for done in FinishedShots.load(outputs).find(plans)]


def check_whole(outputs, plan):
    for name in FILES:
        assert outputs.read(plan.shot.id, name) == name.encode()


FAULTY = (".running", "a/shot.json", ".parquet")
"""Ends of the paths whose first request of each kind has a fault. Every retry takes time."""
MORE_FAULTY = (*FAULTY, "a/image.png", ".jsonl", ".complete", "-000001")


@pytest.mark.parametrize(
    "fault", ["slow down", "error after success", "truncated", pytest.param("stall", marks=pytest.mark.slow)]
)
def test_requests_that_fail_once_change_nothing(store, url, endpoint, plan_of, monkeypatch, fault):
    if fault == "stall":
        monkeypatch.setattr(object_storage, "READ_TIMEOUT", "1s")
        monkeypatch.setattr(object_storage, "LEASE_READ_TIMEOUT", "1s")

    def is_hit(method, path):
        return path.endswith(FAULTY if fault == "stall" else MORE_FAULTY) and (fault != "truncated" or method == "GET")

    a, b, c = (plan_of(name) for name in "abc")
    outputs = OutputFolder(url.replace(endpoint, store.endpoint))
    for run, plans, failing in (("r1", [a, b], ["c"]), ("r2", [c], [])):
        store.begin(fault, is_hit)
        write_run(outputs, run, plans, failing)
        assert found(outputs, a, b, c) == [True, True, not failing]
        np.testing.assert_array_equal(outputs.stage_cache.get(a.steps[0].key, ["image"])["image"], PIXELS["image"])
        assert store.hits
    store.begin(None)
    outputs = OutputFolder(url)
    for plan in (a, b, c):
        check_whole(outputs, plan)
    assert {r.id: r.status for r in read_manifest(url)} == dict.fromkeys("abc", "done")
    assert (outputs.storage.read("failures.jsonl"), outputs.storage.read(".running")) == (None, None)
    assert verify(outputs).damaged == []


def test_expired_credentials_are_named_and_renewed_ones_are_used(store, plan_of, monkeypatch, tmp_path):
    """As of a user who logs in again while the run waits."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(object_storage, "CREDENTIALS_TTL", timedelta(0))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def log_in(key):
        (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = SECRET\n")

    object_storage._aws_files.cache_clear()
    log_in("OLD")
    outputs, plan = OutputFolder(f"s3://clips/renewed?endpoint={store.endpoint}"), plan_of("a")
    with outputs.lease("r1") as held:
        fenced = outputs.fenced(held)
        store.expired_key = "OLD"
        with pytest.raises(OSError, match="The provided token has expired"):
            commit(fenced, plan, FILES)
        assert fenced.write_problem() == "The provided token has expired."
        log_in("NEW")
        commit(fenced, plan, FILES)
    assert outputs.find_finished(plan)
    object_storage._aws_files.cache_clear()
