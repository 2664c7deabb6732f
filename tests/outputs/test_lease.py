"""Lease of an output folder, on a disk and in an object store (moto)."""

import json
import os
import pickle
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from moto.s3.responses import S3Response

from tests.outputs.test_outputs import row, write
from vidgen_ray.batch.line_planner import LinePlanner
from vidgen_ray.batch.render_script import render_lines
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.messages import Kind
from vidgen_ray.errors import SetupError, WriteError
from vidgen_ray.outputs import lease as leases
from vidgen_ray.outputs.cleanup import collect_garbage, prune_shots
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.object_storage import ObjectStorage
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.outputs.run_log import RunLog
from vidgen_ray.outputs.storage import LocalStorage
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.script.check import LineChecker
from vidgen_ray.system.files import remove, temporary_prefix, this_process, write_atomically

WAIT_S = 60.0
ELSEWHERE = this_process()._replace(namespace="0" * 16)
ENDED = this_process()._replace(started=1)


@pytest.fixture(params=["disk", "s3"])
def outputs(request, tmp_path, url):
    if request.param == "disk":
        return OutputFolder(tmp_path / "out")
    return OutputFolder(url)


@pytest.fixture
def disk(tmp_path):
    return OutputFolder(tmp_path / "out")


@pytest.fixture
def s3(url):
    return OutputFolder(url)


@pytest.fixture
def fast_refresh(monkeypatch):
    monkeypatch.setattr(leases, "REFRESH_S", 0.02)


@pytest.fixture
def watching(monkeypatch):
    """List of what happens during each second in which another lease is watched."""
    events = []

    def sleep(seconds):
        if seconds == leases.WATCH_INTERVAL_S:
            events.pop(0)() if callable(events[0]) else events.pop(0)

    monkeypatch.setattr(leases.time, "sleep", sleep)
    return events


def take(outputs, run):
    """Take and release the lease, and return the name of its file."""
    with outputs.lease(run) as lease:
        return lease.name


def lease_files(outputs):
    return {name for name in outputs.storage.files("") if name.startswith(".running")}


def lease_name(outputs):
    return ".running" if outputs.storage.local is None else ".running-r0"


def write_lease(outputs, process, name=None):
    holder = leases.Holder("r0", "node7", str(process), "then", "token", 0)
    outputs.storage.write(name or lease_name(outputs), holder.to_json())


def test_lease_rejects_a_second_run_and_names_the_first(outputs):
    with outputs.lease("r1") as lease:
        with pytest.raises(SetupError, match=rf"run r1 \(process {os.getpid()} on .*\) is working in it") as error:
            take(outputs, "r2")
        assert "another folder" in str(error.value)
        assert lease_files(outputs) == {lease.name}
        lease.check()
    assert not lease_files(outputs)
    take(outputs, "r2")


@pytest.mark.parametrize("clock_s", [-10_000, 10_000])
def test_lease_of_another_namespace_is_taken_after_two_minutes_without_a_refresh(outputs, watching, monkeypatch, clock_s):
    """Independent of the clocks: that of the holder, of this machine and of the storage may have been set."""
    write_lease(outputs, ELSEWHERE)
    name, now = lease_name(outputs), time.time()
    monkeypatch.setattr(time, "time", lambda: now + clock_s)

    def refresh():
        outputs.storage.write(name, outputs.storage.read(name) + b" ")

    if outputs.storage.local is not None:
        os.utime(outputs.root / name, (now + clock_s,) * 2)
    watching += [None] * 119 + [refresh]
    with pytest.raises(SetupError, match=r"run r0 \(process \d+ on node7, since then\) is working in it.*use another folder$"):
        take(outputs, "r1")
    watching += [None] * 120
    take(outputs, "r1")
    assert not lease_files(outputs)
    assert not watching
    write_lease(outputs, ELSEWHERE)
    watching += [None, lambda: outputs.storage.delete(name)]
    take(outputs, "r1")


def test_run_that_waits_for_a_lease_refreshes_its_own(disk, watching):
    write_lease(disk, ELSEWHERE)
    own = disk.root / ".running-r1"
    watching += [lambda: os.utime(own, (0, 0)), lambda: own.stat().st_mtime and disk.storage.delete(lease_name(disk))]
    take(disk, "r1")


