"""Output folder on storage with faults: an object store that fails requests, sick disks, power loss, flipped bits."""

import errno
import json
import os
import shutil
import subprocess
import threading
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.batch.test_batch import Events
from tests.fake_stages import FAKES, profile_of_fakes
from tests.outputs.test_outputs import commit, failed, row
from tests.small_disk import mounted_disk
from vidgen_ray.batch.render_script import render
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.engine import storage_pause
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs import lease, object_storage
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import FinishedShots, ManifestRow, read_manifest
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import key_path, shot_path
from vidgen_ray.outputs.verify import verify
from vidgen_ray.planner import parse_gpus
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.system.files import this_process

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
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

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
    """Write shots, their rows and failed lines as a run does. Return the paths of damaged manifest files."""
    outputs.prepare()
    with outputs.lease(run) as held:
        fenced = outputs.fenced(held)
        outputs.sweep()
        writer = ManifestWriter(fenced, held.run, "s.jsonl")
        try:
            for plan, done in zip(plans, FinishedShots.load(fenced).find(plans), strict=True):
                result = done or commit(fenced, plan, FILES)
                writer.add(ManifestRow.of_shot(held.run, "s.jsonl", plan.shot, 1, result, "reused" if done else "rendered"))
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
    """Stand-in for a user who logs in again while the run waits."""
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


@pytest.mark.slow
def test_run_waits_for_an_object_store_and_loses_no_line(local_ray, store, tiny, tmp_path, monkeypatch):
    """The store is slow for a moment, loses answers, and refuses the credentials of the run until the user renews them."""
    monkeypatch.setattr(storage_pause, "PROBE_INTERVAL_S", 0.2)
    events, profile = Events(), profile_of_fakes(tiny)

    def on_finished(row):
        events.rows.append(row)
        if len(events.rows) == 4:
            store.expired_key = "KEY"
        if len(events.rows) == 12:
            store.begin("error after success", lambda method, path: path.endswith(("shot.json", ".parquet", ".running")))

    def on_message(message):
        events.messages.append(message)
        if "The provided token has expired" in message:
            store.expired_key = None

    events.on_finished, events.on_message = on_finished, on_message
    store.begin("slow down", lambda method, path: path.endswith("image.png"))
    script = tmp_path / "s.jsonl"
    script.write_text("".join(f'{{"id": "s{n:02}", "prompt": "shot {n}"}}\n' for n in range(20)))
    url = f"s3://KEY:SECRET@clips/run?endpoint={store.endpoint}"
    options = RenderOptions(cluster=parse_gpus("2x80GB"), stages=FAKES, cache="none")
    settings = ScriptSettings(script, profile_defaults=profile.defaults)
    report = render(settings, profile, OutputFolder(url), options, listener=events)
    assert (report.done, report.failed, report.quarantined) == (20, 0, ()), [r.failure_message for r in events.rows]
    assert any("The provided token has expired" in message for message in events.messages)
    assert {row.id: row.failure_attempts for row in read_manifest(url)} == {f"s{n:02}": None for n in range(20)}
    assert verify(OutputFolder(url)).damaged == []


# Power loss


