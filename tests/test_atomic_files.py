"""Temporary files of killed processes, and the identity of processes in their names."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vidgen_ray.system.files import UNKNOWN, ProcessId, abandoned, temporary_folder, temporary_prefix, this_process

OURS = this_process()
ELSEWHERE = OURS._replace(namespace="0" * 16)
ENDED = OURS._replace(started=1)
UNSHARE = ("unshare", "--map-root-user", "--pid", "--fork")
PRINT_ID = (sys.executable, "-c", "from vidgen_ray.system.files import this_process; print(this_process())")


def make(parent, owner, days_ago=0.0):
    """Create a temporary folder of a process with a file in it, both of this age."""
    folder = parent / f"{temporary_prefix(owner)}x{days_ago}"
    folder.mkdir()
    (folder / "clip.mp4").write_text("")
    age(folder / "clip.mp4", days_ago)
    age(folder, days_ago)
    return folder


def age(path, days_ago):
    os.utime(path, (time.time() - 86_400 * days_ago,) * 2)


def test_files_of_a_process_in_this_namespace_are_abandoned_when_it_has_ended(tmp_path):
    ended = make(tmp_path, ENDED)
    make(tmp_path, OURS, days_ago=30)
    temporary_folder(tmp_path)
    (tmp_path / ".tmpfile").touch()
    assert list(abandoned(tmp_path)) == [ended]
    assert list(abandoned(tmp_path / "missing")) == []


def test_files_of_a_process_elsewhere_are_abandoned_a_day_after_the_last_write(tmp_path):
    make(tmp_path, ELSEWHERE, days_ago=0.9)
    old = make(tmp_path, ELSEWHERE, days_ago=1.1)
    age(make(tmp_path, ELSEWHERE, days_ago=2) / "clip.mp4", 0)
    assert list(abandoned(tmp_path)) == [old]


def test_running_and_ended_processes_are_distinguished():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        identity = OURS._replace(pid=process.pid, started=started)
        assert identity.is_running() is True
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert identity.is_running() is False, "a zombie counts as running"
        process.wait()
        assert identity.is_running() is False
    assert OURS.is_running() is True
    assert ENDED.is_running() is False, "a reused PID is another process"
    assert ENDED._replace(namespace="0" * 16).is_running() is None, "a process of another boot or container is not judged"
    assert ENDED._replace(namespace=UNKNOWN).is_running() is None


def test_id_differs_in_another_pid_namespace():
    output = [
        subprocess.run([*UNSHARE, *options, *PRINT_ID], capture_output=True, text=True) for options in (["--mount-proc"], [])
    ]
    if output[0].stderr.startswith("unshare"):
        pytest.skip(f"cannot create a PID namespace: {output[0].stderr}")
    other, with_our_proc = (ProcessId.parse(each.stdout.strip()) for each in output)
    assert other.namespace not in (UNKNOWN, OURS.namespace)
    assert other.is_running() is None
    assert with_our_proc == (UNKNOWN, 1, 0)


def test_parse_rejects_other_text():
    for text in ("", "host-12", "my-host-12", f"{'a' * 16}-12", f"{'a' * 16}-{'9' * 30}-1", "unknown--1-5"):
        assert ProcessId.parse(text) is None, text
    assert ProcessId.parse(str(OURS)) == OURS
