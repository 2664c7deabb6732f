"""Lease of an output folder, on a disk and in an object store (moto)."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial

import pytest
from moto.s3.responses import S3Response

from tests.outputs.test_outputs import row, write
from tests.pid_namespaces import run_in_pid_namespace
from vidgen_ray.batch.line_planner import LinePlanner
from vidgen_ray.batch.render_script import render_lines
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs import lease as leases
from vidgen_ray.outputs.cleanup import collect_garbage, prune
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.object_storage import ObjectStorage
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.outputs.storage import LocalStorage
from vidgen_ray.script.check import LineChecker
from vidgen_ray.system.files import temporary_folder, temporary_prefix, this_process, write_atomically

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


def test_lease_of_an_ended_process_in_this_namespace_is_taken_at_once(outputs):
    write_lease(outputs, ENDED)
    with outputs.lease("r1") as lease:
        assert lease_files(outputs) == {lease.name}


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
    for run in ("r9", "r1"):
        with outputs.lease(run) as lease:
            numbers.append(lease.run)
    write_lease(outputs, ENDED)
    with outputs.lease("r1") as lease:
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


def test_number_that_another_run_has_taken_meanwhile_is_not_used(outputs, monkeypatch):
    outputs.storage.write(".lease-000001", b"another run")
    read, stale = leases.last_number, ["000000"]
    monkeypatch.setattr(leases, "last_number", lambda storage: stale.pop() if stale else read(storage))
    with outputs.lease("r1") as lease:
        assert lease.run == "000002-r1"


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


def test_lease_of_a_running_process_in_this_namespace_never_expires(outputs, monkeypatch):
    """The clock was set forward, or the machine was suspended."""
    monkeypatch.setattr(leases, "STALE_AFTER_S", -1.0)
    write_lease(outputs, this_process())
    with pytest.raises(SetupError, match=r"run r0 .* is working in it.*use another folder$"):
        take(outputs, "r1")


def test_damaged_lease_expires(outputs, watching):
    for content in ("{", json.dumps({"run": "r0", "host": "node7", "pid": 1, "since": "then"})):
        outputs.storage.write(lease_name(outputs), content)
        watching += [None, lambda: outputs.storage.write(lease_name(outputs), "[]")]
        with pytest.raises(SetupError, match=r"run (r0|\.running) is working in it; wait"):
            take(outputs, "r1")
        watching += [None] * 120
        take(outputs, "r1")


def test_refused_run_deletes_no_expired_lease(disk, watching):
    write_lease(disk, ENDED, ".running-a")
    write_lease(disk, ELSEWHERE, ".running-b")
    watching += [partial(write_lease, disk, ELSEWHERE, ".running-b")]
    with pytest.raises(SetupError, match=r"run r0 .* is working"):
        take(disk, "r1")
    assert lease_files(disk) == {".running-a", ".running-b"}


def test_lease_is_refreshed(disk, fast_refresh):
    with disk.lease("r1") as lease:
        path = disk.root / lease.name
        os.utime(path, (0, 0))
        deadline = time.monotonic() + WAIT_S
        while not path.stat().st_mtime:
            assert time.monotonic() < deadline
            time.sleep(0.01)  # no notification is available


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


def test_lease_is_not_sure_while_it_cannot_be_refreshed(disk, monkeypatch):
    with disk.lease("r1") as lease:
        lease._refreshed -= 2 * leases.UNSURE_AFTER_S
        assert not lease.is_sure
        with monkeypatch.context() as patched:
            patched.setattr(LocalStorage, "touch", lambda *_: (_ for _ in ()).throw(OSError("network")))
            with pytest.raises(SetupError, match="suspended or could not reach the folder"):
                lease.check()
        lease.check()
        assert lease.is_sure
        assert not lease.lost.is_set()


def test_suspended_process_notices_that_its_lease_was_taken(outputs, monkeypatch):
    """A run on another machine takes the lease while the first process is stopped with SIGSTOP."""
    code = f"""
import sys
import vidgen_ray.outputs.lease as leases
from vidgen_ray.outputs.folder import OutputFolder
leases.this_process = lambda: {str(ELSEWHERE)!r}
leases.REFRESH_S = 0.1
with OutputFolder(sys.argv[1]).lease("r1") as lease:
    print("held", flush=True)
    lease.lost.wait()
    try:
        lease.check()
    except Exception as error:
        print(error)
