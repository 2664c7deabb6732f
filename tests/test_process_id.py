"""Identity of processes in file names."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.pid_namespaces import run_in_pid_namespace
from vidgen_ray.system.files import UNKNOWN, ProcessId, this_process

PRINT_ID = "from vidgen_ray.system.files import this_process; print(this_process())"


def id_of(process: subprocess.Popen) -> ProcessId:
    started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    return this_process()._replace(pid=process.pid, started=started)


def test_running_and_ended_processes_are_distinguished():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        identity = id_of(process)
        assert identity.is_running() is True
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert identity.is_running() is False, "a zombie counts as running"
        process.wait()
        assert identity.is_running() is False


def test_reused_pid_is_another_process():
    assert this_process().is_running() is True
    assert this_process()._replace(started=1).is_running() is False


def test_process_of_another_boot_or_namespace_is_not_judged():
    ended = this_process()._replace(started=1)
    assert ended._replace(namespace="0" * 16).is_running() is None
    assert ended._replace(namespace=UNKNOWN).is_running() is None


def test_id_differs_in_another_pid_namespace():
    other = ProcessId.parse(run_in_pid_namespace(PRINT_ID).strip())
    assert other.namespace not in (UNKNOWN, this_process().namespace)
    assert other.is_running() is None


def test_namespace_is_unknown_with_the_proc_of_another_namespace():
    assert ProcessId.parse(run_in_pid_namespace(PRINT_ID, mount_proc=False).strip()) == (UNKNOWN, 1, 0)


@pytest.mark.parametrize("text", ["", "host-12", "my-host-12", f"{'a' * 16}-12", f"{'a' * 16}-{'9' * 30}-1", "unknown--1-5"])
def test_parse_rejects_other_text(text):
    assert ProcessId.parse(text) is None
    assert ProcessId.parse(str(this_process())) == this_process()