class Recorder:
    """Records the state in which each metadata operation of this process would leave the folder if power failed before it.

    Files that were not flushed are empty, as on a journaling file system.
    """

    def __init__(self, root, patch):
        self.root, self.states = root, []
        self._flushed = {path.stat().st_ino: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync"):
            patch.setattr(os, name, self._recorded(getattr(os, name)))

    def _recorded(self, operation):
        def recorded(*args, **options):
            self.record()
            result = operation(*args, **options)
            if operation.__name__ == "fsync":
                self._flushed[os.fstat(args[0]).st_ino] = Path(f"/proc/self/fd/{args[0]}").read_bytes()
            return result

        return recorded

    def record(self):
        state = {}
        for path in sorted(self.root.rglob("*")):
            content, stat = None if path.is_dir() else path.read_bytes(), path.stat()
            if content is not None and self._flushed.get(stat.st_ino) != content:
                content = b""
            state[str(path.relative_to(self.root))] = content, stat.st_mtime_ns
        if not self.states or state != self.states[-1]:
            self.states.append(state)


def restored(state, root):
    """Write a recorded state. The machine was started again, so the process of its lease is of another boot."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, (content, _) in state.items():
        path = root / name
        path.mkdir() if content is None else path.write_bytes(content)
    for name, (content, modified) in state.items():
        if content is not None:
            os.utime(root / name, ns=(modified, modified))
    for held in root.glob(".running-*"):
        held.write_bytes(held.read_bytes().replace(this_process().namespace.encode(), b"0" * 16))
    return OutputFolder(root)


@pytest.fixture
def watches_leases_briefly(monkeypatch):
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.02)
    monkeypatch.setattr(lease, "WATCH_INTERVAL_S", 0.01)


@pytest.mark.slow
def test_power_loss_at_any_moment_loses_no_finished_shot(plan_of, tmp_path, monkeypatch, watches_leases_briefly):
    kept, replaced, new, other = plan_of("kept"), plan_of("x"), plan_of("x", prompt="another"), plan_of("y", prompt="y")
    out = OutputFolder(tmp_path / "out")
    write_run(out, "r1", [kept, replaced], ["y", "z"])
    with monkeypatch.context() as patch:
        recorder = Recorder(out.root, patch)
        write_run(out, "r2", [new, other])
        recorder.record()
    assert len(recorder.states) > 50
    for number, state in enumerate(recorder.states):
        disk = restored(state, tmp_path / "restored")
        for plan in (kept, replaced, new, other):
            by_manifest, by_record = found(disk, plan)[0], disk.find_finished(plan) is not None
            assert by_manifest == by_record, number
            if by_record:
                check_whole(disk, plan)
        assert found(disk, kept) == [True], number
        assert {"kept", "x", "y", "z"} == {r.id for r in read_manifest(disk.root)}, number
        damaged = write_run(disk, "r3", [new, other])
        assert damaged == [], number
        assert found(disk, kept, new, other) == [True] * 3
        # A cache entry without its data is found by its digests, and computed again.
        unreadable = [each for each in verify(disk).damaged if not each.path.startswith("cache/")]
        assert unreadable == [], number
        failures = [json.loads(line)["prompt"] for line in disk.storage.read("failures.jsonl").splitlines()]
        assert failures == ["z"], number
        assert not list(disk.root.glob(".running-*")), number


# Sick disks


def full_of_files(folder):
    """Take all inodes."""
    with suppress(OSError):
        for number in range(10_000):
            (folder / f"ballast-{number}").touch()


def without_ballast(folder):
    for path in folder.glob("ballast-*"):
        path.unlink()


def remounted(folder, mode):
    subprocess.run(["mount", "-o", f"remount,{mode}", folder], check=True)


DISK_FAULTS = {
    "no inodes": (
        full_of_files,
        without_ballast,
        "No space left on device",
    ),
    "read-only": (partial(remounted, mode="ro"), partial(remounted, mode="rw"), "Read-only file system"),
}


@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_disk_without_inodes_or_read_only_keeps_finished_shots(plan_of, tmp_path, fault):
    begin, end, reason = DISK_FAULTS[fault]
    a, b = plan_of("a"), plan_of("b")
    with mounted_disk(tmp_path / "disk", "nr_inodes=100") as disk:
        outputs = OutputFolder(disk.folder / "out")
        write_run(outputs, "r1", [a])
        with outputs.lease("r2") as held:
            fenced = outputs.fenced(held)
            writer = ManifestWriter(fenced, held.run, "s.jsonl")
            writer.add(row(held.run, "a"))
            begin(disk.folder)
            for write in (partial(commit, fenced, b, FILES), partial(fenced.write_run, {}), writer.flush):
                with pytest.raises(OSError, match=reason):
                    write()
            assert reason in fenced.write_problem()
            assert found(outputs, a, b) == [True, False]
            with pytest.raises(SetupError, match=reason):
                outputs.prepare()
            end(disk.folder)
            assert fenced.write_problem() is None
            record = commit(fenced, b, FILES)
            writer.add(ManifestRow.of_shot(held.run, "s.jsonl", b.shot, 1, record, "rendered"))
            writer.close()
        assert found(outputs, a, b) == [True, True]
        assert verify(outputs).damaged == []
        assert not list(outputs.root.rglob(".tmp-*"))


def test_error_of_a_flush_or_read_is_raised_and_leaves_no_half_shot(plan_of, tmp_path, monkeypatch):
    outputs, plan = OutputFolder(tmp_path / "out"), plan_of("a")
    write_run(outputs, "r1", [])

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            commit(outputs, plan, FILES)
        assert outputs.write_problem() == "Input/output error"
    assert outputs.find_finished(plan) is None
    commit(outputs, plan, FILES)
    with monkeypatch.context() as patch:
        patch.setattr(type(outputs.storage), "read", fail)
        # An unreadable disk is an error of the run, not a reason to render everything again.
        with pytest.raises(OSError, match="Input/output error"):
            outputs.find_finished(plan)
    check_whole(outputs, plan)
    assert not list(outputs.root.rglob(".tmp-*"))


# Flipped bits


def test_flipped_bit_in_any_file_is_found_or_has_no_effect(plan_of, tmp_path, watches_leases_briefly):
    outputs, plans = OutputFolder(tmp_path / "out"), [plan_of(name, prompt=name) for name in "ab"]
    write_run(outputs, "r1", plans, ["c"])
    key, entry = plans[0].key, f"cache/{plans[0].steps[0].key[:2]}/{plans[0].steps[0].key}"
    record = (outputs.root / shot_path("a") / "shot.json").read_bytes()
    (manifest,) = (f"manifest/{name}" for name in outputs.storage.files("manifest"))
    rows = (outputs.root / manifest).read_bytes()
    prompt = record.index(b'"prompt": "a"') + len(b'"prompt": "')
    # File, position of the byte, path that `vidgen verify` reports, and whether the shot `a` is still finished for a run.
    cases = [
        (f"{shot_path('a')}/image.png", 3, f"{shot_path('a')}/image.png", True),
        (f"{shot_path('a')}/video.mp4", 3, f"{shot_path('a')}/video.mp4", True),
        (f"{shot_path('a')}/shot.json", 0, f"{shot_path('a')}/shot.json", True),
        (f"{shot_path('a')}/shot.json", record.index(key.encode()), key_path(chr(ord(key[0]) ^ 1) + key[1:]), True),
        (f"{shot_path('a')}/shot.json", prompt, f"{shot_path('a')}/shot.json", True),
        (key_path(key), 0, key_path(key), True),
        (manifest, -1, manifest, True),
        (manifest, rows.index(key.encode()), None, True),
        (f"{entry}/image.png", 40, entry, True),
        (f"{entry}/entry.json", 5, entry, True),
        ("failures.jsonl", 20, None, True),
        ("run.json", 3, None, True),
        (".lease-000001", 3, None, True),
    ]
    for path, position, damaged, finished in cases:
        folder = OutputFolder(shutil.copytree(outputs.root, tmp_path / "copy", dirs_exist_ok=True))
        file = folder.root / path
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        stat = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert [each.path for each in verify(folder, repair=False).damaged] == ([damaged] if damaged else []), path
        assert found(folder, *plans) == [finished, True], path
        assert folder.stage_cache.get(plans[1].steps[0].key, ["image"]), path
        # A run continues, and renders what is not finished.
        write_run(folder, "r2", plans)
        assert found(folder, *plans) == [True, True], path
        shutil.rmtree(folder.root)