def test_every_lease_has_a_larger_number(outputs, watching):
    numbers = []
    outputs.storage.write("20261130-notes.txt", b"")
    for run in ("r9", "r1"):
        with outputs.lease(run) as lease:
            numbers.append(lease.run)
    # The lease of an ended process in this namespace is taken at once.
    write_lease(outputs, ENDED)
    with outputs.lease("r1") as lease:
        assert lease_files(outputs) == {lease.name}
        numbers.append(lease.run)
        with suppress(SetupError):
            take(outputs, "refused")
    # Hidden files were not copied with the folder.
    outputs.storage.write(f"manifest/{numbers[-1]}-00000.parquet", b"")
    for name in outputs.storage.files(""):
        outputs.storage.delete(name)
    with outputs.lease("r1") as lease:
        numbers.append(lease.run)
    assert numbers == ["000001-r9", "000002-r1", "000003-r1", "000004-r1"]
    assert [name for name in outputs.storage.files("") if name.startswith(".lease")] == [".lease-000004"]


def test_run_that_loses_its_lease_before_it_has_a_number_is_refused(outputs, monkeypatch):
    """It was suspended for minutes between the two."""
    next_number = leases._next_number

    def suspended(storage):
        outputs.storage.delete(lease_name(outputs))
        return next_number(storage)

    monkeypatch.setattr(leases, "_next_number", suspended)
    with pytest.raises(SetupError, match="this run lost its lease"):
        take(outputs, "r0")


def test_writer_without_the_lease_commits_nothing(outputs, plan_of):
    """An encoder of a run that was cut off, while another run has taken the folder over."""
    old, new = plan_of("a", generate_video=False), plan_of("a", generate_video=False, prompt="new")

    def commit(folder, plan):
        with folder.draft(plan) as draft:
            draft.path("image.png").write_bytes(plan.shot.prompt.encode())
            draft.commit([])

    with outputs.lease("r0") as lease:
        stale = pickle.loads(pickle.dumps(outputs.fenced(lease)))
        commit(stale, old)
        write_lease(outputs, ENDED)
        if outputs.storage.local is not None:
            outputs.storage.delete(lease.name)
        with outputs.lease("r1") as later:
            commit(outputs.fenced(later), new)
            with pytest.raises(OSError, match="does not hold its lease any more"):
                commit(stale, old)
            with pytest.raises(OSError, match="does not hold its lease any more"):
                stale.write_run({})
            writer = ManifestWriter(stale, lease.run, "s.jsonl")
            writer.add(row(lease.run, "a"))
            with pytest.raises(OSError, match="does not hold its lease any more"):
                writer.flush()
            writer.discard()
        with pytest.raises(OSError, match="does not hold its lease any more"):
            commit(outputs.fenced(later), old)
    assert outputs.find_finished(new)
    assert outputs.read("a", "image.png") == b"new"
    commit(outputs, old)  # the library takes no lease


@pytest.mark.parametrize("content", [None, b"theirs"], ids=["deleted", "replaced"])
def test_lease_is_lost_if_its_file_is_deleted_or_replaced(outputs, fast_refresh, content):
    with outputs.lease("r1") as lease:
        if content:
            outputs.storage.write(lease.name, content)
        else:
            outputs.storage.delete(lease.name)
        assert lease.lost.wait(WAIT_S)
        with pytest.raises(
            SetupError, match="this run lost its lease and stopped, because its lease file was deleted or replaced"
        ):
            lease.check()
        assert outputs.storage.read(lease.name) == content
    assert outputs.storage.read(lease.name) == content


@pytest.mark.parametrize("below", [None, Path.mkdir, Path.touch], ids=["missing", "mount point", "file"])
def test_folder_that_is_gone_gets_no_file_and_its_lease_is_not_lost(disk, plan_of, below):
    """Its file system is unmounted, and mounted again."""
    elsewhere, image = disk.root.with_name("elsewhere"), {"image": np.zeros((2, 2, 3), np.uint8)}
    with disk.lease("r1") as lease:
        fenced = disk.fenced(lease)
        log = RunLog(fenced.storage, lease.run, lambda: None, lambda: False)
        lease._refreshed -= 2 * leases.UNSURE_AFTER_S
        assert not lease.is_sure
        disk.root.rename(elsewhere)
        if below is not None:
            below(disk.root)
        with pytest.raises(OSError, match=r"not mounted, was deleted or replaced|No such file"):
            lease.refresh()
        with pytest.raises(SetupError, match="suspended or could not reach the folder"):
            lease.check()
        for write in (
            fenced.draft(plan_of("a")).__enter__,
            partial(fenced.stage_cache.put, "0" * 64, image),
            partial(fenced.remote_jobs.__setitem__, "0" * 64, b""),
            partial(fenced.write_run, {}),
        ):
            with pytest.raises((OSError, WriteError), match=r"not mounted, was deleted or replaced|does not hold") as raised:
                write()
            # A worker that cannot store the job of a server waits as an encoder does.
            if isinstance(raised.value, WriteError):
                assert CallResult.of_failure(StepFailed("remote", raised.value)).kind is Kind.WRITE
        log.add(message="written later")
        log.close()
        assert fenced.write_problem()
        assert not disk.root.is_dir() or not any(disk.root.iterdir())
        assert disk.root.exists() == (below is not None)
        if below is not None:
            remove(disk.root)
        elsewhere.rename(disk.root)
        lease.check()
        assert lease.is_sure
        assert not lease.lost.is_set()
        assert fenced.write_problem() is None


