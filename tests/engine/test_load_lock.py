"""A limited number of processes of a machine load weights at once."""

import select
import subprocess
import sys
from pathlib import Path

from vidgen_ray.engine.worker import load_lock

HOLDER = "import sys; from pathlib import Path; from vidgen_ray.engine.worker import load_lock\n"
HOLDER += "with load_lock(int(sys.argv[2]), Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"


def start(folder, processes=1):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(processes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def waits(process):
    """Return whether the process waits for a file lock."""
    return any("->" in line and str(process.pid) in line.split() for line in Path("/proc/locks").read_text().splitlines())


def test_second_process_waits_for_the_first(tmp_path):
    with load_lock(1, tmp_path):
        second = start(tmp_path)
        while not waits(second):
            assert second.poll() is None
            assert not select.select([second.stdout], [], [], 0.01)[0], "it holds the lock, too"
    assert second.stdout.readline() == "locked\n"
    second.communicate()


def test_killed_process_releases_the_lock(tmp_path):
    holder = start(tmp_path)
    assert holder.stdout.readline() == "locked\n"
    holder.kill()
    with load_lock(1, tmp_path):
        holder.wait()


def test_third_process_waits_for_one_of_two(tmp_path):
    with load_lock(2, tmp_path):
        second = start(tmp_path, 2)
        assert second.stdout.readline() == "locked\n"
        third = start(tmp_path, 2)
        while not waits(third):
            assert third.poll() is None
            assert not select.select([third.stdout], [], [], 0.01)[0], "it holds a lock, too"
    assert third.stdout.readline() == "locked\n"
    second.communicate()
    third.communicate()
