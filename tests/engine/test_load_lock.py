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


def test_one_process_more_than_the_limit_waits(tmp_path):
    for limit in (1, 2):
        with load_lock(limit, tmp_path):
            others = [start(tmp_path, limit) for _ in range(limit - 1)]
            for other in others:
                assert other.stdout.readline() == "locked\n"
            last = start(tmp_path, limit)
            while not waits(last):
                assert last.poll() is None
                assert not select.select([last.stdout], [], [], 0.01)[0], "it holds a lock, too"
        assert last.stdout.readline() == "locked\n"
        for process in (*others, last):
            process.communicate()


def test_killed_process_releases_the_lock(tmp_path):
    holder = start(tmp_path)
    assert holder.stdout.readline() == "locked\n"
    holder.kill()
    with load_lock(1, tmp_path):
        holder.wait()
