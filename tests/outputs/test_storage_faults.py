"""Output folder on storage with faults (failing requests, sick disks, power loss, flipped bits), and `vidgen verify`."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
from contextlib import closing, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.fake_stages import use_fakes
from tests.outputs.test_finished import found
from tests.outputs.test_outputs import commit, failed, row
from tests.small_disk import mounted_disk
from vidgen_ray.cli import folder_commands, main
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs import lease, object_storage
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import FinishedShots, ManifestRow, read_manifest
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import key_path, shot_path
from vidgen_ray.outputs.verify import verify_outputs
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script
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
    assert verify_outputs(outputs).damaged == []


def test_expired_credentials_are_named_and_renewed_ones_are_used(store, plan_of, monkeypatch, tmp_path):
    """Stand-in for a user who logs in again while the run waits."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(object_storage, "CREDENTIALS_TTL", timedelta(0))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "films")

    def log_in(key):
        (tmp_path / "credentials").write_text(f"[films]\naws_access_key_id = {key}\naws_secret_access_key = SECRET\n")

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
        unreadable = [each for each in verify_outputs(disk).damaged if not each.path.startswith("cache/")]
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


def fail_to_flush(folder, patch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    patch.setattr(os, "fsync", fail)


DISK_FAULTS = {
    "no inodes": (lambda folder, _: full_of_files(folder), lambda folder, _: without_ballast(folder), errno.ENOSPC),
    "read-only": (lambda folder, _: remounted(folder, "ro"), lambda folder, _: remounted(folder, "rw"), errno.EROFS),
    "sick": (fail_to_flush, lambda _, patch: patch.undo(), errno.EIO),
}
"""Fault -> functions that begin and end it, and the error of a write."""


@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_disk_with_a_fault_keeps_finished_shots_and_is_used_after_the_repair(plan_of, tmp_path, monkeypatch, fault):
    begin, end, code = DISK_FAULTS[fault]
    a, b, reason = plan_of("a"), plan_of("b"), os.strerror(code)
    with mounted_disk(tmp_path / "disk", "nr_inodes=100") as disk:
        outputs = OutputFolder(disk.folder / "out")
        write_run(outputs, "r1", [a])
        with outputs.lease("r2") as held:
            fenced = outputs.fenced(held)
            writer = ManifestWriter(fenced, held.run, "s.jsonl")
            writer.add(row(held.run, "a"))
            begin(disk.folder, monkeypatch)
            for write in (partial(commit, fenced, b, FILES), partial(fenced.write_run, {}), writer.flush):
                with pytest.raises(OSError, match=reason):
                    write()
            assert reason in fenced.write_problem()
            assert found(outputs, a, b) == [True, False]
            with pytest.raises(SetupError, match=reason):
                outputs.prepare()
            end(disk.folder, monkeypatch)
            assert fenced.write_problem() is None
            record = commit(fenced, b, FILES)
            writer.add(ManifestRow.of_shot(held.run, "s.jsonl", b.shot, 1, record, "rendered"))
            writer.close()
        assert found(outputs, a, b) == [True, True]
        assert verify_outputs(outputs).damaged == []
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
        assert [each.path for each in verify_outputs(folder, repair=False).damaged] == ([damaged] if damaged else []), path
        assert found(folder, *plans) == [finished, True], path
        assert folder.stage_cache.get(plans[1].steps[0].key, ["image"]), path
        # A run continues, and renders what is not finished.
        write_run(folder, "r2", plans)
        assert found(folder, *plans) == [True, True], path
        shutil.rmtree(folder.root)


# vidgen verify


@pytest.fixture
def stored(url, plan_of):
    """An object store with a finished shot, its row, a cache entry and a stored photo, and the plan of the shot."""
    outputs, plan = OutputFolder(url), plan_of("a", generate_video=False)
    write_run(outputs, "r1", [plan])
    outputs.storage.write(f"inputs/{hashlib.sha256(b'photo').hexdigest()[:16]}.png", b"photo")
    return outputs, plan


def test_damage_in_an_object_store_is_named_and_can_be_repaired(stored):
    outputs, plan = stored
    storage, folder, key = outputs.storage, shot_path("a"), plan.steps[0].key
    entry, record = f"cache/{key[:2]}/{key}", storage.read(f"{folder}/shot.json")
    report = verify_outputs(outputs)
    assert (report.shots, report.cache_entries, report.damaged) == (1, 1, [])
    with outputs.lease("r1"), pytest.raises(SetupError, match=r"run r1 .* is working in it"):
        verify_outputs(outputs)
    (manifest,), (photo,) = storage.files("manifest"), storage.files("inputs")
    expected = {
        f"{folder}/image.png": "has another content than shot.json states (sha256)",
        entry: "cannot be decoded",
        f"manifest/{manifest}": "is not a complete Parquet file; rendering its script again restores its rows",
        f"inputs/{photo}": "has another content than its name states (sha256)",
    }
    for path in (f"{folder}/image.png", f"{entry}/image.png", f"manifest/{manifest}", f"inputs/{photo}"):
        content = storage.read(path)
        storage.write(path, content[:-1] if path.endswith(".parquet") else bytes([content[0] ^ 1]) + content[1:])
    report = verify_outputs(outputs)
    assert dict(report.damaged) == expected
    (line,) = map(json.loads, report.lines)
    assert (line["failure"]["id"], line["prompt"], report.scripts) == ("a", plan.shot.prompt, set())
    assert outputs.find_by_id("a"), "nothing is changed without --repair"
    storage.write(f"{folder}/image.png", b"imag")
    assert "has 4 bytes instead of 9" in [each.problem for each in verify_outputs(outputs).damaged]
    storage.delete(f"{folder}/image.png")
    verify_outputs(outputs, repair=True)
    assert outputs.find_by_id("a") is None
    assert not outputs.stage_cache.has(key)
    # The lines of a damaged record are known to the script only.
    storage.write(f"{folder}/shot.json", record[:-9])
    problems = [each.problem for each in verify_outputs(outputs).damaged if "shot.json" in each.path]
    assert problems == ["is not the record of a shot"]


def test_missing_shots_and_key_files_are_found(stored):
    outputs, plan = stored
    outputs.storage.delete(key_path(plan.key))
    assert verify_outputs(outputs, repair=True).damaged == [(key_path(plan.key), "is missing; a server finds the shot a by it")]
    assert outputs.find_by_key(plan.key)
    outputs.delete_shot("a")
    report = verify_outputs(outputs)
    assert report.damaged == [(shot_path("a"), "is missing, but the manifest has it as finished")]
    assert report.scripts == {"s.jsonl"}


def test_command_renders_damaged_shots_again(tmp_path, tiny, make_shot, capsys, monkeypatch):
    """The pipeline stands for a run, which `vidgen retry` starts in the same way."""
    out = tmp_path / "out"

    def render_again(out, read, *options, as_json):
        (tmp_path / "again.jsonl").write_text("\n".join(read()))
        for line in read_script(ScriptSettings(tmp_path / "again.jsonl", profile_defaults=tiny.defaults)).lines:
            pipeline.render(line.shot)

    monkeypatch.setattr(folder_commands, "render_again", render_again)
    with closing(use_fakes(VideoGenerationPipeline(tiny, out))) as pipeline:
        for shot_id in "ab":
            pipeline.render(make_shot(id=shot_id, generate_video=False))
        image = Path(out / shot_path("b") / "image.png")
        original = image.read_bytes()
        image.write_bytes(original[:-20] + bytes(20))
        capsys.readouterr()
        assert main(["verify", str(out), "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["damaged"] == [
            {"path": f"{shot_path('b')}/image.png", "problem": "has another content than shot.json states (sha256)"}
        ]
        assert main(["verify", str(out), "--repair", "-p", "tiny"]) == 0
    assert image.read_bytes() == original
    assert main(["verify", str(out)]) == 0