@pytest.mark.parametrize("request_name", ["create", "replace"])
def test_one_of_two_runs_that_start_at_once_gets_the_lease_in_s3(s3, monkeypatch, request_name):
    """Both have found no lease, or an expired one, before either writes its own."""
    if request_name == "replace":
        write_lease(s3, ENDED, ".running")
    send, others = getattr(ObjectStorage, request_name), []

    def send_after_another_run(self, path, *arguments):
        if path == ".running" and not others:
            others.append(None)
            others[0] = s3.lease("r2")
            others[0].__enter__()
        return send(self, path, *arguments)

    monkeypatch.setattr(ObjectStorage, request_name, send_after_another_run)
    with pytest.raises(SetupError, match=r"run r2 .* is working in it"):
        take(s3, "r1")
    assert json.loads(s3.storage.read(".running"))["run"] == "r2"
    others[0].__exit__(None, None, None)


@pytest.mark.parametrize("answer", ["ignores", "rejects"])
def test_store_without_conditional_requests_is_refused(s3, monkeypatch, answer):
    put, conditions = S3Response.put_object, {"If-None-Match", "If-Match"}

    def put_without_condition(self):
        if answer == "rejects" and conditions & set(self.headers.keys()):
            return 501, {}, "<Error><Code>NotImplemented</Code></Error>"
        self.headers = {name: value for name, value in self.headers.items() if name not in conditions}
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", put_without_condition)
    with pytest.raises(SetupError, match="does not support conditional writes"):
        take(s3, "r1")
    assert not lease_files(s3)


def test_refused_run_deletes_nothing(disk, tiny):
    abandoned = disk.root / "shots" / f"{temporary_prefix(ENDED)}x"
    write_atomically(abandoned / "hd.mp4", b"1")
    planner = LinePlanner(LineChecker("s", disk.root), tiny, disk)
    with disk.lease("r1"), pytest.raises(SetupError, match=r"run r1 .* is working in it"):
        render_lines(planner, [], None, "s", tiny, RenderOptions(), listener=None)
    assert (abandoned / "hd.mp4").exists()
    disk.sweep()
    assert not abandoned.exists()


@pytest.mark.parametrize("command", [partial(collect_garbage, grace_s=-1), prune_shots], ids=["gc", "prune"])
def test_command_stops_when_its_lease_is_lost(disk, monkeypatch, command):
    for name in ("a", "b", "c"):
        write_atomically(disk.root / shot_path(name) / "image.png", b"1")
    write(disk, "000000-a", *(row("000000-a", name, "replaced") for name in ("a", "b", "c")))
    delete_folder = LocalStorage.delete_folder

    def delete_after_losing_the_lease(storage, folder):
        monkeypatch.setattr(leases, "UNSURE_AFTER_S", -1.0)
        delete_folder(storage, folder)

    monkeypatch.setattr(LocalStorage, "delete_folder", delete_after_losing_the_lease)
    with pytest.raises(SetupError, match="this run lost its lease"):
        command(disk)
    assert len(list(disk.root.glob("shots/*/*/image.png"))) == 2


def test_first_workspace_of_a_process_removes_those_of_ended_processes(s3, tmp_path, monkeypatch):
    """Nothing else removes leftovers on worker nodes, which hold no lease."""
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
    folders = [tmp_path / "unfinished" / f"{temporary_prefix(owner)}x" for owner in (ENDED, ELSEWHERE, this_process())]
    for folder in folders:
        folder.mkdir(parents=True)
    with s3.storage.workspace("shots"):
        pass
    assert set((tmp_path / "unfinished").iterdir()) == set(folders[1:])