"""
    monkeypatch.setattr(leases, "STALE_AFTER_S", 2.0)
    arguments = [sys.executable, "-c", code, outputs._root]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        process.send_signal(signal.SIGSTOP)
        with ExitStack() as stack:
            lease, deadline = None, time.monotonic() + WAIT_S
            while lease is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)  # no notification is available
                with suppress(SetupError):
                    lease = stack.enter_context(outputs.lease("r2"))
            process.send_signal(signal.SIGCONT)
            output, errors = process.communicate(timeout=WAIT_S)
            assert "this run lost its lease and stopped, because its lease file was deleted or replaced" in output, errors
            lease.refresh()
            assert not lease.lost.is_set()
            assert lease_files(outputs) == {lease.name}
            assert json.loads(outputs.storage.read(lease.name))["run"] == "r2"


def test_one_of_two_runs_that_start_at_once_gets_the_lease_in_s3(s3, monkeypatch):
    both_have_looked = threading.Barrier(2, timeout=WAIT_S)
    read, put, one_put = ObjectStorage.read_version, S3Response.put_object, threading.Lock()
    looked = threading.local()

    def read_together(self, path):
        stored = read(self, path)
        if not hasattr(looked, "once"):
            looked.once = True
            assert stored is None
            both_have_looked.wait()
        return stored

    def put_atomically(self):
        # S3 checks the condition and writes in one step. moto does not.
        with one_put:
            return put(self)

    monkeypatch.setattr(ObjectStorage, "read_version", read_together)
    monkeypatch.setattr(S3Response, "put_object", put_atomically)
    taken, refused, end = [], [], threading.Event()

    def run(name):
        try:
            with s3.lease(name) as lease:
                assert lease.name == ".running"
                taken.append(name)
                end.wait(WAIT_S)
        except SetupError as error:
            refused.append(str(error))
            end.set()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("r1", "r2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(taken) == len(refused) == 1
    assert f"run {taken[0]} (" in refused[0]


def test_expired_lease_in_s3_is_taken_over_by_one_run(s3, monkeypatch):
    """Both have read the expired lease before either replaces it."""
    write_lease(s3, ENDED, ".running")
    replace, others = ObjectStorage.replace, []

    def replace_after_another_run(self, path, content, version):
        if not others:
            others.append(None)
            others[0] = s3.lease("r2")
            others[0].__enter__()
        return replace(self, path, content, version)

    monkeypatch.setattr(ObjectStorage, "replace", replace_after_another_run)
    with pytest.raises(SetupError, match=r"run r2 .* is working in it"):
        take(s3, "r1")
    assert json.loads(s3.storage.read(".running"))["run"] == "r2"
    others[0].__exit__(None, None, None)


def test_lost_response_of_a_conditional_request(s3, monkeypatch):
    """A request whose response was lost is repeated. The second one then fails, because the first one succeeded."""
    put = ObjectStorage._put_if

    def put_twice(self, *condition):
        put(self, *condition)
        return put(self, *condition)

    monkeypatch.setattr(ObjectStorage, "_put_if", put_twice)
    with s3.lease("r1") as lease:
        assert lease.name == ".running"
        lease.refresh()
        assert not lease.lost.is_set()


@pytest.mark.parametrize("answer", ["ignores", "rejects"])
def test_store_without_conditional_requests_is_refused(s3, monkeypatch, answer):
    put = S3Response.put_object

    def put_without_condition(self):
        if answer == "rejects" and {"If-None-Match", "If-Match"} & set(self.headers.keys()):
            return 501, {}, "<Error><Code>NotImplemented</Code></Error>"
        self.headers = {name: value for name, value in self.headers.items() if name not in ("If-None-Match", "If-Match")}
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", put_without_condition)
    with pytest.raises(SetupError, match="does not support conditional writes"):
        take(s3, "r1")
    assert not lease_files(s3)


class TestSweep:
    def test_refused_run_deletes_nothing(self, disk, tiny):
        abandoned = disk.root / "shots" / f"{temporary_prefix(ENDED)}x"
        write_atomically(abandoned / "hd.mp4", b"1")
        planner = LinePlanner(LineChecker("s", disk.root), tiny, disk)
        with disk.lease("r1"), pytest.raises(SetupError, match=r"run r1 .* is working in it"):
            render_lines(planner, [], None, "s", tiny, RenderOptions(), listener=None)
        assert (abandoned / "hd.mp4").exists()
        disk.sweep()
        assert not abandoned.exists()

    def test_gc_in_another_pid_namespace_deletes_nothing_of_a_live_run(self, disk, fast_refresh):
        """The host name is the same, and the PIDs mean other processes there."""
        with disk.lease("r1") as lease:
            workspace = temporary_folder(disk.root / "shots")
            write_atomically(disk.root / shot_path("partial") / "image.png", b"1")
            code = """
import sys
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.cleanup import collect_garbage
outputs = OutputFolder(sys.argv[1])
try:
    collect_garbage(outputs, grace_s=-1)
except SetupError as error:
    print(error)
outputs.sweep()
"""
            output = run_in_pid_namespace(code, str(disk.root))
            assert f"run r1 (process {os.getpid()} on " in output
            assert workspace.exists()
            assert (disk.root / shot_path("partial")).exists()
            lease.refresh()
            lease.check()
        assert collect_garbage(disk, grace_s=-1).counts["partial shots"] == 1

    @pytest.mark.parametrize("command", [partial(collect_garbage, grace_s=-1), prune], ids=["gc", "prune"])
    def test_command_stops_when_its_lease_is_lost(self, disk, monkeypatch, command):
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

    def test_first_workspace_of_a_process_removes_those_of_ended_processes(self, s3, tmp_path, monkeypatch):
        """Nothing else removes leftovers on worker nodes, which hold no lease."""
        monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
        folders = {
            owner: tmp_path / "unfinished" / f"{temporary_prefix(owner)}x" for owner in (ENDED, ELSEWHERE, this_process())
        }
        for folder in folders.values():
            folder.mkdir(parents=True)
        with s3.storage.workspace("shots"):
            pass
        assert set((tmp_path / "unfinished").iterdir()) == {folders[ELSEWHERE], folders[this_process()]}


def test_lease_is_kept_while_the_folder_is_gone(disk):
    elsewhere = disk.root.with_name("elsewhere")
    with disk.lease("r1") as lease:
        disk.root.rename(elsewhere)
        with pytest.raises(FileNotFoundError):
            lease.refresh()
        elsewhere.rename(disk.root)
        lease.refresh()
        assert lease.is_sure
